"""Policies: each VO and computing queue has time-outs and defaults of its own, changed while everything runs."""

import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from culm import topology_store
from culm.errors import ClientFault, Conflict
from culm.policies import Policy
from culm.registry_wire import ChangedAnswer, QueueRequest, VoRequest
from culm.settings import DispatchSettings, SubmitDefaults, Timeouts
from culm.states import State
from culm.topology import Section
from culm.topology_store import AUDIT
from culm.wire import (
    GetJobRequest,
    Grant,
    InputFile,
    JobSpec,
    LeaseTimes,
    PilotInfo,
    Principal,
    SubmitRequest,
)
from tests.front import RunningFront, front
from tests.partition import ADMIN, OFFER, PILOT, PRODUCTION, QUEUE, USER, Partition, Servers, job, partition
from tests.waiting import eventually

DEADLINE_S = 15.0
CMS = Principal(role="user", subject="eve", authority="central", vo="cms")
CMS_PRODUCTION = msgspec.structs.replace(CMS, subject="cms-prod", roles=["production"])


async def say(router: RunningFront, shard: Partition, vo: str, **changes: Any) -> ChangedAnswer:
    """Set a VO's policy as an admin; the shard knows it."""
    async with router.client(ADMIN) as admin:
        answer = await admin.post("vo", VoRequest(vo=vo, changes=changes, reason="a test"), ChangedAnswer)
    return await _known(shard, answer)


async def describe(router: RunningFront, shard: Partition, **changes: Any) -> ChangedAnswer:
    """Change the computing queue as an admin; router and shard know it."""
    async with router.client(ADMIN) as admin:
        answer = await admin.post("queue", QueueRequest(queue=QUEUE, changes=changes), ChangedAnswer)
    router.forward.fresh_topology()
    return await _known(shard, answer)


async def _known(shard: Partition, answer: ChangedAnswer) -> ChangedAnswer:
    await eventually(
        lambda: shard.shard.topology.current.epochs["central"] >= answer.epoch, DEADLINE_S, what="the shard knows it"
    )
    return answer


@pytest.fixture
async def router(shard: Partition) -> AsyncIterator[RunningFront]:
    """A router over one shard."""
    async with front(shard) as running:
        yield running


def section(shard: Partition) -> Section:
    """The centre's section, as it is on disk."""
    return topology_store.load_section(Path(shard.settings.topology_dir), "central")


async def granted(shard: Partition, who: Principal, **spec: Any) -> Grant:
    """A job of somebody, taken by a pilot."""
    [identifier] = await shard.submit(job(**spec), who=who)
    [grant] = await shard.get()
    assert grant.id == identifier
    return grant


# --- time-outs -------------------------------------------------------------------------------------------------------


async def test_of_two_vos_on_one_shard_the_reaper_takes_the_one_whose_heartbeat_is_late(
    shard: Partition, router: RunningFront
) -> None:
    await say(router, shard, "cms", heartbeat_s=0.2)
    mine, theirs = await granted(shard, USER), await granted(shard, CMS)
    assert (mine.heartbeat_s, theirs.heartbeat_s) == (shard.settings.timeouts.heartbeat_s, 0.2)
    assert mine.lease_s == theirs.lease_s == shard.settings.timeouts.first_lease_s
    assert (await shard.heartbeat(mine)).lease_s == shard.settings.timeouts.heartbeat_s
    assert (await shard.heartbeat(theirs)).lease_s == 0.2

    async def taken() -> bool:
        return await shard.state(theirs.id) is State.ACTIVATED

    await eventually(taken, DEADLINE_S, what="the late one is activated again")
    assert await shard.shard.reaper.end_leases() == 0
    assert await shard.state(mine.id) is State.RUNNING
    with pytest.raises(Conflict, match="lease_lost"):
        await shard.heartbeat(theirs)


async def test_a_change_is_obeyed_by_the_next_claim_and_never_by_a_lease_that_was_told_otherwise(
    shard: Partition, router: RunningFront
) -> None:
    await say(router, shard, "cms", first_lease_s=500, heartbeat_s=1000)
    before = await granted(shard, CMS)
    assert (before.lease_s, before.heartbeat_s) == (500, 1000)
    await say(router, shard, "cms", first_lease_s=0, heartbeat_s=2000)
    after = await granted(shard, CMS)
    assert (after.lease_s, after.heartbeat_s) == (shard.settings.timeouts.first_lease_s, 2000)
    # Its pilot was told 1000, and need not look again.
    assert (await shard.heartbeat(before)).heartbeat_s == 1000


async def test_what_comes_after_the_payload_has_the_policy_of_the_moment(
    shard: Partition, router: RunningFront
) -> None:
    await say(router, shard, "cms", holding_s=111, transferring_s=222)
    grant = await granted(shard, CMS)
    await shard.report(grant, State.HOLDING)
    assert (await shard.heartbeat(grant, State.HOLDING)).lease_s == 111
    await say(router, shard, "cms", holding_s=333)
    assert (await shard.heartbeat(grant, State.HOLDING)).lease_s == 333
    await describe(router, shard, holding_s=444)
    assert (await shard.heartbeat(grant, State.HOLDING)).lease_s == 444
    moved = await granted(shard, CMS)
    await shard.report(moved, State.TRANSFERRING)
    assert (await shard.heartbeat(moved, State.TRANSFERRING)).lease_s == 222


async def test_the_computing_queues_own_time_outs_come_before_the_vos(shard: Partition, router: RunningFront) -> None:
    await say(router, shard, "atlas", first_lease_s=100, heartbeat_s=200)
    await describe(router, shard, heartbeat_s=50)
    async with router.client(USER) as user, router.client(PILOT) as pilot:
        await user.submit(SubmitRequest(idempotency_key="k", jobs=[job()]))
        [grant] = (
            await pilot.get_job(GetJobRequest(request_id=secrets.token_hex(8), queue=QUEUE, pilot=PilotInfo(id="p1")))
        ).jobs
    assert (grant.lease_s, grant.heartbeat_s) == (100, 50)


async def test_in_one_batch_each_job_has_the_lease_of_its_own_vo(shard: Partition, router: RunningFront) -> None:
    await say(router, shard, "cms", heartbeat_s=300)
    await shard.submit(job(), job(), who=USER)
    await shard.submit(job(), job(), who=CMS)
    leases = {(grant.vo, grant.heartbeat_s) for grant in await shard.get(n_jobs=4)}
    assert leases == {("atlas", shard.settings.timeouts.heartbeat_s), ("cms", 300)}
    assert await shard.get(lease=LeaseTimes(1.0, 2.0)) == []


@pytest.mark.parametrize("ready", [True, False])
async def test_who_may_wait_for_long_hides_nobody_who_may_not(
    both: Servers, ready: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More jobs of the patient VO, and older ones, than one look goes through."""
    monkeypatch.setattr("shard.reaper.MAX_EXAMINED", 3)
    # No turn of the shard's own: each look here is one that the test has asked for.
    quiet = DispatchSettings(reap_interval_s=3600.0, sweep_interval_s=0.2)
    async with partition(both, dispatch=quiet) as shard, front(shard) as router:
        spec = {"inputs": [InputFile(name="in.root", ready=ready)]}
        patient = await shard.submit(*[job(**spec)] * 7, who=USER)
        [theirs] = await shard.submit(job(**spec), who=CMS)
        [pinned] = await shard.submit(job(queue=QUEUE, **spec), who=CMS)
        await say(router, shard, "cms", **{"activated_s" if ready else "unready_s": 0.05})
        await describe(router, shard, **{"activated_s" if ready else "unready_s": 3600})
        n_looks = 0

        async def closed() -> bool:
            nonlocal n_looks
            n_looks += 1
            await shard.shard.reaper.close_old()
            return await shard.state(theirs) is State.CLOSED

        await eventually(closed, DEADLINE_S, what="the impatient VO's job is closed")
        assert n_looks >= 3
        states = {await shard.state(one) for one in (*patient, pinned)}
        assert states == {State.ACTIVATED if ready else State.DEFINED}


# --- defaults --------------------------------------------------------------------------------------------------------


async def test_a_submit_gets_the_defaults_of_its_vo_and_of_the_computing_queue_it_names(
    shard: Partition, router: RunningFront
) -> None:
    await say(router, shard, "cms", default_cores=4, default_memory_mb=2000, default_walltime_s=60)
    await say(router, shard, "cms", default_max_attempts=7, default_disk_mb=10)
    await describe(router, shard, cores=8, default_memory_mb=3000)
    asked = [job(), job(queue=QUEUE), job(cores=1, memory_mb=500, walltime_s=5, max_attempts=1, disk_mb=20)]
    views = [await shard.job(one) for one in await shard.submit(*asked, who=CMS)]
    figures = [
        (one.spec.cores, one.spec.memory_mb, one.spec.disk_mb, one.spec.walltime_s, one.spec.max_attempts)
        for one in views
    ]
    assert figures == [(4, 2000, 10, 60, 7), (4, 3000, 10, 60, 7), (1, 500, 20, 5, 1)]
    assert [one.job.max_attempts for one in views] == [7, 7, 1]
    # A pilot is matched with what is stored, and told it.
    assert [grant.id for grant in await shard.get(offer=msgspec.structs.replace(OFFER, cores=1), n_jobs=9)] == [
        views[2].job.id
    ]
    told = [msgspec.msgpack.decode(grant.spec, type=JobSpec) for grant in await shard.get(n_jobs=9)]
    assert sorted(one.memory_mb for one in told) == [2000, 3000]
    # Another VO has none of it.
    [identifier] = await shard.submit(job(), who=USER)
    spec = (await shard.job(identifier)).spec
    assert (spec.cores, spec.memory_mb, spec.max_attempts) == (1, 0, 3)


async def test_the_settings_are_asked_last(both: Servers) -> None:
    defaults = SubmitDefaults(cores=2, memory_mb=100, max_attempts=9, max_priority=400)
    async with partition(both, timeouts=Timeouts(grace_s=0.001), submit=defaults) as shard, front(shard) as router:
        await say(router, shard, "cms", default_memory_mb=200)
        views = [await shard.job((await shard.submit(job(), who=who))[0]) for who in (USER, CMS)]
        assert [(one.spec.cores, one.spec.memory_mb, one.job.max_attempts) for one in views] == [
            (2, 100, 9),
            (2, 200, 9),
        ]
        assert [one.job.priority for one in views] == [400, 400]


async def test_a_priority_is_bounded_for_production_too(shard: Partition, router: RunningFront) -> None:
    await say(router, shard, "cms", max_priority=500)
    ids = await shard.submit(job(), job(priority=300), who=CMS)
    ids += await shard.submit(job(priority=9000), who=CMS_PRODUCTION)
    assert [(await shard.job(one)).job.priority for one in ids] == [500, 300, 500]
    [free] = await shard.submit(job(priority=9000), who=PRODUCTION)
    assert (await shard.job(free)).job.priority == 9000


async def test_a_repeat_across_a_change_of_the_policy_is_the_same_submit(
    shard: Partition, router: RunningFront
) -> None:
    async with router.client(CMS) as user:
        request = SubmitRequest(idempotency_key="k", jobs=[job(), job()])
        first = await user.submit(request)
        await say(router, shard, "cms", default_memory_mb=2000)
        assert (await user.submit(request)).ids == first.ids
        assert (await shard.rows("SELECT COUNT(*) FROM job"))[0][0] == 2


# --- who may set what ------------------------------------------------------------------------------------------------


async def test_a_policy_is_a_versioned_audited_change_and_0_takes_it_back(
    shard: Partition, router: RunningFront
) -> None:
    before = section(shard)
    first = await say(router, shard, "cms", heartbeat_s=300)
    assert first.epoch == before.epoch + 1
    assert section(shard).vos == {"cms": Policy(heartbeat_s=300)}
    assert (await say(router, shard, "cms", heartbeat_s=300)).epoch == first.epoch
    rows = (Path(shard.settings.topology_dir) / AUDIT).read_bytes().splitlines()
    row = msgspec.json.decode(rows[-1])
    assert (row["actor"], row["reason"], row["to_epoch"]) == ("central:root", "a test", first.epoch)
    async with router.client(ADMIN) as admin:
        late = VoRequest(vo="cms", changes={"heartbeat_s": 1}, expected_epoch=before.epoch)
        with pytest.raises(Conflict, match="epoch_changed"):
            await admin.post("vo", late, ChangedAnswer)
    assert section(shard).vos == {"cms": Policy(heartbeat_s=300)}
    await say(router, shard, "cms", heartbeat_s=0)
    assert section(shard).vos == {}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"colour": 1},
        {"heartbeat_s": -1},
        {"heartbeat_s": 1e300},
        {"heartbeat_s": "long"},
        {"default_max_attempts": 51},
        {"default_cores": 1.5},
        {"max_priority": 2_000_000},
        {"status": "offline"},
        {"section": 1},
    ],
    ids=str,
)
async def test_a_policy_that_cannot_be_changes_nothing(
    shard: Partition, router: RunningFront, changes: dict[str, Any]
) -> None:
    before = section(shard)
    body = msgspec.json.encode({"vo": "cms", "changes": changes})
    reply = await router.send("POST", "/v1/vo", body, token=router.token(ADMIN))
    assert (reply.status, reply.code) == (400, "bad_vo" if changes else "bad_request")
    assert section(shard) == before


async def test_a_default_that_the_computing_queue_does_not_have_is_refused(
    shard: Partition, router: RunningFront
) -> None:
    with pytest.raises(ClientFault, match="bad_topology"):
        await describe(router, shard, memory_mb=2000, default_memory_mb=3000)
    assert section(shard).sites["BNL"].queues[QUEUE].memory_mb == 0


@pytest.mark.parametrize("who", [USER, PRODUCTION, PILOT], ids=lambda who: who.subject)
async def test_only_an_admin_sets_a_policy(shard: Partition, router: RunningFront, who: Principal) -> None:
    before = section(shard)
    body = msgspec.json.encode({"vo": "atlas", "changes": {"max_priority": 1}})
    reply = await router.send("POST", "/v1/vo", body, token=router.token(who))
    assert (reply.status, reply.code) == (403, "forbidden")
    assert section(shard) == before


async def test_the_centre_sets_nothing_at_the_router_of_another_authority(shard: Partition) -> None:
    """The strict region's section is its own: what an admin of the centre says there is refused."""
    before = section(shard)
    async with front(shard, authority="CERN") as router, router.client(ADMIN) as admin:
        with pytest.raises(ClientFault, match="CERN only") as caught:
            await admin.post("vo", VoRequest(vo="atlas", changes={"heartbeat_s": 1}), ChangedAnswer)
        assert caught.value.http_status == 403
    assert section(shard) == before
