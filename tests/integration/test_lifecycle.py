"""From the grant to the final state on a real shard: fencing, repeats, the data side, cancel, the reaper."""

import asyncio

import pytest

from culm.errors import ClientFault, Conflict, CulmError
from culm.link import LinkClient, LinkOptions
from culm.settings import DispatchSettings, Timeouts
from culm.states import FINAL, LEASED, TRANSITIONS, Event, State
from culm.wire import Grant, InputFile, JobError, Usage
from tests.partition import ADMIN, OTHER_USER, PRODUCTION, USER, Partition, Servers, job, partition
from tests.waiting import eventually

LOST = JobError(plane="pilot", code=1, text="lost")
DEADLINE_S = 20.0
SHORT = Timeouts(
    first_lease_s=0.3, heartbeat_s=0.3, holding_s=0.3, transferring_s=0.3, activated_s=0.3, unready_s=0.3, grace_s=0.001
)


async def _granted(shard: Partition, **changes: object) -> Grant:
    await shard.submit(job(**changes))
    [grant] = await shard.get()
    return grant


async def _counts(shard: Partition) -> dict[str, int]:
    rows = await shard.rows("SELECT state, SUM(n) FROM tally GROUP BY state HAVING SUM(n) <> 0")
    return {state: int(n) for state, n in rows}


# --- heartbeats ------------------------------------------------------------------------------------------------------


async def test_the_usual_life(shard: Partition) -> None:
    grant = await _granted(shard)
    for state in (State.STARTING, State.RUNNING, State.RUNNING):
        assert (await shard.heartbeat(grant, state)).state is state
    answer = await shard.report(grant, exit_code=0, stdout_tail="hi", usage=Usage(wall_s=1.5))
    assert answer.state is State.FINISHED
    view = await shard.job(grant.id)
    assert [event.target.value for event in view.history] == ["activated", "sent", "starting", "running", "finished"]
    assert [event.n for event in view.history] == [1, 2, 3, 4, 5]
    [report] = view.reports
    assert (report.attempt, report.exit_code, report.stdout_tail) == (1, 0, "hi")
    assert report.usage is not None
    assert report.usage.wall_s == 1.5
    assert await _counts(shard) == {"finished": 1}


async def test_a_heartbeat_that_was_overtaken_does_not_take_the_state_back(shard: Partition) -> None:
    grant = await _granted(shard)
    await shard.heartbeat(grant, State.RUNNING)
    assert (await shard.heartbeat(grant, State.STARTING)).state is State.RUNNING


@pytest.mark.parametrize("state", sorted(set(State) - LEASED | {State.SENT}))
async def test_a_heartbeat_cannot_say_every_state(shard: Partition, state: State) -> None:
    grant = await _granted(shard)
    with pytest.raises(ClientFault) as told:
        await shard.heartbeat(grant, state)
    assert told.value.code == "bad_state"


@pytest.mark.parametrize("wrong", [{"attempt": 2}, {"lease_token": "f" * 24}])
async def test_a_stranger_to_the_lease_is_told_409_and_nothing_changes(
    shard: Partition, wrong: dict[str, object]
) -> None:
    grant = await _granted(shard)
    before = await shard.job(grant.id)
    for call in (shard.heartbeat, shard.report):
        with pytest.raises(Conflict) as told:
            await call(grant, **wrong)  # type: ignore[operator]
        assert (told.value.code, told.value.http_status) == ("lease_lost", 409)
    assert await shard.job(grant.id) == before


# --- reports ---------------------------------------------------------------------------------------------------------


async def test_a_repeated_final_report_gets_the_first_answer(shard: Partition) -> None:
    grant = await _granted(shard)
    first = await shard.report(grant)
    before = await shard.job(grant.id)
    assert await shard.report(grant) == first
    # Even one that says something else: the first counts.
    assert (await shard.report(grant, State.FAILED)).state is State.FINISHED
    assert await shard.job(grant.id) == before


async def test_a_repeat_is_answered_as_the_first_was_though_the_data_side_has_gone_on(shard: Partition) -> None:
    [identifier] = await shard.submit(job())
    [grant] = await shard.get()
    await shard.heartbeat(grant)
    first = await shard.report(grant, State.HOLDING)
    assert first.state is State.HOLDING
    assert await shard.report(grant, State.HOLDING) == first
    await shard.say(identifier, Event.MOVE_OUTPUTS)
    assert await shard.report(grant, State.HOLDING) == first
    await shard.say(identifier, Event.MERGE)
    assert await shard.report(grant, State.HOLDING) == first
    assert await shard.state(identifier) is State.MERGING
    # What it did not say is no repeat; and of work that was done none is given back.
    for state, error in ((State.TRANSFERRING, None), (State.ACTIVATED, None), (State.ACTIVATED, LOST)):
        with pytest.raises(Conflict) as told:
            await shard.report(grant, state, error=error)
        assert told.value.code == "bad_transition"
    assert await shard.state(identifier) is State.MERGING


@pytest.mark.parametrize("archived", [False, True])
async def test_who_gave_a_job_back_has_not_finished_it(shard: Partition, archived: bool) -> None:
    [identifier] = await shard.submit(job())
    [grant] = await shard.get()
    first = await shard.report(grant, State.ACTIVATED)
    if archived:
        await shard.cancel(identifier)
        await shard.sql("UPDATE job SET modified_at = DATE_SUB(modified_at, INTERVAL 2 HOUR)")
        assert await shard.shard.archive.move(3600.0) == 1
    assert await shard.report(grant, State.ACTIVATED) == first
    for state in (State.FINISHED, State.FAILED, State.HOLDING):
        with pytest.raises(Conflict) as told:
            await shard.report(grant, state)
        assert told.value.code == "lease_lost"


@pytest.mark.parametrize("state", [State.STARTING, State.RUNNING])
async def test_that_a_job_is_at_work_is_no_report(shard: Partition, state: State) -> None:
    await shard.submit(job())
    [grant] = await shard.get()
    with pytest.raises(ClientFault) as told:
        await shard.report(grant, state)
    assert told.value.code == "bad_report"


async def test_ten_equal_reports_at_once_are_one(shard: Partition) -> None:
    grant = await _granted(shard)
    answers = await asyncio.gather(*(shard.report(grant) for _ in range(10)))
    assert {answer.state for answer in answers} == {State.FINISHED}
    view = await shard.job(grant.id)
    assert len(view.reports) == 1
    assert [event.event for event in view.history].count(Event.FINISH) == 1


async def test_the_report_of_a_stale_attempt_is_refused(shard: Partition) -> None:
    stale = await _granted(shard)
    await shard.report(stale, State.ACTIVATED)
    [current] = await shard.get()
    assert (current.id, current.attempt) == (stale.id, 2)
    # Its own release is answered again; another word, or that attempt's number and the other's token, is refused.
    assert (await shard.report(stale, State.ACTIVATED)).state is State.ACTIVATED
    with pytest.raises(Conflict):
        await shard.report(stale)
    with pytest.raises(Conflict):
        await shard.report(stale, lease_token=current.lease_token)
    with pytest.raises(Conflict):
        await shard.report(current, attempt=1)
    assert await shard.state(stale.id) is State.SENT


async def test_a_failed_report_keeps_plane_code_and_text(shard: Partition) -> None:
    grant = await _granted(shard)
    error = JobError(plane="pilot", code=1212, text="too much memory")
    await shard.report(grant, State.FAILED, exit_code=137, error=error, stderr_tail="Killed")
    view = await shard.job(grant.id)
    assert (view.job.state, view.job.error) == (State.FAILED, error)
    assert view.reports[0].stderr_tail == "Killed"


async def test_an_unknown_job(shard: Partition) -> None:
    grant = await _granted(shard)
    with pytest.raises(ClientFault) as told:
        await shard.report(grant, id=grant.id + 77)
    assert (told.value.code, told.value.http_status) == ("unknown_job", 404)


async def test_a_report_says_a_state_or_an_event(shard: Partition) -> None:
    grant = await _granted(shard)
    for wrong in ({"event": Event.FINISH}, {"state": None}, {"state": None, "event": Event.CLAIM}):
        with pytest.raises(ClientFault) as told:
            await shard.report(grant, **wrong)  # type: ignore[arg-type]
        assert told.value.code == "bad_report"


async def test_outputs_by_way_of_transferring_and_merging(shard: Partition) -> None:
    grant = await _granted(shard, outputs=["a.root"])
    await shard.heartbeat(grant)
    assert (await shard.report(grant, State.HOLDING)).state is State.HOLDING
    assert (await shard.report(grant, State.HOLDING)).state is State.HOLDING
    assert (await shard.say(grant.id, Event.MOVE_OUTPUTS)).state is State.TRANSFERRING
    assert (await shard.say(grant.id, Event.MERGE)).state is State.MERGING
    assert (await shard.say(grant.id, Event.FINISH)).state is State.FINISHED
    assert (await shard.say(grant.id, Event.FINISH)).state is State.FINISHED


async def test_inputs_that_are_missing_first(shard: Partition) -> None:
    [identifier] = await shard.submit(job(inputs=[InputFile(name="in.root", ready=False)]))
    assert await shard.state(identifier) is State.DEFINED
    assert await shard.get() == []
    for event, state in (
        (Event.INPUTS_MISSING, State.WAITING),
        (Event.ASSIGN, State.ASSIGNED),
        (Event.INPUTS_READY, State.ACTIVATED),
    ):
        assert (await shard.say(identifier, event)).state is state
    [grant] = await shard.get()
    assert grant.id == identifier


@pytest.mark.parametrize("after", [State.SENT, State.RUNNING, State.FINISHED])
async def test_a_repeated_event_of_the_data_side_gets_the_present_state(shard: Partition, after: State) -> None:
    """Its first answer was lost; meanwhile a pilot took the job."""
    [identifier] = await shard.submit(job(inputs=[InputFile(name="in.root", ready=False)]))
    await shard.say(identifier, Event.ASSIGN)
    await shard.say(identifier, Event.INPUTS_READY)
    [grant] = await shard.get()
    if after is not State.SENT:
        await shard.heartbeat(grant)
    if after is State.FINISHED:
        await shard.report(grant)
    before = await shard.job(identifier)
    for event in (Event.ASSIGN, Event.INPUTS_READY):
        answer = await shard.say(identifier, event)
        assert (answer.state, answer.attempt) == (after, 1)
    # What was never said is no repeat.
    with pytest.raises(Conflict) as told:
        await shard.say(identifier, Event.INPUTS_MISSING)
    assert told.value.code == "bad_transition"
    assert await shard.job(identifier) == before


async def test_only_the_data_side_speaks_for_data(shard: Partition) -> None:
    [identifier] = await shard.submit(job(inputs=[InputFile(name="in.root", ready=False)]))
    with pytest.raises(ClientFault) as told:
        await shard.say(identifier, Event.INPUTS_READY, who=USER)
    assert told.value.http_status == 403
    assert await shard.state(identifier) is State.DEFINED


async def test_the_data_side_ends_no_job_that_a_worker_runs(shard: Partition) -> None:
    grant = await _granted(shard)
    with pytest.raises(Conflict) as told:
        await shard.say(grant.id, Event.FAIL)
    assert told.value.code == "bad_transition"


@pytest.mark.parametrize("final", sorted(FINAL - {State.CLOSED}))
async def test_final_states_absorb(shard: Partition, final: State) -> None:
    grant = await _granted(shard)
    if final is State.CANCELLED:
        await shard.cancel(grant.id)
    await shard.report(grant, final)
    for event in (Event.INPUTS_READY, Event.MOVE_OUTPUTS, Event.FAIL if final is not State.FAILED else Event.ASSIGN):
        with pytest.raises(CulmError):
            await shard.say(grant.id, event)
    [ended] = (await shard.cancel(grant.id)).jobs
    assert ended.outcome == "already_final"
    assert await shard.state(grant.id) is final


# --- cancel ----------------------------------------------------------------------------------------------------------


async def test_a_ready_job_is_ended_at_once(shard: Partition) -> None:
    ids = await shard.submit(job(), job())
    [ended] = (await shard.cancel(ids[0])).jobs
    assert (ended.outcome, ended.state) == ("cancelled", State.CANCELLED)
    assert [grant.id for grant in await shard.get(n_jobs=5)] == [ids[1]]


async def test_a_running_jobs_pilot_is_told_at_its_next_heartbeat(shard: Partition) -> None:
    grant = await _granted(shard)
    assert (await shard.heartbeat(grant)).command is None
    [asked] = (await shard.cancel(grant.id)).jobs
    assert (asked.outcome, asked.state) == ("requested", State.RUNNING)
    assert (await shard.heartbeat(grant)).command == "cancel"
    assert (await shard.report(grant, State.CANCELLED)).state is State.CANCELLED


async def test_a_job_that_is_given_back_after_a_request_to_cancel_is_cancelled(shard: Partition) -> None:
    grant = await _granted(shard)
    await shard.cancel(grant.id)
    assert (await shard.report(grant, State.ACTIVATED)).state is State.CANCELLED
    assert await shard.get() == []


async def test_a_whole_jobset(shard: Partition) -> None:
    ids = await shard.submit(*[job()] * 450, jobset=99)
    others = await shard.submit(job(), jobset=98)
    answer = await shard.cancel(jobset=99)
    assert [one.id for one in answer.jobs] == ids
    assert {one.outcome for one in answer.jobs} == {"cancelled"}
    assert await shard.state(others[0]) is State.ACTIVATED


@pytest.mark.parametrize(
    ("who", "outcome"), [(OTHER_USER, "forbidden"), (PRODUCTION, "cancelled"), (ADMIN, "cancelled")]
)
async def test_who_may_end_a_job(shard: Partition, who: object, outcome: str) -> None:
    [identifier] = await shard.submit(job())
    [ended] = (await shard.cancel(identifier, who=who)).jobs  # type: ignore[arg-type]
    assert ended.outcome == outcome


async def test_an_unknown_job_is_not_found(shard: Partition) -> None:
    [identifier] = await shard.submit(job())
    outcomes = [one.outcome for one in (await shard.cancel(identifier, identifier + 1)).jobs]
    assert outcomes == ["cancelled", "not_found"]


# --- the reaper ------------------------------------------------------------------------------------------------------


async def test_a_silent_pilot_loses_its_job_and_the_next_one_gets_it(both: Servers) -> None:
    async with partition(both, timeouts=SHORT) as shard:
        lost = await _granted(shard, max_attempts=3)
        [grant] = await shard.get(wait_s=10.0)
        assert (grant.id, grant.attempt) == (lost.id, 2)
        with pytest.raises(Conflict):
            await shard.report(lost)
        await shard.report(grant)
        assert await shard.state(lost.id) is State.FINISHED


async def test_heartbeats_keep_it(both: Servers) -> None:
    async with partition(both, timeouts=SHORT) as shard:
        grant = await _granted(shard)
        other = await _granted(shard)
        beats = 0

        async def other_is_lost() -> bool:
            nonlocal beats
            await shard.heartbeat(grant)
            beats += 1
            return await shard.state(other.id) is State.ACTIVATED

        await eventually(other_is_lost, DEADLINE_S)
        assert beats > 1
        assert await shard.state(grant.id) is State.RUNNING


async def test_after_the_last_attempt_it_fails_with_pandas_code(both: Servers) -> None:
    async with partition(both, timeouts=SHORT) as shard:
        grant = await _granted(shard, max_attempts=1)
        await shard.heartbeat(grant)

        async def failed() -> bool:
            return await shard.state(grant.id) is State.FAILED

        await eventually(failed, DEADLINE_S)
        error = (await shard.job(grant.id)).job.error
        assert error is not None
        assert (error.plane, error.code) == ("jobDispatcher", 100)


async def test_a_cancelled_job_of_a_silent_pilot_is_cancelled(both: Servers) -> None:
    async with partition(both, timeouts=SHORT) as shard:
        grant = await _granted(shard)
        await shard.cancel(grant.id)

        async def cancelled() -> bool:
            return await shard.state(grant.id) is State.CANCELLED

        await eventually(cancelled, DEADLINE_S)


async def test_within_the_grace_period_no_lease_ends(both: Servers) -> None:
    timeouts = Timeouts(first_lease_s=0.05, grace_s=3600.0)
    async with partition(both, timeouts=timeouts) as shard:
        grant = await _granted(shard)

        async def expired() -> bool:
            return bool(await shard.rows("SELECT id FROM lease WHERE expires_at < UTC_TIMESTAMP(6)"))

        await eventually(expired, DEADLINE_S)
        assert await shard.shard.reaper.end_leases() == 0
        assert (await shard.heartbeat(grant)).state is State.RUNNING


async def test_while_no_router_is_there_no_lease_ends(both: Servers) -> None:
    """Pilots speak by way of routers: their silence says nothing while there is none. A monitor is no router."""
    async with partition(
        both, timeouts=Timeouts(grace_s=0.001), dispatch=DispatchSettings(reap_interval_s=600.0)
    ) as shard:
        grant = await _granted(shard)
        server = shard.shard.link
        await shard.link.stop()
        monitor = LinkClient("us1", shard.settings.link, LinkOptions(says="monitor"))
        monitor.start()
        assert await monitor.wait_connected(DEADLINE_S)
        await eventually(lambda: server.routers_since is None, DEADLINE_S, what="no router is there")
        await shard.sql("UPDATE lease SET expires_at = '2001-01-01'")
        assert await shard.shard.reaper.end_leases() == 0
        shard.link.start()
        assert await shard.link.wait_connected(DEADLINE_S)
        await monitor.stop()
        await eventually(lambda: not shard.shard.reaper.waits, DEADLINE_S, what="the grace period is over")
        assert await shard.shard.reaper.end_leases() == 1
        assert await shard.state(grant.id) is State.ACTIVATED


@pytest.mark.parametrize("ready", [True, False])
async def test_what_nobody_takes_is_closed(both: Servers, ready: bool) -> None:
    async with partition(both, timeouts=SHORT) as shard:
        [identifier] = await shard.submit(job(inputs=[InputFile(name="in.root", ready=ready)]))

        async def closed() -> bool:
            await shard.shard.reaper.close_old()
            return await shard.state(identifier) is State.CLOSED

        await eventually(closed, DEADLINE_S)
        assert await shard.get() == []


# --- every transition ------------------------------------------------------------------------------------------------


def test_these_tests_know_every_event() -> None:
    assert {event for _, event in TRANSITIONS} == set(Event)
