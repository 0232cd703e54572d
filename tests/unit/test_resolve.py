"""From names to slots and offers, over one topology and without I/O."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from culm.errors import ClientFault
from culm.ids import MAX_JOB_ID
from culm.topology import Placement, Queue, Region, Section, Shard, Site, Topology
from culm.wire import GetJobRequest, JobSpec, LeaseTimes, PilotInfo, Principal, SlotRef
from router.resolve import (
    jobset_of,
    lease_times,
    offer_of,
    pilot_slots,
    split_by_shard,
    stable_hash,
    target_slot,
)

HOT_SLOTS = [10, 11, 12, 13]
PILOT = Principal(role="pilot", subject="p", authority="central", queues=["*"])


def topology(*, default_region: str = "US") -> Topology:
    """us1 serves US and site COLD; the hot site has slots on us1 and us2; EU is on eu1."""
    offsets = Queue(priority_offsets={"": 5, "higgs": 50}), Queue(priority_offsets={"": 20, "susy": -7})
    section = Section(
        authority="central",
        epoch=9,
        shards={name: Shard(link=f"unix:/{name}") for name in ("us1", "us2", "eu1")},
        regions={"US": Region(slot=0, shards=["us1", "us2"]), "EU": Region(slot=1, shards=["eu1"])},
        sites={
            "HOT": Site(region="US", slots=HOT_SLOTS, queues={"HOT_1": offsets[0], "HOT_2": offsets[1]}),
            "COLD": Site(region="US", slots=[20], queues={"COLD_1": Queue()}),
            "FZK": Site(region="EU", slots=[30], queues={"FZK_1": Queue()}),
        },
        placement={
            0: Placement("us1", 1),
            1: Placement("eu1", 2),
            20: Placement("us1", 3),
            30: Placement("eu1", 4),
            10: Placement("us1", 5),
            11: Placement("us2", 6),
            12: Placement("us1", 7),
            13: Placement("us2", 8),
        },
        default_region=default_region,
    )
    return Topology([section])


def spec(**changes: Any) -> JobSpec:
    return JobSpec(**({"argv": ["true"]} | changes))


# --- the target of a job --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "slot"),
    [
        ({"queue": "COLD_1"}, 20),
        ({"site": "COLD"}, 20),
        ({"region": "US"}, 0),
        ({"region": "EU"}, 1),
        ({}, 0),
        ({"queue": "FZK_1", "site": "FZK", "region": "EU"}, 30),
        ({"site": "FZK", "region": "EU"}, 30),
    ],
)
def test_a_pin_beats_what_is_wider(changes: dict[str, str], slot: int) -> None:
    assert target_slot(topology(), spec(**changes), "key", "central") == slot


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"queue": "X"}, "unknown_queue"),
        ({"site": "X"}, "unknown_site"),
        ({"region": "X"}, "unknown_region"),
        ({"queue": "COLD_1", "site": "HOT"}, "bad_target"),
        ({"queue": "COLD_1", "region": "EU"}, "bad_target"),
        ({"site": "COLD", "region": "EU"}, "bad_target"),
        ({"site": "COLD", "region": "X"}, "bad_target"),
        ({"queue": "HOT"}, "unknown_queue"),
    ],
)
def test_a_target_that_contradicts_itself_or_is_unknown_is_refused(changes: dict[str, str], code: str) -> None:
    with pytest.raises(ClientFault) as caught:
        target_slot(topology(), spec(**changes), "key", "central")
    assert caught.value.code == code


def test_a_job_without_a_place_needs_a_default_region() -> None:
    with pytest.raises(ClientFault) as caught:
        target_slot(topology(default_region=""), spec(), "key", "central")
    assert caught.value.code == "bad_target"


@given(st.text(max_size=128))
def test_a_repeat_of_a_key_goes_where_the_first_went(key: str) -> None:
    first = target_slot(topology(), spec(site="HOT"), key, "central")
    assert first in HOT_SLOTS
    assert target_slot(topology(), spec(queue="HOT_2"), key, "central") == first


def test_keys_spread_over_the_slots_of_a_hot_site() -> None:
    hits = [target_slot(topology(), spec(site="HOT"), f"key {n}", "central") for n in range(400)]
    assert all(70 <= hits.count(slot) <= 130 for slot in HOT_SLOTS)


def test_placement_hangs_on_these_numbers() -> None:
    """Changed ones would send the repeat of a stored key elsewhere, and accept its jobs twice."""
    assert stable_hash("key") == 61236350311001
    assert stable_hash("a", "b") != stable_hash("ab")
    assert jobset_of("ann", "key") == 101111549587131


@given(st.text(max_size=30), st.text(max_size=30))
def test_a_jobset_is_an_id_that_json_can_carry(owner: str, key: str) -> None:
    assert 1 <= jobset_of(owner, key) < 2**48 < MAX_JOB_ID


# --- cutting a call -------------------------------------------------------------------------------------------------


def test_a_call_is_cut_by_shard_and_slot_and_no_job_is_lost() -> None:
    specs = [spec(site=site, name=str(n)) for n, site in enumerate(["COLD", "FZK", "COLD", "FZK", "COLD"])]
    specs += [spec(region="US", name="5"), spec(region="EU", name="6")]
    parts = split_by_shard(topology(), specs, "key", "central")
    assert [(part.shard, part.n_jobs, part.places) for part in parts] == [
        ("us1", 4, [[0, 2, 4], [5]]),
        ("eu1", 3, [[1, 3], [6]]),
    ]
    assert [[jobs.at for jobs in part.slots] for part in parts] == [
        [SlotRef(20, 3), SlotRef(0, 1)],
        [SlotRef(30, 4), SlotRef(1, 2)],
    ]
    for part in parts:
        for places, jobs in zip(part.places, part.slots, strict=True):
            assert [one.name for one in jobs.specs] == [str(place) for place in places]


@given(st.lists(st.sampled_from(["COLD", "FZK", "HOT"]), min_size=1, max_size=40), st.text(max_size=8))
def test_every_place_of_a_call_is_in_exactly_one_part(sites: list[str], key: str) -> None:
    parts = split_by_shard(topology(), [spec(site=site) for site in sites], key, "central")
    places = [place for part in parts for some in part.places for place in some]
    assert sorted(places) == list(range(len(sites)))
    assert len({part.shard for part in parts}) == len(parts)


def test_the_first_bad_job_is_named_by_its_place() -> None:
    with pytest.raises(ClientFault) as caught:
        split_by_shard(topology(), [spec(), spec(site="X"), spec(site="Y")], "key", "central")
    assert (caught.value.code, caught.value.details, caught.value.http_status) == ("unknown_site", {"index": 1}, 404)
    assert caught.value.message.startswith("jobs[1]: ")


@pytest.mark.parametrize(
    ("changes", "offset"),
    [
        ({"queue": "HOT_1"}, 5),
        ({"queue": "HOT_1", "working_group": "higgs"}, 50),
        ({"queue": "HOT_1", "working_group": "susy"}, 5),
        ({"queue": "HOT_2", "working_group": "susy"}, 20),
        ({"site": "HOT"}, 20),
        ({"site": "HOT", "working_group": "higgs"}, 50),
        ({"region": "US", "working_group": "higgs"}, 0),
        ({"site": "COLD"}, 0),
    ],
)
def test_the_largest_priority_offset_that_applies_wins(changes: dict[str, str], offset: int) -> None:
    [part] = split_by_shard(topology(), [spec(**changes)], "key", "central")
    assert part.slots[0].offsets == ([offset] if offset else [])


def test_offsets_stand_beside_their_jobs() -> None:
    specs = [spec(site="HOT"), spec(site="HOT", working_group="higgs"), spec(site="HOT", working_group="none")]
    [part] = split_by_shard(topology(), specs, "key", "central")
    assert part.slots[0].offsets == [20, 50, 20]


# --- what a pilot may take ------------------------------------------------------------------------------------------


def test_a_pilot_of_a_small_site_asks_one_shard_its_own_slot_first() -> None:
    known = topology()
    assert pilot_slots(known, known.site("COLD"), "p1") == [("us1", [SlotRef(20, 3), SlotRef(0, 1)])]


@given(st.text(min_size=1, max_size=64))
def test_a_pilot_of_a_hot_site_begins_at_home_and_covers_all_slots(pilot: str) -> None:
    known = topology()
    shards = pilot_slots(known, known.site("HOT"), pilot)
    home = HOT_SLOTS[stable_hash(pilot) % 4]
    assert shards[0][0] == known.place(home).shard
    assert shards[0][1][0].slot == home
    assert sorted(ref.slot for _, refs in shards for ref in refs) == [0, *HOT_SLOTS]
    assert all(known.slot(ref.slot) == ref for _, refs in shards for ref in refs)


def test_pilots_have_their_homes_all_over_a_hot_site() -> None:
    known = topology()
    homes = [pilot_slots(known, known.site("HOT"), f"pilot {n}")[0][1][0].slot for n in range(400)]
    assert all(70 <= homes.count(slot) <= 130 for slot in HOT_SLOTS)


def asking(**changes: Any) -> GetJobRequest:
    values = {"request_id": "r" * 8, "queue": "COLD_1", "pilot": PilotInfo(id="p1", type="wn")}
    return GetJobRequest(**(values | changes))


@pytest.mark.parametrize(("asked", "described", "offered"), [(0, 0, 0), (4, 0, 4), (0, 8, 8), (4, 8, 4), (16, 8, 8)])
def test_the_smaller_of_two_known_limits_is_offered(asked: int, described: int, offered: int) -> None:
    for field in ("memory_mb", "disk_mb", "walltime_s"):
        offer = offer_of(PILOT, asking(**{field: asked}), Queue(**{field: described}))
        assert getattr(offer, field) == offered


def test_cores_are_known_of_every_queue() -> None:
    assert [offer_of(PILOT, asking(cores=n), Queue(cores=8)).cores for n in (0, 4, 16)] == [8, 4, 8]


@pytest.mark.parametrize(
    ("status", "label", "labels"),
    [
        ("offline", "unified", set()),
        ("online", "user", {"user", "panda"}),
        ("brokeroff", "user", {"user", "panda"}),
        ("test", "user", {"test", "prod_test"}),
    ],
)
def test_the_status_of_a_queue_decides_about_labels(status: str, label: str, labels: set[str]) -> None:
    offer = offer_of(PILOT, asking(label=label), Queue(status=status))  # type: ignore[arg-type]
    assert offer.labels == labels


def test_an_offer_carries_the_tokens_vos_and_the_queues_tags() -> None:
    queue = Queue(releases=["r1"], platforms=["p1", "p2"])
    offer = offer_of(msgspec.structs.replace(PILOT, vos=["atlas"]), asking(), queue)
    assert (offer.vos, offer.releases, offer.platforms) == ({"atlas"}, {"r1"}, {"p1", "p2"})
    assert (offer.queue, offer.pilot_type) == ("COLD_1", "wn")
    assert offer_of(PILOT, asking(), queue).vos is None
    assert offer_of(msgspec.structs.replace(PILOT, vos=[]), asking(), queue).vos == frozenset()


def test_a_queues_own_lease_times_travel() -> None:
    assert lease_times(Queue(first_lease_s=30, heartbeat_s=90)) == LeaseTimes(30, 90)
    assert lease_times(Queue()) == LeaseTimes(0, 0)
