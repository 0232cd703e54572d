"""Two authorities at one router: a token speaks for its own authority, and namesakes are different people."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest

from culm.client import Client
from culm.errors import ClientFault
from culm.states import Event, State
from culm.tokens import KeyRing
from culm.wire import (
    CancelRequest,
    GetJobRequest,
    HeartbeatRequest,
    JobSpec,
    JobsQuery,
    PilotInfo,
    Principal,
    ReportRequest,
    SubmitRequest,
)
from tests.front import RunningFront, front
from tests.partition import ADMIN, PILOT, PRODUCTION, USER, Partition


@asynccontextmanager
async def of_cern(router: RunningFront, principal: Principal) -> AsyncIterator[Client]:
    """A client with a token that CERN has signed, for a namesake of the principal."""
    ring = KeyRing(router.folder / "cern-keys", router.folder / "trusted", "CERN")
    token = ring.issue(msgspec.structs.replace(principal, authority="CERN"), 600.0)
    async with Client(router.url, token, patience_s=0.0) as client:
        yield client


def asking(name: str) -> GetJobRequest:
    return GetJobRequest(request_id=f"request-{name}", queue="BNL-q", pilot=PilotInfo(id="p1"))


REQUEST = SubmitRequest(idempotency_key="k", jobs=[JobSpec(site="BNL", argv=["true"])])


async def test_namesakes_have_keys_and_jobs_of_their_own(shard: Partition) -> None:
    async with front(shard) as router, router.client(USER) as ann, of_cern(router, USER) as other:
        mine, theirs = await ann.submit(REQUEST), await other.submit(REQUEST)
        assert mine.ids != theirs.ids
        assert mine.jobset != theirs.jobset
        assert await ann.submit(REQUEST) == mine
        [mine_id], [theirs_id] = mine.ids, theirs.ids
        assert mine_id is not None
        assert theirs_id is not None
        # VOs are worldwide: each sees the other's jobs, and ends his own only.
        rows = {row.id: row.owner for row in (await ann.jobs(JobsQuery())).jobs}
        assert rows == {mine_id: "central:ann", theirs_id: "CERN:ann"}
        assert [row.id for row in (await ann.jobs(JobsQuery(owner="ann"))).jobs] == [mine_id]
        assert [row.id for row in (await other.jobs(JobsQuery(owner="ann"))).jobs] == [theirs_id]
        assert [row.id for row in (await ann.jobs(JobsQuery(owner="CERN:ann"))).jobs] == [theirs_id]
        ended = await other.cancel(CancelRequest(ids=[mine_id, theirs_id]))
        assert {job.id: job.outcome for job in ended.jobs} == {mine_id: "forbidden", theirs_id: "cancelled"}


async def test_pilots_take_from_computing_queues_of_their_own_authority(shard: Partition) -> None:
    async with front(shard) as router, router.client(USER) as ann, router.client(PILOT) as pilot:
        [job_id] = (await ann.submit(REQUEST)).ids
        for principal in (PILOT, ADMIN):
            async with of_cern(router, principal) as stranger:
                with pytest.raises(ClientFault) as caught:
                    await stranger.get_job(asking("one"))
                assert (caught.value.code, caught.value.http_status) == ("forbidden", 403)
        [grant] = (await pilot.get_job(asking("one"))).jobs
        assert grant.id == job_id
        held = {"id": grant.id, "attempt": grant.attempt, "lease_token": grant.lease_token}
        async with of_cern(router, PILOT) as stranger:
            with pytest.raises(ClientFault, match="forbidden"):
                await stranger.heartbeat(HeartbeatRequest(**held, state=State.RUNNING))
            with pytest.raises(ClientFault, match="forbidden"):
                await stranger.report(ReportRequest(**held, state=State.FINISHED))
        assert (await pilot.report(ReportRequest(**held, state=State.FINISHED))).state is State.FINISHED


async def test_admins_and_production_reach_as_far_as_their_authority(shard: Partition) -> None:
    async with front(shard) as router, router.client(USER) as ann, of_cern(router, USER) as other:
        [mine], [theirs] = (await ann.submit(REQUEST)).ids, (await other.submit(REQUEST)).ids
        assert mine is not None
        assert theirs is not None
        async with of_cern(router, ADMIN) as admin:
            # CERN's accounts are its own wherever their jobs lie, the centre's are not.
            assert [row.id for row in (await admin.jobs(JobsQuery())).jobs] == [theirs]
            assert (await admin.job(theirs)).job.owner == "CERN:ann"
            with pytest.raises(ClientFault, match="unknown_job"):
                await admin.job(mine)
        for principal in (ADMIN, PRODUCTION):
            async with of_cern(router, principal) as stranger:
                outcome = {job.id: job.outcome for job in (await stranger.cancel(CancelRequest(ids=[mine]))).jobs}
                assert outcome == {mine: "forbidden"}
                with pytest.raises(ClientFault, match="forbidden"):
                    await stranger.report(ReportRequest(id=mine, event=Event.INPUTS_READY))
        async with router.client(ADMIN) as admin:
            assert [row.id for row in (await admin.jobs(JobsQuery())).jobs] == [mine, theirs]
            outcome = {job.id: job.outcome for job in (await admin.cancel(CancelRequest(ids=[mine, theirs]))).jobs}
            assert outcome == {mine: "cancelled", theirs: "cancelled"}


async def test_a_job_without_a_place_goes_to_its_own_authoritys_default(shard: Partition) -> None:
    anywhere = SubmitRequest(idempotency_key="a", jobs=[JobSpec(argv=["true"])])
    async with front(shard) as router, router.client(USER) as ann, of_cern(router, USER) as other:
        [identifier] = (await ann.submit(anywhere)).ids
        assert identifier is not None
        with pytest.raises(ClientFault, match="CERN has no default region"):
            await other.submit(anywhere)


async def test_a_user_orders_his_own_jobs_and_is_not_put_before_others(shard: Partition) -> None:
    def asks(key: str, *priorities: int | None) -> SubmitRequest:
        jobs = [JobSpec(site="BNL", argv=["true"], priority=priority) for priority in priorities]
        return SubmitRequest(idempotency_key=key, jobs=jobs)

    async with front(shard) as router, router.client(USER) as ann, router.client(PRODUCTION) as production:
        await ann.submit(asks("many", *[None] * 50))
        [high, low, none] = (await ann.submit(asks("named", 1000, 7, None))).ids
        [first] = (await production.submit(asks("production", 5000))).ids
        rows = {row.id: row.priority for row in (await ann.jobs(JobsQuery(limit=100))).jobs}
        # 50 jobs in the system take ten off: naming the highest gives no more than naming nothing.
        assert [rows[i] for i in (high, low, none, first) if i is not None] == [990, 7, 990, 5000]
