"""Two shards behind one router: what spans them, what is left when one is gone, slots that move."""

import asyncio
import secrets
from collections.abc import AsyncIterator
from typing import Any

import pytest

from culm.client import Client
from culm.errors import ClientFault, Conflict, CulmError, Unavailable
from culm.ids import slot_of
from culm.positions import position
from culm.registry_wire import ChangedAnswer, SitesRequest
from culm.states import State
from culm.wire import (
    ArchiveAnswer,
    ArchiveRequest,
    CancelRequest,
    GetJobRequest,
    HeartbeatRequest,
    JobRow,
    JobSpec,
    JobsQuery,
    PilotInfo,
    ReportRequest,
    SubmitAnswer,
    SubmitRequest,
)
from tests.front import RunningFront, front_over
from tests.partition import ADMIN, PILOT, USER
from tests.two_partitions import TwoPartitions
from tests.waiting import eventually

DEADLINE_S = 20.0
SOON_S = 1.0
"""A dead shard is said to be dead within this time."""


@pytest.fixture
async def user(router: RunningFront) -> AsyncIterator[Client]:
    """A user who asks once only."""
    async with router.client(USER, patience_s=0) as client:
        yield client


@pytest.fixture
async def pilot(router: RunningFront) -> AsyncIterator[Client]:
    """A pilot that asks once only."""
    async with router.client(PILOT, patience_s=0) as client:
        yield client


def spread(n_jobs: int) -> list[JobSpec]:
    """Jobs for both sites in turn."""
    return [JobSpec(site=("BNL", "FZK")[n % 2], argv=["true"], name=f"n{n}") for n in range(n_jobs)]


def asking(site: str, wait_s: float = 0.0, request_id: str = "") -> GetJobRequest:
    """A get_job for a site's computing queue."""
    name = request_id or secrets.token_hex(8)
    return GetJobRequest(request_id=name, queue=f"{site}-q", pilot=PilotInfo(id="p1"), wait_s=wait_s)


async def stopped(router: RunningFront, pair: TwoPartitions, name: str) -> None:
    """End a shard, and wait until the router has noticed."""
    await pair.stop(name)
    link = router.forward.links._links[name]
    await eventually(lambda: not link.connected, DEADLINE_S, what=f"{name} is seen gone")


async def back(router: RunningFront, pair: TwoPartitions, name: str) -> None:
    """Start a shard again, and wait until the router has found it."""
    await pair.start(name)
    assert await router.forward.links._links[name].wait_connected(DEADLINE_S)


async def refused(call: "asyncio.Future[object] | asyncio.Task[object]", kind: type[CulmError]) -> CulmError:
    """The error of a call, which came soon."""
    async with asyncio.timeout(SOON_S):
        with pytest.raises(kind) as caught:
            await call
    return caught.value


async def test_a_submit_is_spread_over_both_shards_in_the_callers_order(pair: TwoPartitions, user: Client) -> None:
    answer = await user.submit(SubmitRequest(idempotency_key="k", jobs=spread(10)))
    ids = [identifier or 0 for identifier in answer.ids]
    assert len(set(ids)) == 10
    sites = [pair.topology.site_of_slot[slot_of(identifier)] for identifier in ids]
    assert sites == ["BNL", "FZK"] * 5
    assert {name: outcome.n_jobs for name, outcome in answer.shards.items()} == {"us1": 5, "eu1": 5}
    assert [await pair.n_jobs("us1"), await pair.n_jobs("eu1")] == [5, 5]
    assert [(await user.job(identifier)).job.name for identifier in ids] == [f"n{n}" for n in range(10)]


async def test_what_a_dead_shard_left_open_is_said_and_completed_by_the_repeat(
    router: RunningFront, pair: TwoPartitions, user: Client
) -> None:
    await stopped(router, pair, "eu1")
    request = SubmitRequest(idempotency_key="k", jobs=spread(6))
    error = await refused(asyncio.ensure_future(user.submit(request)), Unavailable)
    assert (error.code, error.http_status) == ("partial_submit", 503)
    so_far = error.details["answer"]
    assert [identifier is not None for identifier in so_far["ids"]] == [True, False] * 3
    assert so_far["shards"]["us1"] == {"ok": True, "n_jobs": 3, "error": None}
    lost = so_far["shards"]["eu1"]
    assert (lost["ok"], lost["n_jobs"], lost["error"]["code"], lost["error"]["retryable"]) == (
        False, 3, "shard_down", True
    )  # fmt: skip
    assert await pair.n_jobs("us1") == 3
    await back(router, pair, "eu1")
    whole = await user.submit(request)
    assert whole.ids[::2] == so_far["ids"][::2]
    assert None not in whole.ids
    assert whole.jobset == so_far["jobset"]
    assert [await pair.n_jobs("us1"), await pair.n_jobs("eu1")] == [3, 3]
    assert await user.submit(request) == whole


async def test_a_call_for_a_dead_shard_alone_says_that_it_is_down(
    router: RunningFront, pair: TwoPartitions, user: Client
) -> None:
    await stopped(router, pair, "eu1")
    jobs = [JobSpec(site="FZK", argv=["true"])]
    error = await refused(
        asyncio.ensure_future(user.submit(SubmitRequest(idempotency_key="k", jobs=jobs))), Unavailable
    )
    assert error.code == "shard_down"


async def test_a_submit_that_can_never_be_completed_is_not_worth_a_repeat(pair: TwoPartitions, user: Client) -> None:
    """The key was used for another job at one of the shards: the other accepts, and the caller is told both."""
    await user.submit(SubmitRequest(idempotency_key="k", jobs=[JobSpec(site="FZK", argv=["false"])], jobset=5))
    with pytest.raises(CulmError) as caught:
        await user.submit(SubmitRequest(idempotency_key="k", jobs=spread(2), jobset=5))
    assert (caught.value.code, caught.value.http_status, caught.value.retryable) == ("key_reused", 409, False)
    so_far = caught.value.details["answer"]
    assert (so_far["shards"]["us1"]["ok"], so_far["shards"]["eu1"]["ok"]) == (True, False)


async def test_a_dead_shards_sites_get_503_at_once_while_the_others_are_served(
    router: RunningFront, pair: TwoPartitions, user: Client, pilot: Client
) -> None:
    answer = await user.submit(SubmitRequest(idempotency_key="k", jobs=spread(4)))
    await stopped(router, pair, "eu1")
    error = await refused(asyncio.ensure_future(pilot.get_job(asking("FZK", wait_s=30.0))), Unavailable)
    assert (error.code, error.http_status) == ("shard_down", 503)
    assert error.retry_after_s is not None
    assert 0 < error.retry_after_s <= 2
    async with asyncio.timeout(SOON_S):
        [grant] = (await pilot.get_job(asking("BNL"))).jobs
    assert grant.id == answer.ids[0]
    held = {"attempt": 1, "lease_token": "t"}
    for call in (
        pilot.heartbeat(HeartbeatRequest(id=answer.ids[1] or 0, **held, state=State.RUNNING)),
        pilot.report(ReportRequest(id=answer.ids[1] or 0, **held, state=State.FINISHED)),
        user.job(answer.ids[1] or 0),
    ):
        assert (await refused(asyncio.ensure_future(call), Unavailable)).code == "shard_down"
    await back(router, pair, "eu1")
    assert [grant.id for grant in (await pilot.get_job(asking("FZK"))).jobs] == [answer.ids[1]]


async def test_a_shard_that_dies_while_a_pilot_waits_ends_the_wait(
    router: RunningFront, pair: TwoPartitions, pilot: Client
) -> None:
    waiting = asyncio.ensure_future(pilot.get_job(asking("FZK", wait_s=50.0)))
    link = router.forward.links._links["eu1"]
    await eventually(lambda: link._connection is not None and link._connection.calls, DEADLINE_S, what="it waits")
    await pair.stop("eu1")
    async with asyncio.timeout(DEADLINE_S):
        try:
            assert (await waiting).jobs == []
        except Unavailable as error:
            assert error.code in {"shard_down", "outcome_unknown", "cancelled", "stopping"}


async def test_a_list_names_the_shard_that_gave_no_answer(
    router: RunningFront, pair: TwoPartitions, user: Client
) -> None:
    answer = await user.submit(SubmitRequest(idempotency_key="k", jobs=spread(4)))
    await stopped(router, pair, "eu1")
    page = await user.jobs(JobsQuery())
    assert [row.id for row in page.jobs] == answer.ids[::2]
    assert page.missing_shards == ["eu1"]
    assert (await user.jobs(JobsQuery(site="BNL"))).missing_shards == []
    assert (await user.jobs(JobsQuery(region="EU"))).missing_shards == ["eu1"]
    await back(router, pair, "eu1")
    page = await user.jobs(JobsQuery())
    assert (sorted(answer.ids), page.missing_shards) == ([row.id for row in page.jobs], [])  # type: ignore[type-var]


@pytest.mark.parametrize("limit", [1, 3, 7, 100])
async def test_paging_over_shards_is_complete_and_stable_while_jobs_come(user: Client, limit: int) -> None:
    first = await user.submit(SubmitRequest(idempotency_key="a", jobs=spread(10)))
    seen: list[int] = []
    after, n_pages = 0, 0
    while True:
        page = await user.jobs(JobsQuery(limit=limit, after=after))
        assert len(page.jobs) <= limit
        seen += [row.id for row in page.jobs]
        n_pages += 1
        if n_pages == 1:
            await user.submit(SubmitRequest(idempotency_key="b", jobs=spread(4)))
        if page.next is None:
            break
        after = page.next
    assert seen == sorted(set(seen))
    assert set(first.ids) <= set(seen)


@pytest.mark.parametrize("limit", [1, 3, 7, 100])
async def test_the_newest_of_all_shards_come_first_while_jobs_come(
    user: Client, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shard.lists.MAX_EXAMINED", 4)
    first = [await user.submit(SubmitRequest(idempotency_key=f"a{n}", jobs=spread(4))) for n in range(3)]
    seen: list[JobRow] = []
    before: str | None = ""
    while before is not None:
        page = await user.jobs(JobsQuery(limit=limit, order="newest", before=before))
        assert len(page.jobs) <= limit
        assert page.next is None
        seen += page.jobs
        if before == "":
            await user.submit(SubmitRequest(idempotency_key="b", jobs=spread(4)))
        before = page.before
    assert [position(row) for row in seen] == sorted({position(row) for row in seen}, reverse=True)
    assert {row.id for row in seen} == {identifier for answer in first for identifier in answer.ids}


@pytest.mark.parametrize(
    "query",
    [
        {"order": "newest", "after": 5},
        {"before": "1.2"},
        {"order": "id", "before": "1.2"},
        {"order": "newest", "before": "7"},
    ],
    ids=str,
)
async def test_a_cursor_of_the_other_order_is_refused(user: Client, query: dict[str, Any]) -> None:
    with pytest.raises(ClientFault) as told:
        await user.jobs(JobsQuery(**query))
    assert told.value.code == "bad_request"


async def test_a_cancel_says_unknown_where_no_answer_came(
    router: RunningFront, pair: TwoPartitions, user: Client
) -> None:
    answer = await user.submit(SubmitRequest(idempotency_key="k", jobs=spread(4)))
    ids = [identifier or 0 for identifier in answer.ids]
    await stopped(router, pair, "eu1")
    ended = await user.cancel(CancelRequest(ids=ids))
    assert {one.id: one.outcome for one in ended.jobs} == {
        **dict.fromkeys(ids[::2], "cancelled"),
        **dict.fromkeys(ids[1::2], "unknown"),
    }
    assert ended.missing_shards == ["eu1"]
    of_jobset = await user.cancel(CancelRequest(jobset=answer.jobset))
    assert ({one.id for one in of_jobset.jobs}, of_jobset.missing_shards) == (set(ids[::2]), ["eu1"])
    await back(router, pair, "eu1")
    of_jobset = await user.cancel(CancelRequest(jobset=answer.jobset))
    assert {one.id: one.outcome for one in of_jobset.jobs} == {
        **dict.fromkeys(ids[::2], "already_final"),
        **dict.fromkeys(ids[1::2], "cancelled"),
    }


async def test_a_child_may_live_on_another_shard_than_its_parent(user: Client) -> None:
    [parent] = (await user.submit(SubmitRequest(idempotency_key="p", jobs=[JobSpec(site="BNL", argv=["x"])]))).ids
    child = JobSpec(site="FZK", argv=["x"], parent_id=parent)
    [identifier] = (await user.submit(SubmitRequest(idempotency_key="c", jobs=[child]))).ids
    assert (await user.job(identifier or 0)).job.parent_id == parent


async def test_a_site_takes_its_own_jobs_before_those_of_its_region(user: Client, pilot: Client) -> None:
    """Site UTA is on us1, the slot of its region BOTH on eu1: its pilots ask at home first, then there."""
    jobs = [JobSpec(region="BOTH", argv=["x"]), JobSpec(site="UTA", argv=["x"]), JobSpec(region="BOTH", argv=["x"])]
    of_region, of_site, second = (await user.submit(SubmitRequest(idempotency_key="k", jobs=jobs))).ids
    order = [[grant.id for grant in (await pilot.get_job(asking("UTA"))).jobs] for _ in range(4)]
    assert order == [[of_site], [of_region], [second], []]


async def waits_at_both(router: RunningFront) -> None:
    """Wait until a get_job is under way at both shards."""

    def asked(name: str) -> bool:
        connection = router.forward.links._links[name]._connection
        return connection is not None and "get_job" in {call.verb for call in connection.calls.values()}

    await eventually(lambda: asked("us1") and asked("eu1"), DEADLINE_S, what="it waits at both")


@pytest.mark.parametrize("target", [{"site": "UTA"}, {"region": "BOTH"}], ids=["at home", "at the other"])
async def test_a_pilot_of_two_shards_waits_at_both_and_takes_what_comes_first(
    router: RunningFront, user: Client, pilot: Client, target: dict[str, str]
) -> None:
    request = asking("UTA", wait_s=30.0)
    waiting = asyncio.ensure_future(pilot.get_job(request))
    await waits_at_both(router)
    answer = await user.submit(SubmitRequest(idempotency_key="k", jobs=[JobSpec(**target, argv=["x"])]))
    async with asyncio.timeout(DEADLINE_S):
        given = (await waiting).jobs
    assert [grant.id for grant in given] == answer.ids
    # The same request gets the same, wherever it was given (invariant I6).
    assert (await pilot.get_job(request)).jobs == given


async def test_what_both_shards_give_at_once_goes_to_one_pilot_each(
    router: RunningFront, user: Client, pilot: Client
) -> None:
    """What the second gives goes back and is there for the next one; no attempt is used up."""
    for number in range(10):
        waiting = asyncio.ensure_future(pilot.get_job(asking("UTA", wait_s=30.0)))
        await waits_at_both(router)
        jobs = [JobSpec(site="UTA", argv=["x"]), JobSpec(region="BOTH", argv=["x"])]
        ids = (await user.submit(SubmitRequest(idempotency_key=f"k{number}", jobs=jobs))).ids
        async with asyncio.timeout(DEADLINE_S):
            [first] = (await waiting).jobs
            [second] = (await pilot.get_job(asking("UTA", wait_s=30.0))).jobs
        assert {first.id, second.id} == set(ids)
        rows = {row.id: row for row in (await user.jobs(JobsQuery())).jobs}
        assert {rows[identifier].state for identifier in (first.id, second.id)} == {State.SENT}


async def test_a_shard_that_dies_does_not_spoil_the_wait_at_the_other(
    router: RunningFront, pair: TwoPartitions, user: Client, pilot: Client
) -> None:
    waiting = asyncio.ensure_future(pilot.get_job(asking("UTA", wait_s=30.0)))
    await waits_at_both(router)
    await stopped(router, pair, "eu1")
    answer = await user.submit(SubmitRequest(idempotency_key="k", jobs=[JobSpec(site="UTA", argv=["x"])]))
    async with asyncio.timeout(DEADLINE_S):
        assert [grant.id for grant in (await waiting).jobs] == answer.ids


async def test_a_pilot_that_hangs_up_while_it_waits_at_both_leaves_both_jobs(
    router: RunningFront, user: Client, pilot: Client
) -> None:
    waiting = asyncio.ensure_future(pilot.get_job(asking("UTA", wait_s=30.0)))
    await waits_at_both(router)
    waiting.cancel()
    jobs = [JobSpec(site="UTA", argv=["x"]), JobSpec(region="BOTH", argv=["x"])]
    ids = (await user.submit(SubmitRequest(idempotency_key="k", jobs=jobs))).ids
    async with asyncio.timeout(DEADLINE_S):
        got = [(await pilot.get_job(asking("UTA", wait_s=30.0))).jobs[0].id for _ in ids]
    assert set(got) == set(ids)


async def test_a_site_with_one_shard_down_is_served_by_the_other(
    router: RunningFront, pair: TwoPartitions, user: Client, pilot: Client
) -> None:
    answer = await user.submit(SubmitRequest(idempotency_key="k", jobs=[JobSpec(site="UTA", argv=["x"])]))
    await stopped(router, pair, "eu1")
    assert [grant.id for grant in (await pilot.get_job(asking("UTA"))).jobs] == answer.ids
    # No work at home is not "no work": what the other shard has is not known.
    error = await refused(asyncio.ensure_future(pilot.get_job(asking("UTA"))), Unavailable)
    assert error.code == "shard_down"


async def _reopen(pair: TwoPartitions, slot: int) -> None:
    """The slot goes on at its shard with a newer epoch, as after a move away and back."""
    pair.place(slot, "eu1")
    epoch = pair.topology.slot(slot).epoch
    await pair.rows("eu1", f"UPDATE slot SET epoch = {epoch} WHERE slot = {slot}")


async def test_the_client_sees_nothing_of_an_epoch_that_the_router_did_not_know(
    router: RunningFront, pair: TwoPartitions, user: Client, pilot: Client
) -> None:
    """Every verb in turn is the first to meet the new epoch, and is answered as if nothing was."""
    slot = pair.topology.site("FZK").slots[0]

    async def submitted(key: str) -> SubmitAnswer:
        return await user.submit(SubmitRequest(idempotency_key=key, jobs=spread(2)))

    await _reopen(pair, slot)
    stale = router.forward.topology.slot(slot)
    ids = [identifier or 0 for identifier in (await submitted("k")).ids]
    assert router.forward.topology.slot(slot).epoch > stale.epoch
    assert [await pair.n_jobs("us1"), await pair.n_jobs("eu1")] == [1, 1]
    await _reopen(pair, slot)
    [grant] = (await pilot.get_job(asking("FZK"))).jobs
    held = {"id": grant.id, "attempt": grant.attempt, "lease_token": grant.lease_token}
    await _reopen(pair, slot)
    assert (await pilot.heartbeat(HeartbeatRequest(**held, state=State.RUNNING))).state is State.RUNNING
    await _reopen(pair, slot)
    assert (await pilot.report(ReportRequest(**held, state=State.FINISHED))).state is State.FINISHED
    [_, other] = (await submitted("l")).ids
    await _reopen(pair, slot)
    ended = await user.cancel(CancelRequest(ids=[ids[0], other or 0]))
    assert {one.id: one.outcome for one in ended.jobs} == {ids[0]: "cancelled", other: "cancelled"}
    assert ended.missing_shards == []


async def test_a_slot_that_is_open_nowhere_is_a_retryable_error(
    router: RunningFront, pair: TwoPartitions, user: Client
) -> None:
    """Fenced in a move: the client is asked to come again, and nothing is stored."""
    slot = pair.topology.site("FZK").slots[0]
    answer = await user.submit(SubmitRequest(idempotency_key="a", jobs=spread(2)))
    await pair.rows("eu1", f"UPDATE slot SET state = 'fenced' WHERE slot = {slot}")
    with pytest.raises(CulmError) as caught:
        await user.submit(SubmitRequest(idempotency_key="b", jobs=spread(2)))
    assert (caught.value.code, caught.value.retryable, caught.value.http_status) == ("moved", True, 503)
    assert await pair.n_jobs("eu1") == 1
    ids = [identifier or 0 for identifier in answer.ids]
    ended = await user.cancel(CancelRequest(ids=ids))
    assert {one.id: one.outcome for one in ended.jobs} == {ids[0]: "cancelled", ids[1]: "unknown"}
    assert ended.missing_shards == ["eu1"]
    await pair.rows("eu1", f"UPDATE slot SET state = 'open' WHERE slot = {slot}")
    assert (await user.submit(SubmitRequest(idempotency_key="b", jobs=spread(2)))).ids


async def test_a_site_is_known_to_every_router_as_soon_as_it_is_registered(
    router: RunningFront, pair: TwoPartitions
) -> None:
    """A second router takes the submit, the first the job's whole life, and nobody waits for the topology's poll."""
    site = [{"name": "NEW", "region": "EU", "queues": {"NEW-q": {}}}]
    async with (
        front_over(pair.topology_dir) as second,
        router.client(ADMIN) as admin,
        second.client(USER, patience_s=0) as user,
        second.client(PILOT, patience_s=0) as elsewhere,
        router.client(PILOT, patience_s=0) as pilot,
        router.client(USER, patience_s=0) as reader,
    ):
        async with front_over(pair.topology_dir) as third, third.client(USER, patience_s=0) as late:
            await admin.post("sites", SitesRequest(sites=site), ChangedAnswer)  # type: ignore[arg-type]
            [identifier] = (
                await user.submit(SubmitRequest(idempotency_key="k", jobs=[JobSpec(site="NEW", argv=["x"])]))
            ).ids
            [grant] = (await elsewhere.get_job(asking("NEW"))).jobs
            assert "NEW" not in router.forward.topology.sites
            held = {"id": grant.id, "attempt": grant.attempt, "lease_token": grant.lease_token}
            assert (await pilot.heartbeat(HeartbeatRequest(**held, state=State.RUNNING))).state is State.RUNNING
            assert (await pilot.report(ReportRequest(**held, state=State.FINISHED))).state is State.FINISHED
            assert (await reader.job(identifier or 0)).job.site == "NEW"
            assert "NEW" not in third.forward.topology.sites
            assert [row.id for row in (await late.jobs(JobsQuery(site="NEW"))).jobs] == [identifier]
        with pytest.raises(ClientFault):
            await reader.jobs(JobsQuery(site="NEVER"))


async def test_a_month_is_dropped_where_it_is_as_the_export_says_and_why_not_elsewhere_is_said(
    pair: TwoPartitions, router: RunningFront, user: Client
) -> None:
    [[name, bound, at]] = await pair.rows(
        "us1",
        "SELECT DATE_FORMAT(UTC_DATE() - INTERVAL 2 MONTH, 'p%Y%m'), DATE_FORMAT(UTC_DATE() - INTERVAL 1 MONTH,"
        " '%Y-%m-01'), DATE_FORMAT(UTC_DATE() - INTERVAL 2 MONTH, '%Y-%m-02')",
    )
    for shard in ("us1", "eu1"):
        await pair.rows(shard, f"ALTER TABLE archive_job ADD PARTITION (PARTITION {name} VALUES LESS THAN ('{bound}'))")

    submitted = await user.submit(SubmitRequest(idempotency_key=secrets.token_hex(8), jobs=spread(6)))
    await user.cancel(CancelRequest(ids=submitted.ids))
    for shard in ("us1", "eu1"):
        await pair.rows(shard, f"UPDATE job SET created_at = '{at}', modified_at = '{at}'")
    async with router.client(ADMIN, patience_s=0) as admin:
        moved = await admin.post("archive", ArchiveRequest(older_s=0.0), ArchiveAnswer)
        assert {one.shard: one.n_moved for one in moved.shards} == {"us1": 3, "eu1": 3}
        for exported in ({"us1": 2, "eu1": 4}, {}):
            with pytest.raises(Conflict, match="archive_changed"):
                await admin.post("archive", ArchiveRequest(drop=name, exported=exported), ArchiveAnswer)
        drop = ArchiveRequest(drop=name, exported={"us1": 3, "eu1": 4})
        answer = await admin.post("archive", drop, ArchiveAnswer)
        assert [(one.shard, one.n_dropped) for one in answer.shards] == [("us1", 3)]
        assert answer.missing_shards == ["eu1"]
        assert answer.why_missing["eu1"].startswith(f"archive_changed: {name} has 3 jobs")
        # The repeat says of the one that did it what it had.
        drop = ArchiveRequest(drop=name, exported={"us1": 3, "eu1": 3})
        answer = await admin.post("archive", drop, ArchiveAnswer)
        assert {one.shard: one.n_dropped for one in answer.shards} == {"us1": 3, "eu1": 3}
        assert answer.why_missing == {}
