"""Payloads as real processes: how they end, with what has left their group, and what is said of it."""

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pilot import processes, runner
from tests.node import kill_all_below, running_below
from tests.waiting import eventually_sync

pytestmark = pytest.mark.integration
DEADLINE_S = 20.0
PYTHON = sys.executable


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """The folder of an attempt, with an empty payload directory in it."""
    attempt = tmp_path / "1.1"
    (attempt / "payload").mkdir(parents=True)
    yield attempt
    kill_all_below(tmp_path)


def _start(folder: Path, shell: str = "", **spec: Any) -> runner.Payload:
    return runner.start({"shell": shell} | spec, folder / "payload")


def _ended(payload: runner.Payload) -> dict[str, Any]:
    code = eventually_sync(lambda: (payload.poll(),) if payload.poll() is not None else None, DEADLINE_S)
    assert code is not None and code[0] is not None
    return payload.outcome(code[0])


def _run(folder: Path, shell: str = "", **spec: Any) -> dict[str, Any]:
    return _ended(_start(folder, shell, **spec))


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


# --- what a payload gets


def test_it_runs_in_its_own_directory_session_and_group(folder: Path) -> None:
    script = "import os; print(os.getcwd(), os.getpid() == os.getsid(0) == os.getpgid(0), os.environ['HOME'])"
    outcome = _run(folder, argv=[PYTHON, "-c", script])
    assert outcome["stdout_tail"].split() == [str(folder / "payload"), "True", str(folder / "payload")]


def test_the_specs_environment_wins_over_the_pilots_but_not_over_the_mark(folder: Path) -> None:
    wanted = {"HOME": "/elsewhere", processes.MARK: "/wrong", "ODD NAME.1": "odd", "LEER": ""}
    outcome = _run(folder, argv=["env"], environment=wanted)
    said = set(outcome["stdout_tail"].splitlines())
    assert {"HOME=/elsewhere", f"{processes.MARK}={folder}", "ODD NAME.1=odd", "LEER="} <= said


def test_its_standard_input_is_empty(folder: Path) -> None:
    assert _run(folder, "cat; echo end")["stdout_tail"] == "end\n"


def test_its_words_are_passed_as_they_are(folder: Path) -> None:
    words = ["a b", "$HOME", "ü", "", "'\""]
    outcome = _run(folder, argv=[PYTHON, "-c", "import sys; print(sys.argv[1:])", *words])
    assert outcome["stdout_tail"].strip() == repr(words)


def test_what_it_used_is_told(folder: Path) -> None:
    script = "import time; kept = b'x' * (50 << 20); open('f', 'wb').write(kept[:5 << 20])\n"
    script += "end = time.process_time() + 0.2\nwhile time.process_time() < end: pass"
    usage = _run(folder, argv=[PYTHON, "-c", script])["usage"]
    assert usage["cpu_s"] >= 0.2
    assert usage["wall_s"] >= 0.2
    assert 50 <= usage["rss_mb"] < 500
    assert 5 <= usage["disk_mb"] < 50


# --- what cannot be run


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["no-such-program"], "no-such-program: No such file or directory"),
        (["/nowhere/program"], "/nowhere/program: No such file or directory"),
        (["/etc"], "/etc: Permission denied"),
        (["./../stderr"], "./../stderr: Permission denied"),
        (["true", "a\0b"], "embedded null byte"),
        (["x" * 5000], f"{'x' * 5000}: File name too long"),
    ],
)
def test_what_cannot_be_run_says_why(folder: Path, argv: list[str], text: str) -> None:
    with pytest.raises(runner.PayloadError) as caught:
        _start(folder, argv=argv)
    assert str(caught.value) == f"the payload cannot be run: {text}"


def test_a_bad_name_in_the_environment_says_so(folder: Path) -> None:
    with pytest.raises(runner.PayloadError, match="environment variable"):
        _start(folder, "true", environment={"a=b": "c"})


def test_a_file_without_a_format_cannot_be_run(folder: Path) -> None:
    program = folder / "payload" / "program"
    program.write_bytes(b"\0\1\2")
    program.chmod(0o700)
    with pytest.raises(runner.PayloadError, match="Exec format error"):
        _start(folder, argv=["./program"])


def test_a_node_that_can_run_nothing_is_not_the_payloads_fault(folder: Path) -> None:
    """Without a free file descriptor nothing can be started; the payload might run elsewhere."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + 3, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            _start(folder, "true")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_more_memory_than_the_pilot_may_have_itself_is_as_much_as_it_may(folder: Path) -> None:
    """A batch system's own limit on us; raising it is not ours to do, and no reason to fail."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
        "from pathlib import Path\nfrom pilot import runner\n"
        "payload = runner.start({'shell': 'ulimit -v', 'memory_mb': 4096}, Path(sys.argv[1]))\n"
        "while payload.poll() is None: pass\nprint(payload.outcome(payload.poll())['stdout_tail'])"
    )
    done = subprocess.run(
        [PYTHON, "-c", code, str(folder / "payload")], capture_output=True, text=True, check=True, timeout=DEADLINE_S
    )
    assert done.stdout.strip() == str(1 << 20)


# --- how it ends


def test_the_signal_that_killed_it_is_told(folder: Path) -> None:
    outcome = _run(folder, "kill -SEGV $$")
    assert (outcome["state"], outcome["exit_code"]) == ("failed", -signal.SIGSEGV)
    assert outcome["error"] == {"plane": "trans", "code": 11, "text": "the payload was killed by signal 11"}


def test_one_that_ends_itself_when_told_has_the_time_for_it(folder: Path) -> None:
    payload = _start(folder, "trap 'echo bye; exit 3' TERM; echo ready; while :; do sleep 0.05; done")
    eventually_sync(lambda: _read(folder / "stdout"), DEADLINE_S)
    payload.end(runner.CANCELLED)
    outcome = _ended(payload)
    assert (outcome["state"], outcome["exit_code"], outcome["stdout_tail"]) == ("cancelled", 3, "ready\nbye\n")


def test_one_that_does_not_is_killed(folder: Path) -> None:
    payload = _start(folder, "trap '' TERM; echo ready; while :; do sleep 0.05; done")
    eventually_sync(lambda: _read(folder / "stdout"), DEADLINE_S)
    payload.end("walltime", term_s=0.2)
    outcome = _ended(payload)
    assert (outcome["state"], outcome["exit_code"], outcome["error"]["code"]) == ("failed", -signal.SIGKILL, 1213)


def test_to_end_it_twice_changes_nothing(folder: Path) -> None:
    payload = _start(folder, "sleep 600")
    payload.end("walltime")
    payload.end(runner.CANCELLED)
    assert _ended(payload)["error"]["code"] == 1213


def test_one_that_ended_by_itself_is_not_said_to_have_been_ended(folder: Path) -> None:
    payload = _start(folder, "exit 0")
    assert _ended(payload)["state"] == "finished"
    payload.end(runner.CANCELLED)
    assert payload.outcome(0)["state"] == "finished"


def test_what_it_left_in_its_group_goes_with_it(folder: Path) -> None:
    outcome = _run(folder, "sleep 600 & sleep 600 & echo done")
    assert outcome["state"] == "finished"
    eventually_sync(lambda: running_below(folder) == [], DEADLINE_S, what="its children end")


def test_children_that_the_pilot_had_before_are_left_alone(folder: Path) -> None:
    """A site's wrapper may have started a helper and then become the pilot by exec."""
    helper = subprocess.Popen(["sleep", "600"])
    try:
        _run(folder, "sleep 600 & setsid sleep 600 & true")
        assert helper.poll() is None
    finally:
        helper.kill()
        helper.wait()


def test_orphans_that_left_the_session_go_with_it(folder: Path) -> None:
    """In a process of its own, for who adopts orphans adopts them for good."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom pilot import processes, runner\n"
        "processes.adopt_orphans()\n"
        "spec = {'shell': '(setsid env -i sleep 600 &) ; (setsid setsid sleep 600 &); sleep 0.2'}\n"
        "payload = runner.start(spec, Path(sys.argv[1]))\n"
        "while payload.poll() is None: pass\n"
        "assert processes.descendants(without=()) == [], processes.descendants(without=())"
    )
    subprocess.run([PYTHON, "-c", code, str(folder / "payload")], check=True, timeout=DEADLINE_S)
    assert running_below(folder) == []


def test_the_kernel_ends_it_when_its_pilot_is_killed(folder: Path) -> None:
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom pilot import runner\n"
        "runner.start({'argv': ['sleep', '600']}, Path(sys.argv[1]))\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([PYTHON, "-c", code, str(folder / "payload")], check=False, timeout=DEADLINE_S)
    assert done.returncode == -signal.SIGKILL
    eventually_sync(lambda: running_below(folder) == [], DEADLINE_S, what="the payload ends")


# --- what a dead pilot left


def _left(folder: Path, *argv: str, mark: bool) -> "subprocess.Popen[bytes]":
    environment = {"PATH": os.environ["PATH"]} | ({processes.MARK: str(folder)} if mark else {})
    return subprocess.Popen(argv, env=environment, cwd=folder, start_new_session=True)


def test_a_left_process_is_known_by_its_mark(folder: Path) -> None:
    left = _left(folder, "sleep", "600", mark=True)
    processes.end_left(folder, 0, 0)
    assert left.wait(DEADLINE_S) == -signal.SIGKILL


def test_a_left_process_is_known_by_its_session(folder: Path) -> None:
    """Also when its leader has ended: env -i wiped the mark, but the session is the payload's."""
    left = _left(folder, "sh", "-c", "sleep 600 & exec sleep 600", mark=False)
    started = processes.start_time(left.pid)
    eventually_sync(lambda: len(running_below(folder)) == 2, DEADLINE_S)
    left.kill()
    left.wait()
    processes.end_left(folder, left.pid, started)
    eventually_sync(lambda: running_below(folder) == [], DEADLINE_S, what="the child ends")


def test_a_later_process_with_the_same_pid_is_left_alone(folder: Path) -> None:
    stranger = _left(folder, "sleep", "600", mark=False)
    try:
        processes.end_left(folder, stranger.pid, processes.start_time(stranger.pid) - 1)
        processes.end_left(folder.parent / "1.12", 0, 0)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_another_jobs_process_is_left_alone(folder: Path) -> None:
    """The mark of job 1.12 begins like that of job 1.1."""
    other = _left(folder, "sleep", "600", mark=True)
    try:
        processes.end_left(folder.parent / "1", 0, 0)
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


# --- what is reported


@pytest.mark.parametrize(
    ("written", "told"),
    [
        (b"", ""),
        (b"line\n", "line\n"),
        (b"\xff\xfe\x00\x80", "\ufffd\ufffd\x00\ufffd"),
        (b"a" * 10_000 + b"end", "a" * 8189 + "end"),
        ("ü".encode() * 5000, "ü" * 4096),
        ("ü".encode() * 5000 + b"x", "\ufffd" + "ü" * 4095 + "x"),
    ],
)
def test_a_tail_is_the_end_of_the_file_as_text(tmp_path: Path, written: bytes, told: str) -> None:
    (tmp_path / "stdout").write_bytes(written)
    assert runner.tail(tmp_path / "stdout") == told


def test_the_tail_of_nothing_is_empty(tmp_path: Path) -> None:
    assert runner.tail(tmp_path / "stdout") == ""


def test_a_huge_stdout_costs_no_memory(folder: Path) -> None:
    path = folder / "stdout"
    with path.open("wb") as file:
        file.truncate(1 << 40)
        file.seek(0, os.SEEK_END)
        file.write(b"end")
    assert runner.tail(path).endswith("\0end")


def test_disk_counts_what_is_written_not_what_is_pretended(folder: Path) -> None:
    with (folder / "sparse").open("wb") as file:
        file.truncate(1 << 30)
    (folder / "full").write_bytes(os.urandom(3 << 20))
    (folder / "link").symlink_to("/usr")
    assert runner.used_mb(folder) == 3


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "directory", "missing", "dangling", "a\0b"])
def test_what_is_no_file_of_the_payload_is_no_output(folder: Path, name: str) -> None:
    (folder / "outside").touch()
    (folder / "payload" / "directory").mkdir()
    (folder / "payload" / "dangling").symlink_to("nowhere")
    (folder / "payload" / "good").touch()
    outcome = _run(folder, "true", outputs=["good", name])
    assert (outcome["state"], outcome["exit_code"], outcome["error"]["code"]) == ("failed", 0, 1165)
    assert outcome["error"]["text"] == f"the payload did not write its output: {name}"


def test_a_failed_payload_is_not_blamed_for_its_outputs(folder: Path) -> None:
    assert _run(folder, "exit 4", outputs=["missing"])["error"]["code"] == 4


def test_too_much_on_stdout_ends_it_without_a_disk_limit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "MAX_LOG_MB", 1)
    monkeypatch.setattr(runner, "LOOK_S", 0.1)
    outcome = _run(folder, "head -c 5000000 /dev/zero; sleep 600")
    assert (outcome["error"]["code"], outcome["error"]["text"]) == (
        1106,
        "the payload was ended: it wrote more than 1 MB to stdout and stderr",
    )
