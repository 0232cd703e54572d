"""Running one payload: its own process group and work directory, walltime, memory and disk enforced."""

import errno
import os
import resource
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pilot import processes

TAIL_CHARS = 8192
TEXT_CHARS = 1000
TERM_S = 5.0
"""Between SIGTERM and SIGKILL."""
LOOK_S = 2.0
"""Between two looks at disk, memory and orphans."""
COLLECT_POLL_S = 0.02
MAX_LOG_MB = 2048
"""stdout and stderr together, also of a job without a disk limit."""

# PanDA's pilot error codes.
CODES = {"disk": 1104, "log": 1106, "cancelled": 1144, "memory": 1212, "walltime": 1213}
CANNOT_RUN = 1110
KILLED = 1200
MISSING_OUTPUT = 1165
CANCELLED = "cancelled"

# What says that this node is at its end, not that the payload is wrong.
_OF_THE_NODE = {errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS}


class PayloadError(Exception):
    """The payload cannot be run, here or anywhere."""


@dataclass(frozen=True)
class Limits:
    """What a payload may use; 0 is no limit."""

    walltime_s: float
    memory_mb: int
    disk_mb: int


class Payload:
    """A running payload."""

    def __init__(
        self, process: "subprocess.Popen[bytes]", folder: Path, spec: dict[str, Any], others: frozenset[int]
    ) -> None:
        self.process = process
        self.folder = folder
        self.started = processes.start_time(process.pid)
        """In the kernel's ticks: tells it from a later process with its pid."""
        self.broken = ""
        """Why it was ended: the limit that it broke, or CANCELLED."""
        self._limits = _limits(spec)
        self._outputs = [str(name) for name in spec.get("outputs") or []]
        self._others = others
        self._started_at = time.monotonic()
        self._looked_at = self._started_at
        self._used: resource.struct_rusage | None = None

    def poll(self) -> "int | None":
        """Its exit code, None while it runs; a payload over a limit is ended."""
        if self._collect() is None and (why := self._limit_broken()):
            self.end(why)
        return self._collect()

    def end(self, why: str = "", term_s: float = TERM_S) -> None:
        """End its process group, politely, then not; and what has left the group. Safe to repeat."""
        if self.process.returncode is not None:
            return
        self.broken = self.broken or why
        for number in (signal.SIGTERM, signal.SIGKILL):
            self._signal(number)
            if self._collect(term_s) is not None:
                return

    def outcome(self, code: int) -> dict[str, Any]:
        """The fields of the final report: state, exit_code, error, tails, usage."""
        error = self._error(code)
        state = "finished" if error is None else CANCELLED if self.broken == CANCELLED else "failed"
        return {
            "state": state,
            "exit_code": code,
            "stdout_tail": tail(self.folder.parent / "stdout"),
            "stderr_tail": tail(self.folder.parent / "stderr"),
            "usage": self.usage(),
        } | ({"error": error} if error else {})

    def usage(self) -> dict[str, Any]:
        """Walltime and disk so far; processor time and peak memory when it has ended."""
        usage: dict[str, Any] = {
            "wall_s": round(time.monotonic() - self._started_at, 3),
            "disk_mb": used_mb(self.folder.parent),
        }
        if self._used is not None:
            usage["cpu_s"] = round(self._used.ru_utime + self._used.ru_stime, 3)
            usage["rss_mb"] = self._used.ru_maxrss // 1024
        return usage

    def _error(self, code: int) -> "dict[str, Any] | None":
        if self.broken:
            return failure(CODES[self.broken], f"the payload was ended: {self._why()}")
        if code > 0:
            return failure(code, f"the payload ended with {code}", plane="trans")
        if code < 0:
            return failure(-code, f"the payload was killed by signal {-code}", plane="trans")
        missing = [name for name in self._outputs if not _is_output(self.folder, name)]
        if missing:
            return failure(MISSING_OUTPUT, f"the payload did not write its output: {', '.join(missing)}")
        return None

    def _why(self) -> str:
        match self.broken:
            case "walltime":
                return f"it ran longer than {self._limits.walltime_s:g} s"
            case "memory":
                return f"its processes used more than {self._limits.memory_mb} MB of memory"
            case "disk":
                return f"it used more than {self._limits.disk_mb} MB of disk"
            case "log":
                return f"it wrote more than {MAX_LOG_MB} MB to stdout and stderr"
            case _:
                return "it was cancelled"

    def _limit_broken(self) -> str:
        now, limits = time.monotonic(), self._limits
        if limits.walltime_s and now - self._started_at > limits.walltime_s:
            return "walltime"
        if now - self._looked_at < LOOK_S:
            return ""
        self._looked_at = now
        ours = processes.descendants(without=self._others)
        processes.reap([process for process in ours if process.pid != self.process.pid])
        if limits.memory_mb and processes.resident_mb(ours) > limits.memory_mb:
            return "memory"
        if limits.disk_mb and used_mb(self.folder.parent) > limits.disk_mb:
            return "disk"
        return "log" if _log_mb(self.folder.parent) > MAX_LOG_MB else ""

    def _signal(self, number: int) -> None:
        try:
            os.killpg(self.process.pid, number)
        except (ProcessLookupError, PermissionError):
            return

    def _collect(self, patience_s: float = 0.0) -> "int | None":
        """The exit code if it ends in time. Waited for by hand: subprocess would throw away what it has used."""
        deadline = time.monotonic() + patience_s
        pid = self.process.pid
        while self.process.returncode is None:
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                # What it left goes with it, and before it: until it is reaped no other group can have its number.
                self._signal(signal.SIGKILL)
                processes.end_descendants(without=self._others | {pid})
                _, status, self._used = os.wait4(pid, 0)
                self.process.returncode = os.waitstatus_to_exitcode(status)
            elif time.monotonic() >= deadline:
                return None
            else:
                time.sleep(COLLECT_POLL_S)
        return self.process.returncode


def start(spec: dict[str, Any], folder: Path, environment: "Mapping[str, str] | None" = None) -> Payload:
    """Start a job's payload in `folder`, which exists; its stdout and stderr go beside it.

    Args:
        spec: the job's spec.
        folder: absolute.
        environment: wins over the spec's.

    Raises:
        PayloadError: it cannot be run.
        OSError: this node cannot run anything now.
    """
    command = [str(word) for word in spec.get("argv") or []] or ["/bin/sh", "-c", str(spec.get("shell", ""))]
    ours = {"PATH": os.environ.get("PATH", os.defpath), "HOME": str(folder), "TMPDIR": str(folder)}
    marked = {**(environment or {}), processes.MARK: str(folder.parent)}
    address_space = _address_space(_limits(spec).memory_mb)
    # Before it runs: after that an orphan of it may be a child of ours already.
    others = processes.children()

    def prepare() -> None:
        processes.die_with_parent()
        if address_space:
            resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))

    with (folder.parent / "stdout").open("wb") as out, (folder.parent / "stderr").open("wb") as err:
        try:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=ours | dict(spec.get("environment") or {}) | marked,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
                preexec_fn=prepare,  # noqa: PLW1509  # the pilot has one thread
            )
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            if isinstance(error, OSError) and error.errno in _OF_THE_NODE:
                raise
            raise PayloadError(f"the payload cannot be run: {_reason(error)}") from None
    return Payload(process, folder, spec, others)


def failure(code: int, text: str, plane: str = "pilot") -> dict[str, Any]:
    """The error of a report, with a text that any message can carry."""
    clean = text.encode("utf-8", "replace").decode("utf-8")
    return {"plane": plane, "code": code, "text": clean[:TEXT_CHARS]}


def tail(path: Path) -> str:
    """The end of a file as text."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_CHARS))
            return file.read(TAIL_CHARS).decode("utf-8", "replace")
    except OSError:
        return ""


def used_mb(folder: Path) -> int:
    """What a folder takes on disk; links are not followed."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(root) / name).lstat().st_blocks * 512
            except OSError:
                continue
    return total >> 20


def _limits(spec: dict[str, Any]) -> Limits:
    return Limits(
        walltime_s=float(spec.get("walltime_s") or 0),
        memory_mb=int(spec.get("memory_mb") or 0),
        disk_mb=int(spec.get("disk_mb") or 0),
    )


def _address_space(memory_mb: int) -> int:
    """The limit in bytes, within what this pilot may have itself; 0 is none."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    wanted = memory_mb << 20
    return wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)


def _log_mb(folder: Path) -> int:
    total = 0
    for name in ("stdout", "stderr"):
        try:
            total += (folder / name).stat().st_blocks * 512
        except OSError:
            continue
    return total >> 20


def _is_output(folder: Path, name: str) -> bool:
    """Whether a file of this name is there, and not somewhere else."""
    path = Path(os.path.normpath(folder / name))
    return path.is_relative_to(folder) and path.is_file()


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return str(error)
