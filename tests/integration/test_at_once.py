"""The claim in one packet: what is not as it seems costs a second look, never a wrong answer."""

import asyncio

import msgspec
import pytest

from culm.settings import DispatchSettings
from culm.states import State
from ops.audit import audit
from shard import dispatch
from shard.hints import Hint
from shard.shelf import Row
from tests.partition import OFFER, Partition, Servers, job, partition
from tests.waiting import eventually

DEADLINE_S = 30.0
QUIET = DispatchSettings(sweep_interval_s=600.0)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which claims were run, in their order."""
    ran: list[str] = []
    for name in ("claim", "claim_at_once"):
        whole = getattr(dispatch, name)

        def noted(*arguments: object, name: str = name, whole: object = whole) -> object:
            ran.append(name)
            return whole(*arguments)  # type: ignore[operator]

        monkeypatch.setattr(dispatch, name, noted)
    return ran


async def _queued(shard: Partition, looks: list[str] | None = None) -> None:
    """Until the dispatch queue may be relied on, which it may from the first job on."""
    [first] = await shard.submit(job())
    refill, classes = shard.shard.refill, shard.shard.classes
    await eventually(lambda: refill.clean(classes.active()), DEADLINE_S, what="the queue is whole")
    assert [grant.id for grant in await shard.get()] == [first]
    if looks is not None:
        looks.clear()


async def _hint(shard: Partition, identifier: int) -> Hint:
    [hint] = [hint for hint in await shard.shard.queue.everything() if hint.id == identifier]
    return hint


async def test_what_is_as_it_seems_is_claimed_at_once(shard: Partition, looks: list[str]) -> None:
    await _queued(shard, looks)
    ids = await shard.submit(*[job()] * 3)
    assert [grant.id for grant in await shard.get(n_jobs=3)] == ids
    assert looks == ["claim_at_once"]


async def test_without_a_shelf_it_is_claimed_at_once_too(both: Servers, looks: list[str]) -> None:
    async with partition(both, dispatch=DispatchSettings(shelf_mb=0)) as shard:
        await _queued(shard, looks)
        ids = await shard.submit(*[job()] * 3)
        assert [grant.id for grant in await shard.get(n_jobs=3)] == ids
        assert looks == ["claim_at_once"]


async def test_a_hint_of_a_job_that_is_gone_costs_a_second_look(both: Servers, looks: list[str]) -> None:
    async with partition(both, dispatch=QUIET) as shard:
        await _queued(shard, looks)
        gone, there = await shard.submit(job(), job())
        hint = await _hint(shard, gone)
        await shard.cancel(gone)
        await shard.shard.queue.push([hint])
        assert [grant.id for grant in await shard.get()] == [there]
        assert looks == ["claim_at_once", "claim"]


async def test_a_shelf_that_is_out_of_date_is_found_out(both: Servers, looks: list[str]) -> None:
    async with partition(both, dispatch=QUIET) as shard:
        await _queued(shard, looks)
        [identifier] = await shard.submit(job())
        shelf = shard.shard.refill.shelf
        old = shelf.take(identifier)
        assert old is not None
        shelf.put([old])
        [grant] = await shard.get()
        await shard.report(grant, State.ACTIVATED)
        # As it was before the first attempt.
        shelf.put([old])
        looks.clear()
        [again] = await shard.get()
        assert (again.id, again.attempt) == (identifier, 2)
        assert looks == ["claim_at_once", "claim"]
        assert (await audit([shard.settings], shard.topology)).findings == []


async def test_a_hint_of_another_class_gives_its_job_to_nobody_whom_it_does_not_fit(
    both: Servers, looks: list[str]
) -> None:
    async with partition(both, dispatch=QUIET) as shard:
        await _queued(shard, looks)
        small, large = await shard.submit(job(memory_mb=10), job(memory_mb=9000))
        lie = Hint(-(10**6), large, (await _hint(shard, small)).key)
        await shard.shard.queue.remove([await _hint(shard, large)])
        await shard.shard.queue.push([lie])
        assert [grant.id for grant in await shard.get(offer=msgspec.structs.replace(OFFER, memory_mb=100))] == [small]
        assert looks[:2] == ["claim_at_once", "claim"]
        assert await shard.state(large) is State.ACTIVATED


async def test_a_repeat_that_nothing_fits_any_more_gets_its_first_answer(both: Servers, looks: list[str]) -> None:
    async with partition(both, dispatch=QUIET) as shard:
        await _queued(shard, looks)
        [identifier] = await shard.submit(job())
        assert [grant.id for grant in await shard.get(request_id="the-same-one")] == [identifier]
        # InnoDB is seen empty: from now on no class is active.
        assert await shard.get() == []
        looks.clear()
        assert [grant.id for grant in await shard.get(request_id="the-same-one")] == [identifier]
        assert looks == ["claim_at_once", "claim"]
        looks.clear()
        assert await shard.get() == []
        assert looks == ["claim_at_once"]


async def test_a_repeat_among_others_that_get_something_costs_them_nothing(both: Servers) -> None:
    async with partition(both, dispatch=QUIET) as shard:
        await _queued(shard)
        ids = await shard.submit(*[job()] * 10)
        [first] = await shard.get(request_id="the-same-one")
        answers = await asyncio.gather(
            *(shard.get() for _ in range(4)), shard.get(request_id="the-same-one"), *(shard.get() for _ in range(4))
        )
        given = [grant.id for grants in answers for grant in grants]
        assert sorted(given) == sorted(ids[:9])
        assert [grant.lease_token for grant in answers[4]] == [first.lease_token]
        assert (await audit([shard.settings], shard.topology)).findings == []


async def test_the_shelf_knows_what_a_refill_brought(both: Servers) -> None:
    async with partition(both, dispatch=DispatchSettings(cap=5, sweep_interval_s=600.0)) as shard:
        await _queued(shard)
        ids = await shard.submit(*[job()] * 8)
        shelf = shard.shard.refill.shelf
        shelf.drop(ids)
        key = (await _hint(shard, ids[0])).key
        shard.shard.refill.mark([key])
        await eventually(lambda: shelf.lacks(ids) == ids[5:], DEADLINE_S, what="the best five are on the shelf")
        row: Row | None = shelf.take(ids[0])
        assert row is not None
        stored = await shard.rows(f"SELECT slot, class_id, state, version, attempt FROM job WHERE id = {ids[0]}")
        assert [(row[1], row[2], row[3], row[4], row[5])] == stored
