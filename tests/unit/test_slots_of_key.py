"""Where a key's jobs are while its site grows."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from culm.errors import ClientFault, Conflict
from culm.section_changes import MAX_SLOTS_PER_SITE, register_sites, set_slots
from culm.topology import Placement, Queue, Region, Section, Shard, Site, SiteRegistration
from router.resolve import slots_of_key

SECTION = register_sites(
    Section(
        authority="central",
        epoch=1,
        shards={name: Shard(link=f"unix:/{name}") for name in ("a", "b", "c")},
        regions={"US": Region(slot=0, shards=["a", "b", "c"])},
        placement={0: Placement("a", 1)},
    ),
    [SiteRegistration(name=name, region="US", queues={f"{name}-q": Queue()}) for name in ("BNL", "UTA")],
)


def now(slots: list[int], key: str) -> int:
    return slots_of_key(Site(region="US", slots=slots), key)[-1]


@given(st.lists(st.integers(0, 16_383), min_size=1, max_size=12, unique=True), st.text(max_size=40))
def test_a_key_is_where_it_was_or_in_a_slot_that_came_since(slots: list[int], key: str) -> None:
    where = [now(slots[:n], key) for n in range(1, len(slots) + 1)]
    for n, (before, after) in enumerate(itertools.pairwise(where), start=1):
        assert after in (before, slots[n])
    # All the places where it ever was, the oldest first.
    assert list(dict.fromkeys(where)) == slots_of_key(Site(region="US", slots=slots), key)


def test_keys_spread_evenly() -> None:
    slots = [1, 2, 3, 4]
    counts = [sum(now(slots, f"key-{n}") == slot for n in range(4000)) for slot in slots]
    assert all(850 < count < 1150 for count in counts)


def test_a_site_grows_over_the_shards_of_its_region_and_nothing_moves() -> None:
    grown = set_slots(SECTION, "BNL", 8)
    assert grown.epoch == SECTION.epoch + 1
    assert grown.sites["BNL"].slots[:1] == SECTION.sites["BNL"].slots
    assert len(set(grown.sites["BNL"].slots)) == 8
    assert {slot: place for slot, place in grown.placement.items() if slot in SECTION.placement} == SECTION.placement
    assert {grown.placement[slot].shard for slot in grown.sites["BNL"].slots} == {"a", "b", "c"}
    assert grown.sites["UTA"] == SECTION.sites["UTA"]
    assert set_slots(grown, "BNL", 8) is grown
    # Slot numbers are never handed out twice.
    assert not {*set_slots(grown, "UTA", 3).sites["UTA"].slots} & {*grown.sites["BNL"].slots}


@pytest.mark.parametrize(
    ("site", "n_slots", "code"),
    [("Mars", 2, "unknown_site"), ("BNL", 0, "slots_cannot_shrink"), ("BNL", MAX_SLOTS_PER_SITE + 1, "too_many_slots")],
)
def test_what_cannot_be(site: str, n_slots: int, code: str) -> None:
    with pytest.raises((ClientFault, Conflict)) as told:
        set_slots(SECTION, site, n_slots)
    assert told.value.code == code
