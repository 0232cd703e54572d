"""The doctor's judgement: what is well, what is not, and that every fault comes with what to do."""

import os
import re
from pathlib import Path

import msgspec
import pytest

from culm import topology_store
from culm.section_changes import set_ban
from culm.topology import Placement, Region, Section, Shard
from culm.topology_store import Who
from culm.wire import Principal
from ops.cluster.layout import Layout
from ops.doctor import databases, examine, machine
from ops.doctor.check import Check
from ops.doctor.keys import keys

GOOD = {
    "innodb_flush_log_at_trx_commit": "1",
    "innodb_doublewrite": "ON",
    "innodb_flush_method": "fsync",
    "log_bin": "OFF",
    "sync_binlog": "0",
    "tx_isolation": "READ-COMMITTED",
}
GIB = 1 << 30


def _bad(found: list[Check]) -> list[str]:
    assert all(check.advice for check in found if check.level != "ok")
    return [check.text for check in found if check.level == "bad"]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({}, []),
        ({"innodb_flush_log_at_trx_commit": "3"}, []),
        ({"innodb_flush_log_at_trx_commit": "2"}, ["innodb_flush_log_at_trx_commit=2"]),
        ({"innodb_flush_log_at_trx_commit": "0"}, ["innodb_flush_log_at_trx_commit=0"]),
        ({"innodb_doublewrite": "OFF"}, ["innodb_doublewrite=OFF"]),
        ({"innodb_doublewrite": "DETECT_ONLY"}, ["innodb_doublewrite=DETECT_ONLY"]),
        ({"innodb_doublewrite": "DETECT_AND_RECOVER"}, []),
        ({"innodb_flush_method": "nosync"}, ["innodb_flush_method=nosync"]),
        ({"log_bin": "ON"}, ["sync_binlog=0"]),
        ({"log_bin": "ON", "sync_binlog": "1"}, []),
    ],
)
def test_a_database_that_may_lose_what_it_acknowledged_is_bad(changed: dict[str, str], told: list[str]) -> None:
    assert _bad(list(databases.durability("us1", GOOD | changed))) == told


def test_a_server_that_takes_no_large_job_is_bad() -> None:
    assert databases.packet("us1", 16 << 20).level == "ok"
    assert _bad([databases.packet("us1", (16 << 20) - 1024)]) == ["max_allowed_packet=16776192"]


def test_a_buffer_pool_that_is_smaller_than_the_data_is_said() -> None:
    assert databases.memory("us1", GIB, GIB).level == "ok"
    assert databases.memory("us1", GIB, GIB + 1).level == "warn"


@pytest.mark.parametrize(("skew_s", "level"), [(0.0, "ok"), (-1.0, "ok"), (1.1, "warn"), (-1.1, "warn")])
def test_a_clock_that_is_off_either_way_is_said(skew_s: float, level: str) -> None:
    assert databases.clock("us1", skew_s).level == level


@pytest.mark.parametrize(("free_bytes", "level"), [(5 * GIB, "ok"), (5 * GIB - 1, "warn"), (GIB - 1, "bad")])
def test_a_disk_is_scarce_before_it_is_full(free_bytes: int, level: str) -> None:
    assert machine.space(Path("/data"), free_bytes).level == level


@pytest.mark.parametrize(("median_ms", "level"), [(0.001, "warn"), (0.01, "ok"), (10.0, "ok"), (10.1, "warn")])
def test_a_disk_that_is_slow_or_none_is_said(median_ms: float, level: str) -> None:
    assert machine.sync_time(Path("/data"), median_ms).level == level


def test_packages_are_compared_with_the_lock() -> None:
    assert machine.packages("").level == "warn"
    assert machine.packages("no-such-package==1 ; python_version < '3'").level == "ok"
    wrong = machine.packages("no-such-package==1 \\\n    --hash=sha256:0\nclick==0.0.1\n")
    assert wrong.level == "warn"
    assert "no-such-package is missing; click is " in wrong.text


# --- keys and tokens -------------------------------------------------------------------------------------------------


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """A cluster's folder with a key of the centre and a token of it."""
    found = Layout(tmp_path)
    found.tokens.mkdir()
    for role in ("admin", "user"):
        token = found.ring.issue(Principal(role=role, subject="root", authority="central"), 365 * 86_400.0)
        (found.tokens / f"central.{role}").write_text(token, encoding="utf-8")
    return found


def _levels(layout: Layout) -> dict[str, str]:
    found = list(keys(layout))
    assert all(check.advice for check in found if check.level != "ok")
    return {check.name: check.level for check in found}


def test_good_keys_and_tokens_are_well(layout: Layout) -> None:
    assert _levels(layout) == {
        "key of central": "ok",
        "trusted keys of central": "ok",
        "token central.admin": "ok",
        "token central.user": "ok",
    }


def test_no_text_of_a_token_is_shown(layout: Layout) -> None:
    secret = (layout.tokens / "central.admin").read_text(encoding="utf-8")
    assert not [check for check in keys(layout) if secret in check.text + check.advice]


def test_an_authority_whose_key_is_elsewhere_is_said(layout: Layout) -> None:
    assert {check.name: check.level for check in keys(Layout(layout.folder, authority="CERN"))}["key of CERN"] == "warn"


def test_an_old_key_is_to_be_rotated(layout: Layout) -> None:
    for folder, ending in ((layout.keys, "key"), (layout.trusted, "pub")):
        [path] = folder.glob(f"*.{ending}")
        path.rename(path.with_name(re.sub(r"-\d+-", "-1500000000000-", path.name)))
    assert _levels(layout)["key of central"] == "warn"


def test_a_key_that_others_may_read_is_bad(layout: Layout) -> None:
    [path] = layout.keys.glob("*.key")
    path.chmod(0o640)
    assert _levels(layout)["key of central"] == "bad"


def test_a_withdrawn_key_is_bad_and_so_are_its_tokens(layout: Layout) -> None:
    [path] = layout.trusted.glob("*.pub")
    path.unlink()
    levels = _levels(layout)
    assert (levels["key of central"], levels["token central.admin"]) == ("bad", "bad")


@pytest.mark.parametrize(("valid_s", "level"), [(-60.0, "bad"), (86_400.0, "warn")])
def test_a_token_that_ends_is_said_before(layout: Layout, valid_s: float, level: str) -> None:
    token = layout.ring.issue(Principal(role="user", subject="ann", authority="central"), valid_s)
    (layout.tokens / "central.user").write_text(token, encoding="utf-8")
    assert _levels(layout)["token central.user"] == level


def test_without_a_cluster_nothing_is_bad_and_it_says_how_to_get_one(tmp_path: Path) -> None:
    found = {check.name: check for check in examine(Layout(tmp_path / "none", 1).homes)}
    assert _bad(list(found.values())) == []
    assert found["topology of CERN"].advice == "culm up makes one"
    assert found["processes of central"].text.startswith("none runs")
    assert os.fspath(tmp_path) in found["disk space"].text
    assert not (tmp_path / "none").exists()


def test_a_broken_topology_and_broken_settings_are_bad(tmp_path: Path) -> None:
    layout = Layout(tmp_path, 1)
    layout.topology.mkdir()
    (layout.topology / "central.json").write_text("{", encoding="utf-8")
    (tmp_path / "us1.toml").write_text("nonsense = 1", encoding="utf-8")
    bad = _bad(examine([layout], [tmp_path / "us1.toml"]))
    assert len(bad) == 2
    assert "central.json" in bad[0]
    assert "us1.toml" in bad[1]


# --- the topology ----------------------------------------------------------------------------------------------------


def section() -> Section:
    return Section(
        authority="central",
        epoch=1,
        shards={"us1": Shard(link="unix:/us1")},
        regions={"US": Region(slot=0, shards=["us1"])},
        placement={0: Placement("us1", 1)},
    )


@pytest.fixture
def home(tmp_path: Path) -> Layout:
    """The centre's home, whose section was changed once."""
    layout = Layout(tmp_path, 1)
    topology_store.create(layout.topology, section())
    topology_store.change(
        layout.topology, "central", lambda one: set_ban(one, "central:ann", "x"), Who(actor="a", reason="", at=1.0)
    )
    return layout


def _of_topology(home: Layout) -> Check:
    [check] = [check for check in examine([home]) if check.name == "topology of central"]
    return check


def test_a_good_topology_is_well(home: Layout) -> None:
    assert _of_topology(home).level == "ok"


@pytest.mark.parametrize("damage", ["lost", "broken", "older", "a copy of the peer is newer", "a copy differs"])
def test_a_section_that_is_lost_or_steps_back_is_to_be_put_back_by_the_command(home: Layout, damage: str) -> None:
    path = home.topology / "central.json"
    cern = home.home("CERN").topology
    now = topology_store.load_section(home.topology, "central")
    match damage:
        case "lost":
            path.unlink()
        case "broken":
            path.write_bytes(b"{")
        case "older":
            path.write_bytes((home.topology / "history" / "central-1.json").read_bytes())
        case "a copy of the peer is newer":
            cern.mkdir(parents=True)
            topology_store.adopt(cern, msgspec.structs.replace(now, epoch=3))
        case _:
            cern.mkdir(parents=True)
            topology_store.adopt(cern, msgspec.structs.replace(now, banned={}))
    check = _of_topology(home)
    assert check.level == "bad"
    assert check.advice.startswith("culm topology restore --plan ")


def test_a_broken_copy_is_not_to_be_put_back(home: Layout) -> None:
    (home.topology / "CERN.json").write_bytes(b"{")
    check = _of_topology(home)
    assert (check.level, "restore" in check.advice) == ("bad", False)
