"""The monitor's merged view: sums over shards, missing ones named and shown as last heard."""

from culm.states import State
from culm.topology import CENTRAL, Placement, Region, Section, Shard, Site, Topology
from culm.wire import ShardCountsAnswer, SlotCount
from monitor_api.merge import UNPLACED, Heard, merge

NOW = 1000.0


def topology() -> Topology:
    """Region US with the sites BNL (two slots) and MWT2, and a slot of its own; all on two shards."""
    slots = {0: "us1", 1: "us1", 2: "us2", 3: "us2"}
    return Topology(
        [
            Section(
                authority=CENTRAL,
                epoch=1,
                shards={"us1": Shard(link="unix:/run/us1"), "us2": Shard(link="unix:/run/us2")},
                regions={"US": Region(slot=0, shards=["us1"])},
                sites={"BNL": Site(region="US", slots=[1, 2]), "MWT2": Site(region="US", slots=[3])},
                placement={slot: Placement(shard, 1) for slot, shard in slots.items()},
            )
        ]
    )


def heard(shard: str, *counts: tuple[int, State, int], at: float = NOW) -> Heard:
    said = [SlotCount(slot=slot, state=state, n_jobs=n_jobs) for slot, state, n_jobs in counts]
    return Heard(ShardCountsAnswer(shard=shard, at=5.0, counts=said), at)


def test_counts_are_sums_over_shards_and_slots() -> None:
    view = merge(
        topology(),
        {
            "us1": heard("us1", (0, State.ACTIVATED, 1), (1, State.ACTIVATED, 10), (1, State.FINISHED, 5)),
            "us2": heard("us2", (2, State.ACTIVATED, 100), (3, State.FAILED, 7)),
        },
        [],
        NOW,
    )
    assert view.total == {"activated": 111, "finished": 5, "failed": 7}
    assert view.by_region == {"US": view.total}
    assert view.by_site == {
        "(any site of US)": {"activated": 1},
        "BNL": {"activated": 110, "finished": 5},
        "MWT2": {"failed": 7},
    }
    assert view.missing_shards == []


def test_a_missing_shard_is_named_and_shown_as_it_was_with_its_age() -> None:
    known = {"us1": heard("us1", (1, State.RUNNING, 3), at=NOW - 12.3456), "us2": heard("us2", (3, State.RUNNING, 4))}
    view = merge(topology(), known, ["us1"], NOW)
    assert view.missing_shards == ["us1"]
    assert view.total == {"running": 7}
    assert view.shards == {"us1": 12.346, "us2": 0.0}


def test_a_shard_that_never_answered_is_missing_and_not_a_zero() -> None:
    view = merge(topology(), {}, ["us2", "us1"], NOW)
    assert view.missing_shards == ["us1", "us2"]
    assert (view.total, view.by_region, view.by_site, view.shards) == ({}, {}, {}, {})


def test_jobs_of_a_slot_that_no_section_names_are_not_lost_from_the_total() -> None:
    view = merge(topology(), {"us1": heard("us1", (99, State.RUNNING, 2))}, [], NOW)
    assert view.total == {"running": 2}
    assert view.by_region == {UNPLACED: {"running": 2}}


def test_the_sums_by_region_and_by_site_equal_the_total() -> None:
    known = {
        "us1": heard("us1", *((slot, state, slot + 1) for slot in (0, 1) for state in State)),
        "us2": heard("us2", *((slot, state, slot + 1) for slot in (2, 3) for state in State)),
    }
    view = merge(topology(), known, [], NOW)
    for groups in (view.by_region, view.by_site):
        for state in State:
            assert sum(counts.get(state, 0) for counts in groups.values()) == view.total[state] == 10
