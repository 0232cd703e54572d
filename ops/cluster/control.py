"""Start, stop and look at a cluster on this machine."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, NoReturn

import msgspec

from culm.errors import ClientFault, Conflict, CulmError, Unavailable
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


def running(folder: Path) -> Layout:
    """The layout of a cluster that is up. Raises Unavailable(not_running)."""
    told = status(folder)
    if told is None or not told.alive:
        raise Unavailable("not_running", f"no cluster runs in {folder}: culm up --dir {folder}")
    return Layout(folder, told.port)


def up(layout: Layout, progress: Callable[[str], None]) -> Status:
    """Start a cluster and wait until it is up; one that is up already is left alone.

    Ctrl-C ends what this call has begun; a start that another one began goes on.

    Raises Conflict(runs_elsewhere, port_busy), CulmError(start_failed, interrupted). Safe to retry: yes.
    """
    process = None
    if not _runs_already(layout):
        with (layout.folder / "supervisor.log").open("ab") as log:
            process = subprocess.Popen(
                _supervisor(layout),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
    try:
        return _wait_up(layout, process, progress)
    except KeyboardInterrupt:
        if process is None or process.poll() == RUNS_ALREADY:
            told = f"the start that another began goes on: culm down --dir {layout.folder}"
        else:
            _end(process)
            told = "what had been begun is ended"
        raise CulmError("interrupted", f"interrupted; {told}") from None


def become(layout: Layout) -> NoReturn:
    """Turn this process into the cluster's supervisor: what ends it ends the cluster.

    Raises Conflict(runs_already, runs_elsewhere, port_busy).
    """
    if _runs_already(layout):
        raise Conflict("runs_already", f"the cluster in {layout.folder} is up: culm down --dir {layout.folder}")
    command = _supervisor(layout)
    os.execv(command[0], command)  # noqa: S606  # no shell: our own interpreter


def is_leaving(folder: Path) -> bool:
    """Whether the cluster is down or on its way there."""
    told = status(folder)
    return told is None or not told.alive or told.phase in ENDING


def down(folder: Path) -> bool:
    """Stop what `up` started and nothing else; whether anything ran. Raises CulmError(still_running)."""
    told = status(folder)
    if told is None or not told.alive:
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(told.pid, signal.SIGTERM)
    _wait_end(told)
    return True


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
    make_private(layout.folder)
    for port in (layout.port, layout.port + 1):
        _require_free(port)
    layout.status.unlink(missing_ok=True)
    return False


def _supervisor(layout: Layout) -> list[str]:
    return [sys.executable, "-P", "-m", "ops.cluster.supervisor", str(layout.folder), str(layout.port)]


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
