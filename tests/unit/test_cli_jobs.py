"""`culm job` and `culm jobset`: what is said, by which option a fault is named, and with whose token."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

from culm.client import Client
from culm.errors import ClientFault
from culm.states import State
from culm.wire import (
    AttemptReport,
    CancelAnswer,
    CancelledJob,
    JobsAnswer,
    JobSpec,
    JobView,
    Reason,
    SubmitAnswer,
    SubmitWarning,
)
from ops.cli import culm, exits
from tests.unit.test_cli_partial import ROW

Answer = Callable[..., list[tuple[str, Any]]]


def run(*words: str) -> Result:
    return CliRunner().invoke(culm, list(words))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("job show 0", "JOB_ID"),
        ("job why -- -1", "JOB_ID"),
        ("job history 99999999999999999999", "JOB_ID"),
        ("job kill 0", "IDS"),
        ("job retry 1 0", "IDS"),
        ("jobset show 0", "NUMBER"),
        ("jobset kill 0", "NUMBER"),
        ("job list --jobset 0", "--jobset"),
        ("job list --after -1", "--after"),
        ("job watch 1 --timeout -5", "--timeout"),
        ("job submit --walltime -1 -- true", "--walltime"),
        ("job submit --cores 0 -- true", "--cores"),
        ("job submit --memory-mb -5 -- true", "--memory-mb"),
        ("job submit --disk-mb -5 -- true", "--disk-mb"),
        ("job submit --priority -1 -- true", "--priority"),
        ("job submit --max-attempts 51 -- true", "--max-attempts"),
        ("pilot run --queue q --max-jobs -1", "--max-jobs"),
        ("pilot run --queue q --idle-exit -1", "--idle-exit"),
    ],
)
def test_a_number_out_of_range_is_named_by_its_option(words: str, named: str) -> None:
    told = run(*words.split())
    assert told.exit_code == exits.USAGE, told.exception
    assert "not in the range" in told.output
    assert named in told.output
    assert "$." not in told.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--name", "x" * 257, "--", "true"), "--name: Expected `str` of length <= 256"),
        (("--site", "x" * 129, "--", "true"), "--site: Expected `str` of length <= 128"),
        (("--", "x" * 65537), "ARGV: Expected `str` of length <= 65536"),
    ],
    ids=["name", "site", "argv"],
)
def test_a_text_that_is_too_long_is_named_by_its_option(words: tuple[str, ...], said: str) -> None:
    told = run("job", "submit", *words)
    assert isinstance(told.exception, ClientFault)
    assert (told.exception.code, told.exception.message) == ("bad_job", said)


@pytest.mark.parametrize("verb", ["kill", "retry", "watch"])
@pytest.mark.parametrize(
    ("words", "said"), [(("1", "--jobset", "1"), "were both given"), ((), "must say which jobs")], ids=["both", "none"]
)
def test_ids_or_a_jobset_say_which_jobs_are_meant(verb: str, words: tuple[str, ...], said: str) -> None:
    told = run("job", verb, *words)
    assert isinstance(told.exception, ClientFault)
    assert said in told.exception.message


def test_a_submit_tells_the_jobset_and_each_warning_once_beside_the_ids(answer_with: Answer) -> None:
    reasons = [Reason(code="queue_offline", text="BNL-q is offline: \x1b[31m"), Reason(code="no_queue_there", text="b")]
    warning = SubmitWarning(index=0, n_jobs=2, reasons=reasons)
    answer_with(SubmitAnswer(jobset=204711, ids=[13, 14], shards={}, warnings=[warning]))
    told = run("job", "submit", "--count", "2", "--", "true")
    assert told.stdout == "13\n14\n"
    assert told.stderr.splitlines() == [
        "jobset 204711",
        "warning: nobody can run job 13 and 1 more like it as things are:",
        r"  queue_offline: BNL-q is offline: \x1b[31m",
        "  no_queue_there: b",
    ]


def view(**changes: Any) -> JobView:
    report = AttemptReport(
        attempt=1, at=0.0, state=State.CANCELLED, exit_code=None, error=None, stdout_tail="", stderr_tail="", usage=None
    )
    values = {"job": ROW, "spec": JobSpec(argv=["sh", "-c", "echo :fire:"]), "history": [], "reports": [report]}
    return JobView(**(values | changes))


def test_a_job_is_shown_with_its_jobset_vo_name_and_payload(answer_with: Answer) -> None:
    answer_with(view(job=msgspec.structs.replace(ROW, jobset=204711, name="mine")))
    told = run("job", "show", "7").stdout
    assert "name mine, jobset 204711, VO atlas, label user" in told
    assert "runs: sh -c 'echo :fire:'" in told
    assert "attempt 1: cancelled\n" in told
    answer_with(view(spec=JobSpec(shell="sleep 1; date")))
    assert "runs: sleep 1; date" in run("job", "show", "7").stdout


def test_what_a_watch_says_as_json_is_json_whatever_is_in_it(answer_with: Answer) -> None:
    answer_with(view(job=msgspec.structs.replace(ROW, host="node\x9b\x1b[2J")))
    assert json.loads(run("job", "watch", "7", "-o", "json").stdout)["host"] == "node\x9b\x1b[2J"
    assert r"finished node\x9b\x1b[2J" in run("job", "watch", "7").stdout


def test_a_list_shows_names(answer_with: Answer) -> None:
    answer_with(JobsAnswer(jobs=[msgspec.structs.replace(ROW, name="mine")], next=None))
    assert "mine" in run("job", "list").stdout


def test_any_number_of_jobs_is_killed_in_calls_of_a_bounded_size(answer_with: Answer) -> None:
    asked = answer_with(CancelAnswer(jobs=[CancelledJob(id=1, outcome="cancelled")]))
    told = run("job", "kill", *map(str, range(1, 1226)))
    assert told.exit_code == 0, told.exception
    assert [len(request.ids) for _, request in asked] == [1000, 225]
    assert told.stdout == "1 cancelled\n" * 2


def test_a_second_retry_tells_what_was_retried_before(answer_with: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [msgspec.structs.replace(ROW, id=n, state=State.FAILED) for n in (1, 2)]
    retried = msgspec.structs.replace(ROW, id=3, state=State.RUNNING)
    answer_with(JobsAnswer(jobs=[*rows, retried], next=None), view())
    made = {"retry-1": 3, "retry-2": 4}

    async def submit(_client: Client, request: Any) -> SubmitAnswer:
        return SubmitAnswer(jobset=7, ids=[made[request.idempotency_key]], shards={})

    monkeypatch.setattr(Client, "submit", submit)
    assert run("job", "retry", "--jobset", "7").stdout == "1 -> 3 (was retried before)\n2 -> 4\n"


# --- with whose token


@pytest.fixture
def tokens(answer_with: Answer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The token of each client that is made."""
    answer_with(JobsAnswer(jobs=[], next=None))
    for role in ("user", "admin"):
        (tmp_path / "tokens" / f"central.{role}").write_text(f"the.{role}.token\n", encoding="utf-8")
    made: list[str] = []
    make = Client.__init__

    def init(client: Client, url: str, token: str, **options: Any) -> None:
        made.append(token)
        make(client, url, token, **options)

    monkeypatch.setattr(Client, "__init__", init)
    return made


def test_jobs_are_read_as_user_demo_or_as_an_admin_or_with_a_token_of_ones_own(
    tokens: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "ann"
    own.write_text("anns.own.token", encoding="utf-8")
    plain = run("job", "list")
    admin = run("job", "list", "--as", "admin")
    own_one = run("job", "list", "--token-file", str(own))
    monkeypatch.setenv("CULM_TOKEN_FILE", str(own))
    run("job", "list", "--as", "admin")
    hint = "--as admin sees those of all"
    assert [hint in told.stderr for told in (plain, admin, own_one)] == [True, False, False]
    assert tokens == ["the.user.token", "the.admin.token", "anns.own.token", "anns.own.token"]


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"a.b\n.c", b"garbage", "a.b.\u00fc".encode()])
def test_a_damaged_token_is_said_with_its_file_and_the_cure(content: bytes, tokens: list[str], tmp_path: Path) -> None:
    path = tmp_path / "tokens" / "central.user"
    path.write_bytes(content)
    told = run("job", "list")
    assert isinstance(told.exception, ClientFault), told.exception
    assert told.exception.code == "bad_token_file"
    assert str(path) in told.exception.message
    assert "culm down, then culm up" in told.exception.message
    path.unlink()
    told = run("job", "list")
    assert isinstance(told.exception, ClientFault)
    assert (told.exception.code, tokens) == ("no_token", [])
    assert "culm down, then culm up" in told.exception.message
