"""The supervisor: starts the processes in order, restarts with back-off what dies, ends all when it is told to.

`python -m ops.cluster.supervisor DIR PORT AUTHORITY`, one for each authority's home. Its children die with it, whatever
kills it. It holds a lock on the home, which the kernel gives back, so that a killed one blocks nothing.
"""

import asyncio
import fcntl
import json
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from culm import telemetry
from culm.errors import CulmError
from culm.service import Loops
from ops.cluster import logs
from ops.cluster.child import Child, Pace
from ops.cluster.layout import Layout
from ops.cluster.plan import Process, prepare

RUNS_ALREADY: Final = 5
"""The exit code of one that found another at work."""
_BEGAN_AT: Final = time.time()

log = logging.getLogger("culm.supervisor")


class Supervisor:
    """The children of one cluster."""

    def __init__(self, layout: Layout, processes: list[Process], pace: Pace | None = None) -> None:
        self._layout = layout
        self._pace = pace or Pace()
        self._children = [Child(process, layout.logs / f"{process.name}.log", self._pace) for process in processes]
        self._stop = asyncio.Event()
        self._more = asyncio.Event()
        self._loops = Loops()
        self._beginning: set[asyncio.Task[str]] = set()
        self._phase = "starting"
        self._failure = ""
        self._told = True

    def stop(self) -> None:
        """Let `run` end all, also while it starts them. Safe to retry: yes."""
        self._stop.set()

    def extend(self) -> None:
        """Let `run` start what the home has more by now: a shard that was added. Safe to retry: yes."""
        self._more.set()

    async def run(self) -> int:
        """Start all, keep them up until `stop`, end them in reverse order; 1 if router or monitor did not come up.

        A shard that does not come up is kept as one that has died: the others are not to wait for it.
        """
        loops = self._loops
        stopped = asyncio.create_task(self._stop.wait())
        starting = asyncio.create_task(self._start(self._children))
        try:
            loops.every(self._pace.look_s, "housekeeping", self._housekeeping)
            await asyncio.wait({starting, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not stopped.done():
                self._failure = starting.result()
                if self._failure:
                    return 1
                loops.every(self._pace.first_pause_s, "extend", self._extend)
                self._phase = "up"
                self._tell()
                await stopped
            return 0
        finally:
            # Before anything ends: who asks for a start now waits for our end, and does not take us for up.
            self._phase = "failed" if self._failure else "stopping"
            self._tell()
            tasks = (starting, stopped, *self._beginning)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await loops.stop()
            for wave in reversed(self._waves(self._children)):
                await asyncio.gather(*(child.stop() for child in wave))
            self._phase = "failed" if self._failure else "down"
            self._tell()

    async def _extend(self) -> None:
        """One turn of a loop: what cannot be started is kept as any other, and tried again."""
        await self._more.wait()
        self._more.clear()
        known = {child.process.name for child in self._children}
        added = [
            Child(process, self._layout.logs / f"{process.name}.log", self._pace)
            for process in await asyncio.to_thread(prepare, self._layout)
            if process.name not in known
        ]
        self._children += added
        await self._start(added)

    async def _start(self, children: Sequence[Child]) -> str:
        """Begin every part for itself; what there is no cluster without and did not come up, or "".

        Done when all parts are up or were tried once, or when one has taken too long for the others to wait for it: a
        database that recovers goes on.
        """
        parts: dict[str, list[Child]] = {}
        for child in children:
            parts.setdefault(child.process.part, []).append(child)
        tasks = {part: asyncio.create_task(self._begin(some), name=part) for part, some in parts.items()}
        self._beginning |= set(tasks.values())
        for task in tasks.values():
            task.add_done_callback(self._beginning.discard)
        needed = [tasks[""]] if "" in tasks else []
        failure = next(iter(await asyncio.gather(*needed)), "")
        others = set(tasks.values()) - set(needed)
        if others and not failure:
            _, late = await asyncio.wait(others, timeout=self._pace.patience_s)
            for task in late:
                log.warning("%s takes long to come up", task.get_name())
        return failure

    async def _begin(self, part: Sequence[Child]) -> str:
        """Start what belongs together, the earlier waves first, and keep it up from then on; what did not come up."""
        failure = ""
        for wave in self._waves(part):
            ready = await asyncio.gather(*(child.begin(self._tell) for child in wave))
            failed = [child for child, well in zip(wave, ready, strict=True) if not well]
            if failed:
                failure = (
                    f"{failed[0].process.name} {failed[0].state.partition('(')[2].rstrip(')') or 'did not come up'}"
                )
                failure += ", see its log"
                log.warning("%s", failure)
                break
        if not failure or part[0].process.part:
            for child in part:
                self._loops.every(
                    self._pace.first_pause_s, f"keep {child.process.name}", partial(child.keep, self._tell)
                )
        return failure

    @staticmethod
    def _waves(children: Sequence[Child]) -> list[list[Child]]:
        waves = sorted({child.process.wave for child in children})
        return [[child for child in children if child.process.wave == wave] for wave in waves]

    async def _housekeeping(self) -> None:
        if not self._told:
            self._tell()
        paths = [*self._layout.logs.glob("*.log"), *self._layout.folder.glob("supervisor.log")]
        await asyncio.to_thread(logs.rotate, paths, max_bytes=self._pace.max_log_bytes)

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
        # Where it fails, the loop tells it again.
        self._told = _tell(self._layout, self._phase, failure=self._failure, processes=children)


def _tell(layout: Layout, phase: str, *, failure: str = "", processes: Sequence[Mapping[str, object]] = ()) -> bool:
    """Write the status; whether it could be written. A supervisor must not die of a full disk."""
    told = {
        "phase": phase,
        "failure": failure,
        "pid": os.getpid(),
        "started": start_time(os.getpid()),
        "began_at": _BEGAN_AT,
        "port": layout.port,
        "processes": list(processes),
    }
    beside = layout.status.with_suffix(".new")
    try:
        beside.write_text(json.dumps(told), encoding="utf-8")
        beside.replace(layout.status)
    except OSError as error:
        log.warning("the status cannot be written: %s", error)
        return False
    return True


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
        telemetry.configure_logging("supervisor", "INFO")
        # Until it can be obeyed: the default action would end us.
        signal.signal(signal.SIGUSR1, lambda _number, _frame: None)
        # Before the engine is fetched, which may take minutes: `down` must find who is at it.
        _tell(layout, "starting")
        for mark in (layout.folder / "data").glob("*/joining"):
            # What had not joined when the last supervisor ended is begun anew by `culm shard add`.
            mark.unlink()
        try:
            processes = prepare(layout)
        except (CulmError, OSError) as error:
            told = error.message if isinstance(error, CulmError) else str(error)
            log.exception("the cluster cannot be prepared")
            _tell(layout, "failed", failure=told)
            return 1
        try:
            return asyncio.run(_run(layout, processes))
        finally:
            shutil.rmtree(layout.sockets, ignore_errors=True)


async def _run(layout: Layout, processes: list[Process]) -> int:
    supervisor = Supervisor(layout, processes)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, supervisor.stop)
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, supervisor.extend)
    return await supervisor.run()


if __name__ == "__main__":
    sys.exit(main())
