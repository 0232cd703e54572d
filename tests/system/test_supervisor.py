"""The supervisor over real processes: nothing that goes wrong once ends its watch, its status or its logs' bound."""

import asyncio
import contextlib
import os
import signal
import stat
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from ops.cluster import control
from ops.cluster.child import Pace
from ops.cluster.layout import Layout
from ops.cluster.plan import Process
from ops.cluster.supervisor import Supervisor
from tests.waiting import eventually

pytestmark = pytest.mark.system
DEADLINE_S = 30.0
PACE = Pace(first_pause_s=0.01, max_pause_s=0.05, stop_s=DEADLINE_S, look_s=0.05, max_log_bytes=100_000)
SERVICE = """#!{python}
import itertools, os, pathlib, signal, socket, sys
folder = pathlib.Path(sys.argv[1])
if (folder / "stubborn").exists():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if not (folder / "deaf").exists():
    (folder / "socket").unlink(missing_ok=True)
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(folder / "socket"))
    server.listen(100)
(folder / "pid").write_text(str(os.getpid()))
if (folder / "chatty").exists():
    for number in itertools.count():
        print(f"line {{number:09d}} " + "x" * 84, flush=True)
while True:
    signal.pause()
"""


class World:
    """A supervisor with one process, whose program and behaviour are files of its folder."""

    def __init__(self, folder: Path, *, ready_s: float) -> None:
        self.folder = folder
        self.layout = Layout(folder)
        self.layout.logs.mkdir(parents=True)
        self.program = folder / "service"
        self.install()
        argv = [str(self.program), str(folder)]
        self.process = Process("us1", argv, f"unix:{folder / 'socket'}", 0, ready_s=ready_s)
        self.supervisor = Supervisor(self.layout, [self.process], PACE)

    def install(self) -> None:
        """Put the program there."""
        self.program.write_text(SERVICE.format(python=sys.executable), encoding="utf-8")
        self.program.chmod(stat.S_IRWXU)

    def has(self, behaviour: str) -> None:
        """From its next start on."""
        (self.folder / behaviour).touch()

    def told(self) -> control.Status:
        """What the supervisor last said."""
        told = control.status(self.folder)
        assert told is not None
        return told

    @property
    def state(self) -> str:
        """Of the process, as told."""
        return self.told().processes[0].state

    def kill(self) -> int:
        """Kill it; the pid that it had."""
        pid = self.pid()
        os.kill(pid, signal.SIGKILL)
        return pid

    def pid(self) -> int:
        """As the process wrote it down, whatever the status says."""
        return int((self.folder / "pid").read_text(encoding="utf-8") or 0)

    async def up(self, restarts: int = 0) -> None:
        """Wait until it is told to be up, started again at least so often."""

        def is_up() -> bool:
            told = control.status(self.folder)
            return bool(
                told
                and told.phase == "up"
                and told.processes[0].state == "up"
                and told.processes[0].restarts >= restarts
            )

        await eventually(is_up, DEADLINE_S, what="it is up")


@asynccontextmanager
async def world(folder: Path, *behaviours: str, ready_s: float = DEADLINE_S) -> AsyncIterator[World]:
    """Run it; whatever the test did, its process is ended."""
    made = World(folder, ready_s=ready_s)
    for behaviour in behaviours:
        made.has(behaviour)
    task = asyncio.create_task(made.supervisor.run())
    try:
        yield made
        made.supervisor.stop()
        assert await asyncio.wait_for(task, DEADLINE_S) == 0
    finally:
        task.cancel()
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            os.kill(made.pid(), signal.SIGKILL)
        await asyncio.gather(task, return_exceptions=True)


async def test_a_start_that_fails_is_tried_again(folder: Path) -> None:
    async with world(folder) as made:
        await made.up()
        made.program.unlink()
        made.kill()
        await eventually(lambda: made.state.startswith("restarting (cannot start"), DEADLINE_S)
        made.install()
        await made.up(restarts=2)


async def test_a_status_that_cannot_be_written_ends_no_watch_and_is_told_later(folder: Path) -> None:
    async with world(folder) as made:
        await made.up()
        blocked = made.layout.status.with_suffix(".new")
        blocked.mkdir()
        killed = made.kill()
        await eventually(lambda: made.pid() not in {0, killed}, DEADLINE_S, what="it is started again")
        again = made.kill()
        await eventually(lambda: made.pid() not in {0, again}, DEADLINE_S, what="and again")
        assert made.told().processes[0].restarts == 0
        blocked.rmdir()
        await made.up(restarts=2)


async def test_one_that_does_not_get_ready_is_ended_and_started_again(folder: Path) -> None:
    async with world(folder, ready_s=2.0) as made:
        await made.up()
        made.has("deaf")
        (made.folder / "socket").unlink()
        first = made.kill()
        await eventually(lambda: made.pid() not in {0, first}, DEADLINE_S, what="it is started again")
        deaf = made.pid()
        await eventually(lambda: made.pid() not in {0, deaf}, DEADLINE_S, what="and again, for it was not ready")
        assert not _runs(deaf)
        (made.folder / "deaf").unlink()
        await made.up(restarts=2)


async def test_that_it_is_stopping_is_told_before_anything_has_ended(folder: Path) -> None:
    async with world(folder, "stubborn") as made:
        await made.up()
        made.supervisor.stop()
        await eventually(lambda: made.told().phase == "stopping", DEADLINE_S)
        assert _runs(made.pid())
        made.kill()
        await eventually(lambda: made.told().phase == "down", DEADLINE_S)


async def test_it_is_stopped_while_it_starts(folder: Path) -> None:
    async with world(folder, "deaf") as made:
        await eventually((folder / "pid").exists, DEADLINE_S, what="the process runs")
    assert made.told().phase == "down"


async def test_a_first_start_that_fails_is_told_with_its_reason(folder: Path) -> None:
    made = World(folder, ready_s=DEADLINE_S)
    made.program.unlink()
    assert await made.supervisor.run() == 1
    assert (made.told().phase, "us1 cannot start" in made.told().failure) == ("failed", True)


async def test_a_shard_that_does_not_come_up_keeps_nobody_down(folder: Path) -> None:
    made, bad, slow = (World(folder / name, ready_s=DEADLINE_S) for name in ("good", "bad", "slow"))
    bad.program.unlink()
    slow.has("deaf")
    processes = [
        replace(made.process, name="router"),
        replace(bad.process, name="us1-db", part="us1"),
        replace(made.process, name="us1", wave=1, part="us1", argv=["/bin/false"]),
        replace(slow.process, name="eu1-db", part="eu1"),
    ]
    supervisor = Supervisor(made.layout, processes, replace(PACE, patience_s=0.2))
    task = asyncio.create_task(supervisor.run())

    def states() -> dict[str, str]:
        return {one.name: one.state for one in made.told().processes} if made.layout.status.exists() else {}

    try:
        await eventually(lambda: bool(states()) and made.told().phase == "up", DEADLINE_S, what="it is up")
        assert (states()["router"], states()["eu1-db"]) == ("up", "starting")
        await eventually(lambda: "restarting" in states()["us1-db"], DEADLINE_S, what="the bad one is tried again")
        bad.install()
        await eventually(lambda: states()["us1-db"] == "up", DEADLINE_S, what="it comes up when it can")
        await eventually(lambda: "ended with 1" in states()["us1"], DEADLINE_S, what="what needs it is begun too")
        supervisor.stop()
        assert await asyncio.wait_for(task, DEADLINE_S) == 0
        assert not any(_runs(one.pid()) for one in (made, bad, slow))
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_the_logs_of_a_chatty_process_are_bounded_while_it_runs(folder: Path) -> None:
    async with world(folder, "chatty") as made:
        await made.up()
        pid = made.pid()
        log = made.layout.logs / "us1.log"
        oldest = log.with_name("us1.log.2")
        await eventually(oldest.exists, DEADLINE_S, what="rotated twice")
        assert {len(line) for line in oldest.read_bytes().splitlines()[:-1]} == {99}, "only the last may be cut"
        os.kill(pid, signal.SIGSTOP)
        await eventually(lambda: log.stat().st_size <= PACE.max_log_bytes, DEADLINE_S, what="cut once more")
        assert {path.name for path in made.layout.logs.iterdir()} <= {
            "us1.log",
            "us1.log.1",
            "us1.log.2",
            "us1.log.new",
        }
        os.kill(pid, signal.SIGCONT)
        assert (made.pid(), made.state) == (pid, "up")


def _runs(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()
