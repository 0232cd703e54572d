"""The supervisor: starts the processes in order, restarts with back-off what dies, ends all when it is told to.

`python -m ops.cluster.supervisor DIR PORT AUTHORITY`, one for each authority's home. Its children die with it, whatever kills it. It holds a lock on the
cluster's folder, which the kernel gives back, so that a killed one blocks nothing.
"""

import asyncio
import contextlib
import ctypes
import fcntl
import json
import os
import shutil
import signal
import socket
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from culm.errors import CulmError
from ops.cluster.layout import Layout
from ops.cluster.plan import Process, prepare

READY_S: Final = 60.0
POLL_S: Final = 0.03
STOP_S: Final = 15.0
FIRST_PAUSE_S: Final = 0.2
MAX_PAUSE_S: Final = 10.0
STABLE_S: Final = 30.0
"""A process that lived so long starts again at the first pause."""
MAX_LOG_BYTES: Final = 50 << 20
RUNS_ALREADY: Final = 5
"""The exit code of one that found another at work."""
PR_SET_PDEATHSIG: Final = 1
_LIBC: Final = ctypes.CDLL(None)


class _Child:
    """One process through its lives."""

    def __init__(self, process: Process, layout: Layout) -> None:
        self.process = process
        self.state = "starting"
        self.restarts = 0
        self.since = time.time()
        self.running: asyncio.subprocess.Process | None = None
        self._log = layout.logs / f"{process.name}.log"

    async def start(self) -> None:
        if self._log.exists() and self._log.stat().st_size > MAX_LOG_BYTES:
            self._log.replace(self._log.with_suffix(".log.1"))
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
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline and self.running is not None and self.running.returncode is None:
            if await asyncio.to_thread(_answers, self.process.ready):
                self.state = "up"
                return True
            await asyncio.sleep(POLL_S)
        return False

    async def stop(self) -> None:
        running = self.running
        if running is None or running.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            running.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(running.wait(), STOP_S)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                running.kill()
            await running.wait()
        self.state = "stopped"


class Supervisor:
    """The children of one cluster."""

    def __init__(self, layout: Layout, processes: list[Process]) -> None:
        self._layout = layout
        self._children = [_Child(process, layout) for process in processes]
        self._stop = asyncio.Event()
        self._phase = "starting"
        self._failure = ""

    async def run(self) -> int:
        """Start all, watch them until SIGTERM or SIGINT, end them in reverse order."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        watchers: list[asyncio.Task[None]] = []
        try:
            # Databases first, all at once; then what needs them.
            for wave in self._waves():
                for child in wave:
                    await child.start()
                self._tell()
                for child in wave:
                    if not await child.ready():
                        self._failure = f"{child.process.name} did not come up, see its log"
                        return 1
                self._tell()
            watchers = [loop.create_task(self._watch(child)) for child in self._children]
            self._phase = "up"
            self._tell()
            await self._stop.wait()
            return 0
        finally:
            for watcher in watchers:
                watcher.cancel()
            await asyncio.gather(*watchers, return_exceptions=True)
            self._phase = "failed" if self._failure else "stopping"
            for wave in reversed(self._waves()):
                await asyncio.gather(*(child.stop() for child in wave))
            self._phase = "failed" if self._failure else "down"
            self._tell()

    def _waves(self) -> list[list[_Child]]:
        waves = sorted({child.process.wave for child in self._children})
        return [[child for child in self._children if child.process.wave == wave] for wave in waves]

    async def _watch(self, child: _Child) -> None:
        pause_s = FIRST_PAUSE_S
        while True:
            assert child.running is not None
            code = await child.running.wait()
            lived_s = time.time() - child.since
            pause_s = FIRST_PAUSE_S if lived_s > STABLE_S else min(pause_s * 2, MAX_PAUSE_S)
            child.state, child.since, child.restarts = (
                f"restarting (ended with {code})",
                time.time(),
                child.restarts + 1,
            )
            self._tell()
            await asyncio.sleep(pause_s)
            await child.start()
            await child.ready()
            self._tell()

    def _tell(self) -> None:
        children = [
            {
                "name": child.process.name,
                "pid": child.running.pid if child.running else 0,
                "state": child.state,
                "restarts": child.restarts,
                "since": child.since,
            }
            for child in self._children
        ]
        _tell(self._layout, self._phase, failure=self._failure, processes=children)


def _tell(layout: Layout, phase: str, *, failure: str = "", processes: Sequence[Mapping[str, object]] = ()) -> None:
    told = {
        "phase": phase,
        "failure": failure,
        "pid": os.getpid(),
        "started": start_time(os.getpid()),
        "port": layout.port,
        "processes": list(processes),
    }
    beside = layout.status.with_suffix(".new")
    beside.write_text(json.dumps(told), encoding="utf-8")
    beside.replace(layout.status)


def start_time(pid: int) -> int:
    """When a process began, in the kernel's ticks, 0 if there is none: a pid with it is never mistaken for another.

    One that ended but was not collected counts as none: a container's first process may never collect it.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return 0 if fields[0] in "ZX" else int(fields[19])
    except (OSError, IndexError, ValueError):
        return 0


def main() -> int:
    """The command."""
    layout = Layout(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    with (layout.folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.stderr.write("another supervisor runs here\n")
            return RUNS_ALREADY
        # Before the engine is fetched, which may take minutes: `down` must find who is at it.
        _tell(layout, "starting")
        try:
            processes = prepare(layout)
        except CulmError as error:
            _tell(layout, "failed", failure=error.message)
            return 1
        try:
            return asyncio.run(_run(layout, processes))
        finally:
            shutil.rmtree(layout.sockets, ignore_errors=True)


async def _run(layout: Layout, processes: list[Process]) -> int:
    return await Supervisor(layout, processes).run()


def die_with_parent() -> None:
    """For `preexec_fn`: the kernel ends the child when its parent is gone, whatever ended that."""
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _answers(target: str) -> bool:

    if not target.startswith("unix:"):
        try:
            with urllib.request.urlopen(target, timeout=1.0) as answer:  # noqa: S310  # our own loopback URL
                return bool(answer.status == 200)
        except OSError:
            return False
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(1.0)
        try:
            client.connect(target.removeprefix("unix:"))
        except OSError:
            return False
    return True


if __name__ == "__main__":
    sys.exit(main())
