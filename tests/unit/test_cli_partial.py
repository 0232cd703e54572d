"""A command that could not hear every shard shows what is known, and says by its exit code that it is not all."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from culm.client import Client
from culm.errors import Unavailable
from culm.states import State
from culm.wire import (
    CountsAnswer,
    ErrorRow,
    ErrorsAnswer,
    JobRow,
    JobsAnswer,
    PileUpsAnswer,
    PilotsAnswer,
    ShardRow,
    ShardsAnswer,
    SiteWhyAnswer,
    SubmitAnswer,
)
from ops.audit import AuditReport, Finding
from ops.cli import audit, culm, demo, exits
from ops.cluster import control
from ops.cluster.layout import Layout

ROW = JobRow(
    id=7, state=State.FINISHED, site="BNL", region="US", queue="BNL-q", name="", owner="central:ann", vo="atlas",
    working_group="", label="user", priority=1000, attempt=1, max_attempts=3, jobset=7, parent_id=None,
    created_at=0.0, modified_at=0.0, pilot="", host="", cancel_requested=False, error=None,
)  # fmt: skip
ERROR = ErrorRow(plane="pilot", code=1099, site="BNL", region="US", n_jobs=77, example=1, last_at=0.0)
SHARD = ShardRow(
    name="cern1", authority="CERN", link="unix:/x", regions=["CERN"], n_slots=2, n_active=None, age_s=None,
    answers=False,
)  # fmt: skip


def counts(missing: list[str]) -> CountsAnswer:
    states = {"finished": 77}
    shards = {"us1": 0.1, "cern1": 40.0}
    return CountsAnswer(total=states, by_region={"US": states}, by_site={}, shards=shards, missing_shards=missing)


@pytest.mark.parametrize("output", ["table", "json"])
@pytest.mark.parametrize("missing", [[], ["cern1"]], ids=["whole", "partial"])
@pytest.mark.parametrize(
    ("words", "known"),
    [
        ("counts", "77"),
        ("top --once", "77"),
        ("job list", "BNL"),
        ("jobset show 7", "7"),
        ("errors", "77"),
        ("pile-ups", "24"),
        ("pilot list", ""),
        ("site why BNL", ""),
    ],
)
def test_what_is_known_is_shown_and_the_exit_code_says_whether_it_is_all(
    words: str, known: str, missing: list[str], output: str, answer_with: Callable[..., object]
) -> None:
    answer_with(
        counts(missing),
        ShardsAnswer(epochs={}, shards=[SHARD] if missing else []),
        JobsAnswer(jobs=[ROW], next=None, missing_shards=missing),
        ErrorsAnswer(hours=24, errors=[ERROR], missing_shards=missing),
        PileUpsAnswer(hours=24, pile_ups=[], n_samples={"us1": 24}, missing_shards=missing),
        PilotsAnswer(window_s=300.0, queues=[], pilots=[], n_left_out=0, missing_shards=missing),
        SiteWhyAnswer(site="BNL", window_s=300.0, queues=[], missing_shards=missing),
    )
    told = CliRunner().invoke(
        culm, [*words.split(), *(["--hours", "24"] if words == "pile-ups" else []), "-o", output]
    )  # fmt: skip
    assert known in told.stdout
    assert told.stdout
    if not missing:
        assert told.exit_code == 0, told.exception
        return
    assert isinstance(told.exception, Unavailable), told.exception
    assert exits.of(told.exception) == exits.UNAVAILABLE
    assert "cern1" in told.exception.message


# --- the demo


@pytest.mark.parametrize(
    ("finished", "missing", "code", "said"),
    [
        (60, [], 0, "60 jobs: 60 finished"),
        (40, ["cern1"], exits.UNAVAILABLE, "60 jobs: 40 finished, 20 not accounted for"),
        (59, [], exits.FAILED, "60 jobs: 59 finished, 1 not accounted for"),
        (0, [], exits.FAILED, "60 jobs: 60 not accounted for"),
    ],
)
def test_the_demo_succeeds_only_if_every_job_that_it_submitted_has_finished(
    finished: int,
    missing: list[str],
    code: int,
    said: str,
    answer_with: Callable[..., object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    submitted: list[int] = []

    async def submit(_client: Client, request: Any) -> SubmitAnswer:
        submitted.extend(range(len(submitted), len(submitted) + len(request.jobs)))
        return SubmitAnswer(ids=list(submitted[-len(request.jobs) :]), jobset=len(submitted), shards={})

    async def all_jobs(_client: Client, query: Any) -> tuple[list[JobRow], list[str]]:
        await asyncio.sleep(0)
        return ([ROW] * finished if query.jobset == 20 else []), missing

    answer_with()
    monkeypatch.setattr(Client, "submit", submit)
    monkeypatch.setattr(Client, "all_jobs", all_jobs)
    monkeypatch.setattr(control, "is_leaving", lambda _folder: False)
    monkeypatch.setattr(demo, "start", lambda *_: Layout(tmp_path))
    monkeypatch.setattr(demo, "PILOTS_PER_REGION", 0)
    monkeypatch.setattr(demo, "DEADLINE_S", 0.0)
    told = CliRunner().invoke(culm, ["demo"])
    assert len(submitted) == 60
    assert said in told.stdout
    error = told.exception
    assert (exits.of(error) if isinstance(error, Unavailable) else told.exit_code) == code, error


# --- the audit


@pytest.mark.parametrize("output", ["table", "json"])
@pytest.mark.parametrize(
    ("findings", "missing", "code"),
    [(0, {}, 0), (1, {}, exits.FINDINGS), (0, {"cern1": "no such socket"}, exits.UNAVAILABLE),
     (1, {"cern1": "no such socket"}, exits.FINDINGS)],
)  # fmt: skip
def test_an_audit_without_a_shard_is_none_of_all(
    findings: int, missing: dict[str, str], code: int, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [Finding(invariant="I1", rule="r", shard="us1", subject=7, text="x")] * findings
    report = AuditReport(n_jobs=77, states={"finished": 77}, shards=["us1"], findings=found, missing_shards=missing)
    monkeypatch.setattr(audit, "run", lambda *_: report)
    told = CliRunner().invoke(culm, ["audit", "-o", output])
    assert "77" in told.stdout
    assert ("cern1 was not audited: no such socket" in told.stderr) is bool(missing)
    assert (exits.of(told.exception) if isinstance(told.exception, Unavailable) else told.exit_code) == code
