"""The command line as a process: where its output goes, and what its front door installs."""

import os
import shutil
import signal
import stat
import subprocess
from pathlib import Path

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from culm.registry_wire import TopologyAnswer
from tests.cluster import CULM, ROOT, Cluster
from tests.traffic import ADMIN
from tests.waiting import eventually

pytestmark = pytest.mark.system
LOCKS = ("requirements.lock", "requirements-load.lock", "requirements-test.lock")


def _culm(*words: str, stdout: int) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([CULM, *words], stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60, check=False)


@pytest.mark.parametrize("words", [("--version",), ("--help",), ("version", "-o", "json"), ("doctor",)], ids=" ".join)
def test_output_that_cannot_be_written_is_one_line_and_an_exit_code(words: tuple[str, ...]) -> None:
    with Path("/dev/full").open("w") as full:
        told = _culm(*words, stdout=full.fileno())
    assert told.returncode == 1
    assert told.stderr == "culm: the output cannot be written: No space left on device\n"


@pytest.mark.parametrize("words", [("--version",), ("--help",), ("version", "-o", "json"), ("doctor",)], ids=" ".join)
def test_a_reader_that_has_gone_away_is_left_in_peace(words: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        told = _culm(*words, stdout=writer)
    finally:
        os.close(writer)
    assert (told.returncode, told.stderr) == (1, "")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout whose environment has the product's packages only; its Python says what it is asked for."""
    (tmp_path / "bin").mkdir()
    shutil.copy(CULM, tmp_path / "bin" / "culm")
    for lock in LOCKS:
        shutil.copy(ROOT / lock, tmp_path / lock)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$@"\n', encoding="utf-8")
    python.chmod(stat.S_IRWXU)
    lock_sum = subprocess.run(["cksum"], input=(ROOT / LOCKS[0]).read_bytes(), capture_output=True, check=True).stdout
    (tmp_path / ".venv" / "culm-requirements").write_bytes(lock_sum)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "installs"),
    [
        (("test", "--help"), ""),
        (("test", "tests/unit", "-h"), ""),
        (("status", "--help"), ""),
        (("load", "run", "--help"), ""),
        (("load", "list"), "load"),
        (("load", "run", "smoke"), "load"),
        (("test",), "test"),
        (("test", "tests/unit"), "test"),
        (("test", "--", "--help"), "test"),
    ],
)
def test_only_what_runs_needs_packages_of_its_own(words: tuple[str, ...], installs: str, checkout: Path) -> None:
    done = subprocess.run(
        [str(checkout / "bin" / "culm"), *words], capture_output=True, text=True, timeout=60, check=True
    )
    assert [line.split()[2] for line in done.stderr.splitlines() if "installing" in line] == (
        [f"requirements-{installs}.lock"] if installs else []
    )
    assert done.stdout.splitlines()[-1] == " ".join(("-P -m ops", *words))


def test_a_second_router_at_a_port_is_refused_and_shares_nothing(running: Cluster) -> None:
    """The workers of one share their port by SO_REUSEPORT: another one would get half of the requests."""
    config = running.layout.configs / "router.toml"
    done = subprocess.run(
        [CULM, "router", "run", "--config", str(config)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, "port_busy" in done.stderr) == (5, True), done.stderr
    assert "Traceback" not in done.stderr


async def test_metrics_are_the_sum_over_all_workers_of_a_router(running: Cluster) -> None:
    admin = {"Authorization": f"Bearer {running.token(ADMIN)}"}

    async def counted() -> float:
        # A new connection each time: the kernel gives it to any worker.
        url = f"{running.layout.router_url}/metrics"
        async with aiohttp.ClientSession(headers=admin) as session, session.get(url) as answer:
            assert answer.status == 200, await answer.text()
            text = await answer.text()
        families = text_string_to_metric_families(text)
        samples = [sample for family in families for sample in family.samples]
        return sum(
            sample.value
            for sample in samples
            if sample.name == "culm_request_seconds_count" and sample.labels["verb"] == "topology"
        )

    before = await counted()
    for _ in range(20):
        async with running.client(ADMIN) as client:
            await client.get("topology", {}, TopologyAnswer)
    assert [await counted() for _ in range(6)] == [before + 20] * 6
    # A worker that dies takes nothing back.
    workers = running.workers()
    os.kill(workers[0], signal.SIGKILL)
    await eventually(lambda: len(set(running.workers()) - {workers[0]}) == len(workers), 30.0, what="another works")
    assert await counted() == before + 20
