"""A hot site over several slots of two shards: jobs spread, pilots take from all, and no repeat is stored twice."""

import secrets

import msgspec
import pytest

from culm import topology_store
from culm.errors import ClientFault, Conflict, CulmError, Unavailable
from culm.registry_wire import ChangedAnswer, SlotsRequest
from culm.topology import Section, Topology
from culm.wire import GetJobRequest, JobSpec, JobsQuery, PilotInfo, SubmitRequest
from tests.front import RunningFront
from tests.partition import ADMIN, PILOT, USER
from tests.two_partitions import NAMES, WHO, TwoPartitions

PATIENCE_S = 20.0
SITE = "UTA"


def over_both(section: Section) -> Section:
    """The site's region has both shards."""
    region = msgspec.structs.replace(section.regions["BOTH"], shards=list(NAMES))
    return msgspec.structs.replace(section, epoch=section.epoch + 1, regions=section.regions | {"BOTH": region})


async def spread(router: RunningFront, pair: TwoPartitions, n_slots: int) -> Topology:
    if len(pair.topology.region("BOTH").shards) == 1:
        topology_store.change(pair.topology_dir, "central", over_both, WHO)
    async with router.client(ADMIN) as admin:
        await admin.post("slots", SlotsRequest(site=SITE, n_slots=n_slots, reason="hot"), ChangedAnswer)
    router.forward.fresh_topology()
    return pair.topology


async def submit(router: RunningFront, key: str, n_jobs: int = 1) -> list[int]:
    async with router.client(USER, patience_s=PATIENCE_S) as client:
        jobs = [JobSpec(site=SITE, argv=["true", key])] * n_jobs
        answer = await client.submit(SubmitRequest(idempotency_key=key, jobs=jobs))
    return [identifier for identifier in answer.ids if identifier is not None]


async def test_repeats_find_their_jobs_however_often_the_site_has_grown(
    router: RunningFront, pair: TwoPartitions
) -> None:
    first = {f"key-{n}": await submit(router, f"key-{n}", 1 + n % 3) for n in range(20)}
    for n_slots in (4, 12):
        topology = await spread(router, pair, n_slots)
        assert len(topology.site(SITE).slots) == n_slots
        assert {topology.place(slot).shard for slot in topology.site(SITE).slots} == set(NAMES)
        assert {key: await submit(router, key, len(ids)) for key, ids in first.items()} == first
        fresh = {f"key-{n_slots}-{n}": await submit(router, f"key-{n_slots}-{n}") for n in range(30)}
        assert len({ids[0] >> 39 for ids in fresh.values()}) > 3
        first |= fresh
    ids = {identifier for some in first.values() for identifier in some}
    assert sum([await pair.n_jobs(name) for name in NAMES]) == len(ids) == sum(map(len, first.values()))
    async with router.client(USER) as user:
        assert {row.id for row in (await user.jobs(JobsQuery(site=SITE, limit=1000))).jobs} == ids
    taken: list[int] = []
    async with router.client(PILOT, patience_s=PATIENCE_S) as pilot:
        for n in range(len(ids)):
            request = GetJobRequest(request_id=secrets.token_hex(8), queue=f"{SITE}-q", pilot=PilotInfo(id=f"p{n % 7}"))
            taken += [grant.id for grant in (await pilot.get_job(request)).jobs]
    assert sorted(taken) == sorted(ids)


async def test_with_a_silent_shard_a_repeat_is_rather_refused_than_stored_twice(
    router: RunningFront, pair: TwoPartitions
) -> None:
    keys = [f"key-{n}" for n in range(12)]
    first = {key: await submit(router, key) for key in keys}
    home = pair.topology.place(pair.topology.site(SITE).slots[0]).shard
    other = next(name for name in NAMES if name != home)
    await spread(router, pair, 8)
    for key in keys:
        assert await submit(router, key) == first[key]
    await pair.stop(home)
    before = await pair.n_jobs(other)
    async with router.client(USER, patience_s=0.0) as client:
        for key in keys:
            with pytest.raises(Unavailable):
                await client.submit(SubmitRequest(idempotency_key=key, jobs=[JobSpec(site=SITE, argv=["true", key])]))
    assert await pair.n_jobs(other) == before
    await pair.start(home)
    for key in keys:
        assert await submit(router, key) == first[key]


async def test_who_may_spread_what(router: RunningFront, pair: TwoPartitions) -> None:
    topology = await spread(router, pair, 3)
    for who, request, code in (
        (USER, SlotsRequest(site=SITE, n_slots=5), "forbidden"),
        (ADMIN, SlotsRequest(site="Mars", n_slots=5), "unknown_site"),
        (ADMIN, SlotsRequest(site=SITE, n_slots=2), "slots_cannot_shrink"),
        (ADMIN, SlotsRequest(site=SITE, n_slots=65), "too_many_slots"),
    ):
        async with router.client(who) as client:
            with pytest.raises(CulmError) as told:
                await client.post("slots", request, ChangedAnswer)
            assert isinstance(told.value, ClientFault | Conflict)
            assert told.value.code == code
    # As many as there are is no change.
    assert (await spread(router, pair, 3)).epochs == topology.epochs
