"""One supervised process through its lives: started, ready, ended, and the pause before it is started again."""

import asyncio
import contextlib
import ctypes
import http.client
import os
import signal
import socket
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ops.cluster import logs
from ops.cluster.plan import Process

POLL_S: Final = 0.03
PR_SET_PDEATHSIG: Final = 1
_LIBC: Final = ctypes.CDLL(None)


@dataclass(frozen=True)
class Pace:
    """How a supervisor goes about it; seconds, bytes."""

    first_pause_s: float = 0.2
    """Before a process is started again; twice as long each time, up to the longest."""
    max_pause_s: float = 10.0
    patience_s: float = 120.0
    """How long a first start waits for a shard; then the cluster is up without it."""
    stable_s: float = 30.0
    """A process that was up for so long starts again after the first pause."""
    stop_s: float = 15.0
    """After SIGTERM; then SIGKILL."""
    look_s: float = 1.0
    """Between two looks at the logs, and at what could not be told."""
    max_log_bytes: int = logs.MAX_BYTES


class Child:
    """A process; `state` is for people: starting, up, restarting (why), stopped."""

    def __init__(self, process: Process, log: Path, pace: Pace) -> None:
        self.process = process
        self.state = "starting"
        self.restarts = 0
        self.since = time.time()
        self.running: asyncio.subprocess.Process | None = None
        self._log = log
        self._pace = pace
        self._pause_s = pace.first_pause_s
        self._up_since: float | None = None

    async def start(self) -> None:
        """Start it. Raises OSError if that is impossible now."""
        self.running, self._up_since = None, None
        with self._log.open("ab") as log:
            self.running = await asyncio.create_subprocess_exec(
                *self.process.argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | dict(self.process.environment),
                preexec_fn=die_with_parent,
                start_new_session=True,
            )
        self.state, self.since = "starting", time.time()

    async def ready(self) -> bool:
        """Wait until it answers; False if it ended or was too slow."""
        deadline = time.monotonic() + self.process.ready_s
        while time.monotonic() < deadline and self.running is not None and self.running.returncode is None:
            if await asyncio.to_thread(_answers, self.process.ready):
                self.state, self._up_since = "up", time.monotonic()
                return True
            await asyncio.sleep(POLL_S)
        return False

    async def keep(self, tell: Callable[[], None]) -> None:
        """One turn of a loop that keeps it up: wait for its end, pause, start it, wait until it is ready.

        One that cannot be started, or is not ready in time, is ended; the next turn tries again, later.
        """
        if self.running is not None:
            self._restarting(f"ended with {await self.running.wait()}")
        tell()
        await asyncio.sleep(self._next_pause_s())
        await self.begin(tell)

    async def begin(self, tell: Callable[[], None]) -> bool:
        """Start it and wait until it is ready; whether it is. One that is not in time is ended."""
        try:
            await self.start()
        except OSError as error:
            self._restarting(f"cannot start: {error.strerror or error}")
            tell()
            return False
        tell()
        ready = await self.ready()
        if not ready and self.running is not None and self.running.returncode is None:
            await self.stop()
            self.running = None
            self._restarting(f"was not ready in {self.process.ready_s:g} s")
        tell()
        return ready

    async def stop(self) -> None:
        """SIGTERM, then SIGKILL; done when it has ended."""
        running = self.running
        if running is None or running.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            running.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(running.wait(), self._pace.stop_s)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                running.kill()
            await running.wait()
        self.state = "stopped"

    def _restarting(self, why: str) -> None:
        self.state, self.since = f"restarting ({why})", time.time()
        self.restarts += 1

    def _next_pause_s(self) -> float:
        stable = self._up_since is not None and time.monotonic() - self._up_since > self._pace.stable_s
        self._pause_s = self._pace.first_pause_s if stable else min(self._pause_s * 2, self._pace.max_pause_s)
        return self._pause_s


def die_with_parent() -> None:
    """For `preexec_fn`: the kernel ends the child when its parent is gone, whatever ended that."""
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _answers(target: str) -> bool:
    if not target.startswith("unix:"):
        try:
            with urllib.request.urlopen(target, timeout=1.0) as answer:  # noqa: S310  # our own loopback URL
                return bool(answer.status == 200)
        except (OSError, http.client.HTTPException):
            return False
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(1.0)
        try:
            client.connect(target.removeprefix("unix:"))
        except OSError:
            return False
    return True
