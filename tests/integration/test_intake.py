"""Submit on a real shard: one key one range of ids, all or nothing, parents, many jobs."""

import asyncio

import pytest

from culm.errors import ClientFault, Conflict, Moved
from culm.ids import slot_of
from culm.states import State
from culm.wire import ShardDepths, ShardDepthsAnswer, ShardSubmit, ShardSubmitAnswer, SlotJobs, SlotRef
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
    assert [row.id for row in (await shard.jobs(owner="prod")).jobs] == others
    assert (await shard.jobs(state=State.FINISHED)).jobs == []
    row = (await shard.jobs(jobset=2)).jobs[0]
    assert (row.site, row.region, row.vo, row.state) == ("BNL", "US", "atlas", State.ACTIVATED)


async def test_names_of_every_alphabet_survive(shard: Partition) -> None:
    spec = job(name="数据 ✓ \U0001f680", argv=["echo", "naïve\n\t'\"\\"], environment={"Ä": "ß"})
    [identifier] = await shard.submit(spec)
    view = await shard.job(identifier)
    assert view.spec == spec
    assert view.job.name == spec.name
