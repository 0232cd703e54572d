"""Bad luck at any line: the pilot is killed, or told to go, between two lines of its own, and again a few lines on."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from culm.states import Event, State
from tests.cable import cable
from tests.front import front
from tests.node import Node, kill_all_below, running_below
from tests.partition import Partition, job

pytestmark = pytest.mark.integration
STEP = 14
"""Lines from one stroke of bad luck to the next; odd places come up as the number of lines of a run varies."""
STRUCK = """
import os, sys
sys.path.insert(0, {root!r})
from pilot import agent, journal, main

left = {n_lines}

def line(frame, event, _):
    global left
    if event == "line":
        left -= 1
        if left == 0:
            os.kill(os.getpid(), {number})
    return line

def call(frame, event, _):
    return line if frame.f_code.co_filename in (agent.__file__, journal.__file__) else None

sys.settrace(call)
sys.exit(main.main())
"""
ROOT = str(Path(__file__).parents[2])


@pytest.fixture
async def node(shard: Partition, tmp_path: Path) -> AsyncIterator[Node]:
    """A worker node with an empty work directory."""
    async with front(shard) as router, cable(router.url) as way:
        yield Node(shard, router, way, tmp_path / "work", router.token_file())
        kill_all_below(tmp_path)


async def _struck(node: Node, n_lines: int, number: int) -> int:
    """Run a pilot for one job, with a signal before its n-th line; its exit code."""
    code = STRUCK.format(root=ROOT, n_lines=n_lines, number=number)
    with node.pilot("--max-jobs", "1", "--wait", "1", program=("-P", "-c", code)) as pilot:
        return await pilot.ends()


async def test_killed_at_any_line_the_job_is_finished_once_by_the_next_pilot(node: Node) -> None:
    n_lines, returncode = 1, -9
    while returncode == -9:
        [identifier] = await node.shard.submit(job(argv=[], shell="sleep 600 & echo done"))
        returncode = await _struck(node, n_lines, 9)
        assert await node.run("--idle-exit", "0.1") == 0
        view = await node.shard.job(identifier)
        where = f"killed at line {n_lines}"
        assert view.job.state is State.FINISHED, where
        assert [event.event for event in view.history].count(Event.FINISH) == 1, where
        assert [report.stdout_tail for report in view.reports if report.state is State.FINISHED] == ["done\n"], where
        assert node.folders() == [], where
        assert running_below(node.work) == [], where
        n_lines += STEP
    assert returncode == 0
    assert n_lines > 10 * STEP


async def test_told_to_go_at_any_line_the_job_is_given_back_or_finished(node: Node) -> None:
    n_lines, returncode, n_given_back = 1, 143, 0
    while returncode == 143:
        [identifier] = await node.shard.submit(job(argv=[], shell="sleep 600 & sleep 0.1; echo done"))
        returncode = await _struck(node, n_lines, 15)
        view = await node.shard.job(identifier)
        where = f"told at line {n_lines}"
        assert view.job.state in {State.ACTIVATED, State.FINISHED}, where
        assert node.folders() == [], where
        assert running_below(node.work) == [], where
        if view.job.state is State.ACTIVATED:
            n_given_back += view.history[-1].event is Event.RELEASE
            await node.shard.cancel(identifier)
        n_lines += STEP
    assert returncode == 0
    assert n_given_back >= 3
