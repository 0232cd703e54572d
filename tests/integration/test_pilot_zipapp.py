"""The pilot as one file: built by the command, run by a bare Python."""

import os
import stat
import subprocess
import sys
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from culm.states import State
from tests.cable import cable
from tests.cluster import ROOT
from tests.front import front
from tests.node import Node, kill_all_below
from tests.partition import Partition, job

pytestmark = pytest.mark.integration
COMMAND_S = 60.0


def _build(target: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-P", "-m", "ops", "pilot", "build", str(target)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=COMMAND_S,
        check=False,
    )


@pytest.fixture
def zipapp(tmp_path: Path) -> Path:
    """One, just built."""
    target = tmp_path / "culm-pilot.pyz"
    done = _build(target)
    assert (done.returncode, done.stdout) == (0, f"{target}\n"), done.stderr
    return target


@pytest.fixture
async def node(shard: Partition, tmp_path: Path) -> AsyncIterator[Node]:
    """A worker node with an empty work directory."""
    async with front(shard) as router, cable(router.url) as way:
        yield Node(shard, router, way, tmp_path / "work", router.token_file())
        kill_all_below(tmp_path)


async def test_it_runs_a_job_with_nothing_else_on_the_path(node: Node, zipapp: Path) -> None:
    [identifier] = await node.shard.submit(job(argv=["echo", "zipped"]))
    # -I: neither the current directory, nor PYTHONPATH, nor the user's packages; -S: not those of this environment.
    with node.pilot("--max-jobs", "1", program=("-I", "-S", str(zipapp))) as pilot:
        assert await pilot.ends() == 0
    view = await node.shard.job(identifier)
    assert view.job.state is State.FINISHED
    assert [report.stdout_tail for report in view.reports] == ["zipped\n"]


def test_it_holds_the_pilot_and_nothing_else(zipapp: Path) -> None:
    names = {name for name in zipfile.ZipFile(zipapp).namelist() if not name.endswith("/")}
    sources = {f"pilot/{path.name}" for path in (ROOT / "pilot").glob("*.py")}
    assert names == sources | {"__main__.py"}


def test_it_is_a_program(zipapp: Path) -> None:
    assert zipapp.stat().st_mode & stat.S_IXUSR
    assert zipapp.read_bytes().startswith(b"#!/usr/bin/env python3\n")


def test_building_it_again_replaces_it_as_a_whole(zipapp: Path) -> None:
    with zipapp.open("rb") as running:
        assert _build(zipapp).returncode == 0
        # Who has it open goes on with the old one.
        assert os.fstat(running.fileno()).st_ino != zipapp.stat().st_ino
    assert [path.name for path in zipapp.parent.iterdir()] == [zipapp.name]


def test_a_place_where_it_cannot_be_written_is_named(tmp_path: Path) -> None:
    target = tmp_path / "missing" / "pilot.pyz"
    done = _build(target)
    assert done.returncode == 1
    assert done.stderr == f"Error: {target} cannot be written: No such file or directory\n"


def test_an_older_python_is_told_what_it_lacks(zipapp: Path, tmp_path: Path) -> None:
    """Run by this Python as if it were an older one: the check comes before any of our modules is read."""
    code = f"import runpy, sys; sys.version_info = (3, 9); runpy.run_path({str(zipapp)!r}, run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False, timeout=COMMAND_S
    )
    assert done.returncode == 1
    assert done.stderr.startswith("culm-pilot: needs Python 3.11 or newer")
