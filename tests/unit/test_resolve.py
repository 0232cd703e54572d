"""From names to slots: pins, hot sites, a pilot's slots, what a pilot and its computing queue offer together."""

import pytest

from culm import labels
from culm.errors import ClientFault
from culm.topology import CENTRAL, Placement, Queue, Region, Section, Shard, Site, Topology
from culm.wire import GetJobRequest, JobSpec, LeaseTimes, PilotInfo, Principal, SlotRef
from router import resolve

PILOT = Principal(role="pilot", subject="pilots", authority=CENTRAL, queues=["*"])


def topology(**queue: object) -> Topology:
    """BNL is hot and has two slots, on two shards; MWT2 has one; the slot of region US is on us1."""
    section = Section(
        authority=CENTRAL,
        epoch=9,
        shards={"us1": Shard(link="unix:/run/us1"), "us2": Shard(link="unix:/run/us2")},
        regions={"US": Region(slot=0, shards=["us1"]), "EU": Region(slot=5, shards=["us2"])},
        sites={
            "BNL": Site(
                region="US",
                slots=[1, 2],
                queues={
                    "BNL-q": Queue(**queue),  # type: ignore[arg-type]  # fields by name
                    "BNL-low": Queue(priority_offsets={"": -10, "higgs": 40}),
                },
            ),
            "MWT2": Site(region="US", slots=[3], queues={"MWT2-q": Queue()}),
        },
        placement={
            0: Placement("us1", 1),
            1: Placement("us1", 4),
            2: Placement("us2", 7),
            3: Placement("us1", 3),
            5: Placement("us2", 1),
        },
        default_region="EU",
    )
    return Topology([section])


def spec(**changes: object) -> JobSpec:
    return JobSpec(**({"argv": ["true"]} | changes))  # type: ignore[arg-type]  # fields by name


def request(**changes: object) -> GetJobRequest:
    values = {"request_id": "12345678", "queue": "BNL-q", "pilot": PilotInfo(id="p1", type="big")}
    return GetJobRequest(**(values | changes))  # type: ignore[arg-type]  # fields by name


# --- target_slot ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "slot"),
    [
        ({"queue": "MWT2-q"}, 3),
        ({"queue": "MWT2-q", "site": "MWT2", "region": "US"}, 3),
        ({"site": "MWT2"}, 3),
        ({"site": "MWT2", "region": "US"}, 3),
        ({"region": "US"}, 0),
        ({}, 5),
    ],
)
def test_a_queue_beats_a_site_beats_a_region_beats_the_default(target: dict[str, str], slot: int) -> None:
    assert resolve.target_slot(topology(), spec(**target), "key") == slot


@pytest.mark.parametrize(
    ("target", "code", "status"),
    [
        ({"queue": "nowhere"}, "unknown_queue", 404),
        ({"site": "nowhere"}, "unknown_site", 404),
        ({"region": "nowhere"}, "unknown_region", 404),
        ({"queue": "MWT2-q", "site": "BNL"}, "bad_target", 400),
        ({"queue": "MWT2-q", "region": "EU"}, "bad_target", 400),
        ({"site": "MWT2", "region": "EU"}, "bad_target", 400),
        ({"site": "MWT2", "region": "nowhere"}, "bad_target", 400),
    ],
)
def test_targets_that_are_unknown_or_disagree_are_refused(target: dict[str, str], code: str, status: int) -> None:
    with pytest.raises(ClientFault) as caught:
        resolve.target_slot(topology(), spec(**target), "key")
    assert (caught.value.code, caught.value.http_status) == (code, status)


def test_without_a_default_region_a_job_must_name_its_place() -> None:
    empty = Topology([Section(authority=CENTRAL, epoch=1)])
    with pytest.raises(ClientFault, match="no default region"):
        resolve.target_slot(empty, spec(), "key")


def test_a_hot_site_spreads_keys_over_its_slots_and_a_repeat_goes_where_the_first_went() -> None:
    keys = [f"key-{number}" for number in range(200)]
    first = [resolve.target_slot(topology(), spec(site="BNL"), key) for key in keys]
    again = [resolve.target_slot(topology(), spec(queue="BNL-q"), key) for key in keys]
    assert first == again
    assert 60 < first.count(1) < 140
    assert set(first) == {1, 2}


def test_the_hash_that_places_jobs_is_the_same_for_ever() -> None:
    """Pinned: another value would send the repeat of a key to another slot after an upgrade."""
    assert resolve.stable_hash("key") == 61_236_350_311_001
    assert resolve.stable_hash("a", "b") != resolve.stable_hash("ab")
    assert resolve.jobset_of("ann", "one") == 92_987_004_654_043
    assert resolve.jobset_of("ann", "one") != resolve.jobset_of("bob", "one")


# --- split_by_shard -------------------------------------------------------------------------------------------------


def test_a_call_is_cut_by_shard_and_slot_and_every_place_is_kept() -> None:
    specs = [spec(site="MWT2", name="0"), spec(region="EU", name="1"), spec(region="US", name="2"), spec(name="3")]
    parts = resolve.split_by_shard(topology(), [*specs, spec(site="MWT2", name="4")], "key")
    assert [part.shard for part in parts] == ["us1", "us2"]
    assert [part.places for part in parts] == [[[0, 4], [2]], [[1, 3]]]
    assert [part.n_jobs for part in parts] == [3, 2]
    assert [slot.at for part in parts for slot in part.slots] == [SlotRef(3, 3), SlotRef(0, 1), SlotRef(5, 1)]
    for part in parts:
        for places, slot in zip(part.places, part.slots, strict=True):
            assert [int(one.name) for one in slot.specs] == places


def test_the_first_bad_job_is_named_by_its_place() -> None:
    specs = [spec(site="MWT2"), spec(site="nowhere"), spec(queue="nowhere")]
    with pytest.raises(ClientFault) as caught:
        resolve.split_by_shard(topology(), specs, "key")
    assert (caught.value.code, caught.value.http_status, caught.value.details) == ("unknown_site", 404, {"index": 1})
    assert caught.value.message.startswith("jobs[1]: ")


@pytest.mark.parametrize(
    ("job", "offsets"),
    [
        ({"queue": "BNL-low"}, [-10]),
        ({"queue": "BNL-low", "working_group": "higgs"}, [40]),
        ({"queue": "BNL-low", "working_group": "susy"}, [-10]),
        ({"site": "BNL", "working_group": "higgs"}, [40]),
        ({"queue": "BNL-q", "working_group": "higgs"}, []),
        ({"region": "US", "working_group": "higgs"}, []),
    ],
)
def test_the_largest_priority_offset_that_applies_wins(job: dict[str, str], offsets: list[int]) -> None:
    [part] = resolve.split_by_shard(topology(), [spec(**job)], "key")
    assert part.slots[0].offsets == offsets


def test_jobs_with_and_without_an_offset_keep_their_places_beside_each_other() -> None:
    specs = [spec(queue="BNL-q"), spec(queue="BNL-low")]
    [part] = resolve.split_by_shard(topology(), specs, "key")
    assert part.slots[0].offsets == [0, -10]


# --- pilots ---------------------------------------------------------------------------------------------------------


def test_a_pilot_has_a_home_slot_then_its_siblings_then_the_regions_own() -> None:
    known = topology()
    homes = set()
    for number in range(40):
        by_shard = resolve.pilot_slots(known, known.site("BNL"), f"p{number}")
        homes.add(by_shard[0][0])
        slots = {ref.slot: ref.epoch for _, refs in by_shard for ref in refs}
        assert slots == {0: 1, 1: 4, 2: 7}
        for shard, refs in by_shard:
            assert all(known.place(ref.slot).shard == shard for ref in refs)
            # Jobs of the region come after those of the site.
            assert 0 not in [ref.slot for ref in refs[:-1]]
    assert homes == {"us1", "us2"}


def test_a_site_with_one_slot_is_asked_together_with_its_region() -> None:
    known = topology()
    assert resolve.pilot_slots(known, known.site("MWT2"), "p") == [("us1", [SlotRef(3, 3), SlotRef(0, 1)])]


@pytest.mark.parametrize(
    ("asked", "described", "offered"), [(0, 0, 0), (0, 500, 500), (500, 0, 500), (400, 500, 400), (600, 500, 500)]
)
def test_the_smaller_of_two_known_limits_is_offered(asked: int, described: int, offered: int) -> None:
    queue = Queue(memory_mb=described, disk_mb=described, walltime_s=described)
    offer = resolve.offer_of(PILOT, request(memory_mb=asked, disk_mb=asked, walltime_s=asked), queue)
    assert (offer.memory_mb, offer.disk_mb, offer.walltime_s) == (offered, offered, offered)


def test_a_pilot_never_offers_more_cores_than_its_queue() -> None:
    assert resolve.offer_of(PILOT, request(cores=64), Queue(cores=8)).cores == 8
    assert resolve.offer_of(PILOT, request(), Queue(cores=8)).cores == 8
    assert resolve.offer_of(PILOT, request(cores=2), Queue(cores=8)).cores == 2


def test_an_offer_carries_what_the_queue_and_the_token_say() -> None:
    queue = Queue(releases=["22.0"], platforms=["el9"])
    offer = resolve.offer_of(PILOT, request(), queue)
    assert (offer.queue, offer.releases, offer.platforms) == ("BNL-q", {"22.0"}, {"el9"})
    assert (offer.vos, offer.pilot_type, offer.labels) == (None, "big", labels.ANY)
    of_one_vo = Principal(role="pilot", subject="p", authority=CENTRAL, queues=["*"], vos=["atlas"])
    assert resolve.offer_of(of_one_vo, request(), queue).vos == {"atlas"}
    of_none = Principal(role="pilot", subject="p", authority=CENTRAL, queues=["*"], vos=[])
    assert resolve.offer_of(of_none, request(), queue).vos == frozenset()


def test_an_offline_queue_offers_nothing_and_a_queue_in_test_takes_test_jobs() -> None:
    assert resolve.offer_of(PILOT, request(), Queue(status="offline")).labels == frozenset()
    assert resolve.offer_of(PILOT, request(), Queue(status="test")).labels == {"test", "prod_test"}
    assert resolve.offer_of(PILOT, request(), Queue(status="brokeroff")).labels == labels.ANY


def test_a_queues_own_lease_times_travel_with_the_request() -> None:
    assert resolve.lease_times(Queue(first_lease_s=30, heartbeat_s=60)) == LeaseTimes(30, 60)
    assert resolve.lease_times(Queue()) == LeaseTimes(0, 0)
