"""What is shown of sites, VOs, accounts, counts and keys, and what is refused before a router is asked."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

from culm.errors import ClientFault, Conflict, CulmError
from culm.policies import Policy
from culm.registry_wire import ChangedAnswer, TopologyAnswer
from culm.section_changes import register_sites
from culm.topology import Placement, Queue, Region, Section, Shard, SiteRegistration
from culm.wire import CountsAnswer, ShardsAnswer
from ops.cli import culm, exits
from ops.cluster.layout import Layout

Answer = Callable[..., list[tuple[str, Any]]]


def run(*words: str) -> Result:
    return CliRunner().invoke(culm, list(words))


def refused(*words: str) -> CulmError:
    told = run(*words)
    assert isinstance(told.exception, CulmError), told.exception
    assert told.stdout == ""
    return told.exception


def section() -> Section:
    empty = Section(
        authority="central",
        epoch=1,
        shards={"us1": Shard(link="unix:/us1"), "eu1": Shard(link="unix:/eu1")},
        regions={"US": Region(slot=0, shards=["us1"]), "EU": Region(slot=1, shards=["eu1"])},
        placement={0: Placement("us1", 1), 1: Placement("eu1", 1)},
    )
    queue = Queue(heartbeat_s=900.0, default_walltime_s=86400)
    return register_sites(empty, [SiteRegistration(name="BNL", region="US", queues={"BNL-q": queue})])


@pytest.fixture
def known(answer_with: Answer) -> Callable[..., list[tuple[str, Any]]]:
    """A router that knows this section, with changes."""

    def known(**changes: Any) -> list[tuple[str, Any]]:
        told = msgspec.structs.replace(section(), **changes)
        return answer_with(TopologyAnswer(sections=[told]), ChangedAnswer(authority="central", epoch=9))

    return known


def test_a_site_is_shown_with_its_slots_their_shards_and_its_policy(known: Answer) -> None:
    known()
    told = run("site", "show", "BNL").stdout
    assert "BNL, region US, slot 2 on us1" in told
    assert "heartbeat_s=900 default_walltime_s=86400" in told


def test_no_policy_is_said_in_words_and_numbers_are_plain(known: Answer) -> None:
    known()
    assert run("vo", "list").stdout == "no VO has a policy: the settings of the shards hold for all\n"
    known(vos={"atlas": Policy(heartbeat_s=1800.0, default_cores=2)})
    assert "heartbeat_s=1800 default_cores=2" in run("vo", "list").stdout
    shown = run("vo", "show", "atlas").stdout
    assert "1800 " in shown
    assert "1800.0" not in shown


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("vo", "set", "x", "heartbeat_s=10", "heartbeat_s=20"), "bad_vo", "heartbeat_s is given twice"),
        (("vo", "set", "x", "heartbeat_s=-1"), "bad_vo", "heartbeat_s: Expected `float` >= 0"),
        (("vo", "set", "x", "heartbeat_s=0.001"), "bad_vo", "heartbeat_s: 0.001 s is less than 1"),
        (("site", "set", "BNL-q", "cores=0"), "bad_queue", "cores: Expected `int` >= 1"),
        (("user", "ban", "bob", "--reason", "x"), "bad_account", "'bob' is not AUTHORITY:SUBJECT"),
        (("user", "ban", "central:", "--reason", "x"), "bad_account", "is not AUTHORITY:SUBJECT"),
        (("user", "ban", "NOPE:ann", "--reason", "x"), "bad_account", "there is no authority 'NOPE'"),
        (("user", "unban", "bob"), "bad_account", "is not AUTHORITY:SUBJECT"),
        (("user", "unban", "central:bob"), "not_banned", "central:bob is not banned by central"),
    ],
)
def test_what_is_wrong_is_refused_and_nothing_is_changed(
    words: tuple[str, ...], code: str, said: str, known: Answer
) -> None:
    asked = known()
    error = refused(*words)
    assert (error.code, said in error.message) == (code, True), error.message
    assert [path for path, _ in asked if path != "topology"] == []


def test_who_is_banned_is_let_in_again(known: Answer) -> None:
    asked = known(banned={"central:bob": "a test"})
    assert run("user", "unban", "central:bob").exit_code == 0
    assert [path for path, _ in asked] == ["topology", "ban"]


# --- the catalogue


@pytest.mark.parametrize(
    ("line", "code"),
    [("BNL-q,OTHER,US", "queue_of_other_site"), ("BNL-q,BNL,EU", "site_in_other_region")],
)
def test_a_dry_run_refuses_what_the_import_would_refuse(line: str, code: str, known: Answer, tmp_path: Path) -> None:
    asked = known()
    path = tmp_path / "sites.csv"
    path.write_text(f"nickname,site,region\n{line}\n", encoding="utf-8")
    error = refused("site", "import", str(path), "--dry-run")
    assert (type(error), error.code, exits.of(error)) == (Conflict, code, exits.REFUSED)
    assert {path for path, _ in asked} == {"topology"}


def test_an_import_says_what_it_does_not_use(known: Answer, tmp_path: Path) -> None:
    known()
    path = tmp_path / "sites.csv"
    path.write_text("nickname,site,region,cores\nX-q,X,US,8\n", encoding="utf-8")
    told = run("site", "import", str(path), "--dry-run")
    assert "1 site (1 new), 1 computing queue, epoch 2" in told.stdout
    assert "columns that are not used: cores" in told.stderr
    assert "no column `status`" in told.stderr
    for column in ("nickname", "siteid", "maxtime", "cmtconfig"):
        assert column in run("site", "import", "--help").stdout


# --- counts, keys


def test_counts_are_in_the_order_of_a_jobs_life_and_name_the_archive(answer_with: Answer) -> None:
    states = {"finished": 5, "activated": 3, "running": 4}
    counts = CountsAnswer(
        total=states,
        by_region={"US": states},
        by_site={},
        shards={"us1": 0.1},
        archived={"failed": 83, "finished": 700},
    )
    answer_with(counts, ShardsAnswer(epochs={}, shards=[]))
    said = "and in the archive 783 jobs: 700 finished, 83 failed"
    told = run("counts").stdout
    assert told.index("activated") < told.index("running") < told.index("finished")
    assert said in told
    assert said in run("top", "--once").stdout
    answer_with(msgspec.structs.replace(counts, archived={}))
    assert "archive" not in run("counts").stdout


def test_the_list_of_keys_says_which_one_signs(tmp_path: Path) -> None:
    ring = Layout(tmp_path).ring
    old = ring.ensure()
    new = ring.rotate()
    assert old != new
    told = CliRunner().invoke(culm, ["token", "list"], env={"CULM_DIR": str(tmp_path)}).stdout
    assert f"key    {new} (signs)\n" in told
    assert f"key    {old}\n" in told
    as_json = CliRunner().invoke(culm, ["token", "list", "-o", "json"], env={"CULM_DIR": str(tmp_path)}).stdout
    assert json.loads(as_json)["signing"] == [new]


def test_a_token_without_a_subject_is_refused_with_what_is_needed(tmp_path: Path) -> None:
    Layout(tmp_path).ring.ensure()
    told = CliRunner().invoke(culm, ["token", "issue", "user", ""], env={"CULM_DIR": str(tmp_path)})
    assert isinstance(told.exception, ClientFault)
    assert told.exception.message == "a subject has 1 to 128 characters, a VO at most as many"


def test_the_help_of_shard_names_what_show_shows() -> None:
    assert "one shard with its regions, sites and slots" in run("shard", "--help").stdout
