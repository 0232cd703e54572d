"""`culm load` end to end: real clients on a real cluster; what is asserted is correctness, never speed."""

import json
import os
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loadtest import runs
from tests import servers
from tests.cluster import CULM, ROOT, Cluster, cluster, culm, decoded, die_with_parent, remove_sockets
from tests.waiting import eventually_sync

pytestmark = pytest.mark.system
PATIENT = {"CULM_SHARD_TIMEOUTS__FIRST_LEASE_S": "60", "CULM_SHARD_TIMEOUTS__HEARTBEAT_S": "60"}
"""A busy machine must not end the lease of a client that is alive."""
RUN_S = 180.0
LOG = ROOT.parent / "shared" / "data" / "LCG-2005-1.swf.gz"
needs_data = pytest.mark.skipif(not LOG.exists(), reason="the grid's log is not beside the checkout")


@pytest.fixture(scope="module")
def loaded() -> Iterator[Cluster]:
    """A cluster for load."""
    with servers.folder() as name, cluster(Path(name) / "c", PATIENT) as found:
        yield found


def _run(loaded: Cluster, scenario: str, *words: str) -> dict[str, Any]:
    done = loaded.culm("load", "run", scenario, "--json", *words, timeout_s=RUN_S)
    assert done.returncode == 0, done.stdout + done.stderr
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert told["verdict"] == {"outcome": "met", "misses": [], "note": ""}
    assert (told["duplicates"], told["n_lost"], told["n_ended"] > 0) == ([], 0, True)
    assert sum(row["n_failed"] for row in told["rows"]) == 0
    return told


def test_the_smoke_run_fails_nothing_and_gives_nothing_twice(loaded: Cluster) -> None:
    told = _run(loaded, "smoke")
    rows = {row["name"]: row for row in told["rows"]}
    assert {"getJob", "heartbeat", "report", "submit", "monitor", "bad"} <= rows.keys()
    assert {f"getJob [{shard}]" for shard in ("us1", "eu1", "cern1")} <= rows.keys()
    assert all(row["n_ok"] > 0 for row in rows.values())
    assert {"client", "router", "us1", "us1-db", "cern1"} <= told["cpu"].keys()
    assert told["cpu"]["client"]["mean"] > 0
    assert told["settings"].keys() >= {"router", "us1", "cern1"}
    assert loaded.audit() == []
    # Nothing of it waits for anybody, and nobody else's work was touched.
    assert decoded(loaded.culm("counts", "-o", "json"))["total"].keys() <= {"finished", "cancelled"}
    # The order had tokens: it is gone, and they stand nowhere else.
    place = loaded.layout.folder / runs.FOLDER / told["id"]
    assert sorted(path.name for path in place.iterdir()) == ["began", "locust.log", "result.json", "run.json"]
    assert [path for path in place.iterdir() if b"eyJ" in path.read_bytes()] == []


def test_a_stored_run_is_listed_compared_and_reported(loaded: Cluster) -> None:
    for _ in range(2):
        _run(loaded, "arrivals", "--rate", "20", "--seconds", "3", "--slo", str(_slo(loaded)))
    listed = decoded(loaded.culm("load", "list", "-o", "json"))
    assert {"smoke", "ramp", "herd", "lcg"} <= listed["scenarios"].keys()
    first, second = [one["id"] for one in listed["runs"] if one["scenario"] == "arrivals"]
    compared = decoded(loaded.culm("load", "compare", first, "last", "-o", "json"))
    assert compared["second"] == second
    assert [text for text in compared["differences"] if not text.startswith("seed")] == []
    page = Path(decoded(loaded.culm("load", "report", second, "-o", "json"))["report"])
    assert page.read_text(encoding="utf-8").count("data:image/svg+xml") == 4


def test_the_pages_of_locust_show_the_run_while_it_goes_on(loaded: Cluster) -> None:
    port = servers.free_ports(1)
    running = subprocess.Popen(
        [CULM, "load", "run", "smoke", "--seconds", "6", "--web", str(port), "-o", "json"],
        env=os.environ | {"CULM_DIR": str(loaded.layout.folder)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        preexec_fn=die_with_parent,  # noqa: PLW1509  # one call, no Python state
    )
    try:
        eventually_sync(lambda: _shows_get_job(port), RUN_S, what="Locust shows the getJobs")
        told = running.communicate(timeout=RUN_S)[0]
    finally:
        running.kill()
        running.communicate()
    assert running.returncode == 0, told
    assert json.loads(told)["verdict"]["outcome"] == "met"


def _shows_get_job(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/stats/requests", timeout=5) as answer:
            return any(row["name"].startswith("getJob [") for row in json.load(answer)["stats"])
    except OSError:
        return False


@needs_data
def test_a_real_log_is_a_load_too(loaded: Cluster) -> None:
    told = _run(loaded, "lcg", "--speed", "20000", "--jobs", "60", "--users", "20")
    assert (told["n_submitted"], told["n_ended"]) == (60, 60)
    assert told["wait_p99_ms"] > 0
    assert told["cpu"]["router"]["mean"] > 0


def _slo(loaded: Cluster) -> Path:
    path = loaded.layout.folder / "slo.toml"
    path.write_text("n_unanswered = 0\n", encoding="utf-8")
    return path


def test_what_an_slo_file_asks_for_in_vain_is_exit_code_1(loaded: Cluster) -> None:
    path = loaded.layout.folder / "never.toml"
    path.write_text("[p99_ms]\nof_nobody = 1\n", encoding="utf-8")
    done = loaded.culm("load", "run", "smoke", "--seconds", "2", "--slo", str(path), timeout_s=RUN_S)
    assert done.returncode == 1, done.stderr
    assert "of_nobody: no request was answered" in done.stdout


def test_a_shard_that_is_killed_under_load_loses_and_repeats_nothing(loaded: Cluster) -> None:
    told = _run(loaded, "shard-loss", "--rate", "20", "--seconds", "9", "--slo", str(_slo(loaded)))
    assert [text for _, text in told["events"]] == ["us1 was killed"]
    assert told["n_ended"] == told["n_granted"]
    assert loaded.audit() == []


def test_a_shard_that_joins_under_load_takes_its_share(loaded: Cluster) -> None:
    told = _run(loaded, "add-shard", "--rate", "10", "--seconds", "9")
    assert [text for _, text in told["events"]][1:] == ["load1 has joined", "load1 takes its share"]
    again = _run(loaded, "smoke", "--seconds", "4")
    assert next(row for row in again["rows"] if row["name"] == "getJob [load1]")["n_ok"] > 0
    assert loaded.audit() == []


def test_a_run_that_is_interrupted_lets_go_on_what_it_stopped_and_leaves_no_jobs(loaded: Cluster) -> None:
    running = subprocess.Popen(
        [CULM, "load", "run", "herd", "--seconds", "24", "--users", "5"],
        env=os.environ | {"CULM_DIR": str(loaded.layout.folder)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=die_with_parent,  # noqa: PLW1509  # one call, no Python state
    )
    try:
        eventually_sync(lambda: _is_stopped(loaded, "us1"), RUN_S, what="us1 is stopped")
        running.send_signal(signal.SIGINT)
        told = running.communicate(timeout=RUN_S)[1]
    finally:
        running.kill()
        running.communicate()
    assert (running.returncode, "interrupted" in told, "Traceback" in told) == (130, True, False), told
    assert not any(_is_stopped(loaded, shard) for shard in ("us1", "eu1", "cern1"))
    eventually_sync(lambda: _n_ready(loaded) == 0, RUN_S, what="no job waits")


def _is_stopped(loaded: Cluster, name: str) -> bool:
    status = Path(f"/proc/{loaded.one(name).pid}/stat").read_text(encoding="utf-8")
    return status.rpartition(")")[2].split()[0] == "T"


def _n_ready(loaded: Cluster) -> int:
    done = loaded.culm("counts", "-o", "json")
    # 4: a shard was not heard just now.
    return json.loads(done.stdout)["total"].get("activated", 0) if done.returncode == 0 else -1


def test_a_shard_that_does_not_run_cannot_be_killed(loaded: Cluster) -> None:
    done = loaded.culm("load", "run", "shard-loss", "--shard", "of_nobody")
    assert (done.returncode, "of_nobody does not run" in done.stderr) == (4, True), done.stderr
    # What had been made for the run is ended.
    assert "activated" not in decoded(loaded.culm("counts", "-o", "json"))["total"]


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (("run", "smoke"), 4, "not_running"),
        (("run", "lcg", "--rate", "5"), 2, "bad_option"),
        (("run", "lcg", "--log", "/nowhere/at/all"), 2, "no_log"),
        (("run", "smoke", "--tag", "submit", "--slo", "/nowhere/at/all"), 2, "does not exist"),
        (("run", "smoke", "--rate", "5"), 2, "bad_option"),
        (("run", "arrivals", "--users", "5"), 2, "bad_option"),
        (("run", "arrivals", "--speed", "5"), 2, "bad_option"),
        (("run", "nothing"), 2, "'nothing' is not one of"),
        (("compare", "one", "other"), 3, "unknown_run"),
        (("report", "last"), 3, "unknown_run"),
    ],
)
def test_what_cannot_be_is_told_in_a_line(words: tuple[str, ...], code: int, text: str, folder: Path) -> None:
    done = culm("load", *words, folder=folder)
    assert (done.returncode, text in done.stderr) == (code, True), done.stderr
    assert "Traceback" not in done.stderr
    remove_sockets(folder)
