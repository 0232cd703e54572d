"""The clients' book, verdicts, stored runs, their comparison and their page."""

import base64
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from culm.errors import ClientFault
from loadtest import report, runs, verdicts
from loadtest.book import Book, Result, Window
from loadtest.latencies import Histogram
from loadtest.runs import Machine, Run
from loadtest.shapes import StepFigures
from loadtest.verdicts import Facts, Row, Slo, Verdict, judge
from ops import load_bed
from ops.cli import culm, exits
from ops.cli import load as load_command
from ops.cluster.layout import Layout

# --- the book --------------------------------------------------------------------------------------------------------


def test_the_same_attempt_for_two_requests_is_a_duplicate() -> None:
    book = Book(0.0, 1.0)
    book.grant(7, 1, "first", 1.0)
    book.grant(7, 1, "first", 2.0)
    assert book.duplicates == []
    book.grant(7, 2, "second", 3.0)
    assert book.duplicates == []
    book.grant(7, 1, "third", 4.0)
    assert book.duplicates == ["job 7 attempt 1: given to first and to third"]
    assert book.n_granted == 2


def test_a_job_that_two_attempts_ended_is_a_duplicate_and_a_repeated_report_is_none() -> None:
    book = Book(0.0, 1.0)
    book.end(7, 1)
    book.end(7, 1)
    assert (book.duplicates, book.n_ended) == ([], 1)
    book.end(7, 2)
    assert book.duplicates == ["job 7: ended by the attempts 1 and 2"]


def test_a_job_that_an_earlier_run_left_is_not_taken_for_one_of_this_run() -> None:
    book = Book(0.0, 1.0)
    book.accept(7, "A", 1.0)
    for job in (7, 8):
        book.grant(job, 1, f"for {job}", 2.0)
        book.end(job, 1)
    assert (book.n_ended, book.ended_own()) == (2, [7])


def test_an_id_of_two_submits_is_a_duplicate() -> None:
    book = Book(0.0, 1.0)
    book.accept(7, "A", 1.0)
    book.accept(7, "A", 2.0)
    assert book.duplicates == ["job 7: the id of two submits"]


def test_what_waits_is_counted_by_site_and_how_long_it_waited() -> None:
    book = Book(0.0, 1.0)
    for job, site in ((1, "A"), (2, "A"), (3, "B")):
        book.accept(job, site, 10.0)
    book.grant(1, 1, "one", 10.5)
    book.grant(1, 2, "again", 99.0)
    book.grant(4, 1, "of somebody else", 99.0)
    assert book.n_waiting == {"A": 1, "B": 1}
    assert book.waits.n == 1
    assert book.waits.percentile(0.5) == pytest.approx(500, rel=0.02)


def test_outcomes_are_kept_by_name_and_by_window() -> None:
    book = Book(100.0, 2.0)
    book.answered("getJob [us1]", 100.5, 4.0, "ok")
    book.answered("getJob [eu1]", 103.0, 4.0, "busy", "503 shard_down")
    book.answered("getJob [eu1]", 103.5, 4.0, "failed", "500 internal")
    book.felt("getJob [us1]", 100.5, 40.0)
    assert (book.names["getJob [us1]"].n_ok, book.names["getJob [eu1]"].n_busy) == (1, 1)
    assert [window.n_ok.get("getJob", 0) for window in book.windows] == [1, 0]
    assert [window.n_failed.get("getJob", 0) for window in book.windows] == [0, 1]
    assert book.texts == {"getJob [eu1]: 503 shard_down": 1, "getJob [eu1]: 500 internal": 1}
    seen = book.step("getJob", 100.0, 104.0)
    assert (seen.rate, seen.failed_share) == (0.25, pytest.approx(2 / 3))
    assert seen.p99_ms == pytest.approx(40, rel=0.02)


def test_a_window_in_which_nobody_said_so_has_the_users_and_the_rate_of_before() -> None:
    book = Book(0.0, 1.0)
    book.window(0.0).rate, book.window(0.0).n_users = 50.0, 7
    assert (book.window(3.0).rate, book.window(2.0).n_users) == (50.0, 7)


def test_very_many_different_failures_are_counted_without_their_texts() -> None:
    book = Book(0.0, 1.0)
    for n in range(1000):
        book.answered("submit", 0.0, 1.0, "failed", f"{n}")
    assert len(book.texts) <= 51
    assert sum(book.texts.values()) == 1000


# --- verdicts --------------------------------------------------------------------------------------------------------


def _row(name: str = "getJob", **changes: Any) -> Row:
    values: dict[str, Any] = {
        "name": name, "n_ok": 1000, "n_busy": 0, "n_failed": 0, "rate": 100.0, "p50_ms": 5.0, "p95_ms": 20.0,
        "p99_ms": 50.0, "p999_ms": 80.0, "service_p50_ms": 4.0, "service_p99_ms": 40.0,
    }  # fmt: skip
    return Row(**(values | changes))


def _facts(*rows: Row, **changes: Any) -> Facts:
    values: dict[str, Any] = {"n_duplicates": 0, "n_lost": 0, "n_unanswered": 0, "client_cpu": 0.3}
    return Facts(rows=list(rows or (_row(),)), **(values | changes))


def test_a_run_without_fault_meets_what_must_always_hold() -> None:
    assert judge(Slo(), _facts()) == Verdict("met", [])


@pytest.mark.parametrize(
    ("slo", "facts", "word"),
    [
        (Slo(), _facts(_row(n_failed=1)), "1 of 1001 requests failed"),
        (Slo(), _facts(n_duplicates=1), "1 duplicates"),
        (Slo(), _facts(n_lost=2), "2 jobs lost"),
        (Slo(n_unanswered=0), _facts(n_unanswered=3), "3 requests without an answer"),
        (Slo(busy_share=0.01), _facts(_row(n_busy=20)), "come again"),
        (Slo(p50_ms={"getJob": 4.0}), _facts(), "p50 5.0 ms > 4 ms"),
        (Slo(p95_ms={"getJob": 4.0}), _facts(), "p95"),
        (Slo(p99_ms={"getJob": 49.0}), _facts(), "p99 50.0 ms > 49 ms"),
        (Slo(p999_ms={"getJob": 49.0}), _facts(), "p999"),
        (Slo(p99_ms={"submit": 49.0}), _facts(), "submit: no request"),
        (Slo(min_rate={"getJob": 101.0}), _facts(), "100.0/s < 101/s"),
        (Slo(min_rate={"submit": 1.0}), _facts(), "submit"),
        (Slo(min_knee=200.0), _facts(knee=150.0), "150/s < 200/s"),
    ],
)
def test_what_is_missed_is_told_with_its_figures(slo: Slo, facts: Facts, word: str) -> None:
    verdict = judge(slo, facts)
    assert verdict.outcome == "missed"
    assert len(verdict.misses) == 1
    assert word in verdict.misses[0]


def test_a_run_that_did_nothing_is_missed() -> None:
    assert judge(Slo(), _facts(_row(n_ok=0))).outcome == "missed"


def test_answers_that_ask_to_come_again_are_no_failures_unless_it_is_said() -> None:
    assert judge(Slo(), _facts(_row(n_busy=500))).outcome == "met"


def test_speed_is_not_judged_where_the_clients_were_saturated() -> None:
    slo = Slo(p99_ms={"getJob": 1.0})
    verdict = judge(slo, _facts(client_cpu=0.86))
    assert (verdict.outcome, verdict.misses) == ("none", [])
    assert "86%" in verdict.note
    assert judge(slo, _facts(client_cpu=0.85)).outcome == "missed"
    # A knee is a speed, too.
    assert judge(Slo(), _facts(client_cpu=0.86, knee=100.0)).outcome == "none"


def test_correctness_is_judged_however_busy_the_clients_were() -> None:
    assert judge(Slo(), _facts(client_cpu=1.0)).outcome == "met"
    both = judge(Slo(p99_ms={"getJob": 1.0}), _facts(client_cpu=1.0, n_duplicates=1))
    assert (both.outcome, len(both.misses)) == ("missed", 1)


def test_an_slo_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "slo.toml"
    path.write_text("failed_share = 0.001\nn_unanswered = 0\n[p99_ms]\ngetJob = 200\n", encoding="utf-8")
    assert verdicts.read(path) == Slo(failed_share=0.001, n_unanswered=0, p99_ms={"getJob": 200.0})


@pytest.mark.parametrize("text", ["failed_shares = 1", "p99_ms = 5", "[p99_ms", "p99_ms.getJob = 'fast'"])
def test_an_slo_file_with_a_mistake_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "slo.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ClientFault, match=r"slo\.toml"):
        verdicts.read(path)


# --- runs ------------------------------------------------------------------------------------------------------------


def _result(**changes: Any) -> Result:
    book = Book(1000.0, 1.0)
    for n in range(100):
        name = f"getJob [{'us1' if n % 2 else 'eu1'}]"
        book.answered(name, 1000 + n / 10, 4.0, "ok")
        book.felt(name, 1000 + n / 10, 5.0 + n)
    book.answered("bad [us1]", 1001.0, 2.0, "ok")
    values: dict[str, Any] = {
        "began_at": 1000.0, "ended_at": 1010.0, "cpu_s": 1.0, "window_s": 1.0, "windows": book.windows,
        "names": book.names, "texts": {}, "n_granted": 100, "n_ended": 100, "n_empty": 0, "n_unanswered": 0,
        "duplicates": [], "accepted": [], "ended": [], "waits": {},
    }  # fmt: skip
    return Result(**(values | changes))


def test_rows_are_by_operation_and_then_by_shard() -> None:
    rows = runs.rows_of(_result())
    assert [row.name for row in rows] == ["bad", "getJob", "bad [us1]", "getJob [eu1]", "getJob [us1]"]
    by_name = {row.name: row for row in rows}
    assert (by_name["getJob"].n_ok, by_name["getJob"].rate) == (100, 10.0)
    assert by_name["getJob"].p50_ms == pytest.approx(54, rel=0.03)
    assert by_name["getJob"].service_p99_ms == pytest.approx(4, rel=0.02)
    # What is refused on purpose is timed by its answer.
    assert by_name["bad"].p50_ms == pytest.approx(2, rel=0.02)


def _run(**changes: Any) -> Run:
    result = _result()
    machine = Machine(
        platform="Linux", python="3.11", cpu="a processor", n_cpus=2, memory_mb=4096, sync_ms=0.5, load_before=0.1
    )
    values: dict[str, Any] = {
        "id": "smoke-1", "scenario": "smoke", "commit": "abc", "began_at": 1000.0, "seconds": 10.0, "seed": 7,
        "options": {"rate": 100.0}, "settings": {"us1": "{}"}, "machine": machine, "rows": runs.rows_of(result),
        "cpu": {"us1": runs.cpu_use([(0.0, 0.0), (10.0, 5.0)]), "client": runs.cpu_use([(0.0, 0.0), (10.0, 1.0)])},
        "windows": result.windows, "window_s": 1.0, "texts": {}, "events": [], "n_submitted": 100, "n_granted": 100,
        "n_ended": 100, "n_empty": 0, "n_unanswered": 0, "duplicates": [], "n_lost": 0, "wait_p50_ms": 1.0,
        "wait_p99_ms": 2.0, "knee": 0.0, "broken_by": "", "steps": [], "slo": Slo(), "verdict": Verdict("met", []),
    }  # fmt: skip
    return Run(**(values | changes))


def test_a_stored_run_is_read_back_by_its_id_or_as_the_last(tmp_path: Path) -> None:
    for name in ("smoke-1", "smoke-2"):
        (tmp_path / runs.FOLDER / name).mkdir(parents=True)
        runs.store(tmp_path, _run(id=name))
    assert runs.load(tmp_path, "smoke-1") == _run()
    assert runs.load(tmp_path, runs.LAST).id == runs.names(tmp_path)[-1]


@pytest.mark.parametrize("name", ["smoke-9", "../x", "last", ""])
def test_a_run_that_is_not_there_is_told(name: str, tmp_path: Path) -> None:
    with pytest.raises(ClientFault, match="culm load list"):
        runs.load(tmp_path, name)


def test_a_run_that_is_damaged_is_told(tmp_path: Path) -> None:
    place = runs.place(tmp_path, "smoke")
    (place / runs.FILE).write_text("{", encoding="utf-8")
    with pytest.raises(ClientFault, match=place.name):
        runs.load(tmp_path, place.name)


def test_a_comparison_has_ratios_and_says_what_else_differs() -> None:
    slower = [msgspec.structs.replace(row, p99_ms=row.p99_ms * 3) for row in _run().rows]
    other = _run(id="smoke-2", commit="def", rows=slower, options={"rate": 200.0}, seed=7, n_ended=50)
    compared = runs.compare(_run(), other)
    ratios = {(one.name, one.figure): one.ratio for one in compared.figures}
    assert ratios["getJob", "p99_ms"] == pytest.approx(3)
    assert ratios["getJob", "p50_ms"] == pytest.approx(1)
    # 5 s of us1 for 100 jobs, then for 50.
    assert ratios["us1", "cpu_ms_per_job"] == pytest.approx(2)
    assert compared.differences == ["commit: abc and def", "option rate: 100.0 and 200.0"]


def test_a_comparison_says_which_run_had_no_verdict() -> None:
    saturated = _run(id="smoke-2", verdict=Verdict("none", [], "the clients were busy"))
    assert runs.compare(_run(), saturated).differences == ["smoke-2: the clients were busy"]


def test_the_busiest_seconds_are_found() -> None:
    quiet = [(float(t), 0.1 * t) for t in range(31)]
    burst = [(float(t), 1.0 * min(max(t - 10, 0), 10)) for t in range(31)]
    assert (runs.cpu_use(quiet).mean, runs.cpu_use(quiet).busiest) == pytest.approx((0.1, 0.1))
    assert (runs.cpu_use(burst).mean, runs.cpu_use(burst).busiest) == pytest.approx((1 / 3, 1.0))
    assert runs.cpu_use([(0.0, 0.0), (4.0, 2.0)]).busiest == pytest.approx(0.5)
    assert runs.cpu_use([(0.0, 1.0)]).busiest == 0


def test_a_process_that_was_restarted_goes_on_under_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    used = {1: {1: 5.0}, 2: {2: 0.5, 3: 0.25}}
    monkeypatch.setattr(load_bed.cpu, "of_tree", lambda pid: used[pid])
    monkeypatch.setattr(load_bed.cpu, "machine_seconds", lambda: 0.0)
    book = load_bed.CpuBook(0.0)
    book.sample({"us1": 1}, 0.0)
    used[1] = {1: 6.0}
    book.sample({"us1": 1}, 1.0)
    book.sample({"us1": 2}, 2.0)
    # What it had used before the first look is not the run's; the second process with its child is.
    assert book.uses()["us1"].mean == pytest.approx((1.0 + 0.75) / 2)


def test_no_secret_is_kept_with_a_run(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    layout.configs.mkdir(parents=True)
    text = 'name = "us1"\npeer_token_file = "x"\n[database]\nuser = "culm"\npassword = "hidden"\n'
    (layout.configs / "us1.toml").write_text(text, encoding="utf-8")
    assert load_bed.settings_of(layout) == {
        "us1": '{"database":{"user":"culm"},"name":"us1","peer_token_file":"x"}',
    }


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verdict", "code"),
    [
        (Verdict("met", []), 0),
        (Verdict("missed", ["1 duplicates > 0"]), exits.FAILED),
        (Verdict("none", [], "the clients were busy"), exits.UNAVAILABLE),
    ],
)
def test_the_exit_code_is_the_verdict_and_the_last_line_is_the_run(
    verdict: Verdict, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = runs.place(tmp_path, "smoke")

    async def ran(*_: object) -> Run:
        return _run(id=place.name, verdict=verdict)

    monkeypatch.setattr(load_command, "_run", ran)
    told = CliRunner().invoke(culm, ["load", "run", "smoke", "--json", "--dir", str(tmp_path)])
    assert told.exit_code == code
    assert msgspec.json.decode(told.stdout.splitlines()[-1], type=Run).verdict == verdict
    assert all(text in told.stdout for text in verdict.misses)
    assert runs.load(tmp_path, "last").verdict == verdict


def test_a_damaged_run_hides_no_other_one(tmp_path: Path) -> None:
    for name, text in (("smoke-1", b"{"), ("smoke-2", msgspec.json.encode(_run(id="smoke-2")))):
        (tmp_path / runs.FOLDER / name).mkdir(parents=True)
        (tmp_path / runs.FOLDER / name / runs.FILE).write_bytes(text)
    told = CliRunner().invoke(culm, ["load", "list", "--dir", str(tmp_path)], env={"COLUMNS": "200"})
    assert told.exit_code == 0
    assert "smoke-2" in told.stdout
    assert "cannot be read: smoke-1" in told.stderr


# --- the page --------------------------------------------------------------------------------------------------------

EVIL = "<script>alert('$x^2$')</script>"


def _images(page: str) -> list[str]:
    return [base64.b64decode(found).decode() for found in re.findall(r"base64,([\w+/=]+)", page)]


def test_the_page_has_figures_and_plots() -> None:
    page = report.page(_run())
    assert "getJob [us1]" in page
    assert len(_images(page)) == 4
    assert all("<svg" in image for image in _images(page))
    assert "p99" in _images(page)[1]


def test_a_ramp_has_a_plot_of_its_steps() -> None:
    steps = [(100.0, StepFigures(100.0, 20.0, 0.0)), (125.0, StepFigures(90.0, 900.0, 0.0))]
    page = report.page(_run(steps=steps, knee=100.0, broken_by="p99 900 ms"))
    assert len(_images(page)) == 5
    assert "The knee is at 100 jobs a second: p99 900 ms" in page


def test_whatever_stands_in_a_run_is_text_in_its_page() -> None:
    run = _run(
        commit=EVIL, texts={EVIL: 1}, duplicates=[EVIL], events=[(1.0, EVIL)], options={EVIL: EVIL},
        settings={EVIL: EVIL}, verdict=Verdict("missed", [EVIL], EVIL), cpu={EVIL: _run().cpu["us1"]},
        rows=[_row(EVIL)], broken_by=EVIL, steps=[(1.0, StepFigures(1.0, 1.0, 0.0))],
        windows=[Window(n_ok={EVIL: 3}, felt={"getJob": Histogram({3: 1}).counts})],
    )  # fmt: skip
    page = report.page(run)
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert [image for image in _images(page) if "<script" in image] == []


def test_a_run_without_windows_has_a_page() -> None:
    assert len(_images(report.page(_run(windows=[])))) == 1
