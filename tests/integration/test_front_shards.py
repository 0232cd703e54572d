"""One router over two shards: spread calls, a dead shard that holds up nobody else, moves that nobody sees."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from culm.errors import Conflict, Unavailable
from culm.states import State
from culm.wire import (
    CancelRequest,
    GetJobAnswer,
    GetJobRequest,
    Grant,
    HeartbeatRequest,
    JobSpec,
    JobsQuery,
    PilotInfo,
    ReportRequest,
    SubmitAnswer,
    SubmitRequest,
)
from tests.front import RunningFront, front_over
from tests.partition import PILOT, USER, Servers
from tests.two_partitions import NAMES, TwoPartitions, two_partitions
from tests.waiting import eventually

DEADLINE_S = 20.0
AT_ONCE_S = 1.0
"""A dead shard is said within so long."""


@pytest.fixture
async def pair(both: Servers) -> AsyncIterator[TwoPartitions]:
    async with two_partitions(both) as running:
        yield running


@pytest.fixture
async def router(pair: TwoPartitions) -> AsyncIterator[RunningFront]:
    async with front_over(pair.topology_dir) as running:
        yield running


def at(*sites: str) -> list[JobSpec]:
    return [JobSpec(site=site, argv=["true"]) for site in sites]


async def submit(router: RunningFront, *sites: str, key: str = "") -> SubmitAnswer:
    async with router.client(patience_s=0.0) as client:
        return await client.submit(SubmitRequest(idempotency_key=key or secrets.token_hex(8), jobs=at(*sites)))


async def get_job(router: RunningFront, site: str, **changes: Any) -> GetJobAnswer:
    values = {"request_id": secrets.token_hex(8), "queue": f"{site}-q", "pilot": PilotInfo(id="p1")}
    async with router.client(PILOT, patience_s=0.0) as client:
        return await client.get_job(GetJobRequest(**(values | changes)))


async def partly(router: RunningFront, *sites: str, key: str) -> tuple[Unavailable, SubmitAnswer]:
    with pytest.raises(Unavailable) as caught:
        await submit(router, *sites, key=key)
    answer = msgspec.convert(caught.value.details["answer"], SubmitAnswer)
    return caught.value, answer


async def linked(router: RunningFront, name: str) -> None:
    await eventually(lambda: router.forward.links._links[name].connected, DEADLINE_S, what=f"{name} is linked")


# --- both are up ----------------------------------------------------------------------------------------------------


async def test_a_call_is_spread_over_both_shards(router: RunningFront, pair: TwoPartitions) -> None:
    answer = await submit(router, "BNL", "FZK", "BNL", "FZK", "FZK")
    assert {name: (part.ok, part.n_jobs) for name, part in answer.shards.items()} == {
        "us1": (True, 2),
        "eu1": (True, 3),
    }
    assert [await pair.n_jobs(name) for name in NAMES] == [2, 3]
    async with router.client() as client:
        for identifier, site in zip(answer.ids, ("BNL", "FZK", "BNL", "FZK", "FZK"), strict=True):
            assert identifier is not None
            view = await client.job(identifier)
            assert (view.job.site, view.job.jobset) == (site, answer.jobset)


async def test_a_repeat_gives_the_same_ids_and_stores_nothing(router: RunningFront, pair: TwoPartitions) -> None:
    first = await submit(router, "BNL", "FZK", key="k")
    assert await submit(router, "BNL", "FZK", key="k") == first
    assert [await pair.n_jobs(name) for name in NAMES] == [1, 1]


async def test_a_key_reused_for_another_part_is_final_and_says_what_the_others_did(
    router: RunningFront, pair: TwoPartitions
) -> None:
    await submit(router, "BNL", key="k")
    with pytest.raises(Conflict) as caught:
        await submit(router, "BNL", "BNL", "FZK", key="k")
    assert caught.value.code == "key_reused"
    answer = msgspec.convert(caught.value.details["answer"], SubmitAnswer)
    assert answer.ids[:2] == [None, None]
    assert answer.shards["eu1"].ok
    assert [await pair.n_jobs(name) for name in NAMES] == [1, 1]


@pytest.mark.parametrize("limit", [1, 3, 7, 100])
async def test_pages_over_both_shards_are_complete_and_in_order(router: RunningFront, limit: int) -> None:
    ids = sorted(i for i in (await submit(router, *["BNL", "FZK", "UTA"] * 4)).ids if i is not None)
    seen: list[int] = []
    after: int | None = 0
    async with router.client() as client:
        while after is not None:
            page = await client.jobs(JobsQuery(limit=limit, after=after))
            assert len(page.jobs) <= limit
            seen += [row.id for row in page.jobs]
            after = page.next
    assert seen == ids


async def test_pages_stay_stable_while_jobs_come(router: RunningFront) -> None:
    ids = {i for i in (await submit(router, *["BNL", "FZK"] * 5)).ids if i is not None}
    seen: list[int] = []
    after: int | None = 0
    async with router.client() as client:
        for _ in range(100):
            page = await client.jobs(JobsQuery(limit=2, after=after))
            seen += [row.id for row in page.jobs]
            after = page.next
            if after is None:
                break
            if len(seen) < 9:
                await submit(router, "BNL", "FZK")
    assert after is None
    assert len(seen) == len(set(seen))
    assert ids <= set(seen)


async def test_lists_by_site_and_region_hold_those_jobs_only(router: RunningFront) -> None:
    await submit(router, "BNL", "FZK", "FZK", "UTA")
    async with router.client() as client:
        assert [row.site for row in (await client.jobs(JobsQuery(site="FZK"))).jobs] == ["FZK", "FZK"]
        assert [row.site for row in (await client.jobs(JobsQuery(region="BOTH"))).jobs] == ["UTA"]


async def test_a_jobset_over_both_shards_is_cancelled_as_one(router: RunningFront) -> None:
    answer = await submit(router, "BNL", "FZK", "FZK")
    async with router.client() as client:
        ended = await client.cancel(CancelRequest(jobset=answer.jobset))
    assert {job.id: job.outcome for job in ended.jobs} == dict.fromkeys(answer.ids, "cancelled")
    assert ended.missing_shards == []


async def test_a_pilot_finds_the_regions_jobs_on_the_other_shard(router: RunningFront) -> None:
    async with router.client() as client:
        jobs = [JobSpec(region="BOTH", argv=["true"])]
        [identifier] = (await client.submit(SubmitRequest(idempotency_key="r", jobs=jobs))).ids
    [grant] = (await get_job(router, "UTA", request_id="region-job")).jobs
    assert grant.id == identifier


# --- one is dead ----------------------------------------------------------------------------------------------------


async def test_what_a_call_did_is_said_per_shard_and_its_repeat_completes_it(
    router: RunningFront, pair: TwoPartitions
) -> None:
    await pair.stop("eu1")
    error, answer = await partly(router, "BNL", "FZK", "BNL", key="k")
    assert (error.code, error.http_status) == ("partial_submit", 503)
    assert error.retry_after_s
    assert answer.shards["us1"].ok
    said = answer.shards["eu1"].error
    assert said is not None
    assert said.retryable
    assert answer.ids[1] is None
    assert None not in {answer.ids[0], answer.ids[2]}
    await pair.start("eu1")
    await linked(router, "eu1")
    whole = await submit(router, "BNL", "FZK", "BNL", key="k")
    assert (whole.ids[0], whole.ids[2], whole.jobset) == (answer.ids[0], answer.ids[2], answer.jobset)
    assert whole.ids[1] is not None
    assert [await pair.n_jobs(name) for name in NAMES] == [2, 1]


async def test_a_client_with_patience_sees_no_partial_call(router: RunningFront, pair: TwoPartitions) -> None:
    await pair.stop("eu1")
    async with router.client(patience_s=DEADLINE_S) as client:
        call = SubmitRequest(idempotency_key="k", jobs=at("BNL", "FZK"))
        asking = asyncio.create_task(client.submit(call))
        await eventually(lambda: _holds(pair, "us1", 1), DEADLINE_S, what="the first part is there")
        await pair.start("eu1")
        answer = await asking
    assert None not in answer.ids
    assert [await pair.n_jobs(name) for name in NAMES] == [1, 1]


async def _holds(pair: TwoPartitions, name: str, n_jobs: int) -> bool:
    return await pair.n_jobs(name) == n_jobs


async def test_a_dead_shard_is_said_at_once_while_the_other_serves(router: RunningFront, pair: TwoPartitions) -> None:
    await submit(router, "BNL")
    await pair.stop("eu1")
    body = msgspec.json.encode(GetJobRequest(request_id="12345678", queue="FZK-q", pilot=PilotInfo(id="p"), wait_s=30))
    began = time.monotonic()
    reply = await router.send("POST", "/v1/get_job", body, token=router.token(PILOT))
    assert time.monotonic() - began < AT_ONCE_S
    assert reply.status == 503
    assert reply.code in {"shard_down", "outcome_unknown"}
    assert int(reply.headers["Retry-After"]) >= 1
    assert len((await get_job(router, "BNL")).jobs) == 1
    assert (await submit(router, "BNL")).ids[0] is not None


async def test_lists_and_cancels_name_the_shard_that_is_missing(router: RunningFront, pair: TwoPartitions) -> None:
    answer = await submit(router, "BNL", "FZK")
    bnl, fzk = [identifier for identifier in answer.ids if identifier is not None]
    await pair.stop("eu1")
    async with router.client(patience_s=0.0) as client:
        page = await client.jobs(JobsQuery())
        assert ([row.id for row in page.jobs], page.missing_shards) == ([bnl], ["eu1"])
        assert (await client.jobs(JobsQuery(site="BNL"))).missing_shards == []
        ended = await client.cancel(CancelRequest(ids=[bnl, fzk]))
        assert {job.id: job.outcome for job in ended.jobs} == {bnl: "cancelled", fzk: "unknown"}
        assert ended.missing_shards == ["eu1"]
        with pytest.raises(Unavailable):
            await client.job(fzk)


# --- slots that move ------------------------------------------------------------------------------------------------


async def _reopened(pair: TwoPartitions, site: str) -> None:
    """The slot of a site is at a newer epoch, which the router has not heard of."""
    topology = pair.topology
    slot = topology.site(site).slots[0]
    pair.place(slot, topology.place(slot).shard)
    epoch = pair.topology.place(slot).epoch
    await pair.rows(topology.place(slot).shard, f"UPDATE slot SET epoch = {epoch} WHERE slot = {slot}")


def _held(grant: Grant) -> dict[str, Any]:
    return {"id": grant.id, "attempt": grant.attempt, "lease_token": grant.lease_token}


async def test_no_verb_notices_that_its_slot_was_opened_anew(router: RunningFront, pair: TwoPartitions) -> None:
    await submit(router, "FZK")
    await _reopened(pair, "FZK")
    await submit(router, "BNL", "FZK", "FZK")
    await _reopened(pair, "FZK")
    [grant] = (await get_job(router, "FZK")).jobs
    async with router.client(PILOT, patience_s=0.0) as pilot, router.client(patience_s=0.0) as user:
        await _reopened(pair, "FZK")
        request = HeartbeatRequest(**_held(grant), state=State.RUNNING)
        assert (await pilot.heartbeat(request)).state is State.RUNNING
        await _reopened(pair, "FZK")
        assert (await pilot.report(ReportRequest(**_held(grant), state=State.FINISHED))).state is State.FINISHED
        await _reopened(pair, "FZK")
        assert (await user.job(grant.id)).job.state is State.FINISHED
        left = [row.id for row in (await user.jobs(JobsQuery(state=State.ACTIVATED, site="FZK"))).jobs]
        assert len(left) == 2
        await _reopened(pair, "FZK")
        ended = await user.cancel(CancelRequest(ids=left))
        assert [(job.id, job.outcome) for job in ended.jobs] == [(identifier, "cancelled") for identifier in left]


async def test_a_slot_that_went_to_the_other_shard_is_found_there(router: RunningFront, pair: TwoPartitions) -> None:
    slot = pair.topology.region("BOTH").slot
    assert pair.topology.place(slot).shard == "eu1"
    await pair.rows("eu1", f"UPDATE slot SET state = 'moved' WHERE slot = {slot}")
    pair.place(slot, "us1")
    async with router.client(USER, patience_s=0.0) as client:
        jobs = [JobSpec(region="BOTH", argv=["true"])]
        answer = await client.submit(SubmitRequest(idempotency_key="moved", jobs=jobs))
    assert list(answer.shards) == ["us1"]
    assert [await pair.n_jobs(name) for name in NAMES] == [1, 0]
