"""Running one payload: its own process group and work directory, walltime, memory and disk enforced."""

import os
import resource
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TAIL_CHARS = 8192
TERM_S = 5.0
"""Between SIGTERM and SIGKILL."""
DISK_POLL_S = 5.0
COLLECT_POLL_S = 0.02

# PanDA's pilot error codes.
KILLED_BY_LIMIT = {"memory": 1212, "walltime": 1213, "disk": 1104}
FAILED_TO_START = 1110


@dataclass
class Payload:
    """A running payload."""

    process: "subprocess.Popen[bytes]"
    folder: Path
    walltime_s: float
    disk_mb: int
    memory_mb: int
    started_at: float = field(default_factory=time.monotonic)
    broken: str = ""
    """The limit that it broke."""
    used: "resource.struct_rusage | None" = None
    """What it and the children that it waited for have used; known when it has ended."""
    _disk_looked_at: float = 0.0

    def poll(self) -> "int | None":
        """Its exit code, None while it runs; a payload over a limit is ended."""
        code = self._collect()
        if code is not None:
            return code
        now = time.monotonic()
        if self.walltime_s and now - self.started_at > self.walltime_s:
            self.end("walltime")
        elif self.disk_mb and now - self._disk_looked_at > DISK_POLL_S:
            self._disk_looked_at = now
            if used_mb(self.folder) > self.disk_mb:
                self.end("disk")
        return self._collect()

    def end(self, why: str = "") -> None:
        """End its whole process group: politely, then not."""
        self.broken = self.broken or why
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, number)
            except (ProcessLookupError, PermissionError):
                break
            if self._collect(TERM_S) is not None:
                break
        # What it left in its group goes with it.
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            return

    def outcome(self, code: int) -> dict[str, Any]:
        """The fields of the final report: state, exit_code, error, tails, usage."""
        report: dict[str, Any] = {
            "state": "finished" if code == 0 and not self.broken else "failed",
            "exit_code": code,
            "stdout_tail": tail(self.folder.parent / "stdout"),
            "stderr_tail": tail(self.folder.parent / "stderr"),
            "usage": self.usage(),
        }
        if self.broken:
            report["error"] = {
                "plane": "pilot",
                "code": KILLED_BY_LIMIT.get(self.broken, 1099),
                "text": f"the payload was ended: {self.broken}",
            }
        elif code != 0:
            text = f"the payload ended with {code}" if code > 0 else f"the payload was killed by signal {-code}"
            report["error"] = {"plane": "trans", "code": abs(code), "text": text}
        return report

    def usage(self) -> dict[str, Any]:
        """Walltime and disk so far; processor time and peak memory when it has ended."""
        usage: dict[str, Any] = {
            "wall_s": round(time.monotonic() - self.started_at, 3),
            "disk_mb": used_mb(self.folder),
        }
        if self.used is not None:
            usage["cpu_s"] = round(self.used.ru_utime + self.used.ru_stime, 3)
            usage["rss_mb"] = self.used.ru_maxrss // 1024
        return usage

    def _collect(self, patience_s: float = 0.0) -> "int | None":
        """The exit code if it ends in time. Waited for by hand: subprocess would throw away what it has used."""
        deadline = time.monotonic() + patience_s
        while self.process.returncode is None:
            pid, status, used = os.wait4(self.process.pid, os.WNOHANG)
            if pid:
                self.used = used
                self.process.returncode = os.waitstatus_to_exitcode(status)
            elif time.monotonic() >= deadline:
                return None
            else:
                time.sleep(COLLECT_POLL_S)
        return self.process.returncode


def start(spec: dict[str, Any], folder: Path) -> Payload:
    """Start a job's payload in `folder`. Raises OSError if it cannot be run at all."""
    command = list(spec.get("argv") or []) or ["/bin/sh", "-c", str(spec.get("shell", ""))]
    environment = {"PATH": os.environ.get("PATH", os.defpath), "HOME": str(folder), "TMPDIR": str(folder)}
    memory_mb = int(spec.get("memory_mb") or 0)

    def limit() -> None:
        os.setsid()
        if memory_mb:
            resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))

    with (folder.parent / "stdout").open("wb") as out, (folder.parent / "stderr").open("wb") as err:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment | dict(spec.get("environment") or {}),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            preexec_fn=limit,  # noqa: PLW1509  # the pilot has one thread
        )
    return Payload(process, folder, float(spec.get("walltime_s") or 0), int(spec.get("disk_mb") or 0), memory_mb)


def tail(path: Path) -> str:
    """The end of a file as text."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_CHARS))
            return file.read().decode("utf-8", "replace")[-TAIL_CHARS:]
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
