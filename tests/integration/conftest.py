"""Private servers of this run, and shards on them."""

import os
from collections.abc import AsyncIterator, Iterator

import pytest

from ops.engines import innodb
from tests import servers
from tests.front import RunningFront, front_over
from tests.partition import Partition, Servers, partition
from tests.two_partitions import TwoPartitions, two_partitions

ORDINARY = os.environ.get("CULM_TEST_PATH") == "ordinary"
"""Run without the fast path: every guarantee holds without it too (docs/testing.md)."""


OF_THE_FAST_PATH = ("test_lane.py", "test_signs.py", "test_at_once.py", "test_signs_beyond_the_bound")
"""Tests of the fast path itself."""


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Requests by aiohttp, claims and signs in transactions that look first, nothing read ahead."""
    if ORDINARY:
        if any(name in request.node.nodeid for name in OF_THE_FAST_PATH):
            pytest.skip("it is about the fast path")
        monkeypatch.setattr("tests.front.FAST_LANE", False)
        monkeypatch.setattr("shard.dispatch.enough", lambda _seats, _hints: False)
        monkeypatch.setattr("shard.signs.Signs.begin", lambda _signs, _call: None)
        monkeypatch.setattr("shard.shelf.Shelf.put", lambda _shelf, _rows: None)


@pytest.fixture(scope="session")
def mariadb() -> Iterator[servers.Server]:
    """One database server; a test has a schema of its own in it."""
    with servers.database(innodb.find(servers.cache())) as server:
        yield server


@pytest.fixture(scope="session")
def valkey() -> Iterator[servers.Server]:
    """One Valkey; a test has a database of its own in it."""
    with servers.cache_server() as server:
        yield server


@pytest.fixture
def both(mariadb: servers.Server, valkey: servers.Server) -> Servers:
    """What a shard needs."""
    return Servers(mariadb, valkey)


@pytest.fixture
async def shard(both: Servers) -> AsyncIterator[Partition]:
    """A shard with one site, BNL."""
    async with partition(both) as running:
        yield running


@pytest.fixture
async def pair(both: Servers) -> AsyncIterator[TwoPartitions]:
    """Two shards."""
    async with two_partitions(both) as running:
        yield running


@pytest.fixture
async def router(pair: TwoPartitions) -> AsyncIterator[RunningFront]:
    """A router over both."""
    async with front_over(pair.topology_dir) as running:
        yield running
