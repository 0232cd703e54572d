"""get_job on a real shard: each job to one pilot, no false empty answers, strict order, whatever Valkey does."""

import asyncio
import itertools
import random

import pytest

from culm.errors import Conflict, Moved
from culm.matching import Offer
from culm.settings import DispatchSettings, Timeouts
from culm.states import State
from culm.wire import GetJobAnswer, SlotRef
from tests import servers
from tests.partition import OFFER, QUEUE, Partition, Servers, get_job_call, job, partition
from tests.waiting import eventually

DEADLINE_S = 20.0


async def _flush(server: servers.Server) -> None:
    import redis.asyncio as redis

    client = redis.Redis(unix_socket_path=str(server.socket))
    await client.flushall()
    await client.aclose()


async def _get_many(shard: Partition, n_requests: int) -> list[list[int]]:
    answers = await asyncio.gather(*(shard.get() for _ in range(n_requests)))
    return [[grant.id for grant in grants] for grants in answers]


def _assert_all_once(answers: list[list[int]], ids: list[int], n_empty: int) -> None:
    granted = list(itertools.chain(*answers))
    assert sorted(granted) == sorted(ids)
    assert sum(not answer for answer in answers) == n_empty


async def test_an_empty_shard_gives_no_job(shard: Partition) -> None:
    assert await shard.get() == []


async def test_a_job_comes_with_all_that_its_pilot_needs(shard: Partition) -> None:
    [identifier] = await shard.submit(job(name="hello", priority=5))
    [grant] = await shard.get()
    assert (grant.id, grant.attempt, grant.owner, grant.vo, grant.jobset) == (identifier, 1, "central:ann", "atlas", 7)
    assert grant.lease_s == Timeouts().first_lease_s
    view = await shard.job(identifier)
    assert (view.job.state, view.job.queue, view.job.pilot, view.job.host) == (State.SENT, QUEUE, "p1", "node1")
    assert [(event.event.value, event.target.value) for event in view.history] == [
        ("submit_ready", "activated"),
        ("claim", "sent"),
    ]


async def test_two_hundred_requests_for_a_hundred_jobs(shard: Partition) -> None:
    ids = await shard.submit(*[job()] * 100)
    _assert_all_once(await _get_many(shard, 200), ids, n_empty=100)


async def test_the_same_with_a_flush_in_the_middle(shard: Partition) -> None:
    ids = await shard.submit(*[job()] * 100)
    first = await _get_many(shard, 30)
    await _flush(shard.servers.valkey)
    second, _ = await asyncio.gather(_get_many(shard, 170), _flush(shard.servers.valkey))
    _assert_all_once(first + second, ids, n_empty=100)


async def test_the_same_with_valkey_killed_in_the_middle_and_back_later(mariadb: servers.Server) -> None:
    with servers.cache_server() as own:
        async with partition(Servers(mariadb, own)) as shard:
            ids = await shard.submit(*[job()] * 100)
            first = await _get_many(shard, 30)
            second = asyncio.create_task(_get_many(shard, 170))
            await asyncio.to_thread(own.kill)
            _assert_all_once(first + await second, ids, n_empty=100)
            more = await shard.submit(*[job()] * 20)
            await asyncio.to_thread(own.start)
            _assert_all_once(await _get_many(shard, 20), more, n_empty=0)
            # It is used again: the queue has a generation, and what comes is found there.
            await eventually(lambda: bool(shard.shard.queue.generation), DEADLINE_S)


@pytest.mark.parametrize("cap", [2000, 7])
async def test_drained_by_64_clients_there_is_no_false_empty_answer(both: Servers, cap: int) -> None:
    async with partition(both, dispatch=DispatchSettings(cap=cap, sweep_interval_s=0.05)) as shard:
        ids = await shard.submit(*[job()] * 600)
        left = len(ids)
        granted: list[int] = []
        false_empties = 0

        async def client() -> None:
            nonlocal left, false_empties
            while left > 0:
                # What is promised: at the time of asking fewer are under way than are left.
                left -= 1
                grants = await shard.get()
                false_empties += not grants
                granted.extend(grant.id for grant in grants)

        await asyncio.gather(*(client() for _ in range(64)))
        assert false_empties == 0
        assert sorted(granted) == ids


@pytest.mark.parametrize("cap", [2000, 5])
async def test_priorities_come_out_in_strict_order_then_the_oldest(both: Servers, cap: int) -> None:
    async with partition(both, dispatch=DispatchSettings(cap=cap, sweep_interval_s=60.0)) as shard:
        dice = random.Random(3)
        wanted = []
        for _ in range(4):
            priorities = [dice.randrange(6) for _ in range(25)]
            ids = await shard.submit(*[job(priority=priority) for priority in priorities])
            wanted += [(-priority, identifier) for priority, identifier in zip(priorities, ids, strict=True)]
        got = [(-grants[0].priority, grants[0].id) for grants in [await shard.get() for _ in wanted]]
        assert got == sorted(wanted)


async def test_a_late_job_of_high_priority_overtakes_those_beyond_the_cap(both: Servers) -> None:
    async with partition(both, dispatch=DispatchSettings(cap=3)) as shard:
        await shard.submit(*[job(priority=10)] * 20)
        [urgent] = await shard.submit(job(priority=900))
        [grant] = await shard.get()
        assert grant.id == urgent


async def test_order_holds_across_classes_and_slots(both: Servers) -> None:
    async with partition(both, "BNL", "AGLT2") as shard:
        slots = [shard.slot("BNL"), shard.slot("AGLT2")]
        wanted = []
        for number, (slot, cores) in enumerate(itertools.product(slots, (1, 2, 4))):
            spec = job(site="", cores=cores, priority=100 - number * 7 % 40)
            ids = await shard.submit(spec, spec, at=slot)
            wanted += [(-(spec.priority or 0), identifier) for identifier in ids]
        got = []
        for _ in wanted:
            call = get_job_call(*slots)
            [grant] = (await shard.ask("get_job", call, GetJobAnswer)).jobs
            got.append((-grant.priority, grant.id))
        assert [rank for rank, _ in got] == sorted(rank for rank, _ in wanted)


async def test_a_repeated_request_gets_the_same_job(shard: Partition) -> None:
    await shard.submit(job(), job())
    first = await shard.get(request_id="same-request")
    again = await shard.get(request_id="same-request")
    assert again == first
    [other] = await shard.get()
    assert other.id != first[0].id


async def test_a_repeat_beside_the_first_gets_the_same_job(shard: Partition) -> None:
    await shard.submit(*[job()] * 10)
    answers = await asyncio.gather(*(shard.get(request_id="same-request") for _ in range(10)))
    assert len({answer[0].id for answer in answers}) == 1


async def test_the_same_request_id_of_another_pilot_is_another_request(shard: Partition) -> None:
    await shard.submit(job(), job())
    [mine] = await shard.get(request_id="same-request")
    [other] = await shard.get(request_id="same-request", subject="other-pilots")
    assert mine.id != other.id


async def test_several_jobs_at_once_the_best_first(shard: Partition) -> None:
    await shard.submit(*[job(priority=priority) for priority in (1, 9, 5, 7)])
    grants = await shard.get(n_jobs=3)
    assert [grant.priority for grant in grants] == [9, 7, 5]
    assert len(await shard.get(n_jobs=3)) == 1


@pytest.mark.parametrize(
    ("spec", "offer"),
    [
        (job(cores=16), OFFER),
        (job(memory_mb=4000), Offer(queue=QUEUE, labels=OFFER.labels, vos=None, cores=8, memory_mb=2000)),
        (job(label="managed"), Offer(queue=QUEUE, labels=frozenset({"user"}), vos=None, cores=8)),
        (job(), Offer(queue=QUEUE, labels=OFFER.labels, vos=frozenset({"cms"}), cores=8)),
        (job(queue="AGLT2-q"), OFFER),
    ],
    ids=["cores", "memory", "label", "vo", "queue"],
)
async def test_what_does_not_fit_is_never_granted(shard: Partition, spec: object, offer: Offer) -> None:
    await shard.submit(spec)  # type: ignore[arg-type]
    assert await shard.get(offer=offer) == []


async def test_a_hint_that_lies_about_its_class_is_not_believed(shard: Partition) -> None:
    """Rubbish in Valkey: a job of another class under the class that fits (invariant I13)."""
    [small] = await shard.submit(job())
    [large] = await shard.submit(job(cores=64))
    queue = shard.shard.queue
    classes = {hint.id: hint.key for hint in await queue.everything()}
    await queue._redis.zadd(f"culm:us1:ready:{classes[small].slot}:{classes[small].class_id}", {f"{large:016d}": -9e6})
    assert [grant.id for grant in await shard.get()] == [small]
    assert await shard.get() == []
    assert await shard.state(large) is State.ACTIVATED


async def test_rubbish_of_another_type_in_valkey_does_no_harm(shard: Partition) -> None:
    ids = await shard.submit(*[job()] * 5)
    client = shard.shard.queue._redis
    for name in await client.keys("culm:us1:*"):
        await client.delete(name)
        await client.set(name, b"rubbish")
    _assert_all_once([[g.id for g in await shard.get()] for _ in range(6)], ids, n_empty=1)


async def test_a_waiting_pilot_is_woken_by_a_submit(shard: Partition) -> None:
    waiting = asyncio.create_task(shard.get(wait_s=15.0))
    await eventually(lambda: len(shard.shard.dispatcher._parking) == 1, DEADLINE_S)
    [identifier] = await shard.submit(job())
    assert [grant.id for grant in await asyncio.wait_for(waiting, 5.0)] == [identifier]


async def test_only_as_many_are_woken_as_there_are_jobs(shard: Partition) -> None:
    waiting = [asyncio.create_task(shard.get(wait_s=1.0)) for _ in range(5)]
    await eventually(lambda: len(shard.shard.dispatcher._parking) == 5, DEADLINE_S)
    ids = await shard.submit(job(), job())
    answers = [[grant.id for grant in grants] for grants in await asyncio.gather(*waiting)]
    _assert_all_once(answers, ids, n_empty=3)


async def test_a_client_that_hangs_up_while_it_waits_leaves_the_next_one_its_job(shard: Partition) -> None:
    gone = asyncio.create_task(shard.get(wait_s=15.0))
    await eventually(lambda: len(shard.shard.dispatcher._parking) == 1, DEADLINE_S)
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    await eventually(lambda: len(shard.shard.dispatcher._parking) == 0, DEADLINE_S)
    [identifier] = await shard.submit(job())
    assert [grant.id for grant in await shard.get()] == [identifier]


async def test_clients_that_hang_up_while_being_answered_lose_no_job(shard: Partition) -> None:
    ids = await shard.submit(*[job()] * 40)
    asked = [asyncio.create_task(shard.get()) for _ in range(40)]
    # Some answers are on their way, some claims are under way, some have not begun.
    await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
    for task in asked[::2]:
        task.cancel()
    answers = await asyncio.gather(*asked, return_exceptions=True)
    kept = [grant.id for answer in answers if isinstance(answer, list) for grant in answer]
    rest: list[int] = []

    async def drained() -> bool:
        rest.extend(grant.id for grant in await shard.get())
        return len(rest) + len(kept) == len(ids)

    await eventually(drained, DEADLINE_S, what="what was given back is dispatched again")
    assert sorted(rest + kept) == ids


async def test_a_released_job_keeps_its_attempts(both: Servers) -> None:
    async with partition(both) as shard:
        [identifier] = await shard.submit(job(max_attempts=1))
        for attempt in range(1, 4):
            [grant] = await shard.get()
            assert grant.attempt == attempt
            await shard.report(grant, State.ACTIVATED)
        assert await shard.state(identifier) is State.ACTIVATED


async def test_a_slot_of_another_epoch_is_refused(shard: Partition) -> None:
    await shard.submit(job())
    at = shard.slot()
    with pytest.raises(Moved) as told:
        await shard.ask("get_job", get_job_call(SlotRef(at.slot, at.epoch + 1)), GetJobAnswer)
    assert told.value.details == {"slot": at.slot, "epoch": at.epoch}


async def test_a_slot_that_was_never_placed_here_is_refused(shard: Partition) -> None:
    with pytest.raises(Moved):
        await shard.ask("get_job", get_job_call(SlotRef(4711, 1)), GetJobAnswer)


async def test_a_stopping_shard_answers_those_who_wait(both: Servers) -> None:
    async with partition(both) as shard:
        waiting = asyncio.create_task(shard.get(wait_s=30.0))
        await eventually(lambda: len(shard.shard.dispatcher._parking) == 1, DEADLINE_S)
        shard.stop_event.set()
        assert await asyncio.wait_for(waiting, 5.0) == []


async def test_a_restarted_shard_goes_on_with_what_was_ready(both: Servers) -> None:
    async with partition(both) as first:
        schema = first.settings.database.name
        ids = await first.submit(*[job(priority=n) for n in range(10)])
        await first.get(n_jobs=3)
    async with partition(both, schema=schema) as second:
        grants = await second.get(n_jobs=10)
        assert [grant.id for grant in grants] == list(reversed(ids[:7]))


async def test_an_unfinished_request_of_a_pilot_is_found_by_its_repeat_after_a_restart(both: Servers) -> None:
    async with partition(both) as first:
        schema = first.settings.database.name
        await first.submit(job(), job())
        [granted] = await first.get(request_id="lost-answer")
    async with partition(both, schema=schema) as second:
        [again] = await second.get(request_id="lost-answer")
        assert (again.id, again.attempt, again.lease_token) == (granted.id, granted.attempt, granted.lease_token)
        with pytest.raises(Conflict, match="holds no lease"):
            await second.report(again, lease_token="0" * 24)
