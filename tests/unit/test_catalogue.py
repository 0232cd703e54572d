"""A catalogue of computing queues: the real one of 2009, and what is wrong with a bad one."""

from collections import Counter
from pathlib import Path

import msgspec
import pytest

from culm.errors import ClientFault
from culm.section_changes import register_sites
from culm.topology import Placement, Queue, Region, Section, Shard, SiteRegistration
from ops import catalogue

REAL = Path(__file__).parents[3] / "shared" / "data" / "schedconfig-2009.csv"
HEAD = "nickname,site,siteid,region,status,cmtconfig,releases,maxtime,memory"
needs_data = pytest.mark.skipif(not REAL.exists(), reason="the real catalogue is not beside the checkout")


def _read(tmp_path: Path, *lines: str, head: str = HEAD) -> list[SiteRegistration]:
    path = tmp_path / "catalogue.csv"
    path.write_text("\n".join((head, *lines)) + "\n", encoding="utf-8")
    return catalogue.read(path).sites


def _refused(tmp_path: Path, *lines: str, head: str = HEAD) -> str:
    with pytest.raises(ClientFault) as told:
        _read(tmp_path, *lines, head=head)
    assert told.value.code == "bad_catalogue"
    return told.value.message


def test_a_row_becomes_a_computing_queue(tmp_path: Path) -> None:
    [site] = _read(tmp_path, "BNL-q,BNL,BNL_ATLAS_1,US,online,i686-slc4,14.2|15.0,86400,2000")
    queue = Queue(
        status="online", type="unified", memory_mb=2000, walltime_s=86400, releases=["14.2", "15.0"],
        platforms=["i686-slc4"],
    )  # fmt: skip
    assert site == SiteRegistration(name="BNL", region="US", queues={"BNL-q": queue})


@pytest.mark.parametrize(
    ("head", "lines", "remarks"),
    [
        (HEAD + ",space", ["q,S,,US,online,,,,,5"], []),
        (HEAD, [], ["the file has no computing queue"]),
        (
            "nickname,site,region,cores,maxrss", ["q,S,US,8,abc"],
            [
                "columns that are not used: cores, maxrss",
                "there is no column `status`: computing queues that are new are offline",
            ],
        ),
    ],
)  # fmt: skip
def test_what_of_a_file_is_not_used_is_said(tmp_path: Path, head: str, lines: list[str], remarks: list[str]) -> None:
    path = tmp_path / "catalogue.csv"
    path.write_text("\n".join((head, *lines)) + "\n", encoding="utf-8")
    assert catalogue.read(path).remarks() == remarks


def test_queues_of_one_site_come_together_in_the_order_of_the_first(tmp_path: Path) -> None:
    found = _read(
        tmp_path, "a,S1,,US,online,,,0,0", "b,S2,,EU,online,,,0,0", "c,S1,,US,offline,,,0,0", "ANALY_d,S2,,EU,,,,0,0"
    )
    assert [(site.name, list(site.queues)) for site in found] == [("S1", ["a", "c"]), ("S2", ["b", "ANALY_d"])]
    assert found[1].queues["ANALY_d"].type == "analysis"


@pytest.mark.parametrize(
    ("told", "status"),
    [("online", "online"), ("offline", "offline"), ("test", "test"), ("brokeroff", "brokeroff"),
     ("obsolete", "offline"), ("", "offline")],
)  # fmt: skip
def test_what_is_not_in_use_is_offline(tmp_path: Path, told: str, status: str) -> None:
    [site] = _read(tmp_path, f"q,S,,US,{told},,,,")
    assert site.queues["q"].status == status


@pytest.mark.parametrize(
    ("row", "site"), [("q,?,SID,US,online,,,,", "SID"), ("q,,SID,US,online,,,,", "SID"), ("q,?,,US,online,,,,", "q")]
)
def test_a_site_that_is_unknown_is_named_by_what_there_is(tmp_path: Path, row: str, site: str) -> None:
    assert [one.name for one in _read(tmp_path, row)] == [site]


def test_a_region_that_is_unknown_has_a_name_of_its_own(tmp_path: Path) -> None:
    assert [one.region for one in _read(tmp_path, "q,S,,,online,,,,")] == [catalogue.UNKNOWN_REGION]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (("a,S,,US,online,,,,", "a,S,,US,online,,,,"), "line 3"),
        (("a,S,,US,online,,,,", "b,S,,EU,online,,,,"), "line 3: site S is in US above and in EU here"),
        ((",S,,US,online,,,,",), "line 2"),
        (("a,S,,US,sleeping,,,,",), "line 2: the status 'sleeping'"),
        (("a,S,,US,online,,,soon,",), "line 2"),
        (("a,S,,US,online,,,-5,",), "line 2"),
        (("a,S,,US,online",), "line 2: it has another number of fields"),
        (("a,S,,US,online,,,0,0,more",), "line 2: it has another number of fields"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, lines: tuple[str, ...], message: str) -> None:
    assert message in _refused(tmp_path, *lines)


def test_missing_columns_are_named(tmp_path: Path) -> None:
    assert "region, site" in _refused(tmp_path, head="nickname,siteid,status,cmtconfig,releases,maxtime,memory")


KNOWN = Queue(
    status="test", type="production", cores=8, memory_mb=4000, disk_mb=100, walltime_s=3600, releases=["14.2"],
    platforms=["i686-slc4"], priority_offsets={"higgs": 5}, first_lease_s=30.0, heartbeat_s=60.0,
)  # fmt: skip


def _imported(tmp_path: Path, known: Queue, row: str, head: str) -> Queue:
    """The known computing queue `a` of site S after an import."""
    section = Section(
        authority="central",
        epoch=1,
        shards={"us1": Shard(link="unix:/a")},
        regions={"US": Region(slot=0, shards=["us1"])},
        placement={0: Placement("us1", 1)},
    )
    before = register_sites(section, [SiteRegistration(name="S", region="US", queues={"a": known})])
    path = tmp_path / "catalogue.csv"
    path.write_text(f"{head}\n{row}\n", encoding="utf-8")
    return register_sites(before, catalogue.read(path).over(before.sites)).sites["S"].queues["a"]


def test_an_import_leaves_alone_what_the_file_has_no_column_for(tmp_path: Path) -> None:
    changed = _imported(tmp_path, KNOWN, "a,S,,US,online,,15.0,7200,2000", HEAD)
    assert changed == msgspec.structs.replace(
        KNOWN, status="online", platforms=[], releases=["15.0"], walltime_s=7200, memory_mb=2000
    )
    assert _imported(tmp_path, KNOWN, "a,S,US", "nickname,site,region") == KNOWN
    only_memory = _imported(tmp_path, KNOWN, "a,S,US,1", "nickname,site,region,memory")
    assert only_memory == msgspec.structs.replace(KNOWN, memory_mb=1)


@pytest.mark.parametrize("head", [HEAD, "nickname,site,siteid,region"])
def test_an_import_keeps_the_status_that_an_operator_gave_a_reason_for(tmp_path: Path, head: str) -> None:
    known = msgspec.structs.replace(KNOWN, status="offline", reason="cooling")
    after = _imported(tmp_path, known, "a,S,,US,online,,,," if head == HEAD else "a,S,,US", head)
    assert (after.status, after.reason) == ("offline", "cooling")


def test_a_new_queue_without_a_status_is_offline(tmp_path: Path) -> None:
    [site] = _read(tmp_path, "q,S,US", head="nickname,site,region")
    assert site.queues["q"] == Queue(status="offline")


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "binary.csv"
    path.write_bytes(b"\xff\xfe\x00rubbish\x80")
    with pytest.raises(ClientFault, match="bad_catalogue"):
        catalogue.read(path)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ClientFault, match="bad_catalogue"):
        catalogue.read(tmp_path / "none.csv")


@needs_data
def test_all_real_queues_are_read_and_can_be_registered() -> None:
    found = catalogue.read(REAL).sites
    assert sum(len(site.queues) for site in found) == 965
    assert len({name for site in found for name in site.queues}) == 965
    section = Section(
        authority="central",
        epoch=1,
        shards={"us1": Shard(link="unix:/a"), "eu1": Shard(link="unix:/b")},
        regions={"US": Region(slot=0, shards=["us1"])},
        placement={0: Placement("us1", 1)},
    )
    registered = register_sites(section, found)
    assert registered.epoch == 2
    assert len(registered.sites) == len(found)
    on_shards = Counter(place.shard for place in registered.placement.values())
    assert set(on_shards) == {"us1", "eu1"}
    assert register_sites(registered, found) is registered
