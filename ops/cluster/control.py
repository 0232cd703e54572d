"""Start, stop and look at a cluster on this machine."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Final

import msgspec

from culm.errors import ClientFault, Conflict, CulmError, Unavailable
from culm.topology import CENTRAL
from ops.cluster.child import die_with_parent
from ops.cluster.layout import Layout, make_private
from ops.cluster.supervisor import RUNS_ALREADY, start_time

UP_S: Final = 420.0
"""The first start may fetch an engine."""
DOWN_S: Final = 60.0
POLL_S: Final = 0.05
ENDING: Final = frozenset({"stopping", "down", "failed"})
"""Phases of a supervisor that is on its way out."""


class ProcessStatus(msgspec.Struct, frozen=True):
    """One supervised process; `since` is seconds since the epoch."""

    name: str
    pid: int
    state: str
    restarts: int
    since: float


class Status(msgspec.Struct, frozen=True):
    """What the supervisor last said; `phase` is starting, up, stopping, down or failed."""

    phase: str
    pid: int
    port: int
    processes: list[ProcessStatus]
    failure: str = ""
    started: int = 0
    began_at: float = 0.0
    """When the supervisor began, seconds since the epoch."""

    @property
    def alive(self) -> bool:
        """Whether that supervisor still runs."""
        return self.started != 0 and start_time(self.pid) == self.started


def status(folder: Path) -> Status | None:
    """The cluster's status; None if there never was one."""
    try:
        return msgspec.json.decode((folder / "status.json").read_bytes(), type=Status)
    except (OSError, msgspec.DecodeError):
        return None


def running(folder: Path, authority: str = CENTRAL) -> Layout:
    """The home of an authority whose processes are up. Raises Unavailable(not_running)."""
    home = Layout(folder).home(authority)
    told = status(home.folder)
    if told is None or not told.alive:
        only = "" if authority == CENTRAL else f" --region {authority}"
        raise Unavailable("not_running", f"nothing of {authority} runs in {folder}: culm up --dir {folder}{only}")
    return Layout(home.folder, told.port, authority)


def up(homes: Sequence[Layout], progress: Callable[[str], None]) -> None:
    """Start these homes, all at once, and wait until they are up; one that is up already is left alone.

    Ctrl-C ends what this call has begun; a start that another one began goes on.

    Raises Conflict(runs_elsewhere, port_busy), CulmError(start_failed, interrupted). Safe to retry: yes.
    """
    begun: list[tuple[Layout, subprocess.Popen[bytes] | None]] = []
    try:
        for home in homes:
            begun.append((home, None if _runs_already(home) else _start(home)))
        for home, process in begun:
            _wait_up(home, process, progress)
    except KeyboardInterrupt:
        told = _undo(begun)
        raise CulmError("interrupted", f"interrupted; {told}") from None


def _start(home: Layout) -> "subprocess.Popen[bytes]":
    with (home.folder / "supervisor.log").open("ab") as log:
        return subprocess.Popen(
            _supervisor(home),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _undo(begun: Sequence[tuple[Layout, "subprocess.Popen[bytes] | None"]]) -> str:
    """End what this call has begun; a sentence on what became of it."""
    own = [(home, process) for home, process in begun if process is not None and process.poll() != RUNS_ALREADY]
    for _, process in own:
        process.terminate()
    for _, process in own:
        _end(process)
    if len(own) == len(begun):
        return "what had been begun is ended"
    return f"the start that another began goes on: culm down --dir {begun[0][0].folder}"


def stay(homes: Sequence[Layout]) -> int:
    """Run the supervisors of these homes until SIGTERM or SIGINT, or until one of them ends; the exit code.

    Raises Conflict(runs_already, runs_elsewhere, port_busy).
    """
    for home in homes:
        if _runs_already(home):
            raise Conflict("runs_already", f"{home.authority} is up in {home.folder}: culm down first")
    # They die with this process, whatever kills it.
    supervisors = [
        subprocess.Popen(_supervisor(home), preexec_fn=die_with_parent)  # noqa: PLW1509  # one call, no Python state
        for home in homes
    ]

    def end(_number: int, _frame: FrameType | None) -> None:
        # Once: one that has cleared up its loop would die of a second SIGTERM instead of ending.
        while waiting:
            waiting.pop().terminate()

    waiting = list(supervisors)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    codes = []
    for _ in supervisors:
        pid, code = os.wait()
        codes.append(os.waitstatus_to_exitcode(code))
        for one in supervisors:
            if one.pid == pid:
                one.returncode = codes[-1]
        end(0, None)
    return max(codes, key=abs)


def is_leaving(folder: Path) -> bool:
    """Whether the cluster is down or on its way there."""
    told = status(folder)
    return told is None or not told.alive or told.phase in ENDING


def down(homes: Sequence[Layout]) -> list[str]:
    """Stop what `up` started in these homes and nothing else; the authorities of those that ran.

    All are told at once: an `up` that comes meanwhile must not take the last of them for one that stays.
    Raises CulmError(still_running). Safe to retry: yes.
    """
    running = {home.authority: told for home in homes if (told := status(home.folder)) is not None and told.alive}
    for told in running.values():
        with contextlib.suppress(ProcessLookupError):
            os.kill(told.pid, signal.SIGTERM)
    for told in running.values():
        _wait_end(told)
    return list(running)


def _runs_already(layout: Layout) -> bool:
    """Whether it is up or coming up; if not, what it needs is free. Raises Conflict, ClientFault."""
    told = status(layout.folder)
    if told is not None and told.alive and told.phase in ENDING:
        _wait_end(told)
        told = None
    if told is not None and told.alive:
        if told.port != layout.port:
            raise Conflict("runs_elsewhere", f"the cluster in {layout.folder} is up at port {told.port}")
        return True
    for port in (layout.port, layout.port + 1):
        _require_free(port)
    if layout.authority != CENTRAL:
        make_private(layout.folder.parent)
    make_private(layout.folder)
    layout.status.unlink(missing_ok=True)
    return False


def _supervisor(layout: Layout) -> list[str]:
    words = (str(layout.folder), str(layout.port), layout.authority)
    return [sys.executable, "-P", "-m", "ops.cluster.supervisor", *words]


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(DOWN_S)
    except subprocess.TimeoutExpired:
        raise CulmError("still_running", f"the supervisor {process.pid} has not ended in {DOWN_S:.0f} s") from None


def _wait_end(told: Status) -> None:
    deadline = time.monotonic() + DOWN_S
    while told.alive:
        if time.monotonic() > deadline:
            raise CulmError("still_running", f"the supervisor {told.pid} has not ended in {DOWN_S:.0f} s")
        time.sleep(POLL_S)


def _wait_up(layout: Layout, process: "subprocess.Popen[bytes] | None", progress: Callable[[str], None]) -> Status:
    deadline = time.monotonic() + UP_S
    while time.monotonic() < deadline:
        told = status(layout.folder)
        if told is not None:
            if told.phase == "up":
                return told
            if told.phase in ENDING:
                raise CulmError("start_failed", f"{told.failure or 'it was stopped'} (logs in {layout.logs})")
            n_up = sum(one.state == "up" for one in told.processes)
            known = f"{n_up} of {len(told.processes)} processes are up"
            known = f"{layout.authority}: {known}"
            progress(known if told.processes else "preparing the databases (the first start may fetch their server)")
        if process is not None and process.poll() == RUNS_ALREADY:
            # Another `up` was a moment earlier: wait for that one's.
            process = None
        ended = process.poll() is not None if process is not None else told is not None and not told.alive
        if ended:
            raise CulmError("start_failed", f"the supervisor ended, see {layout.folder / 'supervisor.log'}")
        time.sleep(POLL_S)
    raise CulmError("start_failed", f"not up after {UP_S:.0f} s, see {layout.logs}")


def _require_free(port: int) -> None:
    if not 1 <= port <= 65535:
        raise ClientFault("bad_port", f"{port} is not a port")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise Conflict("port_busy", f"port {port} is in use: choose another with --port") from None
