"""Reads of a real shard: one job whole, pages, counts from the tallies, depths; and who may see what."""

import asyncio
import itertools

import msgspec
import pytest

from culm.errors import ClientFault, Unavailable
from culm.states import Event, State
from culm.wire import (
    InputFile,
    JobError,
    JobsAnswer,
    JobsQuery,
    JobView,
    Principal,
    ShardCounts,
    ShardCountsAnswer,
    ShardDepths,
    ShardDepthsAnswer,
    ShardJobs,
)
from culm.wire import ShardJob as ReadJob
from tests.partition import ADMIN, OTHER_USER, PILOT, PRODUCTION, USER, Partition, Servers, job, partition
from tests.waiting import eventually

NO_VO = Principal(role="user", subject="eve", authority="central")
CMS = Principal(role="user", subject="eve", authority="central", vo="cms")


async def _read(shard: Partition, identifier: int, who: Principal) -> JobView:
    return await shard.ask("job", ReadJob(at=shard.slot(), principal=who, id=identifier), JobView)


async def _counts(shard: Partition) -> ShardCountsAnswer:
    return await shard.ask("counts", ShardCounts(), ShardCountsAnswer)


async def test_a_job_is_shown_with_all_its_history_and_reports(shard: Partition) -> None:
    spec = job(name="n", memory_mb=5, environment={"A": "b"}, inputs=[InputFile(name="in.root")], outputs=["o"])
    [identifier] = await shard.submit(spec)
    [first] = await shard.get()
    await shard.report(first, State.ACTIVATED)
    [second] = await shard.get()
    error = JobError(plane="exe", code=7, text="broken")
    await shard.report(second, State.FAILED, exit_code=7, error=error, stdout_tail="out", stderr_tail="err")
    view = await _read(shard, identifier, USER)
    assert view.spec == msgspec.structs.replace(spec, cores=1, max_attempts=3)
    assert [event.event for event in view.history] == [
        Event.SUBMIT_READY,
        *(Event.CLAIM, Event.RELEASE, Event.CLAIM, Event.FAIL),
    ]
    assert (view.history[0].source, view.history[0].target) == (None, State.ACTIVATED)
    assert all(a.target == b.source for a, b in itertools.pairwise(view.history))
    assert [event.attempt for event in view.history] == [0, 1, 1, 2, 2]
    assert [(report.attempt, report.state) for report in view.reports] == [(1, State.ACTIVATED), (2, State.FAILED)]
    assert (view.reports[1].stdout_tail, view.reports[1].stderr_tail, view.reports[1].exit_code) == ("out", "err", 7)
    assert (view.job.error, view.job.attempt, view.job.owner) == (error, 2, "central:ann")


async def test_times_are_the_databases_and_in_order(shard: Partition) -> None:
    [identifier] = await shard.submit(job())
    await shard.get()
    view = await _read(shard, identifier, ADMIN)
    at = (await _counts(shard)).at
    assert view.job.created_at <= view.history[0].at <= view.history[1].at <= at
    assert view.job.modified_at >= view.history[1].at - 1.0
    assert at - view.job.created_at < 60.0


@pytest.mark.parametrize(
    ("who", "sees"), [(USER, True), (OTHER_USER, True), (ADMIN, True), (CMS, False), (NO_VO, False), (PILOT, False)]
)
async def test_who_sees_a_job(shard: Partition, who: Principal, sees: bool) -> None:
    [identifier] = await shard.submit(job())
    if sees:
        assert (await _read(shard, identifier, who)).job.id == identifier
    else:
        with pytest.raises(ClientFault) as told:
            await _read(shard, identifier, who)
        # The same as for a job that is not there: nothing is told by the difference.
        assert (told.value.code, told.value.http_status) == ("unknown_job", 404)


async def test_a_job_that_never_was_is_not_known(shard: Partition) -> None:
    with pytest.raises(ClientFault) as told:
        await _read(shard, 1234567, ADMIN)
    assert told.value.code == "unknown_job"


@pytest.mark.parametrize(("who", "n_seen"), [(USER, 3), (OTHER_USER, 3), (CMS, 2), (NO_VO, 0), (ADMIN, 5)])
async def test_a_list_shows_only_the_callers_vo(shard: Partition, who: Principal, n_seen: int) -> None:
    await shard.submit(*[job()] * 3)
    await shard.submit(*[job()] * 2, who=CMS)
    assert len((await shard.jobs(who)).jobs) == n_seen


async def test_a_pilot_may_not_list(shard: Partition) -> None:
    with pytest.raises(ClientFault) as told:
        await shard.jobs(PILOT)
    assert told.value.http_status == 403


async def test_pages_are_whole_and_without_overlap(shard: Partition) -> None:
    ids = await shard.submit(*[job()] * 23)
    seen: list[int] = []
    after: int | None = 0
    n_pages = 0
    while after is not None:
        page = await shard.jobs(after=after, limit=5)
        seen += [row.id for row in page.jobs]
        after = page.next
        n_pages += 1
    assert (seen, n_pages) == (ids, 5)


async def test_a_page_that_ends_with_the_last_job_names_no_next(shard: Partition) -> None:
    ids = await shard.submit(*[job()] * 5)
    page = await shard.jobs(limit=5)
    assert ([row.id for row in page.jobs], page.next) == (ids, None)


async def test_filters_hold_together(both: Servers) -> None:
    async with partition(both, "BNL", "AGLT2") as shard:
        here = await shard.submit(*[job()] * 2, jobset=1)
        there = await shard.submit(job(site="AGLT2"), at=shard.slot("AGLT2"), jobset=1)
        other = await shard.submit(job(), jobset=2, who=PRODUCTION)
        await shard.cancel(here[0])

        async def listed(*slots: int, **query: object) -> list[int]:
            call = ShardJobs(principal=ADMIN, query=JobsQuery(**query), slots=list(slots))  # type: ignore[arg-type]
            return [row.id for row in (await shard.ask("jobs", call, JobsAnswer)).jobs]

        slots = [shard.slot(site).slot for site in ("BNL", "AGLT2")]
        assert sorted(await listed()) == sorted(here + there + other)
        assert await listed(slots[1]) == there
        assert sorted(await listed(*slots, jobset=1)) == sorted(here + there)
        assert await listed(slots[0], jobset=1, state=State.CANCELLED) == here[:1]
        assert await listed(slots[0], jobset=1, state=State.ACTIVATED) == here[1:]
        assert await listed(slots[0], owner="central:prod") == other
        assert await listed(slots[1], owner="central:prod") == []
        assert await listed(owner="central:ann' OR '1'='1") == []


async def test_counts_are_those_of_the_jobs_themselves(shard: Partition) -> None:
    await shard.submit(*[job()] * 9, job(inputs=[InputFile(name="a", ready=False)]))
    grants = [grant for _ in range(5) for grant in await shard.get()]
    await asyncio.gather(
        shard.heartbeat(grants[0]),
        shard.report(grants[1]),
        shard.report(grants[2], State.FAILED),
        shard.report(grants[3], State.ACTIVATED),
    )
    counts = {(one.slot, one.state): one.n_jobs for one in (await _counts(shard)).counts}
    rows = await shard.rows("SELECT slot, state, COUNT(*) FROM job GROUP BY slot, state")
    assert counts == {(slot, State(state)): n for slot, state, n in rows}
    assert sum(counts.values()) == 10


async def test_an_empty_shard_counts_nothing(shard: Partition) -> None:
    answer = await _counts(shard)
    assert (answer.shard, answer.counts) == ("us1", [])


async def test_depths_of_known_jobs_only(shard: Partition) -> None:
    [identifier] = await shard.submit(job())
    answer = await shard.ask("depths", ShardDepths(ids=[identifier, identifier + 1]), ShardDepthsAnswer)
    assert answer.depths == {identifier: 0}
    assert (await shard.ask("depths", ShardDepths(ids=[]), ShardDepthsAnswer)).depths == {}


@pytest.mark.parametrize("body", [b"", b"\xc1", b"\x80", b"\x93\x01\x02\x03", msgspec.msgpack.encode({"id": "x"})])
async def test_a_message_that_is_none_is_told_as_such(shard: Partition, body: bytes) -> None:
    with pytest.raises(ClientFault) as told:
        await shard.link.call("job", body, 5.0)
    assert told.value.code == "bad_message"


async def test_a_verb_that_is_none(shard: Partition) -> None:
    with pytest.raises(ClientFault) as told:
        await shard.link.call("frobnicate", b"", 5.0)
    assert (told.value.code, told.value.http_status) == ("unknown_verb", 404)


# --- bounds -----------------------------------------------------------------------------------------------------------


async def _walk(shard: Partition, who: Principal = ADMIN, **query: object) -> tuple[list[int], int]:
    """All ids of a list, and in how many pages they came."""
    found: list[int] = []
    after, n_pages = 0, 0
    while True:
        page = await shard.jobs(who, after=after, **query)
        found += [row.id for row in page.jobs]
        n_pages += 1
        if page.next is None:
            return found, n_pages
        assert page.next > after
        after = page.next


@pytest.mark.parametrize("query", [{}, {"owner": "central:ann"}, {"jobset": 7}], ids=str)
async def test_a_list_looks_at_a_bounded_number_of_rows_and_says_where_to_go_on(
    shard: Partition, monkeypatch: pytest.MonkeyPatch, query: dict[str, object]
) -> None:
    monkeypatch.setattr("shard.lists.MAX_EXAMINED", 10)
    ids = await shard.submit(*[job()] * 45)
    await shard.cancel(ids[3], ids[44])
    assert await _walk(shard, **query) == (ids, 5)
    assert await _walk(shard, state=State.CANCELLED, **query) == ([ids[3], ids[44]], 5)
    assert await _walk(shard, state=State.FAILED, **query) == ([], 5)
    assert await _walk(shard, limit=7, **query) == (ids, 7)
    assert await _walk(shard, USER, limit=1000, **query) == (ids, 5)


async def test_slow_reads_of_people_hold_up_nobody_else(both: Servers) -> None:
    async with partition(both) as shard:
        taken = [asyncio.create_task(_occupy(shard)) for _ in range(shard.settings.database.user_connections)]
        await eventually(shard.shard.database._pools["user"]._slots.locked, 10.0, what="both are taken")
        asked = asyncio.create_task(shard.jobs())
        # Sooner than the slow ones end.
        async with asyncio.timeout(4.0):
            [identifier] = await shard.submit(job())
            [grant] = await shard.get()
            await shard.report(grant)
        assert grant.id == identifier
        with pytest.raises(Unavailable) as caught:
            await asked
        assert caught.value.code == "database_busy"
        for one in await asyncio.gather(*taken, return_exceptions=True):
            # The server ends what takes too long, which is said as that and not as a lost database.
            assert isinstance(one, Unavailable)
            assert one.code == "database_slow"

        async def well() -> bool:
            # Each of those ended with its connection: the next ones are made anew.
            try:
                return (await shard.jobs()).jobs[0].id == identifier
            except Unavailable:
                return False

        await eventually(well, 20.0, what="people can read again")


async def _occupy(shard: Partition) -> None:
    await shard.shard.database.run("user", lambda tx: tx._run("x", "SELECT SLEEP(30) FROM slot", ()))
