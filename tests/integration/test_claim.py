"""One claim transaction on a real database: who gets which row of a batch, repeats, rivals, rubbish among the hints."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from culm.errors import ClientFault, Moved, Unavailable
from culm.matching import Offer
from culm.settings import DispatchSettings
from culm.wire import ShardGetJob, SlotRef
from shard.claim import CLASSES_PER_STATEMENT, Claimed, Seat, claim, groups_of
from shard.database import Transaction
from shard.hints import ClassKey, Hint
from tests.partition import OFFER, QUEUE, Partition, Servers, get_job_call, job, partition
from tests.waiting import eventually

WIDE = OFFER
NARROW = Offer(queue=QUEUE, labels=OFFER.labels, vos=None, cores=1)
DEADLINE_S = 20.0


def _seat(shard: Partition, call: ShardGetJob) -> Seat:
    return Seat(call, shard.shard.classes.fitting([ref.slot for ref in call.slots], call.offer))


async def _claim(shard: Partition, seats: list[Seat], hints: list[list[Hint]] | None = None) -> Claimed:
    given = hints if hints is not None else [[] for _ in groups_of(seats)]
    return await shard.shard.database.run("claim", lambda tx: claim(tx, seats, given, shard.shard.terms))


async def _while_a_rival_holds(shard: Partition, ids: list[int], work: Callable[[], Awaitable[object]]) -> None:
    """Run `work` while another transaction has these ready rows locked; it gives them back afterwards."""

    async def rival(tx: Transaction) -> None:
        assert len(await tx.fetch("lock_ready", tuple(ids))) == len(ids)
        await work()

    await shard.shard.database.run("write", rival)


def _granted(seats: list[Seat]) -> list[list[int]]:
    return [[grant.id for grant in seat.grants] for seat in seats]


@pytest.fixture
async def small_and_large(shard: Partition) -> tuple[int, int]:
    """A job that both offers fit, and one that only the wide one does."""
    [small] = await shard.submit(job(priority=9))
    [large] = await shard.submit(job(priority=1, cores=8))
    return small, large


async def test_a_row_won_by_one_group_of_a_batch_is_not_won_again_by_another(
    shard: Partition, small_and_large: tuple[int, int]
) -> None:
    small, large = small_and_large
    seats = [_seat(shard, get_job_call(shard.slot(), offer=offer)) for offer in (WIDE, NARROW)]
    assert len(groups_of(seats)) == 2
    claimed = await _claim(shard, seats, [[Hint(-9, small, seats[1].keys[0])], []])
    assert _granted(seats) == [[small], []]
    assert not claimed.contended
    assert await shard.rows("SELECT id FROM ready") == [(large,)]


async def test_one_job_for_two_unlike_requests_at_once_ends_with_one_empty_answer(
    shard: Partition, small_and_large: tuple[int, int]
) -> None:
    small, large = small_and_large
    asked = [shard.get(offer=offer) for offer in (WIDE, NARROW, NARROW, WIDE)]
    async with asyncio.timeout(DEADLINE_S):
        answers = await asyncio.gather(*asked)
    granted = sorted(grant.id for grants in answers for grant in grants)
    assert granted == sorted([small, large])
    assert await shard.rows("SELECT COUNT(*), COUNT(DISTINCT id) FROM lease") == [(2, 2)]


async def test_the_first_seat_gets_the_best_job(shard: Partition) -> None:
    ids = await shard.submit(*[job(priority=priority) for priority in (1, 3, 2)])
    seats = [_seat(shard, get_job_call(shard.slot())) for _ in range(3)]
    await _claim(shard, seats)
    assert _granted(seats) == [[ids[1]], [ids[2]], [ids[0]]]
    assert [len(seat.taken) for seat in seats] == [1, 1, 1]


async def test_a_batch_of_several_wishes_is_filled_in_the_order_of_its_seats(shard: Partition) -> None:
    ids = await shard.submit(*[job()] * 4)
    seats = [_seat(shard, get_job_call(shard.slot(), n_jobs=n_jobs)) for n_jobs in (3, 2)]
    claimed = await _claim(shard, seats)
    assert _granted(seats) == [ids[:3], ids[3:]]
    assert [hint.id for hint in claimed.from_database] == ids


async def test_stale_and_false_hints_are_replaced_from_the_database(shard: Partition) -> None:
    ids = await shard.submit(*[job()] * 2)
    seats = [_seat(shard, get_job_call(shard.slot())) for _ in range(2)]
    [key] = seats[0].keys
    rubbish = [Hint(-9, 2**64 + 5, key), Hint(-9, 0, key), Hint(0, ids[0], ClassKey(3, 3)), Hint(0, ids[1] + 99, key)]
    claimed = await _claim(shard, seats, [rubbish])
    assert sorted(i for got in _granted(seats) for i in got) == ids
    assert [hint.id for hint in claimed.unused] == [ids[0], ids[1] + 99]


async def test_what_a_rival_holds_is_passed_over_and_the_next_is_taken(shard: Partition) -> None:
    ids = await shard.submit(*[job()] * 3)
    seats = [_seat(shard, get_job_call(shard.slot()))]

    async def work() -> None:
        await _claim(shard, seats)
        assert _granted(seats) == [[ids[2]]]

    await _while_a_rival_holds(shard, ids[:2], work)


async def test_a_rival_who_holds_all_there_is_makes_no_empty_answer(shard: Partition) -> None:
    ids = await shard.submit(*[job()] * 2)

    async def work() -> None:
        seats = [_seat(shard, get_job_call(shard.slot()))]
        claimed = await _claim(shard, seats)
        assert _granted(seats) == [[]]
        assert claimed.contended
        # Nor does a class seem empty to the registry, or nobody would look at it again.
        assert claimed.empty == []

    await _while_a_rival_holds(shard, ids, work)
    assert len(await shard.get(n_jobs=2)) == 2


async def test_an_empty_class_is_told(shard: Partition) -> None:
    await shard.submit(job())
    seats = [_seat(shard, get_job_call(shard.slot(), n_jobs=2))]
    claimed = await _claim(shard, seats)
    assert claimed.empty == []
    # The row that it has taken is gone only now.
    seats = [Seat(get_job_call(shard.slot()), seats[0].keys)]
    assert (await _claim(shard, seats)).empty == list(seats[0].keys)


async def test_request_ids_that_differ_in_trailing_spaces_only_are_one(shard: Partition) -> None:
    """The database pads with spaces when it compares: seen as two they would hit the unique key for ever."""
    await shard.submit(job(), job())
    async with asyncio.timeout(DEADLINE_S):
        first = await shard.get(request_id="a-request")
        assert await shard.get(request_id="a-request  ") == first
        answers = await asyncio.gather(*(shard.get(request_id="b-request" + " " * n) for n in range(4)))
    assert len({grants[0].id for grants in answers}) == 1


async def test_a_repeat_gets_what_is_left_of_its_first_answer(shard: Partition) -> None:
    await shard.submit(*[job()] * 4)
    first = await shard.get(request_id="same-request", n_jobs=3)
    await shard.report(first[0])
    assert await shard.get(request_id="same-request", n_jobs=3) == first[1:]
    for grant in first[1:]:
        await shard.report(grant)
    # Nothing lives of it any more: it is a new request.
    [fresh] = await shard.get(request_id="same-request", n_jobs=3)
    assert fresh.id not in {grant.id for grant in first}


async def test_repeats_and_new_requests_share_a_batch(shard: Partition) -> None:
    ids = await shard.submit(*[job()] * 3)
    [first] = await shard.get(request_id="same-request")
    seats = [
        _seat(shard, get_job_call(shard.slot(), request_id=request_id))
        for request_id in ("new-request", "same-request", "other-request")
    ]
    await _claim(shard, seats)
    assert _granted(seats) == [[ids[1]], [first.id], [ids[2]]]
    assert [seat.repeated for seat in seats] == [False, True, False]


async def test_a_request_of_another_computing_queue_never_gets_this_ones_job(both: Servers) -> None:
    """Two tokens of one subject, scoped for one queue each (invariant I13)."""
    async with partition(both, "BNL", "AGLT2") as shard:
        await shard.submit(job())
        [grant] = await shard.get(request_id="same-request")
        other = Offer(queue="AGLT2-q", labels=OFFER.labels, vos=None, cores=8)
        with pytest.raises(ClientFault) as told:
            await shard.get(request_id="same-request", offer=other)
        assert told.value.code == "request_id_reused"
        assert await shard.get(request_id="same-request") == [grant]


async def test_a_request_of_another_queue_does_not_join_one_that_waits(both: Servers) -> None:
    async with partition(both, "BNL", "AGLT2") as shard:
        waiting = asyncio.create_task(shard.get(request_id="same-request", wait_s=15.0))
        await eventually(lambda: len(shard.shard.dispatcher._parking) == 1, DEADLINE_S)
        other = Offer(queue="AGLT2-q", labels=OFFER.labels, vos=None, cores=8)
        with pytest.raises(ClientFault):
            await shard.get(request_id="same-request", offer=other)
        [identifier] = await shard.submit(job())
        assert [grant.id for grant in await waiting] == [identifier]


async def test_a_batch_with_one_stale_epoch_is_refused_whole(shard: Partition) -> None:
    ids = await shard.submit(job())
    at = shard.slot()
    seats = [_seat(shard, get_job_call(ref)) for ref in (at, SlotRef(at.slot, at.epoch + 1))]
    with pytest.raises(Moved):
        await _claim(shard, seats)
    assert await shard.rows("SELECT id FROM ready") == [(ids[0],)]


async def test_beside_one_with_a_stale_epoch_the_others_of_its_batch_are_served(shard: Partition) -> None:
    """The router that learned of a move last must not hold up the others."""
    ids = await shard.submit(*[job()] * 3)
    at = shard.slot()
    dispatcher, ownership = shard.shard.dispatcher, shard.shard.ownership
    await shard.sql(f"UPDATE slot SET epoch = {at.epoch + 1} WHERE slot = {at.slot}")
    stale = [asyncio.ensure_future(dispatcher.get_job(get_job_call(at))) for _ in range(2)]
    await asyncio.sleep(0)
    ownership.open[at.slot] = at.epoch + 1
    fresh = await dispatcher.get_job(get_job_call(SlotRef(at.slot, at.epoch + 1)))
    assert len(fresh.jobs) == 1
    assert fresh.jobs[0].id in ids
    answers = await asyncio.gather(*stale, return_exceptions=True)
    assert [type(answer) for answer in answers] == [Moved, Moved]


async def test_a_row_that_collides_in_every_claim_is_a_503_not_an_endless_loop(shard: Partition) -> None:
    """Broken data: a ready job that has a lease already. The audit names it; the workers must live on."""
    [broken] = await shard.submit(job())
    await shard.sql(
        "INSERT INTO lease (id, attempt, token, request_id, ordinal, subject, first_s, heartbeat_s, granted_at,"
        f" expires_at) VALUES ({broken}, 1, 'x', 'another-one', 0, 'pilots', 1e6, 1e6, UTC_TIMESTAMP(6), '2100-01-01')"
    )
    async with asyncio.timeout(DEADLINE_S):
        for _ in range(3):
            with pytest.raises(Unavailable) as told:
                await shard.get()
            assert told.value.code == "contended"
    await shard.sql(f"DELETE FROM lease WHERE id = {broken}")
    assert [grant.id for grant in await shard.get()] == [broken]


async def test_a_batch_holds_no_more_jobs_than_it_may(both: Servers) -> None:
    """Wishes for many at once are cut into several claims; one larger than a batch is served alone."""
    async with partition(both, dispatch=DispatchSettings(max_batch=4)) as shard:
        ids = await shard.submit(*[job()] * 40)
        answers = await asyncio.gather(*(shard.get(n_jobs=n) for n in (3, 3, 9, 1, 4, 20)))
        assert [len(grants) for grants in answers] == [3, 3, 9, 1, 4, 20]
        assert sorted(grant.id for grants in answers for grant in grants) == ids


async def test_more_classes_than_fit_into_one_statement_are_all_looked_at(shard: Partition) -> None:
    n_classes = CLASSES_PER_STATEMENT + 20
    ids = await shard.submit(*[job(memory_mb=n, priority=n) for n in range(1, n_classes + 1)])
    got = [grant.id for grant in await shard.get(n_jobs=60)] + [grant.id for grant in await shard.get(n_jobs=100)]
    assert got == ids[::-1]
