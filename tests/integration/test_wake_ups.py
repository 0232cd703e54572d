"""Long polls: a job that becomes ready finds the pilot that waits for it, whoever else was woken and left."""

import asyncio

import pytest

from culm.errors import Unavailable
from culm.matching import Offer
from culm.settings import DispatchSettings, Timeouts
from culm.states import Event, State
from culm.wire import GetJobAnswer, Grant, InputFile
from shard import dispatch
from shard.database import Transaction
from shard.dispatch import Dispatcher
from shard.request import Wake
from tests.partition import OFFER, QUEUE, Partition, Servers, get_job_call, job, partition
from tests.waiting import eventually

DEADLINE_S = 20.0
WAIT_S = 15.0
QUIET = DispatchSettings(sweep_interval_s=600.0, reap_interval_s=600.0)
NARROW = Offer(queue=QUEUE, labels=OFFER.labels, vos=None, cores=1)


async def _parked(shard: Partition, n_requests: int) -> None:
    parking = shard.shard.dispatcher._parking
    await eventually(lambda: len(parking) == n_requests, DEADLINE_S, what=f"{n_requests} wait")


async def _wait(shard: Partition, **changes: object) -> "asyncio.Task[list[Grant]]":
    """One more that waits, parked before this returns."""
    n_before = len(shard.shard.dispatcher._parking)
    task = asyncio.create_task(shard.get(wait_s=WAIT_S, **changes))
    await _parked(shard, n_before + 1)
    return task


def _ids(grants: list[Grant]) -> list[int]:
    return [grant.id for grant in grants]


async def _soon(task: "asyncio.Task[list[Grant]]") -> list[int]:
    """What it gets, long before its wait is over."""
    async with asyncio.timeout(WAIT_S / 3):
        return _ids(await task)


async def test_one_that_was_woken_and_leaves_wakes_the_next(both: Servers) -> None:
    """Gone between its wake-up and its claim: the job is not the next one's by itself."""
    async with partition(both, dispatch=QUIET) as shard:
        dispatcher = shard.shard.dispatcher
        first = asyncio.ensure_future(dispatcher.get_job(get_job_call(shard.slot(), wait_s=WAIT_S)))
        await _parked(shard, 1)
        second = await _wait(shard)
        woken = _when_woken(dispatcher, first.cancel)
        [identifier] = await shard.submit(job())
        assert woken == [True]
        assert await _soon(second) == [identifier]


def _when_woken(dispatcher: Dispatcher, act: object) -> list[bool]:
    """Call `act` in the moment in which the first parked request is woken."""
    done: list[bool] = []
    wake = dispatcher._wake

    def observed(reason: Wake) -> None:
        wake(reason)
        if not done:
            done.append(True)
            act()  # type: ignore[operator]

    dispatcher._wake = observed  # type: ignore[method-assign]
    return done


async def test_one_that_was_woken_and_takes_another_job_wakes_the_next(both: Servers) -> None:
    """Two classes become ready in one call; whoever was woken for the one may take the other."""
    async with partition(both, dispatch=QUIET) as shard:
        first = await _wait(shard)
        narrow = await _wait(shard, offer=NARROW)
        last = await _wait(shard)
        large, small = await shard.submit(job(cores=8, priority=1), job(priority=9))
        # Woken for the large one, the first takes the better one that the narrow one was woken for.
        assert await _soon(first) == [small]
        assert await _soon(last) == [large]
        assert not narrow.done()


@pytest.mark.parametrize("n_waiting", [1, 5, 20])
async def test_as_many_jobs_as_pilots_wait_leave_nobody_waiting(both: Servers, n_waiting: int) -> None:
    async with partition(both, dispatch=QUIET) as shard:
        tasks = [await _wait(shard, offer=(OFFER, NARROW)[n % 2]) for n in range(n_waiting)]
        ids = await shard.submit(*[job(priority=n) for n in range(n_waiting)])
        got = [await _soon(task) for task in tasks]
        assert sorted(i for some in got for i in some) == ids


async def test_a_wish_for_several_takes_what_is_there_and_the_rest_wakes_the_next(both: Servers) -> None:
    async with partition(both, dispatch=QUIET) as shard:
        many = await _wait(shard, n_jobs=3)
        one = await _wait(shard)
        ids = await shard.submit(*[job()] * 4)
        assert await _soon(many) == ids[:3]
        assert await _soon(one) == ids[3:]


async def test_what_becomes_ready_by_each_way_wakes_a_pilot(both: Servers) -> None:
    async with partition(both, dispatch=QUIET) as shard:
        # Given back by its pilot.
        [identifier] = await shard.submit(job())
        [grant] = await shard.get()
        waiting = await _wait(shard)
        await shard.report(grant, State.ACTIVATED)
        assert await _soon(waiting) == [identifier]
        # Its inputs have come.
        [later] = await shard.submit(job(inputs=[InputFile(name="in.root", ready=False)]))
        waiting = await _wait(shard)
        await shard.say(later, Event.INPUTS_READY)
        assert await _soon(waiting) == [later]
        # Its client went away before it read the answer.
        [last] = await shard.submit(job())
        await shard.get(request_id="lost-answer")
        waiting = await _wait(shard)
        assert await shard.shard.lifecycle.release_request("pilots", "lost-answer") == 1
        assert await _soon(waiting) == [last]


async def test_an_expired_lease_wakes_a_pilot(both: Servers) -> None:
    timeouts = Timeouts(first_lease_s=0.3, grace_s=0.001)
    async with partition(
        both, timeouts=timeouts, dispatch=DispatchSettings(sweep_interval_s=600.0, reap_interval_s=0.05)
    ) as shard:
        [identifier] = await shard.submit(job())
        await shard.get()
        assert await _soon(await _wait(shard)) == [identifier]


async def test_an_announcement_whose_caller_is_cancelled_wakes_all_the_same(both: Servers) -> None:
    """The jobs are committed: that nobody waits for the submit's answer any more changes nothing for the pilots."""
    async with partition(both, dispatch=QUIET) as shard:
        waiting = await _wait(shard)
        [identifier] = await shard.submit(job(inputs=[InputFile(name="in.root", ready=False)]))
        queue, dispatcher = shard.shard.queue, shard.shard.dispatcher
        [(slot, class_id)] = await shard.rows(f"SELECT slot, class_id FROM job WHERE id = {identifier}")
        await shard.sql(f"UPDATE job SET state = 'activated' WHERE id = {identifier}")
        await shard.sql(f"INSERT INTO ready VALUES ({identifier}, {slot}, {class_id}, -1000, UTC_TIMESTAMP(6))")
        hint = dispatch.Hint(-1000, identifier, dispatch.ClassKey(slot, class_id))
        announcing = asyncio.create_task(dispatcher.announce([hint]))
        await eventually(lambda: shard.shard.classes.announced(hint.key) > 0, DEADLINE_S)
        announcing.cancel()
        await asyncio.gather(announcing, return_exceptions=True)
        assert await _soon(waiting) == [identifier]
        assert queue.available


async def test_jobs_for_others_do_not_keep_an_empty_answer_back(both: Servers) -> None:
    """A slot that is busy with what does not fit: each look is followed by another announcement."""
    async with partition(both, dispatch=QUIET) as shard:
        stop = False

        async def submit_large() -> None:
            while not stop:
                await shard.submit(*[job(cores=8)] * 2)

        busy = [asyncio.create_task(submit_large()) for _ in range(4)]
        async with asyncio.timeout(DEADLINE_S):
            for _ in range(20):
                assert await shard.get(offer=NARROW) == []
        stop = True
        await asyncio.gather(*busy)
        assert shard.shard.dispatcher._requests == {}


async def test_a_rival_who_never_lets_go_is_a_503_not_an_endless_wait(
    both: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "PATIENCE_S", 0.1)
    async with partition(both, dispatch=QUIET) as shard:
        ids = await shard.submit(*[job()] * 2)

        async def rival(tx: Transaction) -> None:
            await tx.fetch("lock_ready", tuple(ids))
            async with asyncio.timeout(DEADLINE_S):
                with pytest.raises(Unavailable) as told:
                    await shard.get()
            assert told.value.code == "contended"

        await shard.shard.database.run("write", rival)
        assert _ids(await shard.get(n_jobs=2)) == ids


async def test_a_fault_before_the_claim_is_answered_and_the_worker_lives_on(shard: Partition) -> None:
    [identifier] = await shard.submit(job())
    queue = shard.shard.queue
    take = queue.take

    async def broken(_wanted: object) -> object:
        raise ZeroDivisionError

    queue.take = broken  # type: ignore[method-assign,assignment]
    n_workers = shard.settings.database.claim_connections
    for _ in range(n_workers + 1):
        await eventually(lambda: shard.shard.refill.clean(shard.shard.classes.active()), DEADLINE_S)
        with pytest.raises(Unavailable) as told:
            await shard.get()
        assert told.value.code == "claim_failed"
    queue.take = take  # type: ignore[method-assign]
    assert _ids(await shard.get()) == [identifier]


async def test_a_repeat_that_comes_while_its_first_try_is_given_back_gets_a_lease_that_holds(shard: Partition) -> None:
    [identifier] = await shard.submit(job())
    dispatcher = shard.shard.dispatcher
    call = get_job_call(shard.slot(), request_id="same-request")
    await dispatcher.get_job(call)
    dispatcher.hand_back(call.subject, call.request_id)
    answer: GetJobAnswer = await dispatcher.get_job(call)
    assert _ids(list(answer.jobs)) == [identifier]
    assert (await shard.heartbeat(answer.jobs[0])).state is State.RUNNING
    assert answer.jobs[0].attempt == 2


async def test_two_clients_of_one_request_share_its_answer_and_one_may_leave(both: Servers) -> None:
    async with partition(both, dispatch=QUIET) as shard:
        gone = asyncio.create_task(shard.get(request_id="same-request", wait_s=WAIT_S))
        await _parked(shard, 1)
        [request] = shard.shard.dispatcher._requests.values()
        stays = asyncio.create_task(shard.get(request_id="same-request", wait_s=WAIT_S))
        await eventually(lambda: request.n_clients == 2, DEADLINE_S)
        gone.cancel()
        await eventually(lambda: request.n_clients == 1, DEADLINE_S)
        [identifier] = await shard.submit(job())
        assert await _soon(stays) == [identifier]
        assert await shard.state(identifier) is State.SENT


async def test_beyond_what_may_be_parked_the_answer_comes_at_once(both: Servers) -> None:
    async with partition(both, dispatch=DispatchSettings(max_parked=1, sweep_interval_s=600.0)) as shard:
        waiting = await _wait(shard)
        async with asyncio.timeout(WAIT_S / 3):
            assert await shard.get(wait_s=WAIT_S) == []
        [identifier] = await shard.submit(job())
        assert await _soon(waiting) == [identifier]


async def test_stopping_ends_the_claim_that_was_begun_and_refuses_what_comes(both: Servers) -> None:
    async with partition(both) as shard:
        ids = await shard.submit(*[job()] * 30)
        dispatcher = shard.shard.dispatcher
        asked = [asyncio.ensure_future(dispatcher.get_job(get_job_call(shard.slot()))) for _ in range(30)]
        await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
        await dispatcher.stop()
        answers = await asyncio.gather(*asked, return_exceptions=True)
        granted = [grant.id for answer in answers if isinstance(answer, GetJobAnswer) for grant in answer.jobs]
        assert all(isinstance(answer, GetJobAnswer | Unavailable) for answer in answers)
        # Every lease has been told to its client: none was cut off between commit and answer.
        assert sorted(granted) == sorted(row[0] for row in await shard.rows("SELECT id FROM lease"))
        assert set(granted) <= set(ids)
        with pytest.raises(Unavailable):
            await dispatcher.get_job(get_job_call(shard.slot()))
