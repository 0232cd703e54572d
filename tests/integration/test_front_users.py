"""What users see of a router: jobs of their own VO, rules of cancel, parents, keys."""

import secrets
from typing import Any

import msgspec
import pytest

from culm.client import Client
from culm.errors import ClientFault, Conflict
from culm.states import Event, State
from culm.wire import (
    MAX_PARENT_DEPTH,
    CancelRequest,
    GetJobRequest,
    JobSpec,
    JobsQuery,
    PilotInfo,
    Principal,
    ReportRequest,
    SubmitRequest,
)
from tests.front import front
from tests.partition import ADMIN, OTHER_USER, PILOT, PRODUCTION, QUEUE, USER, Partition, Servers, job, partition

MANAGER = Principal(role="user", subject="max", authority="central", vo="atlas", roles=["manager:higgs"])
STRANGER = Principal(role="user", subject="cy", authority="central", vo="charmm", roles=["production", "manager:higgs"])


async def submit(user: Client, *specs: JobSpec, **changes: Any) -> list[int]:
    """Submit these jobs, or one small one; the ids."""
    values = {"idempotency_key": secrets.token_hex(8), "jobs": list(specs) or [job()]}
    return [identifier or 0 for identifier in (await user.submit(SubmitRequest(**(values | changes)))).ids]


async def outcomes(who: Client, *ids: int) -> list[str]:
    """What a cancel of these jobs says of each."""
    by_id = {one.id: one.outcome for one in (await who.cancel(CancelRequest(ids=list(ids)))).jobs}
    return [by_id[identifier] for identifier in ids]


async def test_users_see_the_jobs_of_their_own_vo(shard: Partition) -> None:
    async with front(shard) as router, router.client() as ann, router.client(STRANGER) as cy:
        [mine], [theirs] = await submit(ann), await submit(cy)
        assert [row.id for row in (await ann.jobs(JobsQuery())).jobs] == [mine]
        assert [row.id for row in (await cy.jobs(JobsQuery())).jobs] == [theirs]
        async with router.client(OTHER_USER) as bob:
            assert (await bob.job(mine)).job.owner == "central:ann"
        async with router.client(ADMIN) as admin:
            assert [row.id for row in (await admin.jobs(JobsQuery())).jobs] == [mine, theirs]
        for who, hidden in ((ann, theirs), (cy, mine)):
            with pytest.raises(ClientFault) as caught:
                await who.job(hidden)
            assert (caught.value.code, caught.value.http_status) == ("unknown_job", 404)


async def test_a_user_without_a_vo_sees_no_vos_jobs(shard: Partition) -> None:
    nobody = msgspec.structs.replace(USER, vo="", groups=[])
    async with front(shard) as router, router.client() as ann, router.client(nobody) as lost:
        [mine] = await submit(ann)
        assert (await lost.jobs(JobsQuery())).jobs == []
        assert await outcomes(lost, mine) == ["forbidden"]


@pytest.mark.parametrize(
    ("who", "outcome"),
    [
        (USER, "cancelled"),
        (OTHER_USER, "forbidden"),
        (MANAGER, "cancelled"),
        (PRODUCTION, "cancelled"),
        (ADMIN, "cancelled"),
        (STRANGER, "forbidden"),
        (msgspec.structs.replace(MANAGER, roles=["manager:susy"]), "forbidden"),
        (msgspec.structs.replace(USER, vo="charmm"), "forbidden"),
    ],
    ids=["owner", "another", "manager", "production", "admin", "stranger", "manager of susy", "namesake"],
)
async def test_who_may_cancel_whose_job(shard: Partition, who: Principal, outcome: str) -> None:
    async with front(shard) as router, router.client() as ann, router.client(who) as other:
        [mine] = await submit(ann, job(working_group="higgs"))
        assert await outcomes(other, mine) == [outcome]
        state = State.CANCELLED if outcome == "cancelled" else State.ACTIVATED
        assert (await ann.job(mine)).job.state is state


async def test_each_id_of_a_cancel_has_its_outcome(shard: Partition) -> None:
    async with (
        front(shard) as router,
        router.client() as ann,
        router.client(OTHER_USER) as bob,
        router.client(PILOT) as pilot,
    ):
        [running] = await submit(ann)
        request = GetJobRequest(request_id=secrets.token_hex(8), queue=QUEUE, pilot=PilotInfo(id="p1"))
        assert [grant.id for grant in (await pilot.get_job(request)).jobs] == [running]
        [waiting], [theirs] = await submit(ann), await submit(bob)
        never, nowhere = waiting + 100_000, (8000 << 39) + 1
        ids = (running, waiting, theirs, never, nowhere)
        assert await outcomes(ann, *ids) == ["requested", "cancelled", "forbidden", "not_found", "not_found"]
        assert await outcomes(ann, *ids) == ["requested", "already_final", "forbidden", "not_found", "not_found"]
        repeated = await ann.cancel(CancelRequest(ids=[waiting] * 3))
        assert [(one.id, one.outcome) for one in repeated.jobs] == [(waiting, "already_final")]


@pytest.mark.parametrize("order", ["newest", "id"])
async def test_a_sites_list_has_what_ran_there_wherever_it_waited(both: Servers, order: Any) -> None:
    async with (
        partition(both, "BNL", "AGLT2") as shard,
        front(shard) as router,
        router.client(USER) as ann,
        router.client(PILOT) as pilot,
    ):
        jobs = [JobSpec(site="BNL", argv=["true"]), *[JobSpec(region="US", argv=["true"])] * 2]
        ids = [one for one in (await ann.submit(SubmitRequest(idempotency_key="k", jobs=jobs))).ids if one is not None]

        async def listed(site: str, region: str = "") -> list[int]:
            query = JobsQuery(site=site, region=region, order=order)
            return sorted(row.id for row in (await ann.jobs(query)).jobs)

        assert (await listed("BNL"), await listed("AGLT2")) == (ids[:1], [])
        for queue in ("BNL-q", "AGLT2-q"):
            request = GetJobRequest(request_id=f"request-{queue}", queue=queue, pilot=PilotInfo(id="p"))
            for grant in (await pilot.get_job(request)).jobs:
                held = {"id": grant.id, "attempt": grant.attempt, "lease_token": grant.lease_token}
                await pilot.report(ReportRequest(**held, state=State.FINISHED))  # type: ignore[arg-type]
        there, here = await listed("AGLT2"), await listed("BNL", "US")
        assert (len(there), here) == (1, sorted({*ids} - {*there}))
        # Archived it is the same.
        await ann.cancel(CancelRequest(ids=ids))
        await shard.sql("UPDATE job SET modified_at = DATE_SUB(modified_at, INTERVAL 2 HOUR)")
        while await shard.shard.archive.move(3600.0):
            pass
        assert await shard.rows("SELECT COUNT(*) FROM job") == [(0,)]
        assert (await listed("AGLT2"), await listed("BNL")) == (there, here)
        with pytest.raises(ClientFault, match="bad_target"):
            await listed("BNL", "EU")


@pytest.mark.parametrize(("per_call", "seconds"), [(5, 60.0), (10_000, -1.0), (10_000, 60.0)])
async def test_a_large_jobset_is_ended_in_several_calls(
    shard: Partition, monkeypatch: pytest.MonkeyPatch, per_call: int, seconds: float
) -> None:
    monkeypatch.setattr("shard.lifecycle._IDS_PER_TRANSACTION", 4)
    monkeypatch.setattr("shard.lifecycle._ENDED_PER_CALL", per_call)
    monkeypatch.setattr("shard.lifecycle._ENDING_S", seconds)
    stranger = msgspec.structs.replace(OTHER_USER, vo="cms")
    async with front(shard) as router, router.client(USER) as ann, router.client(stranger) as cy:
        jobs = [JobSpec(site="BNL", argv=["true"])] * 19
        answer = await ann.submit(SubmitRequest(idempotency_key="k", jobs=jobs))
        ids = [one for one in answer.ids if one is not None]
        await ann.cancel(CancelRequest(ids=ids[3:4]))
        # Of what he may not see nothing is said, and nothing is locked.
        assert (await cy.cancel_jobset(answer.jobset)).jobs == []
        first = await ann.cancel(CancelRequest(jobset=answer.jobset))
        assert (first.next is None) == (per_call > 19 and seconds > 0)
        ended = await ann.cancel_jobset(answer.jobset)
        assert {one.id for one in (*ended.jobs, *first.jobs)} == set(ids)
        assert ended.next is None
        assert {row.state for row in (await ann.jobs(JobsQuery(jobset=answer.jobset))).jobs} == {State.CANCELLED}
        with pytest.raises(ClientFault, match="bad_cancel"):
            await ann.cancel(CancelRequest(ids=ids[:1], after=5))


async def test_a_jobset_is_cancelled_as_a_whole_but_for_what_is_not_ours(shard: Partition) -> None:
    async with front(shard) as router, router.client() as ann, router.client(OTHER_USER) as bob:
        answer = await ann.submit(SubmitRequest(idempotency_key="a", jobs=[job(), job()]))
        joined = await submit(ann, jobset=answer.jobset)
        theirs = await submit(bob, jobset=answer.jobset)
        ended = {one.id: one.outcome for one in (await ann.cancel(CancelRequest(jobset=answer.jobset))).jobs}
        assert ended == dict.fromkeys([*answer.ids, *joined], "cancelled") | dict.fromkeys(theirs, "forbidden")


async def test_pages_of_jobs_are_complete_and_filters_hold(shard: Partition) -> None:
    async with front(shard) as router, router.client() as ann, router.client(OTHER_USER) as bob:
        ids = await submit(ann, *[job(name=f"n{n}") for n in range(7)])
        theirs = await submit(bob)
        seen, after = [], 0
        while True:
            page = await ann.jobs(JobsQuery(limit=3, after=after))
            seen += [row.id for row in page.jobs]
            if page.next is None:
                break
            after = page.next
        assert seen == sorted(ids + theirs)
        assert [row.id for row in (await ann.jobs(JobsQuery(owner="bob"))).jobs] == theirs
        assert len((await ann.jobs(JobsQuery(site="BNL"))).jobs) == 8
        assert len((await ann.jobs(JobsQuery(region="US"))).jobs) == 8
        assert (await ann.jobs(JobsQuery(state=State.RUNNING))).jobs == []
        for query, code in ((JobsQuery(site="X"), "unknown_site"), (JobsQuery(region="X"), "unknown_region")):
            with pytest.raises(ClientFault) as caught:
                await ann.jobs(query)
            assert caught.value.code == code


async def test_jobs_submit_jobs_to_a_depth(shard: Partition) -> None:
    async with front(shard) as router, router.client() as ann:
        [parent] = await submit(ann)
        for _ in range(MAX_PARENT_DEPTH):
            [child] = await submit(ann, job(parent_id=parent))
            assert (await ann.job(child)).job.parent_id == parent
            parent = child
        with pytest.raises(ClientFault) as caught:
            await submit(ann, job(), job(parent_id=parent))
        assert caught.value.code == "too_deep"
        assert len((await ann.jobs(JobsQuery())).jobs) == MAX_PARENT_DEPTH + 1


async def test_a_repeated_key_gives_the_same_ids_and_other_jobs_are_a_conflict(shard: Partition) -> None:
    async with front(shard) as router, router.client() as ann, router.client(OTHER_USER) as bob:
        first = await ann.submit(SubmitRequest(idempotency_key="k", jobs=[job(), job()]))
        assert await ann.submit(SubmitRequest(idempotency_key="k", jobs=[job(), job()])) == first
        for jobs in ([job(cores=2), job()], [job()], [job(), job(), job()]):
            with pytest.raises(Conflict) as caught:
                await ann.submit(SubmitRequest(idempotency_key="k", jobs=jobs))
            assert caught.value.code == "key_reused"
        # A key belongs to its owner.
        assert set(await submit(bob, idempotency_key="k")).isdisjoint(first.ids)
        assert len(await shard.rows("SELECT id FROM job")) == 3


async def test_only_production_and_admins_submit_production(shard: Partition) -> None:
    async with front(shard) as router:
        for who, allowed in ((USER, False), (PRODUCTION, True), (ADMIN, True)):
            async with router.client(who) as client:
                for spec in (job(label="managed"), job(priority=5000)):
                    if allowed:
                        assert len(await submit(client, spec)) == 1
                    else:
                        with pytest.raises(ClientFault) as caught:
                            await submit(client, spec)
                        assert caught.value.code == "forbidden"


async def test_only_the_data_side_of_the_vo_says_what_became_of_files(shard: Partition) -> None:
    spec = msgspec.convert({"site": "BNL", "argv": ["true"], "inputs": [{"name": "f", "ready": False}]}, JobSpec)
    async with front(shard) as router, router.client() as ann:
        [waits] = await submit(ann, spec)
        for who in (USER, STRANGER, PILOT):
            async with router.client(who) as client:
                with pytest.raises(ClientFault) as caught:
                    await client.report(ReportRequest(id=waits, event=Event.INPUTS_READY))
                assert caught.value.code == "forbidden"
        assert (await ann.job(waits)).job.state is State.DEFINED
        async with router.client(PRODUCTION) as data:
            await data.report(ReportRequest(id=waits, event=Event.ASSIGN))
            assert (await data.report(ReportRequest(id=waits, event=Event.INPUTS_READY))).state is State.ACTIVATED


async def test_an_owners_state_report_is_the_pilots_to_make(shard: Partition) -> None:
    async with front(shard) as router, router.client() as ann:
        [mine] = await submit(ann)
        with pytest.raises(ClientFault) as caught:
            await ann.report(ReportRequest(id=mine, attempt=1, lease_token="t", state=State.FINISHED))
        assert caught.value.code == "forbidden"
