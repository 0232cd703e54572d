"""Many heartbeats and reports in one transaction: each gets what it would have got alone."""

import asyncio

import pytest

from culm.errors import ClientFault, Conflict
from culm.states import State
from culm.wire import Grant, HeartbeatRequest, ReportRequest, ShardHeartbeat, ShardReport
from ops.audit import audit
from tests.partition import PILOT, Partition, job
from tests.waiting import eventually

N = 30


async def _commits(shard: Partition) -> int:
    [row] = await shard.rows("SHOW GLOBAL STATUS LIKE 'Com_commit'")
    return int(row[1])


async def test_many_jobs_live_and_end_with_few_commits(shard: Partition) -> None:
    ids = await shard.submit(*[job()] * N)
    grants = await shard.get(n_jobs=N)
    before = await _commits(shard)
    for state in (State.STARTING, State.RUNNING, State.RUNNING):
        answers = await asyncio.gather(*(shard.heartbeat(grant, state) for grant in grants))
        assert {answer.state for answer in answers} == {state}
    answers = await asyncio.gather(*(shard.report(grant) for grant in grants))
    assert [(answer.id, answer.state) for answer in answers] == [(grant.id, State.FINISHED) for grant in grants]
    # Four of each would be 120; the shard's own loops commit too.
    assert await _commits(shard) - before < 60
    view = await shard.job(ids[0])
    assert [event.event for event in view.history] == ["submit_ready", "claim", "start", "run", "finish"]
    assert [report.state for report in view.reports] == ["finished"]
    assert (await audit([shard.settings], shard.topology)).findings == []


async def test_who_has_lost_his_lease_spoils_nobody_elses_word(shard: Partition) -> None:
    await shard.submit(*[job()] * N)
    grants = await shard.get(n_jobs=N)
    stale = await shard.get(n_jobs=1)
    assert stale == []
    bad = [
        shard.heartbeat(grants[0], lease_token="not-the-lease's"),
        shard.heartbeat(grants[0], attempt=7),
        shard.heartbeat(grants[0], id=grants[0].id + 1000),
    ]
    good = [shard.heartbeat(grant) for grant in grants]
    said = await asyncio.gather(*bad, *good, return_exceptions=True)
    assert [getattr(one, "code", None) for one in said[:3]] == ["lease_lost", "lease_lost", "unknown_job"]
    assert [one.state for one in said[3:]] == [State.RUNNING] * N  # type: ignore[union-attr]


async def test_the_same_report_many_times_at_once_is_stored_once(shard: Partition) -> None:
    [identifier] = await shard.submit(job())
    [grant] = await shard.get()
    answers = await asyncio.gather(*(shard.report(grant) for _ in range(10)))
    assert {answer.state for answer in answers} == {State.FINISHED}
    assert len((await shard.job(identifier)).reports) == 1
    with pytest.raises(Conflict):
        await shard.report(grant, lease_token="another")


async def test_different_words_about_one_job_keep_their_order(shard: Partition) -> None:
    [identifier] = await shard.submit(job())
    [grant] = await shard.get()
    first, second = await asyncio.gather(shard.heartbeat(grant, State.STARTING), shard.heartbeat(grant, State.RUNNING))
    assert (first.state, second.state) == (State.STARTING, State.RUNNING)
    assert await shard.state(identifier) is State.RUNNING


async def test_a_cancel_is_told_at_the_next_heartbeat_and_ends_with_the_attempt(shard: Partition) -> None:
    wanted, other = await shard.submit(job(), job())
    grants = await shard.get(n_jobs=2)
    await asyncio.gather(*(shard.heartbeat(grant) for grant in grants))
    await shard.cancel(wanted)
    told = await asyncio.gather(*(shard.heartbeat(grant) for grant in grants))
    assert [answer.command for answer in told] == ["cancel", None]
    ended = await asyncio.gather(*(shard.report(grant, State.ACTIVATED) for grant in grants))
    assert [answer.state for answer in ended] == [State.CANCELLED, State.ACTIVATED]
    assert await shard.rows("SELECT id FROM job WHERE cancel_requested = 1") == []
    assert [grant.id for grant in await shard.get()] == [other]


async def test_what_is_given_back_is_ready_at_once(shard: Partition) -> None:
    ids = await shard.submit(*[job()] * 5)
    grants = await shard.get(n_jobs=5)
    await asyncio.gather(*(shard.report(grant, State.ACTIVATED) for grant in grants))
    assert sorted(grant.id for grant in await shard.get(n_jobs=5)) == ids


async def test_what_cannot_be_said_is_refused_beside_what_can(shard: Partition) -> None:
    await shard.submit(job(), job())
    one, two = await shard.get(n_jobs=2)
    bad, good = await asyncio.gather(shard.heartbeat(one, State.SENT), shard.heartbeat(two), return_exceptions=True)
    assert isinstance(bad, ClientFault)
    assert not isinstance(good, BaseException)


async def test_words_without_end_about_one_job_hold_up_nobody_else(shard: Partition) -> None:
    await shard.submit(job(), job())
    noisy, quiet = await shard.get(n_jobs=2)
    bad = [asyncio.create_task(shard.heartbeat(noisy, lease_token="wrong")) for _ in range(300)]
    await eventually(lambda: shard.shard.signs._n_behind > 0, 10.0, what="they have come")
    n_commits = await _commits(shard)
    assert (await shard.heartbeat(quiet)).state is State.RUNNING
    assert await _commits(shard) - n_commits < 10
    told = [getattr(one, "code", "") for one in await asyncio.gather(*bad, return_exceptions=True)]
    assert set(told) == {"lease_lost", "overloaded"}
    assert told[:2] == ["lease_lost"] * 2
    assert (shard.shard.signs._n_behind, shard.shard.signs._behind) == (0, {})
    assert (await shard.heartbeat(noisy)).state is State.RUNNING


async def test_a_heartbeat_whose_sender_is_gone_is_left_out_and_a_report_is_not(shard: Partition) -> None:
    [first, second] = await shard.submit(job(), job())
    grants = await shard.get(n_jobs=2)
    signs = shard.shard.signs
    words = [
        ShardHeartbeat(
            at=shard.slot(), principal=PILOT, request=HeartbeatRequest(**held(grants[0]), state=State.RUNNING)
        ),
        ShardReport(at=shard.slot(), principal=PILOT, request=ReportRequest(**held(grants[1]), state=State.FINISHED)),
    ]
    for word in words:
        answer = signs.begin(word)
        assert answer is not None
        answer.cancel()

    async def is_done() -> bool:
        return await shard.state(second) is State.FINISHED

    await eventually(is_done, 10.0, what="the report is stored")
    await eventually(lambda: not signs._behind, 10.0, what="both had their turn")
    assert await shard.state(first) is State.SENT


def held(grant: Grant) -> dict[str, object]:
    """What a pilot says of its lease."""
    return {"id": grant.id, "attempt": grant.attempt, "lease_token": grant.lease_token}
