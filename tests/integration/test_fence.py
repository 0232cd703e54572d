"""The ownership check, per engine: an open claim holds back the change of its slot, a claim after it is refused."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from culm.errors import Moved
from culm.wire import SlotRef
from ops.engines import innodb
from shard.database import Transaction
from shard.driver import connect
from shard.transitions import lock_slots
from tests import servers
from tests.partition import Partition, Servers, job, partition
from tests.waiting import eventually

DEADLINE_S = 20.0
CLOSE = "UPDATE slot SET state = 'closed', epoch = epoch + 1 WHERE slot = %s"


@pytest.fixture(
    params=["mariadb", pytest.param("mysql", marks=pytest.mark.mysql)],
    scope="module",
)
def engine(request: pytest.FixtureRequest) -> Iterator[servers.Server]:
    """A server of each engine; the real MySQL only where one is named."""
    named = os.environ.get("CULM_TEST_MYSQLD")
    if request.param == "mysql" and not named:
        pytest.skip("CULM_TEST_MYSQLD names no MySQL server (docs/testing.md says how to get one)")
    if request.param == "mysql":
        found = innodb._identify(Path(str(named)), None)
        assert found.kind == "mysql"
    else:
        found = innodb.find(servers.cache())
    with servers.database(found) as server:
        yield server


@pytest.fixture
async def shard(engine: servers.Server, valkey: servers.Server) -> AsyncIterator[Partition]:
    """A shard on that engine with two sites."""
    async with partition(Servers(engine, valkey), "BNL", "AGLT2") as running:
        yield running


class _Open:
    """A transaction that has checked its slot and neither commits nor ends."""

    def __init__(self, shard: Partition, at: SlotRef) -> None:
        self._ready = asyncio.Event()
        self.go = asyncio.Event()
        self.done = asyncio.create_task(shard.shard.database.run("write", lambda tx: self._work(tx, at)))

    async def started(self) -> None:
        async with asyncio.timeout(DEADLINE_S):
            await self._ready.wait()

    async def _work(self, tx: Transaction, at: SlotRef) -> None:
        await lock_slots(tx, [at])
        self._ready.set()
        await self.go.wait()


async def _close(shard: Partition, slot: int) -> None:
    connection = await connect(shard.settings.database, autocommit=True)
    try:
        async with connection.cursor() as cursor:
            await cursor.execute("SET SESSION innodb_lock_wait_timeout = 15")
            await cursor.execute(CLOSE, (slot,))
    finally:
        connection.close()


async def _blocked(shard: Partition) -> bool:
    # Not information_schema.innodb_trx: that is a copy which is not renewed while somebody polls it.
    rows = await shard.rows("SHOW GLOBAL STATUS LIKE 'Innodb_row_lock_current_waits'")
    return int(rows[0][1]) > 0


async def test_an_open_claim_holds_back_the_change_and_a_later_one_is_refused(shard: Partition) -> None:
    at = shard.slot("BNL")
    await shard.submit(job())
    claim = _Open(shard, at)
    await claim.started()
    closing = asyncio.create_task(_close(shard, at.slot))
    await eventually(lambda: _blocked(shard), DEADLINE_S)
    assert not closing.done()
    claim.go.set()
    await claim.done
    await asyncio.wait_for(closing, DEADLINE_S)
    with pytest.raises(Moved):
        await shard.get()
    with pytest.raises(Moved):
        await shard.submit(job())


async def test_other_slots_do_not_notice(shard: Partition) -> None:
    at, other = shard.slot("BNL"), shard.slot("AGLT2")
    claim = _Open(shard, at)
    await claim.started()
    closing = asyncio.create_task(_close(shard, at.slot))
    try:
        await shard.submit(job(site="AGLT2"), at=other)
        grants = await asyncio.wait_for(shard.get(slots=[other]), DEADLINE_S)
        assert len(grants) == 1
        assert not closing.done()
    finally:
        claim.go.set()
        await claim.done
        await closing


async def test_claims_of_one_slot_do_not_hold_each_other_back(shard: Partition) -> None:
    at = shard.slot("BNL")
    await shard.submit(job())
    claim = _Open(shard, at)
    await claim.started()
    assert len(await asyncio.wait_for(shard.get(), DEADLINE_S)) == 1
    claim.go.set()
    await claim.done


async def test_a_closed_slot_refuses_every_verb_that_writes(shard: Partition) -> None:
    ids = await shard.submit(job(), job())
    [grant] = await shard.get()
    await _close(shard, shard.slot("BNL").slot)
    for call in (shard.heartbeat(grant), shard.report(grant), shard.cancel(ids[1]), shard.submit(job()), shard.get()):
        with pytest.raises(Moved):
            await call
    assert await shard.rows("SELECT state FROM job ORDER BY id") == [("sent",), ("activated",)]


async def test_a_job_runs_from_submit_to_finish_on_this_engine(shard: Partition) -> None:
    [identifier] = await shard.submit(job())
    [grant] = await shard.get()
    await shard.heartbeat(grant)
    await shard.report(grant)
    assert (await shard.job(identifier)).job.state.value == "finished"
