"""One cluster of real processes for the tests of this folder; those that break it for good start their own."""

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ops.cluster import control
from ops.cluster.layout import Layout
from tests.cluster import Cluster, cluster, remove_sockets
from tests.waiting import eventually_sync

END_S = 60.0


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder of the test's own."""
    with tempfile.TemporaryDirectory(prefix="culm-s-", dir="/tmp") as name:
        yield Path(name) / "c"


@pytest.fixture
def own(folder: Path) -> Iterator[Path]:
    """A folder for a cluster that `culm up` starts: whatever a test leaves running there is ended."""
    yield folder
    for home in Layout(folder).homes:
        told = control.status(home.folder)
        if told is not None and told.alive:
            os.kill(told.pid, signal.SIGTERM)
            eventually_sync(lambda told=told: not told.alive, END_S)  # type: ignore[misc]
    remove_sockets(folder)


@pytest.fixture(scope="session")
def running() -> Iterator[Cluster]:
    """A cluster that is up; a test leaves it as it found it."""
    with tempfile.TemporaryDirectory(prefix="culm-s-", dir="/tmp") as name, cluster(Path(name) / "c") as found:
        yield found
