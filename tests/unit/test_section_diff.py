"""The diff of two sections names every value that differs, and nothing else."""

import msgspec

from culm.section_changes import set_queue
from culm.topology import Placement, Queue, Region, Section, Shard, Site
from ops.section_diff import lines

replace = msgspec.structs.replace


def section() -> Section:
    return Section(
        authority="central",
        epoch=3,
        shards={"us1": Shard(link="unix:/run/us1")},
        regions={"US": Region(slot=0, shards=["us1"])},
        sites={"BNL": Site(region="US", slots=[1], queues={"BNL-q": Queue(memory_mb=2000)})},
        placement={0: Placement("us1", 1), 1: Placement("us1", 1)},
    )


def test_the_same_section_at_another_epoch_differs_in_nothing() -> None:
    assert lines(section(), replace(section(), epoch=9)) == []


def test_what_is_new_gone_and_changed_is_told_with_its_path() -> None:
    after = replace(
        set_queue(section(), "BNL-q", memory_mb=4000, status="offline", reason="cooling"),
        regions={"US": Region(slot=0, shards=["us1"], strict=True)},
        placement={0: Placement("us1", 4)},
    )
    assert lines(section(), after) == [
        '~ placement.0: ["us1",1] -> ["us1",4]',
        '- placement.1: ["us1",1]',
        "+ regions.US.strict: true",
        "~ sites.BNL.queues.BNL-q.memory_mb: 2000 -> 4000",
        '+ sites.BNL.queues.BNL-q.reason: "cooling"',
        '+ sites.BNL.queues.BNL-q.status: "offline"',
    ]


def test_a_queue_without_a_field_of_its_own_shows() -> None:
    site = section().sites["BNL"]
    after = replace(section(), sites={"BNL": replace(site, queues=site.queues | {"BNL-long": Queue()})})
    assert lines(section(), after) == ["+ sites.BNL.queues.BNL-long: {}"]
