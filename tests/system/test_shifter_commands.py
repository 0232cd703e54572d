"""What a shifter looks at, by the command line on a cluster: `culm top`, `culm pile-ups`, `culm pilot list`."""

import contextlib
import os
import pty
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import CULM, Cluster, decoded, pilot
from tests.waiting import eventually_sync

pytestmark = pytest.mark.system
DEADLINE_S = 60.0
SHARDS = {"us1", "eu1", "cern1"}


def test_top_once_shows_states_rates_and_shards_and_ends(running: Cluster) -> None:
    done = running.culm("top", "--once")
    assert (done.returncode, done.stderr) == (0, "")
    assert "region" in done.stdout
    assert "dispatched (mean of the last minutes)" in done.stdout
    assert all(name in done.stdout for name in SHARDS)
    told = decoded(running.culm("top", "--once", "-o", "json"))
    assert {row["name"]: row["answers"] for row in told["shards"]["shards"]} == dict.fromkeys(SHARDS, True)
    assert told["counts"]["missing_shards"] == []


def test_top_names_a_shard_that_gives_no_answer(running: Cluster) -> None:
    pid = running.one("eu1").pid
    os.kill(pid, signal.SIGSTOP)
    try:
        done = running.culm("top", "--once")
        partial = [
            running.culm(*words, *more)
            for words in (("counts",), ("job", "list"), ("errors",), ("pile-ups",), ("pilot", "list"))
            for more in ((), ("-o", "json"))
        ]
    finally:
        os.kill(pid, signal.SIGCONT)
    assert done.returncode == 0
    assert "no answer from eu1: shown as last heard" in done.stdout
    # What is printed is not all there is, and a script sees that.
    assert [(one.returncode, "no answer from eu1" in one.stderr) for one in partial] == [(4, True)] * len(partial)
    assert all(one.stdout for one in partial)

    def back() -> bool:
        return "no answer" not in running.culm("top", "--once").stdout

    eventually_sync(back, DEADLINE_S, what="it answers again")


def test_a_new_cluster_has_a_history_and_a_diff(running: Cluster) -> None:
    rows = decoded(running.culm("topology", "history", "-o", "json"))
    assert (rows[-1]["from_epoch"], rows[-1]["to_epoch"], rows[-1]["reason"]) == (0, 1, "a new cluster")
    shown = decoded(running.culm("topology", "show", "-o", "json"))
    assert rows[0]["to_epoch"] == next(one["epoch"] for one in shown if one["authority"] == "central")
    assert running.culm("topology", "diff").returncode == 0
    done = running.culm("topology", "restore", "--plan")
    assert (done.returncode, "nothing to put back" in done.stdout) == (0, True), done.stderr


@contextlib.contextmanager
def on_a_terminal(running: Cluster, *words: str) -> Iterator[tuple["subprocess.Popen[bytes]", int]]:
    """A command whose output is a terminal; the process, and what reads that terminal."""
    reader, writer = pty.openpty()
    process = subprocess.Popen(
        [CULM, *words],
        env=os.environ | {"CULM_DIR": str(running.layout.folder), "TERM": "xterm", "COLUMNS": "200", "LINES": "50"},
        stdin=writer,
        stdout=writer,
        stderr=subprocess.PIPE,
    )
    os.close(writer)
    try:
        yield process, reader
    finally:
        process.kill()
        process.communicate()
        os.close(reader)


def read_until(reader: int, times: int, mark: bytes) -> bytes:
    """What a terminal shows, up to the mark's last time."""
    seen, end = b"", time.monotonic() + DEADLINE_S
    while seen.count(mark) < times:
        left_s = end - time.monotonic()
        assert left_s > 0, seen
        if select.select([reader], [], [], left_s)[0]:
            seen += os.read(reader, 65536)
    return seen


def test_top_is_shown_again_and_again_until_ctrl_c_and_leaves_the_terminal_as_it_was(running: Cluster) -> None:
    with on_a_terminal(running, "top", "--interval", "0.5") as (process, reader):
        seen = read_until(reader, 3, b"culm top, ")
        assert b"\x1b[?1049h" in seen
        os.kill(process.pid, signal.SIGINT)
        rest = read_until(reader, 1, b"\x1b[?1049l")
        assert b"\x1b[?25h" in rest
        _, errors = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, errors) == (130, b"culm: interrupted (interrupted)\n")


def test_top_goes_on_when_its_output_is_no_terminal(running: Cluster) -> None:
    process = subprocess.Popen(
        [CULM, "top", "--interval", "0.5"],
        env=os.environ | {"CULM_DIR": str(running.layout.folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        seen = read_until(process.stdout.fileno(), 3, b"culm top, ")
        assert b"\x1b" not in seen
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=DEADLINE_S)
    finally:
        process.kill()
        process.communicate()
    assert (process.returncode, errors) == (130, b"culm: interrupted (interrupted)\n")


def test_top_without_a_monitor_says_so_once(folder: Path) -> None:
    done = subprocess.run(
        [CULM, "top", "--once"],
        env=os.environ | {"CULM_DIR": str(folder)},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 4
    assert "not_running" in done.stderr


def test_pilots_that_asked_are_listed_with_what_they_got(running: Cluster, tmp_path: Path) -> None:
    assert running.culm("job", "submit", "--site", "DESY", "--", "true").returncode == 0
    with pilot(running, "DESY-q", tmp_path, "--max-jobs", "1", "--idle-exit", "60") as process:
        process.communicate(timeout=DEADLINE_S)
    told = decoded(running.culm("pilot", "list", "--site", "DESY", "-o", "json"))
    # The latest first.
    one = told["pilots"][0]
    assert (one["queue"], one["site"], one["n_answered"], one["n_jobs"]) == ("DESY-q", "DESY", 1, 1)
    shown = running.culm("pilot", "list", "--site", "DESY")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert one["host"] in shown.stdout
    assert running.culm("pilot", "list", "--site", "nowhere").returncode == 3


def test_pile_ups_are_told_or_why_they_cannot_be(running: Cluster) -> None:
    told = decoded(running.culm("pile-ups", "-o", "json"))
    assert (told["hours"], set(told["n_samples"]), told["missing_shards"]) == (6, SHARDS, [])
    shown = running.culm("pile-ups", "--hours", "24")
    assert shown.returncode == 0
    assert "likely cause" in shown.stdout or "no state grows against the last 24 hours" in shown.stdout
