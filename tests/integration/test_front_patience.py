"""What a client with patience, and one that asks for a slot that lives elsewhere by now, do not notice."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from culm.wire import GetJobRequest, JobSpec, JobsQuery, PilotInfo, SubmitRequest
from tests.front import RunningFront, front_over
from tests.partition import PILOT, Servers
from tests.two_partitions import NAMES, TwoPartitions, two_partitions
from tests.waiting import eventually

DEADLINE_S = 20.0


@pytest.fixture
async def pair(both: Servers) -> AsyncIterator[TwoPartitions]:
    """Two shards."""
    async with two_partitions(both) as running:
        yield running


@pytest.fixture
async def router(pair: TwoPartitions) -> AsyncIterator[RunningFront]:
    """A router over both."""
    async with front_over(pair.topology_dir) as running:
        yield running


def call(*specs: JobSpec) -> SubmitRequest:
    return SubmitRequest(idempotency_key="k", jobs=list(specs))


def at(site: str) -> JobSpec:
    return JobSpec(site=site, argv=["true"])


async def test_a_client_with_patience_sees_no_partial_call(router: RunningFront, pair: TwoPartitions) -> None:
    await pair.stop("eu1")
    async with router.client(patience_s=DEADLINE_S) as client:
        asking = asyncio.create_task(client.submit(call(at("BNL"), at("FZK"))))

        async def first_part_is_there() -> bool:
            return await pair.n_jobs("us1") == 1

        await eventually(first_part_is_there, DEADLINE_S, what="the first part is there")
        assert not asking.done()
        await pair.start("eu1")
        answer = await asking
    assert None not in answer.ids
    assert [await pair.n_jobs(name) for name in NAMES] == [1, 1]


async def test_a_slot_that_went_to_the_other_shard_is_found_there(router: RunningFront, pair: TwoPartitions) -> None:
    slot = pair.topology.region("BOTH").slot
    assert pair.topology.place(slot).shard == "eu1"
    await pair.rows("eu1", f"UPDATE slot SET state = 'moved' WHERE slot = {slot}")
    pair.place(slot, "us1")
    async with router.client(patience_s=0.0) as client:
        answer = await client.submit(call(JobSpec(region="BOTH", argv=["true"])))
    assert list(answer.shards) == ["us1"]
    assert [await pair.n_jobs(name) for name in NAMES] == [1, 0]


async def test_lists_by_site_and_region_hold_those_jobs_only(router: RunningFront) -> None:
    async with router.client() as client:
        await client.submit(call(at("BNL"), at("FZK"), at("FZK"), at("UTA"), JobSpec(region="BOTH", argv=["true"])))
        assert [row.site for row in (await client.jobs(JobsQuery(site="FZK"))).jobs] == ["FZK", "FZK"]
        assert [row.region for row in (await client.jobs(JobsQuery(region="BOTH"))).jobs] == ["BOTH", "BOTH"]
        assert [row.region for row in (await client.jobs(JobsQuery(region="EU"))).jobs] == ["EU", "EU"]


async def test_a_repeat_gets_its_first_answer_also_when_there_is_work_at_home_by_now(router: RunningFront) -> None:
    """The first answer came from the shard of the region's slot; home has a job since (invariant I6)."""
    request = GetJobRequest(request_id="12345678", queue="UTA-q", pilot=PilotInfo(id="p"))
    async with router.client() as user, router.client(PILOT) as pilot:
        [of_region] = (await user.submit(call(JobSpec(region="BOTH", argv=["true"])))).ids
        first = await pilot.get_job(request)
        assert [grant.id for grant in first.jobs] == [of_region]
        [of_site] = (await user.submit(SubmitRequest(idempotency_key="later", jobs=[at("UTA")]))).ids
        assert [grant.id for grant in (await pilot.get_job(request)).jobs] == [of_region]
        other = GetJobRequest(request_id="87654321", queue="UTA-q", pilot=PilotInfo(id="p"))
        assert [grant.id for grant in (await pilot.get_job(other)).jobs] == [of_site]
