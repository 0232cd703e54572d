"""What a copy of a section becomes when it is put back: its decisions, and everything that has happened since."""

import msgspec
import pytest

from culm.errors import Conflict
from culm.put_back import Copy, put_back
from culm.topology import Placement, Region, Section, Shard, Site

replace = msgspec.structs.replace


def section(epoch: int = 1, placement: dict[int, Placement] | None = None, **changes: object) -> Section:
    """US with one site, on us1."""
    found = Section(
        authority="central",
        epoch=epoch,
        shards={"us1": Shard(link="unix:/us1")},
        regions={"US": Region(slot=0, shards=["us1"])},
        sites={"BNL": Site(region="US", slots=[1])},
        placement={0: Placement("us1", 1), 1: Placement("us1", 1)} | (placement or {}),
    )
    return replace(found, **changes)


EU = {"us1": Shard(link="unix:/us1"), "eu1": Shard(link="unix:/eu1")}
OLD = Copy("the old one", section())


def test_what_is_decided_is_the_copys_and_what_has_happened_stays() -> None:
    later = section(
        5,
        {2: Placement("eu1", 4)},
        shards=EU,
        banned={"central:ann": "x"},
        regions={"EU": Region(slot=2, shards=["eu1"])},
    )
    found = put_back(OLD, [Copy("the later one", later)], epoch=5)
    assert (found.epoch, found.last_slot) == (6, 2)
    assert (found.banned, found.regions, found.sites) == ({}, OLD.section.regions, OLD.section.sites)
    assert (found.shards, found.placement) == (EU, later.placement)


def test_the_highest_slot_that_anything_tells_is_the_last_one() -> None:
    assert put_back(OLD, [Copy("another", section(2, last_slot=9))], epoch=2).last_slot == 9
    assert put_back(OLD, [], epoch=2, last_slot=11).last_slot == 11
    assert put_back(OLD, [], epoch=2).last_slot == 1


def test_a_slot_that_has_moved_is_where_it_moved_to_whichever_copy_is_put_back() -> None:
    moved = Copy("the later one", section(5, {1: Placement("eu1", 5)}, shards=EU))
    for kept, other in ((OLD, moved), (moved, OLD)):
        assert put_back(kept, [other], epoch=5).placement[1] == Placement("eu1", 5)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (section(2, {2: Placement("us1", 2)}, shards=EU), section(2, {2: Placement("eu1", 2)}, shards=EU)),
        (section(4, {2: Placement("us1", 2)}, shards=EU), section(5, {2: Placement("eu1", 3)}, shards=EU)),
    ],
    ids=["at one epoch", "at two"],
)
def test_two_histories_of_one_slot_are_for_a_person_to_judge(ours: Section, theirs: Section) -> None:
    with pytest.raises(Conflict, match=r"slot 2 is on (us1|eu1) in (ours|theirs) and on") as caught:
        put_back(OLD, [Copy("ours", ours), Copy("theirs", theirs)], epoch=5)
    assert caught.value.code == "copies_differ"
