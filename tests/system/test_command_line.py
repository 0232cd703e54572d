"""The command line as a process: where its output goes, and what its front door installs."""

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from tests.cluster import CULM, ROOT

pytestmark = pytest.mark.system
LOCKS = ("requirements.lock", "requirements-test.lock")


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
        (("test", "--help"), False),
        (("test", "tests/unit", "-h"), False),
        (("status", "--help"), False),
        (("test",), True),
        (("test", "tests/unit"), True),
        (("test", "--", "--help"), True),
    ],
)
def test_only_tests_that_run_need_their_packages(words: tuple[str, ...], installs: bool, checkout: Path) -> None:
    done = subprocess.run(
        [str(checkout / "bin" / "culm"), *words], capture_output=True, text=True, timeout=60, check=True
    )
    assert ("installing requirements-test.lock" in done.stderr) is installs
    assert done.stdout.splitlines()[-1] == " ".join(("-P -m ops", *words))
