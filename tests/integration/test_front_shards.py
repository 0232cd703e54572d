"""One router over two shards: spread calls, a dead shard that holds up nobody else, moves that nobody sees."""

import asyncio
import secrets
from typing import Any

from culm.wire import (
    CancelRequest,
    GetJobAnswer,
    GetJobRequest,
    Grant,
    JobSpec,
    JobsQuery,
    PilotInfo,
    SubmitAnswer,
    SubmitRequest,
)
from tests.front import RunningFront
from tests.partition import PILOT, USER
from tests.two_partitions import NAMES, TwoPartitions
from tests.waiting import eventually

DEADLINE_S = 20.0
AT_ONCE_S = 1.0
"""A dead shard is said within so long."""


def at(*sites: str) -> list[JobSpec]:
    return [JobSpec(site=site, argv=["true"]) for site in sites]


async def submit(router: RunningFront, *sites: str, key: str = "") -> SubmitAnswer:
    async with router.client(patience_s=0.0) as client:
        return await client.submit(SubmitRequest(idempotency_key=key or secrets.token_hex(8), jobs=at(*sites)))


async def get_job(router: RunningFront, site: str, **changes: Any) -> GetJobAnswer:
    values = {"request_id": secrets.token_hex(8), "queue": f"{site}-q", "pilot": PilotInfo(id="p1")}
    async with router.client(PILOT, patience_s=0.0) as client:
        return await client.get_job(GetJobRequest(**(values | changes)))


async def linked(router: RunningFront, name: str) -> None:
    await eventually(lambda: router.forward.links._links[name].connected, DEADLINE_S, what=f"{name} is linked")


# --- both are up ----------------------------------------------------------------------------------------------------


async def test_a_repeat_gives_the_same_ids_and_stores_nothing(router: RunningFront, pair: TwoPartitions) -> None:
    first = await submit(router, "BNL", "FZK", key="k")
    assert await submit(router, "BNL", "FZK", key="k") == first
    assert [await pair.n_jobs(name) for name in NAMES] == [1, 1]


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


# --- one is dead ----------------------------------------------------------------------------------------------------


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


async def test_a_repeat_gets_its_first_answer_also_when_there_is_work_at_home_by_now(router: RunningFront) -> None:
    """The first answer came from the shard of the region's slot; home has a job since (invariant I6)."""
    request = GetJobRequest(request_id="12345678", queue="UTA-q", pilot=PilotInfo(id="p"))
    async with router.client() as user, router.client(PILOT) as pilot:
        [of_region] = (
            await user.submit(SubmitRequest(idempotency_key="k", jobs=[JobSpec(region="BOTH", argv=["true"])]))
        ).ids
        first = await pilot.get_job(request)
        assert [grant.id for grant in first.jobs] == [of_region]
        [of_site] = (await user.submit(SubmitRequest(idempotency_key="later", jobs=at("UTA")))).ids
        assert [grant.id for grant in (await pilot.get_job(request)).jobs] == [of_region]
        other = GetJobRequest(request_id="87654321", queue="UTA-q", pilot=PilotInfo(id="p"))
        assert [grant.id for grant in (await pilot.get_job(other)).jobs] == [of_site]
