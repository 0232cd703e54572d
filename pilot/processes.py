"""The processes of a payload, also those that left its group: found in /proc, killed, reaped. Linux only."""

import os
import signal
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

_PRCTL: Any = None
try:
    import ctypes

    _PRCTL = ctypes.CDLL(None).prctl
except (ImportError, OSError, AttributeError):  # a Python without libffi, a system without prctl
    pass

MARK = "CULM_PAYLOAD"
"""The environment variable that every process of a payload has from us: the folder of its attempt."""
END_S = 2.0
"""A killed process is gone in milliseconds, unless the kernel itself is stuck in it."""
_POLL_S = 0.01
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_ZOMBIE = "Z"


class Process(NamedTuple):
    """A line of /proc."""

    pid: int
    state: str
    parent: int
    session: int
    started: int
    """In the kernel's ticks since the start of the machine."""


def adopt_orphans() -> None:
    """From now on descendants whose parents end become our children, so that no payload can slip away."""
    if _PRCTL is not None:
        _PRCTL(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def die_with_parent() -> None:
    """Between fork and exec: the kernel kills us when the pilot dies, however that happens."""
    if _PRCTL is not None:
        _PRCTL(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def start_time(pid: int) -> int:
    """When a process began; 0 if there is none."""
    process = _read(pid)
    return process.started if process else 0


def children() -> frozenset[int]:
    """Our own direct children now."""
    return frozenset(process.pid for process in _all() if process.parent == os.getpid())


def descendants(without: Collection[int]) -> list[Process]:
    """Our children, theirs and so on, but for some children and what is below them."""
    below: dict[int, list[Process]] = {}
    for process in _all():
        below.setdefault(process.parent, []).append(process)
    found: list[Process] = []
    parents = [os.getpid()]
    while parents:
        new = [process for process in below.get(parents.pop(), []) if process.pid not in without]
        found += new
        parents += [process.pid for process in new]
    return found


def end_descendants(without: Collection[int]) -> None:
    """Kill and reap our descendants until there are none, or the kernel does not let them go."""
    deadline = time.monotonic() + END_S
    while (left := descendants(without)) and time.monotonic() < deadline:
        for process in left:
            _kill(process)
        reap(left)
        time.sleep(_POLL_S)


def reap(processes: Collection[Process]) -> None:
    """Take leave of adopted children that have ended."""
    for process in processes:
        if process.parent == os.getpid() and process.state == _ZOMBIE:
            try:
                os.waitpid(process.pid, os.WNOHANG)
            except ChildProcessError:
                continue


def end_left(folder: Path, leader: int, started: int) -> None:
    """Kill what a dead pilot's payload left running.

    Its processes are known by their environment, or by the session of the payload that was started then; a pid that
    meanwhile means another process is left alone.
    """
    deadline = time.monotonic() + END_S
    while (left := list(_left(folder, leader, started))) and time.monotonic() < deadline:
        for process in left:
            _kill(process)
        time.sleep(_POLL_S)


def resident_mb(processes: Collection[Process]) -> int:
    """The memory that processes really use, what they share counted once."""
    total = 0
    for process in processes:
        try:
            text = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="ascii")
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))
    return total >> 10


def _left(folder: Path, leader: int, started: int) -> Iterator[Process]:
    mark = f"{MARK}={folder}".encode()
    leads_now = start_time(leader) if leader else 0
    for process in _all():
        if process.pid == os.getpid() or process.state == _ZOMBIE:
            continue
        in_session = 0 < started <= process.started and process.session == leader and leads_now in (0, started)
        if in_session or mark in _environment(process.pid):
            yield process


def _environment(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def _kill(process: Process) -> None:
    try:
        os.kill(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


def _all() -> Iterator[Process]:
    for path in Path("/proc").glob("[0-9]*"):
        if path.name.isdecimal() and (process := _read(int(path.name))):
            yield process


def _read(pid: int) -> Process | None:
    try:
        # The name of the program, in parentheses, may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return Process(pid, fields[0].decode(), int(fields[1]), int(fields[3]), int(fields[19]))
    except (OSError, IndexError, ValueError):
        return None
