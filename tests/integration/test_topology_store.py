"""The topology on disk: changed under a lock against an epoch, read by processes that keep their last good copy."""

import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from culm import topology_store
from culm.errors import ClientFault, Conflict, CulmError
from culm.section_changes import register_sites
from culm.topology import Placement, Queue, Region, Section, Shard, SiteRegistration
from culm.topology_store import HISTORY, TopologyCache, Who

WHO = Who(actor="central:root", reason="a test", at=1.0)


def section(authority: str = "central", slot: int = 0, region: str = "US") -> Section:
    """A section with one shard and one region."""
    shard = f"{region.lower()}1"
    return Section(
        authority=authority,
        epoch=1,
        shards={shard: Shard(link=f"unix:/{shard}")},
        regions={region: Region(slot=slot, shards=[shard])},
        placement={slot: Placement(shard, 1)},
    )


def adding(name: str, region: str = "US") -> Callable[[Section], Section]:
    """The edit that registers a site."""
    registration = SiteRegistration(name=name, region=region, queues={f"{name}-q": Queue()})
    return lambda before: register_sites(before, [registration])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with both authorities' sections."""
    topology_store.create(tmp_path, section())
    topology_store.create(tmp_path, section("CERN", 12288, "CERN"))
    return tmp_path


def test_a_section_is_created_once(folder: Path) -> None:
    with pytest.raises(Conflict) as caught:
        topology_store.create(folder, section())
    assert caught.value.code == "section_exists"
    assert topology_store.load_section(folder, "central") == section()


def test_a_change_keeps_what_was_before_and_says_who_it_was(folder: Path) -> None:
    after = topology_store.change(folder, "central", adding("BNL"), WHO, expected=1)
    assert (after.epoch, topology_store.load_section(folder, "central")) == (2, after)
    kept = msgspec.json.decode((folder / HISTORY / "central-1.json").read_bytes(), type=Section)
    assert kept == section()
    row = msgspec.json.decode((folder / topology_store.AUDIT).read_bytes())
    assert (row["from_epoch"], row["to_epoch"], row["actor"]) == (1, 2, "central:root")


def test_only_the_newest_are_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topology_store, "KEPT", 3)
    topology_store.change(folder, "CERN", adding("CERN-PROD", "CERN"), WHO)
    # 9 and 10: by number, not by name.
    for number in range(11):
        topology_store.change(folder, "central", adding(f"S{number}"), WHO)
    names = {path.name for path in (folder / HISTORY).iterdir()}
    assert names == {"central-10.json", "central-11.json", "central-12.json", "CERN-1.json", "CERN-2.json"}
    assert len((folder / topology_store.AUDIT).read_bytes().splitlines()) == 12


def test_a_history_that_cannot_be_pruned_does_not_undo_the_change(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topology_store, "KEPT", 1)
    topology_store.change(folder, "central", adding("S1"), WHO)
    (folder / HISTORY / "central-1.json").mkdir()
    assert topology_store.change(folder, "central", adding("S2"), WHO).epoch == 3


def test_who_saw_an_older_epoch_changes_nothing(folder: Path) -> None:
    topology_store.change(folder, "central", adding("BNL"), WHO)
    before = (folder / "central.json").read_bytes()
    with pytest.raises(Conflict) as caught:
        topology_store.change(folder, "central", adding("UTA"), WHO, expected=1)
    assert caught.value.code == "epoch_changed"
    assert (folder / "central.json").read_bytes() == before


def test_an_edit_that_skips_an_epoch_or_clashes_with_another_section_is_refused(folder: Path) -> None:
    def skips(before: Section) -> Section:
        return msgspec.structs.replace(before, epoch=before.epoch + 2)

    def clashes(before: Section) -> Section:
        return msgspec.structs.replace(
            before, epoch=before.epoch + 1, shards={"us1": Shard(link="unix:/x")} | before.shards
        )

    for edit, authority, code in ((skips, "central", "bad_topology"), (clashes, "CERN", "name_taken")):
        with pytest.raises(CulmError) as caught:
            topology_store.change(folder, authority, edit, WHO)
        assert caught.value.code == code
    assert topology_store.load(folder).epochs == {"central": 1, "CERN": 1}
    assert not (folder / topology_store.AUDIT).exists()


def test_rivals_never_overwrite_each_other(folder: Path) -> None:
    threads = [
        threading.Thread(target=topology_store.change, args=(folder, "central", adding(f"S{n}"), WHO)) for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    after = topology_store.load_section(folder, "central")
    assert (after.epoch, len(after.sites)) == (9, 8)


def test_an_unknown_authority_and_an_empty_folder_are_said(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with pytest.raises(ClientFault) as caught:
        topology_store.load_section(folder, "FNAL")
    assert caught.value.http_status == 404
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(ClientFault):
        topology_store.load(empty)
    with pytest.raises(ClientFault):
        topology_store.change(empty / "none", "central", adding("X"), WHO)


def test_a_reader_sees_a_change_and_only_a_change(folder: Path) -> None:
    cache = TopologyCache(folder)
    assert not cache.refresh_if_changed()
    topology_store.change(folder, "central", adding("BNL"), WHO)
    assert cache.refresh_if_changed()
    assert cache.current.epochs == {"central": 2, "CERN": 1}
    assert not cache.refresh_if_changed()


@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"null", b"\xff", b'{"authority": "\xff"}', b'{"authority": "central", "epoch": 3}', b"[" * 100_000],
    ids=lambda damage: repr(damage[:20]),
)  # fmt: skip
def test_a_broken_section_stays_as_it_was_and_the_others_move_on(folder: Path, damage: bytes) -> None:
    cache = TopologyCache(folder)
    (folder / "CERN.json").write_bytes(damage)
    topology_store._replace(folder / "central.json", adding("BNL")(section()))
    cache.refresh_if_changed()
    assert cache.current.epochs == {"central": 2, "CERN": 1}
    assert cache.current.site("BNL").region == "US"


def test_a_section_that_does_not_hold_together_stays_as_it_was(folder: Path) -> None:
    cache = TopologyCache(folder)
    broken = msgspec.structs.replace(section(), epoch=7, placement={})
    topology_store._replace(folder / "central.json", broken)
    cache.refresh_if_changed()
    assert cache.current.epochs == {"central": 1, "CERN": 1}


def test_a_section_that_is_gone_for_a_moment_stays(folder: Path) -> None:
    cache = TopologyCache(folder)
    (folder / "CERN.json").rename(folder / "away")
    cache.refresh_if_changed()
    assert cache.current.epochs == {"central": 1, "CERN": 1}
    (folder / "away").rename(folder / "CERN.json")
    topology_store.change(folder, "CERN", adding("CERN-P1", "CERN"), WHO)
    cache.refresh_if_changed()
    assert cache.current.epochs == {"central": 1, "CERN": 2}


def test_sections_that_clash_change_nothing(folder: Path) -> None:
    cache = TopologyCache(folder)
    topology_store._replace(folder / "CERN.json", msgspec.structs.replace(section("CERN", 12288, "US"), epoch=2))
    assert not cache.refresh_if_changed()
    assert cache.current.epochs == {"central": 1, "CERN": 1}


def test_a_process_may_start_before_there_is_a_topology(tmp_path: Path) -> None:
    cache = TopologyCache(tmp_path / "none")
    assert cache.current.epochs == {}
    topology_store.create(tmp_path / "none", section())
    assert cache.refresh_if_changed()
    assert cache.current.epochs == {"central": 1}
