"""A worker node: real pilots in one work directory, against a router in the test's event loop."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from culm.states import State
from culm.wire import JobView
from tests.cable import Cable
from tests.cluster import ROOT, die_with_parent
from tests.front import RunningFront
from tests.partition import QUEUE, Partition
from tests.waiting import eventually

DEADLINE_S = 30.0


@dataclass
class Node:
    """Where pilots run, and what they run against."""

    shard: Partition
    router: RunningFront
    cable: Cable
    work: Path
    token_file: Path

    @contextmanager
    def pilot(self, *options: str, program: tuple[str, ...] = ("-P", "-m", "pilot")) -> Iterator["Pilot"]:
        """A pilot; killed at the end if it still runs. Later options win over ours."""
        log = self.work.parent / "pilot.log"
        with log.open("ab") as stderr:
            process = subprocess.Popen(
                [
                    *(sys.executable, *program, "--server", self.cable.url, "--queue", QUEUE),
                    *("--token-file", str(self.token_file), "--work-dir", str(self.work), "--wait", "5"),
                    *("--heartbeat", "0.2", *options),
                ],
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                preexec_fn=die_with_parent,  # noqa: PLW1509  # one call, no Python state
            )
        try:
            yield Pilot(process, log)
        finally:
            process.kill()
            process.wait()

    async def run(self, *options: str) -> int:
        """A pilot until it ends; its exit code."""
        with self.pilot(*options) as pilot:
            return await pilot.ends()

    async def reaches(self, job: int, state: State) -> JobView:
        """Wait for a state; the job."""

        async def there() -> JobView | None:
            view = await self.shard.job(job)
            return view if view.job.state is state else None

        view = await eventually(there, DEADLINE_S, what=f"job {job} is {state}")
        assert view is not None
        return view

    def folders(self) -> list[str]:
        """The folders of attempts and questions that are there."""
        return sorted(path.name for path in self.work.iterdir() if path.is_dir())

    def has_outcome(self, folder: str) -> bool:
        """Whether the journal of an attempt says how it ended."""
        path = self.work / folder / "journal.json"
        return path.exists() and '"outcome"' in path.read_text(encoding="utf-8")


@dataclass
class Pilot:
    """A running pilot."""

    process: "subprocess.Popen[bytes]"
    log: Path

    async def ends(self) -> int:
        """Its exit code."""
        await eventually(lambda: self.process.poll() is not None, DEADLINE_S, what="the pilot ends")
        assert "Traceback" not in self.said
        return self.process.returncode

    async def stopped(self) -> int:
        """SIGTERM; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return await self.ends()

    async def killed(self) -> None:
        """kill -9."""
        self.process.kill()
        await asyncio.to_thread(self.process.wait)

    @property
    def said(self) -> str:
        """What the pilots of this node wrote to stderr."""
        return self.log.read_text(encoding="utf-8")


def running_below(folder: Path) -> list[int]:
    """Processes, zombies apart, that work in a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cwd"):
        try:
            if path.readlink().is_relative_to(folder):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def kill_all_below(folder: Path) -> None:
    """End what a test has left."""
    for pid in running_below(folder):
        os.kill(pid, signal.SIGKILL)
