"""Why is my job not running: for each reason the situation is made, that reason is told and no other, then it runs."""

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from culm.client import Client
from culm.errors import ClientFault
from culm.registry_wire import ChangedAnswer, QueueRequest
from culm.settings import Timeouts
from culm.states import State
from culm.wire import (
    CancelRequest,
    GetJobRequest,
    Grant,
    HeartbeatRequest,
    InputFile,
    JobSpec,
    PilotInfo,
    ReasonCode,
    ReportRequest,
    SubmitRequest,
)
from tests.front import RunningFront, front, front_over
from tests.partition import ADMIN, OTHER_USER, PILOT, PRODUCTION, QUEUE, USER, Partition, Servers, partition
from tests.two_partitions import TwoPartitions
from tests.waiting import eventually

DEADLINE_S = 15.0


@dataclass
class World:
    """A user, a pilot and an admin at one router."""

    router: RunningFront
    user: Client
    pilot: Client
    admin: Client

    async def submit(self, **spec: Any) -> int:
        """One job at BNL."""
        job = JobSpec(**({"site": "BNL", "argv": ["true"]} | spec))
        request = SubmitRequest(idempotency_key=secrets.token_hex(8), jobs=[job])
        [identifier] = (await self.user.submit(request)).ids
        assert identifier is not None
        return identifier

    async def ask(self, **changes: Any) -> list[Grant]:
        """One get_job."""
        values = {"request_id": secrets.token_hex(8), "queue": QUEUE, "pilot": PilotInfo(id="p1", host="node1")}
        return (await self.pilot.get_job(GetJobRequest(**(values | changes)))).jobs

    async def describe(self, **changes: Any) -> None:
        """Change the computing queue."""
        await self.admin.post("queue", QueueRequest(queue=QUEUE, changes=changes, reason="a test"), ChangedAnswer)
        self.router.forward.fresh_topology()

    async def codes(self, identifier: int) -> list[ReasonCode]:
        """The codes of the reasons."""
        return [reason.code for reason in (await self.user.why(identifier)).reasons]

    async def tells(self, identifier: int, *codes: ReasonCode) -> None:
        """Wait until exactly these are the reasons: the shard looks at the topology every now and then."""

        async def told() -> bool:
            return await self.codes(identifier) == list(codes)

        await eventually(told, DEADLINE_S, what=f"the reasons are {codes}")

    async def runs(self, identifier: int, **changes: Any) -> None:
        """A pilot gets it."""

        async def got() -> bool:
            return [grant.id for grant in await self.ask(**changes)] == [identifier]

        await eventually(got, DEADLINE_S, what="the job runs")


@asynccontextmanager
async def world_at(shard: Partition, **settings: Any) -> AsyncIterator[World]:
    """The clients of a router over one partition."""
    async with (
        front(shard, **settings) as router,
        router.client(USER) as user,
        router.client(PILOT) as pilot,
        router.client(ADMIN) as admin,
    ):
        yield World(router, user, pilot, admin)


@pytest.fixture
async def world(shard: Partition) -> AsyncIterator[World]:
    """One site, BNL, with one computing queue."""
    async with world_at(shard) as found:
        yield found


async def test_no_pilot_has_asked(world: World) -> None:
    identifier = await world.submit()
    [reason] = (await world.user.why(identifier)).reasons
    assert (reason.code, reason.queue, reason.since) == ("no_pilot_asked", QUEUE, None)
    assert "or ever" in reason.text
    await world.runs(identifier)


async def test_when_a_pilot_last_asked_outlives_a_restart(both: Servers) -> None:
    async with partition(both) as shard, world_at(shard) as world:
        await world.ask()
        await eventually(lambda: _saved(shard), DEADLINE_S, what="it is stored")
        schema = shard.settings.database.name
    async with partition(both, schema=schema) as shard, world_at(shard) as world:
        identifier = await world.submit()
        [reason] = (await world.user.why(identifier)).reasons
        assert reason.code == "no_pilot_asked"
        assert reason.since is not None
        assert "or ever" not in reason.text


async def _saved(shard: Partition) -> bool:
    return await shard.rows("SELECT queue FROM asked") == [(QUEUE,)]


async def test_the_computing_queue_is_offline(world: World) -> None:
    identifier = await world.submit()
    await world.describe(status="offline")
    await world.tells(identifier, "queue_offline")
    assert "a test" in (await world.user.why(identifier)).reasons[0].text
    assert await world.ask() == []
    await world.describe(status="online")
    await world.runs(identifier)


async def test_the_computing_queue_is_in_test(world: World) -> None:
    identifier = await world.submit()
    await world.describe(status="test")
    await world.tells(identifier, "queue_in_test")
    assert await world.ask() == []
    await world.describe(status="online")
    await world.runs(identifier)


@pytest.mark.parametrize(
    ("spec", "described", "code", "needed", "offered", "cure"),
    [
        ({"memory_mb": 4000}, {"memory_mb": 2000}, "too_little_memory_mb", "4000", "2000", {"memory_mb": 8000}),
        ({"disk_mb": 500}, {"disk_mb": 100}, "too_little_disk_mb", "500", "100", {"disk_mb": 500}),
        ({"walltime_s": 600}, {"walltime_s": 60}, "too_little_walltime_s", "600", "60", {"walltime_s": 0}),
        ({"cores": 8}, {"cores": 4}, "too_few_cores", "8", "4", {"cores": 8}),
        ({"release": "r2"}, {"releases": ["r1"]}, "no_matching_release", "r2", "r1", {"releases": ["r1", "r2"]}),
        ({"platform": "p2"}, {"platforms": ["p1"]}, "no_matching_platform", "p2", "p1", {"platforms": ["p2"]}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_the_computing_queue_cannot_run_it(
    world: World, spec: dict[str, Any], described: dict[str, Any], code: ReasonCode, needed: str, offered: str,
    cure: dict[str, Any],
) -> None:  # fmt: skip
    await world.describe(**described)
    identifier = await world.submit(**spec)

    async def told() -> bool:
        reasons = (await world.user.why(identifier)).reasons
        return [(one.code, one.needed, one.offered, one.queue) for one in reasons] == [(code, needed, offered, QUEUE)]

    await eventually(told, DEADLINE_S, what=f"the reason is {code} with its figures")
    assert await world.ask() == []
    await world.describe(**cure)
    await world.runs(identifier)


@pytest.mark.parametrize(
    ("spec", "asked", "code"),
    [
        ({"memory_mb": 4000}, {"memory_mb": 1000}, "too_little_memory_mb"),
        ({}, {"label": "managed"}, "wrong_label"),
        ({"pilot_type": "RC"}, {}, "wrong_pilot_type"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_the_pilots_that_ask_do_not_fit(
    world: World, spec: dict[str, Any], asked: dict[str, Any], code: ReasonCode
) -> None:
    identifier = await world.submit(**spec)
    assert await world.ask(**asked) == []
    await world.tells(identifier, code)
    [told] = (await world.user.site_why("BNL")).queues
    assert [(one.code, one.n_classes, one.example) for one in told.refused] == [(code, 1, identifier)]
    assert (told.n_pilots, told.n_asked, told.n_given) == (1, 1, 0)
    fitting = PilotInfo(id="p2", type=spec.get("pilot_type", ""))
    await world.runs(identifier, pilot=fitting)
    [told] = (await world.user.site_why("BNL")).queues
    assert (told.n_pilots, told.n_given, told.refused) == (2, 1, [])


async def test_it_is_behind_others_of_higher_rank(world: World) -> None:
    # A pilot has asked and fits.
    assert await world.ask() == []
    low = await world.submit(priority=10)
    first = [await world.submit(priority=20) for _ in range(3)]
    await world.submit(priority=5)
    [reason] = (await world.user.why(low)).reasons
    assert (reason.code, reason.n_ahead, reason.rate_per_s) == ("behind_others", 3, 0.0)
    for identifier in first:
        await world.runs(identifier)
    [reason] = (await world.user.why(low)).reasons
    assert (reason.code, reason.n_ahead, reason.rate_per_s) == ("ready_to_run", 0, 3 / 300)
    await world.runs(low)


async def test_what_is_not_ready_says_where_it_stands(both: Servers) -> None:
    quick = Timeouts(first_lease_s=0.3, heartbeat_s=60.0, grace_s=0.001)
    async with partition(both, timeouts=quick) as shard, world_at(shard) as world:
        waiting = await world.submit(inputs=[InputFile(name="in", ready=False)])
        assert await world.codes(waiting) == ["inputs_missing"]

        poison = await world.submit(max_attempts=1)
        assert [grant.id for grant in await world.ask()] == [poison]
        await world.tells(poison, "attempts_used_up")
        assert "1 of 1 attempts were lost" in (await world.user.why(poison)).reasons[0].text

        job = await world.submit()
        [grant] = await world.ask()
        held = {"id": grant.id, "attempt": grant.attempt, "lease_token": grant.lease_token}
        assert await world.codes(job) == ["sent"]
        await world.pilot.heartbeat(HeartbeatRequest(**held, state=State.RUNNING))
        [reason] = (await world.user.why(job)).reasons
        assert reason.code == "running"
        assert "pilot p1 on node1" in reason.text
        await world.user.cancel(CancelRequest(ids=[job]))
        assert await world.codes(job) == ["cancel_requested", "running"]
        await world.pilot.report(ReportRequest(**held, state=State.CANCELLED))
        assert await world.codes(job) == ["cancelled"]


async def test_who_may_not_read_a_job_is_not_told_why(world: World) -> None:
    identifier = await world.submit()
    async with world.router.client(OTHER_USER) as same_vo:
        assert (await same_vo.why(identifier)).id == identifier
    async with world.router.client(PILOT) as pilot:
        for asked in (pilot.why(identifier), pilot.site_why("BNL")):
            with pytest.raises(ClientFault) as caught:
                await asked
            assert caught.value.http_status == 403
    for asked in (world.user.why(identifier + 1), world.user.site_why("nowhere")):
        with pytest.raises(ClientFault) as caught:
            await asked
        assert caught.value.http_status == 404


async def test_a_shard_that_is_down_is_a_reason(pair: TwoPartitions) -> None:
    async with (
        front_over(pair.topology_dir) as router,
        router.client(USER) as user,
        router.client(PRODUCTION) as production,
    ):
        jobs = [JobSpec(site="FZK", argv=["true"])]
        [identifier] = (await user.submit(SubmitRequest(idempotency_key="k", jobs=jobs))).ids
        assert identifier is not None
        await pair.stop("eu1")
        link = router.forward.links._links["eu1"]
        await eventually(lambda: not link.connected, DEADLINE_S, what="it is seen gone")
        answer = await user.why(identifier)
        assert (answer.state, [reason.code for reason in answer.reasons]) == (None, ["shard_down"])
        assert "eu1" in answer.reasons[0].text
        await pair.start("eu1")
        assert await link.wait_connected(DEADLINE_S)
        assert [reason.code for reason in (await production.why(identifier)).reasons] == ["no_pilot_asked"]


async def test_an_authority_that_cannot_be_reached_from_here_is_a_reason(pair: TwoPartitions) -> None:
    """A router of CERN that sees none of the centre's shards; its own router may see them well."""
    async with front_over(pair.topology_dir, authority="CERN") as router, router.client(USER) as user:
        jobs = [JobSpec(site="FZK", argv=["true"])]
        [identifier] = (await user.submit(SubmitRequest(idempotency_key="k", jobs=jobs))).ids
        assert identifier is not None
        links = router.forward.links._links
        for name in ("eu1", "us1"):
            await pair.stop(name)
            await eventually(lambda name=name: not links[name].connected, DEADLINE_S, what="it is seen gone")  # type: ignore[misc]
            codes = [reason.code for reason in (await user.why(identifier)).reasons]
            assert codes == (["shard_down"] if name == "eu1" else ["region_cut_off"])
        for name in ("eu1", "us1"):
            await pair.start(name)
            assert await links[name].wait_connected(DEADLINE_S)
        assert [reason.code for reason in (await user.why(identifier)).reasons] == ["no_pilot_asked"]
