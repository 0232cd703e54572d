"""The command line: every command explains itself, fails in one line, and never shows a traceback."""

import json
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import click
import msgspec
import pytest
from click.testing import CliRunner, Result

from culm import __version__, topology_store
from culm.errors import Bug, ClientFault, Conflict, CulmError, Moved, Unavailable
from culm.section_changes import register_sites
from culm.tokens import Verifier
from culm.topology import Placement, Queue, Region, Section, Shard, SiteRegistration
from culm.topology_store import Who
from ops.cli import culm, exits
from ops.cluster import control
from ops.cluster.layout import Layout

LOCAL = {"test", "router run", "shard run", "monitor run", "pilot build", "completion", "version"}
"""These speak to no cluster."""
WITHOUT_DATA = {"up", "down", "logs", "demo", "test", "pilot run", "pilot build", "token issue", "token rotate", *LOCAL}
"""These show no data that a program would want as JSON; a token is printed bare."""


def _walk(command: click.Command, words: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None, name
            yield from _walk(found, (*words, name))
    else:
        yield " ".join(words), command


COMMANDS = dict(_walk(culm))


def _options(command: click.Command) -> set[str]:
    return {option for parameter in command.params for option in parameter.opts}


def _run(*words: str, folder: Path) -> Result:
    return CliRunner().invoke(culm, list(words), env={"CULM_DIR": str(folder)})


def test_the_commands_of_the_first_release_are_there() -> None:
    assert set(COMMANDS) >= {
        "up", "down", "status", "logs", "demo", "test", "job submit", "job list", "job show", "job kill", "site import",
        "site list", "site show", "site set", "topology show", "pilot run", "pilot build", "token issue", "token list",
        "replay", "audit", "router run", "shard run", "monitor run", "counts",
    }  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_what_it_does_and_gives_an_example(name: str, tmp_path: Path) -> None:
    told = _run(*name.split(), "--help", folder=tmp_path)
    assert told.exit_code == 0
    assert f"Usage: culm {name}" in told.output
    assert re.search(rf"^ +culm {name}", told.output, re.MULTILINE), "no example"


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - LOCAL))
def test_whatever_speaks_to_a_cluster_takes_a_folder(name: str) -> None:
    assert "--dir" in _options(COMMANDS[name])


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - WITHOUT_DATA))
def test_whatever_shows_data_can_show_it_as_json(name: str) -> None:
    assert "--output" in _options(COMMANDS[name])


def test_the_exit_codes_are_in_the_help(tmp_path: Path) -> None:
    told = " ".join(_run("--help", folder=tmp_path).output.split())
    for code in (exits.FAILED, exits.USAGE, exits.NOT_FOUND, exits.UNAVAILABLE, exits.REFUSED, exits.FINDINGS):
        assert f"{code} " in told


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ClientFault("bad_job", ""), exits.USAGE),
        (ClientFault("unknown_job", "", http_status=404), exits.NOT_FOUND),
        (ClientFault("forbidden", "", http_status=403), exits.REFUSED),
        (ClientFault("token_expired", "", http_status=401), exits.REFUSED),
        (Conflict("lease_lost", ""), exits.REFUSED),
        (Unavailable("shard_down", ""), exits.UNAVAILABLE),
        (Moved(1, 2), exits.UNAVAILABLE),
        (CulmError("start_failed", ""), exits.FAILED),
        (Bug("ours"), exits.FAILED),
    ],
)
def test_errors_have_their_exit_codes(error: CulmError, code: int) -> None:
    assert exits.of(error) == code


@pytest.mark.parametrize(
    "words",
    [
        ("job", "list"),
        ("job", "show", "1"),
        ("job", "kill", "1"),
        ("job", "submit", "--", "true"),
        ("site", "list"),
        ("site", "show", "BNL"),
        ("site", "set", "BNL-q", "status=offline"),
        ("vo", "set", "atlas", "heartbeat_s=1800.5", "default_cores=2"),
        ("vo", "list"),
        ("vo", "show", "atlas"),
        ("topology", "show"),
        ("counts",),
        ("pilot", "run", "--queue", "BNL-q"),
    ],
    ids=" ".join,
)
def test_without_a_cluster_it_says_how_to_get_one(words: tuple[str, ...], tmp_path: Path) -> None:
    told = _run(*words, folder=tmp_path)
    assert isinstance(told.exception, Unavailable)
    assert told.exception.code == "not_running"
    assert f"culm up --dir {tmp_path}" in told.exception.message


@pytest.mark.parametrize(
    ("words", "kind", "code"),
    [
        (("audit",), ClientFault, "no_cluster"),
        (("logs",), ClientFault, "no_log"),
        (("token", "list"), ClientFault, "no_keys"),
        (("token", "issue", "user", "ann"), ClientFault, "no_keys"),
        (("token", "rotate"), ClientFault, "no_keys"),
        (("site", "set", "q", "status"), ClientFault, "bad_queue"),
        (("site", "set", "q", "heartbeat_s=long"), ClientFault, "bad_queue"),
        (("site", "set", "q"), ClientFault, "bad_queue"),
        (("site", "set", "q", "cores=2", "--slots", "3"), ClientFault, "bad_queue"),
        (("vo", "set", "atlas", "heartbeat_s"), ClientFault, "bad_vo"),
        (("vo", "set", "atlas", "heartbeat_s=long"), ClientFault, "bad_vo"),
        (("vo", "set", "atlas", "colour=1"), ClientFault, "bad_vo"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_what_is_wrong_is_said_by_its_code(
    words: tuple[str, ...], kind: type[CulmError], code: str, tmp_path: Path
) -> None:
    told = _run(*words, folder=tmp_path)
    assert isinstance(told.exception, kind)
    assert told.exception.code == code


@pytest.mark.parametrize(
    "words",
    [
        ("nothing",),
        ("job",),
        ("job", "show", "one"),
        ("job", "list", "--state", "sleeping"),
        ("job", "list", "--limit", "0"),
        ("job", "submit"),
        ("job", "submit", "--count", "2001", "--", "true"),
        ("up", "--port", "70000"),
        ("replay", "no-such-file"),
        ("site", "import", "no-such-file"),
        ("token", "issue", "king", "ann"),
        ("token", "issue", "user", "ann", "--days", "0"),
        ("shard", "run"),
    ],
    ids=" ".join,
)
def test_wrong_use_is_told_by_exit_code_2_and_one_message(words: tuple[str, ...], tmp_path: Path) -> None:
    told = _run(*words, folder=tmp_path)
    assert told.exit_code == exits.USAGE
    assert "Usage:" in told.output
    assert "Traceback" not in told.output


@pytest.fixture
def signing(tmp_path: Path) -> Path:
    """A cluster's folder with a signing key and one computing queue, BNL-q."""
    layout = Layout(tmp_path)
    layout.ring.ensure()
    section = Section(
        authority="central",
        epoch=1,
        shards={"us1": Shard(link="unix:/us1")},
        regions={"US": Region(slot=0, shards=["us1"])},
        placement={0: Placement("us1", 1)},
    )
    sites = [SiteRegistration(name="BNL", region="US", queues={"BNL-q": Queue()})]
    topology_store.create(layout.topology, register_sites(section, sites))
    return tmp_path


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("user", "ann", "--role", "king"), "'king' is neither production, monitor nor manager:GROUP"),
        (("user", "ann", "--role", "manager:"), "'manager:' is neither"),
        (("user", "ann", "--days", "0.0001"), "less than 60 s"),
        (("user", "ann", "--days", "nan"), "less than 60 s"),
        (("user", "ann", "--queue", "BNL-q"), "--queue is for a pilot"),
        (("pilot", "p"), "needs --queue"),
        (("pilot", "p", "--queue", ""), "no computing queue"),
        (("pilot", "p", "--queue", "*", "--role", "production"), "are for a user"),
        (("admin", "root", "--group", "higgs"), "are for a user"),
    ],
)
def test_a_token_that_could_do_nothing_is_not_issued(words: tuple[str, ...], said: str, signing: Path) -> None:
    told = _run("token", "issue", *words, folder=signing)
    assert isinstance(told.exception, ClientFault)
    assert (told.exception.code, told.stdout) == ("bad_token", "")
    assert said in told.exception.message


@pytest.mark.parametrize(
    ("words", "warned"),
    [
        (("user", "ann", "--role", "production", "--role", "manager:higgs", "--days", "0.001"), []),
        (("pilot", "p", "--queue", "BNL-q", "--queue", "B*", "--queue", "*"), []),
        (("pilot", "p", "--queue", "BNL-q", "--queue", "DESY*", "--queue", "BNL"), ["DESY*", "BNL"]),
    ],
)
def test_a_token_that_can_do_something_is_issued_and_what_matches_nothing_now_is_said(
    words: tuple[str, ...], warned: list[str], signing: Path
) -> None:
    told = _run("token", "issue", *words, folder=signing)
    assert told.exit_code == 0
    principal = Verifier(Layout(signing).trusted).verify(f"Bearer {told.stdout.strip()}")
    assert principal.subject == words[1]
    assert re.findall(r"matches '([^']+)'", told.stderr) == warned


def test_a_token_is_issued_where_only_its_own_authority_has_a_home(tmp_path: Path) -> None:
    home = Layout(tmp_path).home("CERN")
    home.ring.ensure()
    section = Section(
        authority="CERN",
        epoch=1,
        shards={"cern1": Shard(link="unix:/cern1")},
        regions={"CERN": Region(slot=12_288, shards=["cern1"])},
        placement={12_288: Placement("cern1", 1)},
    )
    sites = [SiteRegistration(name="CERN-PROD", region="CERN", queues={"CERN-PROD-q": Queue()})]
    topology_store.create(home.topology, register_sites(section, sites))
    words = ("token", "issue", "pilot", "p", "--queue", "CERN*", "--queue", "BNL*", "--authority", "CERN")
    told = _run(*words, folder=tmp_path)
    assert told.exit_code == 0, told.exception
    assert re.findall(r"matches '([^']+)'", told.stderr) == ["BNL*"]


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_is_a_script_for_the_shell(shell: str, tmp_path: Path) -> None:
    told = _run("completion", shell, folder=tmp_path)
    assert told.exit_code == 0
    assert f"_CULM_COMPLETE={shell}_complete" in told.stdout


def test_the_version_is_told_as_json_too(tmp_path: Path) -> None:
    assert json.loads(_run("version", "-o", "json", folder=tmp_path).stdout)["culm"] == __version__
    assert __version__ in _run("version", folder=tmp_path).stdout


def test_ctrl_c_has_an_exit_code_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(control, "status", interrupted)
    told = _run("status", folder=tmp_path)
    assert isinstance(told.exception, CulmError)
    assert exits.of(told.exception) == exits.INTERRUPTED


def test_a_cluster_that_is_refused_its_port_leaves_no_folder(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        folder = tmp_path / "second"
        told = _run("up", "--port", str(min(busy.getsockname()[1], 65532)), folder=folder)
    assert isinstance(told.exception, Conflict)
    assert (told.exception.code, folder.exists()) == ("port_busy", False)


def test_status_without_a_cluster_is_told_as_json_too(tmp_path: Path) -> None:
    told = _run("status", "-o", "json", folder=tmp_path)
    assert told.exit_code == exits.UNAVAILABLE
    assert json.loads(told.output) == {"phase": "down"}


@pytest.mark.parametrize("service", ["router", "shard", "monitor"])
@pytest.mark.parametrize(
    ("text", "message"),
    [("", "missing required field"), ("nonsense = 1\n", "nonsense"), ("= 1", "is not TOML")],
    ids=["empty", "unknown key", "no TOML"],
)
def test_bad_settings_name_the_file_and_the_key(service: str, text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    path.write_text(text, encoding="utf-8")
    told = _run(service, "run", "--config", str(path), folder=tmp_path)
    assert isinstance(told.exception, ClientFault)
    assert told.exception.code == "bad_settings"
    assert str(path) in told.exception.message
    assert message in told.exception.message


# --- the topology's past ---------------------------------------------------------------------------------------------

OPERATOR = Who(actor="central:operator", reason="a new cluster", at=1.0)


@pytest.fixture
def topology(tmp_path: Path) -> Path:
    """The topology of a cluster that was up: UTA was registered after the first section."""
    folder = Layout(tmp_path).topology
    topology_store.create(
        folder,
        Section(
            authority="central",
            epoch=1,
            shards={"us1": Shard(link="unix:/us1")},
            regions={"US": Region(slot=0, shards=["us1"])},
            placement={0: Placement("us1", 1)},
        ),
        OPERATOR,
    )
    uta = SiteRegistration(name="UTA", region="US", queues={})
    topology_store.change(folder, "central", lambda section: register_sites(section, [uta]), OPERATOR)
    return folder


def test_the_first_section_has_a_history_and_a_diff(topology: Path, tmp_path: Path) -> None:
    rows = json.loads(_run("topology", "history", "-o", "json", folder=tmp_path).stdout)
    assert [(row["from_epoch"], row["to_epoch"]) for row in rows] == [(1, 2), (0, 1)]
    assert "+ sites.UTA.region" in _run("topology", "diff", folder=tmp_path).stdout
    told = _run("topology", "diff", "0", "1", folder=tmp_path)
    assert "central, epoch 0 -> 1" in told.stdout
    assert "+ shards.us1.link" in told.stdout


def test_a_section_of_which_nothing_is_recorded_agrees_with_itself(topology: Path, tmp_path: Path) -> None:
    shutil.rmtree(topology / topology_store.HISTORY)
    (topology / topology_store.AUDIT).unlink()
    told = _run("topology", "history", folder=tmp_path)
    assert told.stdout == "nothing is recorded of the section of central, which is at epoch 2\n"
    assert "central, epoch 0 -> 2" in _run("topology", "diff", folder=tmp_path).stdout


def test_a_lost_section_is_put_back_by_a_command_with_a_plan(topology: Path, tmp_path: Path) -> None:
    (topology / "central.json").unlink()
    planned = _run("topology", "restore", "--plan", folder=tmp_path)
    assert planned.exit_code == 0
    assert "would put back" in planned.stdout
    assert not (topology / "central.json").exists()
    done = json.loads(_run("topology", "restore", "--reason", "disk full", "-o", "json", folder=tmp_path).stdout)
    assert (done["from_epoch"], done["to_epoch"], done["planned"]) == (2, 3, False)
    [row] = topology_store.changes(topology, "central", 1)
    assert (row.from_epoch, row.to_epoch, row.reason) == (2, 3, "put back: disk full")
    assert row.actor.startswith("local:")
    again = _run("topology", "restore", folder=tmp_path)
    assert again.stdout == "the section of central is whole at epoch 3: nothing to put back\n"


def test_an_older_copy_is_put_back_past_what_the_other_home_knows(topology: Path, tmp_path: Path) -> None:
    cern = Layout(tmp_path).home("CERN").topology
    cern.mkdir(parents=True)
    section = topology_store.load_section(topology, "central")
    topology_store.adopt(cern, msgspec.structs.replace(section, epoch=9))
    old = topology / topology_store.HISTORY / "central-1.json"
    told = _run("topology", "restore", "--from", str(old), folder=tmp_path)
    assert told.exit_code == 0
    assert "(epoch 1) as epoch 10 of central" in told.stdout
    assert "- sites.UTA.region" in told.stdout
    after = topology_store.load_section(topology, "central")
    assert (after.epoch, after.placement) == (10, section.placement)


def test_a_copy_of_another_authority_is_not_put_back(topology: Path, tmp_path: Path) -> None:
    source = topology / topology_store.HISTORY / "central-1.json"
    told = _run("topology", "restore", "--authority", "CERN", "--from", str(source), folder=tmp_path)
    assert isinstance(told.exception, ClientFault)
    assert told.exception.code == "other_authority"
    assert not Layout(tmp_path).home("CERN").topology.exists()
