"""The topology on disk: readers keep their last good copy, changes are checked, recorded and never half done."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from culm.errors import ClientFault, Conflict
from culm.put_back import Copy
from culm.section_changes import register_sites, set_queue
from culm.telemetry import TOPOLOGY_REFUSED
from culm.topology import CENTRAL, Placement, Queue, Region, Section, Shard, Site, SiteRegistration
from culm.topology_store import (
    AUDIT,
    HISTORY,
    Change,
    TopologyCache,
    Who,
    adopt,
    change,
    changes,
    create,
    forerunner,
    load,
    load_epoch,
    load_section,
    restore,
)

WHO = Who(actor="central:root", reason="a test", at=1.0)
CERN_FIRST = 12_288
replace = msgspec.structs.replace


def central() -> Section:
    return Section(
        authority=CENTRAL,
        epoch=1,
        shards={"us1": Shard(link="unix:/run/us1")},
        regions={"US": Region(slot=0, shards=["us1"])},
        sites={"BNL": Site(region="US", slots=[1], queues={"BNL-q": Queue()})},
        placement={0: Placement("us1", 1), 1: Placement("us1", 1)},
    )


def cern() -> Section:
    return Section(
        authority="CERN",
        epoch=1,
        shards={"cern1": Shard(link="unix:/run/cern1")},
        regions={"CERN": Region(slot=CERN_FIRST, shards=["cern1"], strict=True)},
        placement={CERN_FIRST: Placement("cern1", 1)},
    )


def offline(section: Section) -> Section:
    return set_queue(section, "BNL-q", status="offline", reason="downtime")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    create(tmp_path / "topology", central())
    create(tmp_path / "topology", cern())
    return tmp_path / "topology"


def test_a_change_is_seen_recorded_and_its_forerunner_kept(folder: Path) -> None:
    cache = TopologyCache(folder)
    assert change(folder, CENTRAL, offline, WHO).epoch == 2
    assert cache.current.queue("BNL-q")[2].status == "online"
    assert cache.refresh_if_changed()
    assert cache.current.queue("BNL-q")[2].status == "offline"
    assert cache.current.epochs == {CENTRAL: 2, "CERN": 1}
    assert not cache.refresh_if_changed()
    kept = msgspec.json.decode((folder / "history" / "central-1.json").read_bytes(), type=Section)
    assert kept == central()
    [row] = [msgspec.json.decode(line) for line in (folder / AUDIT).read_bytes().splitlines()]
    assert (row["actor"], row["reason"], row["from_epoch"], row["to_epoch"]) == ("central:root", "a test", 1, 2)


def test_the_past_can_be_read_newest_change_first(folder: Path) -> None:
    change(folder, CENTRAL, offline, WHO)
    change(folder, CENTRAL, lambda section: set_queue(section, "BNL-q", status="online"), replace(WHO, reason="again"))
    with (folder / AUDIT).open("ab") as file:
        file.write(b'{"authority": "cen')
    assert [(row.to_epoch, row.reason) for row in changes(folder, CENTRAL, 10)] == [(3, "again"), (2, "a test")]
    assert [row.to_epoch for row in changes(folder, CENTRAL, 1)] == [3]
    # A half line takes no other row with it.
    change(folder, CENTRAL, offline, replace(WHO, reason="after it"))
    assert [row.reason for row in changes(folder, CENTRAL, 10)] == ["after it", "again", "a test"]
    assert changes(folder, "CERN", 10) == []
    assert load_epoch(folder, CENTRAL, 1) == central()
    assert load_epoch(folder, CENTRAL, 4) == load_section(folder, CENTRAL)
    with pytest.raises(ClientFault, match="unknown_epoch"):
        load_epoch(folder, CENTRAL, 5)


def test_a_change_that_changes_nothing_leaves_no_trace(folder: Path) -> None:
    assert change(folder, CENTRAL, lambda section: section, WHO).epoch == 1
    assert not (folder / AUDIT).exists()


def test_who_builds_on_an_old_epoch_is_refused(folder: Path) -> None:
    change(folder, CENTRAL, offline, WHO, expected=1)
    with pytest.raises(Conflict) as caught:
        change(folder, CENTRAL, offline, WHO, expected=1)
    assert caught.value.code == "epoch_changed"
    assert load_section(folder, CENTRAL).epoch == 2


@pytest.mark.parametrize(
    "edit",
    [
        lambda section: replace(section, default_region="US"),
        lambda section: replace(section, epoch=5),
        lambda section: replace(section, epoch=2, default_region="nowhere"),
        lambda section: replace(section, epoch=2, placement=section.placement | {CERN_FIRST: Placement("us1", 2)}),
    ],
    ids=["no new epoch", "an epoch too far", "not valid", "another's slot"],
)
def test_a_change_that_is_not_good_is_refused_and_nothing_is_written(
    folder: Path, edit: Callable[[Section], Section]
) -> None:
    with pytest.raises(ClientFault) as caught:
        change(folder, CENTRAL, edit, WHO)
    assert caught.value.code == "bad_topology"
    assert load_section(folder, CENTRAL) == central()
    assert not (folder / AUDIT).exists()


# --- the other authorities --------------------------------------------------------------------------------------------


def cern1_of_the_centre(section: Section) -> Section:
    return replace(section, epoch=section.epoch + 1, shards=section.shards | {"cern1": Shard(link="unix:/run/x")})


def test_a_name_that_another_authority_has_given_is_refused_and_nothing_is_written(folder: Path) -> None:
    with pytest.raises(Conflict) as caught:
        change(folder, CENTRAL, cern1_of_the_centre, WHO)
    assert (caught.value.code, "cern1" in caught.value.message) == ("name_taken", True)
    assert load_section(folder, CENTRAL) == central()


def test_a_clash_that_came_about_apart_hinders_no_other_change(folder: Path) -> None:
    # Each side gave the name while it could not see the other.
    assert adopt(folder, replace(cern(), epoch=2, shards=cern().shards | {"us1": Shard(link="unix:/run/theirs")}))
    home = load(folder, CENTRAL)
    assert home.shards["us1"].link == "unix:/run/us1"
    assert home.clashes == ["shard us1 is named by CERN and by another authority"]
    assert load(folder, "CERN").shards["us1"].link == "unix:/run/theirs"
    assert change(folder, CENTRAL, offline, WHO).epoch == 2
    with pytest.raises(Conflict, match="cern1"):
        change(folder, CENTRAL, cern1_of_the_centre, WHO)


def test_what_another_authority_places_on_a_shard_that_is_passed_over_is_nowhere(folder: Path) -> None:
    theirs = replace(
        cern(),
        epoch=2,
        shards={"us1": Shard(link="unix:/run/theirs")},
        regions={"CERN": Region(slot=CERN_FIRST, shards=["us1"], strict=True)},
        placement={CERN_FIRST: Placement("us1", 2)},
    )
    assert adopt(folder, theirs)
    assert CERN_FIRST not in load(folder, CENTRAL).placement
    assert load(folder, "CERN").placement[CERN_FIRST].shard == "us1"


def test_an_older_copy_never_replaces_a_newer_one(folder: Path) -> None:
    newer = replace(cern(), epoch=3, default_region="CERN")
    assert adopt(folder, newer)
    with pytest.raises(Conflict, match="stepped_back"):
        adopt(folder, replace(cern(), epoch=2))
    assert not adopt(folder, newer)
    assert load_section(folder, "CERN") == newer


def test_another_content_at_the_same_epoch_is_no_copy(folder: Path) -> None:
    done = []
    with pytest.raises(Conflict, match="epoch_differs"):
        adopt(folder, replace(cern(), default_region="CERN"), lambda: done.append("keys"))
    assert load_section(folder, "CERN") == cern()
    assert done == []
    assert not adopt(folder, cern(), lambda: done.append("keys"))
    assert done == ["keys"]


def test_a_copy_that_is_broken_is_replaced_and_a_bad_section_is_not_kept(folder: Path) -> None:
    (folder / "CERN.json").write_text("{", encoding="utf-8")
    with pytest.raises(ClientFault, match="bad_topology"):
        adopt(folder, replace(cern(), placement={CERN_FIRST: Placement("nobody", 1)}))
    assert adopt(folder, cern())
    assert load_section(folder, "CERN") == cern()


def test_a_section_is_created_once(folder: Path) -> None:
    with pytest.raises(Conflict):
        create(folder, central())


def test_an_authority_without_a_section_is_unknown(folder: Path) -> None:
    with pytest.raises(ClientFault) as caught:
        change(folder, "nobody", offline, WHO)
    assert (caught.value.code, caught.value.http_status) == ("unknown_authority", 404)


# --- files that are broken for a moment -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rubbish", [b"", b"{", b"null", b'{"authority":"\xff"}', b'{"authority":"central"}', b"\0" * 99]
)
def test_a_broken_section_keeps_its_last_good_copy_and_the_others_move_on(folder: Path, rubbish: bytes) -> None:
    cache = TopologyCache(folder)
    _overwrite(folder / "CERN.json", rubbish)
    change_without_others = offline(central())
    _overwrite(folder / "central.json", msgspec.json.encode(change_without_others))
    cache.refresh_if_changed()
    assert cache.current.queue("BNL-q")[2].status == "offline"
    assert cache.current.region("CERN").slot == CERN_FIRST
    with pytest.raises(ClientFault):
        load(folder)


def test_a_section_that_is_gone_keeps_its_last_good_copy(folder: Path) -> None:
    cache = TopologyCache(folder)
    for path in folder.glob("*.json"):
        path.unlink()
    cache.refresh_if_changed()
    assert cache.current.epochs == {CENTRAL: 1, "CERN": 1}


def test_a_section_under_anothers_name_is_not_believed(folder: Path) -> None:
    cache = TopologyCache(folder)
    _overwrite(folder / "CERN.json", msgspec.json.encode(offline(central())))
    cache.refresh_if_changed()
    assert cache.current.epochs == {CENTRAL: 1, "CERN": 1}


def test_a_folder_that_is_not_there_yet_is_found_later(tmp_path: Path) -> None:
    cache = TopologyCache(tmp_path / "topology")
    assert cache.current.epochs == {}
    create(tmp_path / "topology", central())
    assert cache.refresh_if_changed()
    assert cache.current.epochs == {CENTRAL: 1}


# --- a section that steps back ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "laid_over",
    [central(), replace(offline(central()), default_region="US")],
    ids=["an older epoch", "the same epoch, other content"],
)
def test_a_section_that_steps_back_is_said_counted_and_not_believed(
    folder: Path, laid_over: Section, caplog: pytest.LogCaptureFixture
) -> None:
    now = change(folder, CENTRAL, offline, WHO)
    cache = TopologyCache(folder)
    counted = TOPOLOGY_REFUSED.labels(CENTRAL)._value.get()
    _overwrite(folder / "central.json", msgspec.json.encode(laid_over))
    change(folder, "CERN", lambda section: replace(section, epoch=2, default_region="CERN"), WHO)
    cache.refresh_if_changed()
    assert cache.current.sections[CENTRAL] == now
    assert cache.current.epochs["CERN"] == 2
    assert TOPOLOGY_REFUSED.labels(CENTRAL)._value.get() == counted + 1
    assert [record.levelname for record in caplog.records if "stays at epoch 2" in record.message] == ["ERROR"]


def test_nothing_is_built_on_a_section_that_stepped_back(folder: Path) -> None:
    change(folder, CENTRAL, registering("UTA"), WHO)
    _overwrite(folder / "central.json", (folder / HISTORY / "central-1.json").read_bytes())
    with pytest.raises(Conflict, match="culm topology restore"):
        change(folder, CENTRAL, registering("MWT2"), WHO)
    assert load_section(folder, CENTRAL) == central()


# --- putting a section back -------------------------------------------------------------------------------------------


def registering(name: str) -> Callable[[Section], Section]:
    """The edit that registers a site: its slot is the next one."""
    return lambda section: register_sites(section, [SiteRegistration(name=name, region="US", queues={})])


def slot_of(section: Section, site: str) -> int:
    return section.sites[site].slots[0]


@pytest.mark.parametrize("damage", [None, b"", b"{", b'{"authority": "central"}'], ids=str)
def test_a_section_that_is_lost_is_put_back_whole_at_a_new_epoch(folder: Path, damage: bytes | None) -> None:
    lost = change(folder, CENTRAL, registering("UTA"), WHO)
    (folder / "central.json").unlink()
    if damage is not None:
        (folder / "central.json").write_bytes(damage)
    done = restore(folder, CENTRAL, replace(WHO, reason="the disk was full"))
    assert done.before is None
    assert done.after.epoch == 3
    assert replace(done.after, epoch=2, last_slot=-1) == lost
    assert load_section(folder, CENTRAL) == done.after
    assert [(row.from_epoch, row.to_epoch, row.reason) for row in changes(folder, CENTRAL, 1)] == [
        (2, 3, "the disk was full")
    ]
    assert [path.read_bytes() for path in folder.glob("*.broken")] == ([] if damage is None else [damage])
    assert change(folder, CENTRAL, registering("MWT2"), WHO).sites["MWT2"].slots == [3]


def test_no_epoch_and_no_slot_is_given_out_again_after_an_older_copy_is_put_back(folder: Path) -> None:
    first = change(folder, CENTRAL, registering("UTA"), WHO)
    done = restore(folder, CENTRAL, WHO, kept=Copy("an old copy", central()))
    assert done.after.epoch == 3
    assert "UTA" not in done.after.sites
    # Its jobs are there, and stay readable.
    assert done.after.placement == first.placement
    again = change(folder, CENTRAL, registering("MWT2"), WHO)
    assert again.epoch == 4
    assert slot_of(again, "MWT2") == slot_of(first, "UTA") + 1
    cache = TopologyCache(folder)
    assert cache.current.place(slot_of(first, "UTA")).shard == "us1"


def test_what_others_know_counts_too(folder: Path) -> None:
    theirs = replace(registering("UTA")(central()), epoch=7)
    done = restore(folder, CENTRAL, WHO, kept=Copy("an old copy", central()), others=[Copy("CERN", theirs)])
    assert (done.after.epoch, 2 in done.after.placement) == (8, True)
    # Without a choice the newest is put back, wherever it was found.
    (folder / "central.json").unlink()
    assert restore(folder, CENTRAL, WHO, others=[Copy("CERN", replace(theirs, epoch=20))]).kept.where == "CERN"


def test_slots_that_only_the_audit_knows_are_not_given_out_again(folder: Path) -> None:
    first = change(folder, CENTRAL, registering("UTA"), WHO)
    for path in (folder / "central.json", folder / HISTORY / "central-2.json"):
        path.unlink()
    done = restore(folder, CENTRAL, WHO)
    assert (done.after.epoch, done.kept.section) == (3, central())
    assert slot_of(change(folder, CENTRAL, registering("MWT2"), WHO), "MWT2") == slot_of(first, "UTA") + 1


def test_where_nothing_says_which_slots_were_given_out_it_is_asked_for(folder: Path) -> None:
    with (folder / AUDIT).open("ab") as file:
        file.write(
            msgspec.json.encode(
                Change(authority=CENTRAL, from_epoch=1, to_epoch=2, actor="central:root", reason="", at=1.0)
            )
            + b"\n"
        )
    before = (folder / "central.json").read_bytes()
    with pytest.raises(Conflict, match="slots_unknown"):
        restore(folder, CENTRAL, WHO)
    assert (folder / "central.json").read_bytes() == before
    assert restore(folder, CENTRAL, WHO, last_slot=40).after.epoch == 3
    assert slot_of(change(folder, CENTRAL, registering("MWT2"), WHO), "MWT2") == 41


def test_a_plan_and_a_whole_section_change_nothing(folder: Path) -> None:
    now = change(folder, CENTRAL, offline, WHO)
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert restore(folder, CENTRAL, WHO).after is not None
    planned = restore(folder, CENTRAL, WHO, kept=Copy("an old copy", central()), only_plan=True)
    assert (planned.before, planned.after.epoch) == (now, 3)
    done = restore(folder, CENTRAL, WHO)
    assert done.after is done.before
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == files


def test_a_lost_section_is_not_made_anew(folder: Path) -> None:
    change(folder, CENTRAL, offline, WHO)
    (folder / "central.json").unlink()
    with pytest.raises(Conflict, match="section_lost"):
        create(folder, central())
    assert not (folder / "central.json").exists()


def test_there_is_nothing_to_put_back_where_no_copy_is(tmp_path: Path) -> None:
    with pytest.raises(ClientFault, match="no_copy"):
        restore(tmp_path / "topology", CENTRAL, WHO)


def test_the_first_section_is_a_row_of_the_history_too(tmp_path: Path) -> None:
    create(tmp_path / "topology", central(), replace(WHO, reason="a new cluster"))
    [row] = changes(tmp_path / "topology", CENTRAL, 10)
    assert (row.from_epoch, row.to_epoch, row.reason) == (0, 1, "a new cluster")
    change(tmp_path / "topology", CENTRAL, offline, WHO)
    assert [forerunner(tmp_path / "topology", CENTRAL, epoch) for epoch in (2, 1)] == [1, 0]


# --- fields that no section can carry ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"section": 1},
        {"queue": "x"},
        {"nonsense": 1},
        {"status": "broken"},
        {"cores": 0},
        {"memory_mb": -1},
        {"first_lease_s": float("inf")},
        {"heartbeat_s": float("nan")},
        {"heartbeat_s": 1e300},
        {"priority_offsets": {"higgs": 10**12}},
    ],
    ids=str,
)
def test_a_computing_queue_takes_good_fields_only(folder: Path, changes: dict[str, object]) -> None:
    with pytest.raises(ClientFault) as caught:
        change(folder, CENTRAL, lambda section: set_queue(section, "BNL-q", **changes), WHO)
    assert caught.value.code == "bad_queue"
    assert load_section(folder, CENTRAL) == central()


def _overwrite(path: Path, content: bytes) -> None:
    """As an operator's copy would: another file under the name."""
    beside = path.with_suffix(".tmp")
    beside.write_bytes(content)
    beside.replace(path)


def test_a_copy_of_another_authority_that_is_broken_hinders_no_change(folder: Path) -> None:
    _overwrite(folder / "CERN.json", b"{")
    _overwrite(folder / "central-old.json", b"{")
    assert change(folder, CENTRAL, offline, WHO).epoch == 2
