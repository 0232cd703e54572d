"""A submit that nobody can run is accepted, and its answer says so: as `why` would, and no longer than it is true."""

import secrets
from collections.abc import AsyncIterator
from typing import Any

import pytest

from culm.client import Client
from culm.errors import Unavailable
from culm.registry_wire import ChangedAnswer, QueueRequest
from culm.wire import GetJobRequest, JobSpec, PilotInfo, SubmitAnswer, SubmitRequest
from tests.front import RunningFront, front
from tests.partition import ADMIN, PILOT, QUEUE, USER, Partition, job
from tests.two_partitions import TwoPartitions
from tests.waiting import eventually

DEADLINE_S = 15.0


@pytest.fixture
async def one(shard: Partition) -> AsyncIterator[RunningFront]:
    """A router over one shard with one site, BNL."""
    async with front(shard) as running:
        yield running


async def submit(router: RunningFront, *specs: JobSpec, key: str = "") -> SubmitAnswer:
    """One call of a user."""
    async with router.client(USER) as user:
        return await user.submit(SubmitRequest(idempotency_key=key or secrets.token_hex(8), jobs=list(specs)))


async def ask(router: RunningFront, queue: str = QUEUE, **changes: Any) -> list[int]:
    """One get_job of a pilot that can do much; what it got."""
    values = {"request_id": secrets.token_hex(8), "queue": queue, "pilot": PilotInfo(id="p1", host="node1")}
    async with router.client(PILOT) as pilot:
        return [grant.id for grant in (await pilot.get_job(GetJobRequest(**(values | changes)))).jobs]


async def describe(router: RunningFront, shard: Partition, **changes: Any) -> None:
    """Change BNL's computing queue; router and shard know it."""
    async with router.client(ADMIN) as admin:
        request = QueueRequest(queue=QUEUE, changes=changes, reason="a test")
        answer = await admin.post("queue", request, ChangedAnswer)
    router.forward.fresh_topology()
    await eventually(
        lambda: shard.shard.topology.current.epochs["central"] >= answer.epoch, DEADLINE_S, what="the shard knows it"
    )


def told(answer: SubmitAnswer) -> list[tuple[int, int, list[str]]]:
    """Index, number of jobs, and codes of each warning."""
    return [(warning.index, warning.n_jobs, [reason.code for reason in warning.reasons]) for warning in answer.warnings]


async def test_nobody_has_asked_yet_then_somebody_has(one: RunningFront) -> None:
    answer = await submit(one, job())
    assert told(answer) == [(0, 1, ["no_pilot_asked"])]
    assert await ask(one) == answer.ids
    assert told(await submit(one, job())) == []


async def test_an_offline_site_is_told_with_the_reason_and_the_job_runs_when_it_is_back(
    shard: Partition, one: RunningFront
) -> None:
    await ask(one)
    await describe(one, shard, status="offline")
    answer = await submit(one, job(), job(region="US", site=""))
    assert told(answer) == [(0, 1, ["queue_offline"]), (1, 1, ["queue_offline"])]
    assert "a test" in answer.warnings[0].reasons[0].text
    await describe(one, shard, status="online")
    assert sorted(await ask(one, n_jobs=5)) == sorted(identifier for identifier in answer.ids if identifier)


async def test_of_many_jobs_each_kind_that_nobody_can_run_is_told_once(shard: Partition, one: RunningFront) -> None:
    await describe(one, shard, memory_mb=2000, disk_mb=100, walltime_s=60, releases=["24.2"])
    await ask(one)
    kinds = [{}, {"memory_mb": 4000}, {"release": "25.0"}, {"disk_mb": 200, "walltime_s": 600}]
    answer = await submit(one, *(job(**kinds[n % 4]) for n in range(2000)))
    assert None not in answer.ids
    assert told(answer) == [
        (1, 500, ["too_little_memory_mb"]),
        (2, 500, ["no_matching_release"]),
        (3, 500, ["too_little_disk_mb", "too_little_walltime_s"]),
    ]


async def test_a_warning_and_why_say_the_same(shard: Partition, one: RunningFront) -> None:
    await describe(one, shard, memory_mb=2000)
    await ask(one)
    answer = await submit(one, job(memory_mb=4000))
    [identifier] = answer.ids
    assert identifier is not None
    async with one.client(USER) as user:
        assert (await user.why(identifier)).reasons == answer.warnings[0].reasons


async def test_a_default_of_the_policy_is_warned_of_like_what_was_asked_for(
    shard: Partition, one: RunningFront
) -> None:
    await describe(one, shard, memory_mb=2000, default_memory_mb=2000)
    await ask(one, memory_mb=1000)
    assert told(await submit(one, job(queue=QUEUE), job())) == [(0, 1, ["too_little_memory_mb"])]


async def test_a_repeat_is_warned_of_what_is_true_by_then(one: RunningFront) -> None:
    first = await submit(one, job(), key="k")
    assert told(first) == [(0, 1, ["no_pilot_asked"])]
    await ask(one)
    again = await submit(one, job(), key="k")
    assert again.ids == first.ids
    assert told(again) == []


def at(site: str, **changes: Any) -> JobSpec:
    return JobSpec(site=site, argv=["true"], **changes)


async def test_over_two_shards_the_index_is_that_of_the_call(pair: TwoPartitions, router: RunningFront) -> None:
    for queue in ("BNL-q", "FZK-q"):
        await ask(router, queue)
    # us1's part of the call is the jobs 1, 3, 4 and 5, and of two slots.
    specs = [at("FZK"), at("BNL"), at("FZK", cores=9), at("UTA"), at("BNL", cores=9), at("BNL", cores=9)]
    answer = await submit(router, *specs)
    assert told(answer) == [
        (2, 1, ["too_few_cores"]),
        (3, 1, ["no_pilot_asked"]),
        (4, 2, ["too_few_cores"]),
    ]


async def test_what_is_accepted_of_a_call_is_warned_of_though_a_shard_is_down(
    pair: TwoPartitions, router: RunningFront
) -> None:
    await ask(router, "FZK-q")
    await pair.stop("us1")
    async with Client(router.url, router.token(USER), patience_s=0.0) as user:
        request = SubmitRequest(idempotency_key="k", jobs=[at("BNL"), at("FZK", cores=9)])
        with pytest.raises(Unavailable, match="partial_submit") as caught:
            await user.submit(request)
    answer = caught.value.details["answer"]
    assert [(one["index"], one["reasons"][0]["code"]) for one in answer["warnings"]] == [(1, "too_few_cores")]
