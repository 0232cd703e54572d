"""Warnings of a submit: once for all jobs that need the same, bounded in number and in work."""

from collections.abc import Iterator
from typing import Any

import pytest

from culm.matching import Offer, Requirements
from culm.settings import DatabaseSettings
from culm.topology import Placement, Queue, Region, Section, Shard, Site, Topology
from culm.wire import MAX_WARNINGS, PilotInfo
from shard import obstacles
from shard.askers import Askers
from shard.database import Database
from shard.obstacles import MAX_LOOKS, REASONS_PER_WARNING, Obstacles

REGION, BNL = 0, 1


def topology_of(**queues: Queue) -> Topology:
    """One site, in slot 1; slot 0 is its region's."""
    section = Section(
        authority="central",
        epoch=1,
        shards={"us1": Shard(link="unix:/run/us1")},
        regions={"US": Region(slot=REGION, shards=["us1"])},
        sites={"BNL": Site(region="US", slots=[BNL], queues=dict(queues))},
        placement={REGION: Placement("us1", 1), BNL: Placement("us1", 1)},
    )
    return Topology([section])


@pytest.fixture
def askers() -> Askers:
    """Nobody has asked yet. It has no database here: what is asked of it is in its memory."""
    return Askers(Database(DatabaseSettings()))


def asks(askers: Askers, queue: str, **offer: Any) -> None:
    values: dict[str, Any] = {"labels": frozenset({"user"}), "cores": 1}
    askers.asked(Offer(queue=queue, **(values | offer)), PilotInfo(id="p1"))


def needs(**changes: Any) -> Requirements:
    return Requirements(**({"label": "user", "vo": "atlas"} | changes))


def test_jobs_that_a_pilot_would_take_are_not_warned_of(askers: Askers) -> None:
    asks(askers, "q")
    known = Obstacles(askers)
    assert known.warnings(topology_of(q=Queue()), [(BNL, needs()), (REGION, needs())]) == []


def test_jobs_that_need_the_same_in_the_same_place_are_warned_of_once(askers: Askers) -> None:
    asks(askers, "q")
    small, big = needs(), needs(memory_mb=9000)
    calls = [(BNL, small), (BNL, big), (REGION, big), (BNL, big), (BNL, small), (BNL, big)]
    found = Obstacles(askers).warnings(topology_of(q=Queue(memory_mb=2000)), calls)
    assert [(one.index, one.n_jobs, [r.code for r in one.reasons]) for one in found] == [
        (1, 3, ["too_little_memory_mb"]),
        (2, 1, ["too_little_memory_mb"]),
    ]


def test_two_thousand_jobs_of_one_kind_are_held_against_a_computing_queue_once(
    askers: Askers, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at: list[Requirements] = []
    real = obstacles.refusals

    def counted(needs: Requirements, offer: Offer) -> Any:
        looked_at.append(needs)
        return real(needs, offer)

    monkeypatch.setattr(obstacles, "refusals", counted)
    kinds = [needs(memory_mb=1), needs(memory_mb=2)]
    found = Obstacles(askers).warnings(topology_of(q=Queue()), [(BNL, kinds[n % 2]) for n in range(2000)])
    assert looked_at == kinds
    assert [(one.index, one.n_jobs) for one in found] == [(0, 1000), (1, 1000)]


def test_there_are_only_so_many_warnings_and_reasons(askers: Askers) -> None:
    queues = {f"q{n}": Queue(status="offline") for n in range(REASONS_PER_WARNING + 2)}
    calls = [(BNL, needs(memory_mb=n)) for n in range(MAX_WARNINGS + 5)]
    found = Obstacles(askers).warnings(topology_of(**queues), calls)
    assert [one.index for one in found] == list(range(MAX_WARNINGS))
    assert {len(one.reasons) for one in found} == {REASONS_PER_WARNING}


def test_a_kind_that_is_not_looked_at_whole_is_not_warned_of(askers: Askers) -> None:
    """It may be the last computing queue that takes it: no warning is better than an untrue one."""
    queues = {f"q{n}": Queue(memory_mb=1) for n in range(MAX_LOOKS // 2)} | {"last": Queue()}
    asks(askers, "last", memory_mb=0)
    known, topology = Obstacles(askers), topology_of(**queues)
    assert known.warnings(topology, [(BNL, needs(memory_mb=2, queue="q0")), (BNL, needs(memory_mb=2))])[0].index == 0
    too_many = [(BNL, needs(memory_mb=n, cores=2)) for n in range(3)]
    assert [one.index for one in known.warnings(topology, too_many)] == [0]


def test_a_pinned_job_costs_one_look(askers: Askers) -> None:
    queues = {f"q{n}": Queue(memory_mb=1) for n in range(MAX_LOOKS)}
    calls = [(BNL, needs(memory_mb=2, queue=f"q{n}")) for n in range(MAX_WARNINGS)]
    found = Obstacles(askers).warnings(topology_of(**queues), calls)
    assert [one.reasons[0].queue for one in found] == [f"q{n}" for n in range(MAX_WARNINGS)]


@pytest.mark.parametrize(
    ("queues", "needed", "code"),
    [
        ({}, needs(), "no_queue_there"),
        ({"q": Queue()}, needs(queue="other"), "no_queue_there"),
        ({"q": Queue(status="offline", reason="cooling")}, needs(), "queue_offline"),
        ({"q": Queue(status="test")}, needs(), "queue_in_test"),
        ({"q": Queue(disk_mb=1)}, needs(disk_mb=2), "too_little_disk_mb"),
        ({"q": Queue(walltime_s=1)}, needs(walltime_s=2), "too_little_walltime_s"),
        ({"q": Queue(releases=["1.0"])}, needs(release="2.0"), "no_matching_release"),
        ({"q": Queue()}, needs(cores=2), "too_few_cores"),
        ({"q": Queue()}, needs(), "no_pilot_asked"),
        # No more than a pilot is missing: that is told first.
        ({"a": Queue(memory_mb=1), "b": Queue()}, needs(memory_mb=2), "no_pilot_asked"),
    ],
)
def test_each_obstacle_is_told(askers: Askers, queues: dict[str, Queue], needed: Requirements, code: str) -> None:
    [found] = Obstacles(askers).warnings(topology_of(**queues), [(BNL, needed)])
    assert found.reasons[0].code == code


def test_what_pilots_offer_counts_not_only_what_the_computing_queue_has(askers: Askers) -> None:
    asks(askers, "q", vos=frozenset({"cms"}))
    [found] = Obstacles(askers).warnings(topology_of(q=Queue()), [(BNL, needs())])
    assert [(one.code, one.offered) for one in found.reasons] == [("wrong_vo", "cms")]


def test_another_topology_is_looked_at_anew(askers: Askers) -> None:
    asks(askers, "q")
    known = Obstacles(askers)

    def codes() -> Iterator[str]:
        for queue in (Queue(), Queue(status="offline"), Queue()):
            yield "".join(one.reasons[0].code for one in known.warnings(topology_of(q=queue), [(BNL, needs())]))

    assert list(codes()) == ["", "queue_offline", ""]
