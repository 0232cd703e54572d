"""One cluster of real processes for the tests of this folder; those that break it for good start their own."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import Cluster, cluster


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder of the test's own."""
    with tempfile.TemporaryDirectory(prefix="culm-s-", dir="/tmp") as name:
        yield Path(name) / "c"


@pytest.fixture(scope="session")
def running() -> Iterator[Cluster]:
    """A cluster that is up; a test leaves it as it found it."""
    with tempfile.TemporaryDirectory(prefix="culm-s-", dir="/tmp") as name, cluster(Path(name) / "c") as found:
        yield found
