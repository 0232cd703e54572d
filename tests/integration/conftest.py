"""Private servers of this run, and shards on them."""

from collections.abc import AsyncIterator, Iterator

import pytest

from ops.engines import innodb
from tests import servers
from tests.partition import Partition, Servers, partition


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
