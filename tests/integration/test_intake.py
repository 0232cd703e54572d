"""Submit on a real shard: one key one range of ids, all or nothing, parents, many jobs."""

import asyncio
import random
from typing import Any

import msgspec
import pytest

from culm.errors import ClientFault, Conflict, Moved, Unavailable
from culm.ids import slot_of
from culm.states import State
from culm.wire import ShardDepths, ShardDepthsAnswer, ShardSubmit, ShardSubmitAnswer, SlotJobs, SlotRef
from ops.audit import audit
from shard.database import ChangedUnderfootError, Transaction
from tests.partition import OTHER_USER, PRODUCTION, USER, Partition, Servers, job, partition


async def _n_jobs(shard: Partition) -> int:
    return int((await shard.rows("SELECT COUNT(*) FROM job"))[0][0])


async def test_ids_name_their_slot_and_follow_each_other(shard: Partition) -> None:
    first = await shard.submit(*[job()] * 3)
    second = await shard.submit(job())
    assert {slot_of(identifier) for identifier in first + second} == {shard.slot().slot}
    assert first + second == sorted(set(first + second))


async def test_one_key_one_range_of_ids(shard: Partition) -> None:
    first = await shard.submit(job(), job(cores=2), key="k1")
    assert await shard.submit(job(), job(cores=2), key="k1") == first
    assert await _n_jobs(shard) == 2


async def test_one_key_twenty_times_at_once(shard: Partition) -> None:
    async def one() -> list[int]:
        return await shard.submit(*[job()] * 5, key="same")

    answers = await asyncio.gather(*(one() for _ in range(20)))
    assert len({tuple(answer) for answer in answers}) == 1
    assert await _n_jobs(shard) == 5


async def test_a_key_for_other_jobs_is_refused(shard: Partition) -> None:
    await shard.submit(job(), key="k1")
    with pytest.raises(Conflict) as told:
        await shard.submit(job(cores=2), key="k1")
    assert told.value.code == "key_reused"
    assert await _n_jobs(shard) == 1


async def test_a_key_belongs_to_its_owner(shard: Partition) -> None:
    mine = await shard.submit(job(), key="k1")
    assert await shard.submit(job(), key="k1", who=OTHER_USER) != mine


async def test_two_slots_in_one_call_are_stored_together_or_not_at_all(both: Servers) -> None:
    async with partition(both, "BNL", "AGLT2") as shard:
        good, gone = shard.slot("BNL"), SlotRef(shard.slot("AGLT2").slot, 99)
        call = ShardSubmit(
            principal=USER,
            key="k",
            jobset=1,
            parts=[SlotJobs(at=good, specs=[job()]), SlotJobs(at=gone, specs=[job()])],
        )
        with pytest.raises(Moved):
            await shard.ask("submit", call, ShardSubmitAnswer)
        assert await _n_jobs(shard) == 0


async def test_two_thousand_jobs_in_a_call(shard: Partition) -> None:
    ids = await shard.submit(*[job(shell="", argv=["echo", str(n)]) for n in range(2000)])
    assert len(set(ids)) == 2000
    assert await shard.rows("SELECT COUNT(*) FROM ready") == [(2000,)]


async def test_priorities_fall_with_the_owners_jobs(shard: Partition) -> None:
    ids = await shard.submit(*[job()] * 12)
    priorities = [(await shard.job(identifier)).job.priority for identifier in (ids[0], ids[4], ids[5], ids[11])]
    assert priorities == [1000, 1000, 999, 998]
    [later] = await shard.submit(job())
    assert (await shard.job(later)).job.priority == 998
    [other] = await shard.submit(job(), who=OTHER_USER)
    assert (await shard.job(other)).job.priority == 1000


async def test_parents_and_their_depth(shard: Partition) -> None:
    [parent] = await shard.submit(job())
    known = {parent: 0}
    for depth in range(1, 6):
        [child] = await shard.submit(job(parent_id=parent), depths=known)
        depths = await shard.ask("depths", ShardDepths(ids=[child]), ShardDepthsAnswer)
        assert depths.depths == {child: depth}
        parent, known = child, {child: depth}
    with pytest.raises(ClientFault) as told:
        await shard.submit(job(parent_id=parent), depths=known)
    assert told.value.code == "too_deep"


async def test_an_unknown_parent(shard: Partition) -> None:
    with pytest.raises(ClientFault) as told:
        await shard.submit(job(parent_id=12345))
    assert told.value.code == "unknown_parent"
    assert await _n_jobs(shard) == 0


async def test_what_is_listed(shard: Partition) -> None:
    ids = await shard.submit(*[job()] * 5, jobset=1)
    others = await shard.submit(job(), jobset=2, who=PRODUCTION)
    page = await shard.jobs(limit=4)
    assert [row.id for row in page.jobs] == ids[:4]
    assert page.next == ids[3]
    page = await shard.jobs(limit=4, after=page.next)
    assert ([row.id for row in page.jobs], page.next) == ([ids[4], others[0]], None)
    assert [row.id for row in (await shard.jobs(jobset=2)).jobs] == others
    assert [row.id for row in (await shard.jobs(owner="central:prod")).jobs] == others
    assert (await shard.jobs(state=State.FINISHED)).jobs == []
    row = (await shard.jobs(jobset=2)).jobs[0]
    assert (row.site, row.region, row.vo, row.state) == ("BNL", "US", "atlas", State.ACTIVATED)


async def test_names_of_every_alphabet_survive(shard: Partition) -> None:
    spec = job(name="数据 ✓ \U0001f680", argv=["echo", "naïve\n\t'\"\\"], environment={"Ä": "ß"})
    [identifier] = await shard.submit(spec)
    view = await shard.job(identifier)
    assert view.spec == msgspec.structs.replace(spec, cores=1, max_attempts=3)
    assert view.job.name == spec.name


# --- cut off, run again, repeated ------------------------------------------------------------------------------------


def _roll_back_once(shard: Partition) -> None:
    """The next submit's transaction does all its work, is rolled back, and is run again: as by a deadlock."""
    intake = shard.shard.intake
    insert = intake._insert

    async def rolled_back(tx: Transaction, call: ShardSubmit, numbered: Any) -> Any:
        intake._insert = insert  # type: ignore[method-assign]
        await insert(tx, call, numbered)
        raise ChangedUnderfootError

    intake._insert = rolled_back  # type: ignore[method-assign]


async def test_a_submit_that_is_run_again_stores_its_class_too(both: Servers) -> None:
    """Memory must not know it before InnoDB does: after a restart its jobs would fit nobody."""
    async with partition(both) as first:
        schema = first.settings.database.name
        _roll_back_once(first)
        [identifier] = await first.submit(job(cores=3))
        assert len(await first.rows("SELECT class_id FROM requirement_class")) == 1
    async with partition(both, schema=schema) as second:
        assert [grant.id for grant in await second.get()] == [identifier]


async def test_a_submit_that_is_run_again_counts_once(shard: Partition) -> None:
    _roll_back_once(shard)
    await shard.submit(*[job()] * 3)
    assert await _n_jobs(shard) == 3
    assert await shard.rows("SELECT SUM(n) FROM tally") == [(3,)]
    assert await shard.rows("SELECT SUM(n) FROM owner_tally") == [(3,)]
    assert await shard.rows("SELECT COUNT(*) FROM ready") == [(3,)]


async def test_a_submit_whose_client_hangs_up_anywhere_is_whole_or_not_there(shard: Partition) -> None:
    dice = random.Random(4)
    keys = [f"k{number}" for number in range(30)]
    for key in keys:
        task = asyncio.create_task(shard.submit(*[job()] * 3, key=key))
        await asyncio.wait([task], timeout=dice.random() * 0.006)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert await _n_jobs(shard) % 3 == 0
    # The repeat gets what the first got, or makes it.
    answers = [await shard.submit(*[job()] * 3, key=key) for key in keys]
    assert len({identifier for ids in answers for identifier in ids}) == 3 * len(keys)
    assert await _n_jobs(shard) == 3 * len(keys)
    assert (await audit([shard.settings], shard.topology)).findings == []


async def test_a_repeat_brings_the_part_of_a_slot_that_has_moved_here_since(both: Servers) -> None:
    """The other shard was down at the first try; its slot is here now. What is stored is not stored again."""
    async with partition(both, "BNL", "AGLT2") as shard:
        here = SlotJobs(at=shard.slot("BNL"), specs=[job()])
        moved = SlotJobs(at=shard.slot("AGLT2"), specs=[job(cores=2)])

        async def submit(*parts: SlotJobs) -> list[int]:
            call = ShardSubmit(principal=USER, key="k", jobset=1, parts=list(parts))
            return (await shard.ask("submit", call, ShardSubmitAnswer)).first_ids

        first = await submit(here)
        both_of_them = await submit(here, moved)
        assert both_of_them[0] == first[0]
        assert slot_of(both_of_them[1]) == moved.at.slot
        assert await submit(moved, here) == both_of_them[::-1]
        assert await _n_jobs(shard) == 2
        with pytest.raises(Conflict):
            await submit(here, SlotJobs(at=moved.at, specs=[job(cores=3)]))


async def test_a_number_that_is_taken_is_a_503_and_the_repeat_gets_another(shard: Partition) -> None:
    """A sequence that was set back, by a restore for instance."""
    [taken] = await shard.submit(job())
    shard.shard.intake._ids._blocks.clear()
    await shard.sql("UPDATE slot_sequence SET next_seq = 1")
    with pytest.raises(Unavailable) as told:
        await shard.submit(job(), key="k")
    assert told.value.code == "key_in_use"
    [other] = await shard.submit(job(), key="k")
    assert other != taken
    assert await _n_jobs(shard) == 2


async def test_two_calls_with_new_classes_in_unlike_order_both_end_well(shard: Partition) -> None:
    specs = [job(cores=n) for n in range(1, 9)]
    answers = await asyncio.gather(*(shard.submit(*(specs if n % 2 else specs[::-1])) for n in range(8)))
    assert len({identifier for ids in answers for identifier in ids}) == 64
    assert await shard.rows("SELECT COUNT(*) FROM requirement_class") == [(8,)]


async def test_a_key_that_is_used_for_jobs_of_another_slot_is_noticed(both: Servers) -> None:
    async with partition(both, "BNL", "AGLT2") as shard:

        async def call(key: str, digest: bytes, site: str) -> int:
            part = SlotJobs(at=shard.slot(site), specs=[job(site=site)])
            message = ShardSubmit(principal=USER, key=key, jobset=7, parts=[part], call_digest=digest)
            return (await shard.ask("submit", message, ShardSubmitAnswer)).first_ids[0]

        first = await call("k", b"a" * 16, "BNL")
        with pytest.raises(Conflict) as caught:
            await call("k", b"b" * 16, "AGLT2")
        assert caught.value.code == "key_reused"
        assert await call("k", b"a" * 16, "BNL") == first
        # A part of the same call that another try has not brought yet.
        assert await call("k", b"a" * 16, "AGLT2") > 0
        # From a router of before, or stored by a shard of before: compared by the part.
        assert await call("k", b"", "BNL") == first
        old = await call("old", b"", "BNL")
        assert await call("old", b"c" * 16, "BNL") == old
