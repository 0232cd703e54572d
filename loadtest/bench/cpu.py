"""Processor time of processes, as the kernel has counted it: user and system, with their threads."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

_TICK_S: Final = 1 / os.sysconf("SC_CLK_TCK")


def seconds(pid: int) -> float:
    """What a process has used so far, in seconds, to a tick (10 ms). Raises ProcessLookupError."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        raise ProcessLookupError(f"process {pid} is gone") from None
    return (int(fields[11]) + int(fields[12])) * _TICK_S


def of_tree(pid: int) -> dict[int, float]:
    """The same of a process and of all its children, by process; empty if it is gone."""
    found: dict[int, float] = {}
    waiting = [pid]
    while waiting:
        one = waiting.pop()
        try:
            found[one] = seconds(one)
            for thread in Path(f"/proc/{one}/task").iterdir():
                waiting += map(int, (thread / "children").read_text(encoding="utf-8").split())
        except OSError:
            # It ended while we looked.
            continue
    return found


def machine_seconds() -> float:
    """What all processes of this machine have used so far, on all its processors."""
    user, nice, system, _idle, _wait, irq, soft_irq = map(
        int, Path("/proc/stat").read_text(encoding="utf-8").splitlines()[0].split()[1:8]
    )
    return (user + nice + system + irq + soft_irq) * _TICK_S


def of_all(pids: Mapping[str, int]) -> dict[str, float]:
    """The same by name. Raises ProcessLookupError."""
    return {name: seconds(pid) for name, pid in pids.items()}


def resident_bytes(pid: int) -> int:
    """The memory of a process that is in the machine's. Raises ProcessLookupError."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()[1])
    except OSError:
        raise ProcessLookupError(f"process {pid} is gone") from None
    return pages * os.sysconf("SC_PAGE_SIZE")
