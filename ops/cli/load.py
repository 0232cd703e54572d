"""`culm load run|list|compare|report`: load tests with Locust, stored and judged."""

import asyncio
import importlib.util
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import click
import msgspec
from rich.console import Console
from rich.table import Table

from culm.errors import ClientFault
from culm.states import State
from loadtest import runs, verdicts, workload_log
from loadtest.book import Name, Result
from loadtest.latencies import Histogram
from loadtest.orders import Order
from loadtest.replay import Plan
from loadtest.runs import CLIENT, CpuUse, Run
from loadtest.scenarios import LCG, LCG_SLO, LCG_TEXT, SCENARIOS, TAGS, Scenario
from loadtest.shapes import RAMP
from loadtest.verdicts import Slo
from ops import load_bed
from ops.cli import exits, replay
from ops.cli.options import DIR, OUTPUT, console, utc
from ops.cluster import control
from ops.cluster.layout import Layout

LCG_FILE: Final = "../shared/data/LCG-2005-1.swf.gz"
"""Beside the checkout."""
LCG_PATIENCE_S: Final = 600.0
N_WINDOWS: Final = 300
"""At most so many points in a plot."""
STOP_S: Final = 20


@click.group()
def load() -> None:
    """Load tests: users, shapes and faults against a running cluster, stored with their verdict."""


@load.command()
@DIR
@OUTPUT
@click.option("--users", "n_users", type=click.IntRange(1, 5000), help="Pilots of the closed loop.")
@click.option("--rate", type=click.FloatRange(0.1, 100_000), help="Jobs asked for a second, open loop.")
@click.option("--seconds", type=click.FloatRange(2.0, 86_400), help="How long.  [default: the scenario's]")
@click.option("--seed", type=click.IntRange(0, 2**31), help="Of the users' choices.  [default: a new one]")
@click.option("--shard", default="us1", show_default=True, help="The one that a scenario kills or stops.")
@click.option("--tag", "tags", multiple=True, type=click.Choice(["getjob", "update", "submit", "monitor"]))
@click.option("--web", "web_port", type=click.IntRange(1024, 65535), help="Show Locust's pages at this port.")
@click.option("--speed", type=click.FloatRange(1.0), help="Of lcg: seconds of the log a second.  [default: 1000]")
@click.option("--jobs", "n_jobs", type=click.IntRange(1), help="Of lcg: from the log's start.  [default: 1000]")
@click.option("--log", type=click.Path(dir_okay=False, path_type=Path), help=f"Of lcg.  [default: {LCG_FILE}]")
@click.option("--slo", type=click.Path(dir_okay=False, exists=True, path_type=Path), help="TOML; what must hold.")
@click.option("--json", "as_json", is_flag=True, help="After the table, the run as one JSON object on the last line.")
@click.argument("scenario", type=click.Choice([*SCENARIOS, LCG]), metavar="SCENARIO")
def run(folder: Path, output: str, scenario: str, **how: Any) -> None:
    """Run a SCENARIO (culm load list) against the cluster that is up, and judge it.

    It takes sites of its own (LOAD-..), submits jobs for them and ends those that are left. Exit code 0 if what must
    hold held, 1 if not, 4 if there is no verdict on speed, for the clients were the bottleneck.

    \b
    Examples:
      culm load run smoke
      culm load run arrivals --rate 200 --seconds 60 --slo slo.toml
      culm load run ramp --web 8089
    """
    if scenario == LCG:
        stored = asyncio.run(_run_lcg(folder, how))
    else:
        _require_locust()
        stored = asyncio.run(_run(folder, scenario, _chosen(SCENARIOS[scenario], how), how))
    runs.store(folder, stored)
    if output == "json":
        click.echo(msgspec.json.encode(stored))
    else:
        _print(stored)
        if how["as_json"]:
            click.echo(msgspec.json.encode(stored))
    _exit(stored)


def _require_locust() -> None:
    if importlib.util.find_spec("locust") is None:
        raise ClientFault("no_locust", "Locust is not installed here: bin/culm load installs it", http_status=404)


def _exit(stored: Run) -> None:
    match stored.verdict.outcome:
        case "missed":
            sys.exit(exits.FAILED)
        case "none":
            sys.exit(exits.UNAVAILABLE)


def _chosen(scenario: Scenario, how: dict[str, Any]) -> Scenario:
    """The scenario as the options want it. Raises ClientFault(bad_option, bad_slo)."""
    if any(how[name] is not None for name in ("speed", "n_jobs", "log")):
        raise ClientFault("bad_option", f"--speed, --jobs and --log are for {LCG}")
    if how["n_users"] is not None:
        if scenario.rate:
            raise ClientFault("bad_option", "this scenario's load is a rate (open loop): --rate, not --users")
        scenario = replace(scenario, users={**scenario.users, "PilotUser": how["n_users"]})
    if how["rate"] is not None:
        if not scenario.rate:
            raise ClientFault("bad_option", "this scenario's load is a number of pilots (closed loop): --users")
        scenario = replace(scenario, rate=how["rate"])
    if how["tags"]:
        # Who has none of the tags stays at home, whoever needs what he makes.
        wanted = set(how["tags"])
        staying = {kind: n for kind, n in scenario.users.items() if TAGS[kind] & wanted}
        if not staying:
            raise ClientFault("bad_option", f"nobody in this scenario does {' or '.join(how['tags'])}")
        scenario = replace(scenario, users=staying)
    if how["seconds"] is not None:
        scenario = replace(scenario, seconds=how["seconds"])
    return replace(scenario, slo=verdicts.read(how["slo"])) if how["slo"] is not None else scenario


async def _run(folder: Path, name: str, scenario: Scenario, how: dict[str, Any]) -> Run:
    home = control.running(folder)
    token = load_bed.user_token(home, scenario.seconds + load_bed.SPARE_S)
    seed = how["seed"] if how["seed"] is not None else time.time_ns() % 2**31
    place = runs.place(folder, name)
    with Console(stderr=True).status(f"{name}: registering sites, feeding jobs") as spinner:
        machine = await asyncio.to_thread(load_bed.machine, folder)
        async with load_bed.own_jobset(home, token) as jobset:
            order = await _order(home, place, scenario, token=token, jobset=jobset, seed=seed)
            clients = load_bed.Clients(home, place, order, _locust(scenario, how))
            spinner.update(f"{name}: {scenario.seconds:.0f} s")
            result = await clients.run(load_bed.event(home, scenario, how["shard"], Path(order.more)))
            spinner.update(f"{name}: looking for what became of the jobs")
            n_lost = await load_bed.count_lost(home, token, jobset, result)
    uses = clients.cpu.uses()
    return _stored(
        result,
        id=place.name,
        scenario=name,
        commit=load_bed.commit(),
        seed=seed,
        options=_options(scenario, how),
        settings=load_bed.settings_of(home),
        machine=machine,
        cpu=uses,
        events=clients.events,
        n_lost=n_lost,
        slo=scenario.slo,
        verdict=verdicts.judge(scenario.slo, runs.facts_of(result, n_lost, _use(uses).busiest)),
    )


async def _order(home: Layout, place: Path, scenario: Scenario, *, token: str, jobset: int, seed: int) -> Order:
    targets = await load_bed.targets(home.folder, scenario, scenario.seconds + load_bed.SPARE_S)
    return Order(
        router=home.router_url,
        monitor=home.monitor_url,
        targets=targets,
        user_token=token,
        jobset=jobset,
        users=scenario.users,
        shape=scenario.shape,
        rate=scenario.rate,
        seconds=scenario.seconds,
        # The steps of a ramp are some seconds long, however long it may take.
        window_s=1.0 if scenario.shape == RAMP else max(1.0, scenario.seconds / N_WINDOWS),
        seed=seed,
        backlog=scenario.backlog,
        n_beats=scenario.n_beats,
        job_s=scenario.job_s,
        ramp_p99_ms=scenario.slo.ramp_p99_ms,
        fed=await load_bed.feed(home, token, targets, jobset, scenario.backlog),
        began=str(place / "began"),
        into=str(place / "result.json"),
        more=str(place / "more.json"),
    )


async def _run_lcg(folder: Path, how: dict[str, Any]) -> Run:
    """The replay of a log as a run: what is judged is what became of its jobs, and how long they waited."""
    if any(how[name] is not None for name in ("rate", "seconds", "seed", "web_port")) or how["tags"]:
        raise ClientFault("bad_option", f"{LCG} is led by its log: --speed, --jobs, --users, --log")
    log = how["log"] or load_bed.ROOT / LCG_FILE
    if not log.exists():
        raise ClientFault("no_log", f"{log} is not there: --log names it (LCG-2005-1, Parallel Workloads Archive)")
    n_jobs, speed, n_pilots = how["n_jobs"] or 1000, how["speed"] or 1000.0, how["n_users"] or 100
    plan = Plan(workload_log.read(log, n_jobs), speed, n_pilots, LCG_PATIENCE_S)
    home = control.running(folder)
    machine = await asyncio.to_thread(load_bed.machine, folder)
    place = runs.place(folder, LCG)
    began_at = time.time()
    book = load_bed.CpuBook(began_at)
    watching = asyncio.create_task(load_bed.watch(home, book))
    try:
        replayed, report = await replay.send(folder, plan)
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
    waits = Histogram()
    for some in replayed.waits.values():
        for wait_s in some:
            waits.add(wait_s * 1000)
    name = Name(n_ok=report.finished, n_failed=report.submitted - report.finished, felt=waits.counts)
    uses = book.uses()
    result = Result(
        began_at=began_at,
        ended_at=began_at + report.took_s,
        cpu_s=0.0,
        window_s=1.0,
        windows=[],
        names={"job": name},
        texts={f"job: {state}": n for state, n in report.states.items() if state != State.FINISHED},
        n_granted=waits.n,
        n_ended=report.finished,
        n_empty=0,
        n_unanswered=0,
        duplicates=[f"{report.twice} jobs run or accepted twice"] if report.twice else [],
        accepted=list(replayed.accepted),
        ended=list(replayed.ended),
        waits=waits.counts,
    )
    slo = verdicts.read(how["slo"]) if how["slo"] is not None else LCG_SLO
    return _stored(
        result,
        id=place.name,
        scenario=LCG,
        commit=load_bed.commit(),
        seed=0,
        options={"log": log.name, "jobs": n_jobs, "speed": speed, "users.pilots": n_pilots},
        settings=load_bed.settings_of(home),
        machine=machine,
        cpu=uses,
        events=[],
        n_lost=report.lost,
        slo=slo,
        verdict=verdicts.judge(slo, runs.facts_of(result, report.lost, _use(uses).busiest)),
    )


def _options(scenario: Scenario, how: dict[str, Any]) -> dict[str, float | int | str]:
    """All that the run was led by."""
    options: dict[str, float | int | str] = {
        key: value
        for key, value in msgspec.to_builtins(replace(scenario, slo=Slo())).items()
        if isinstance(value, float | int | str) and key != "text"
    }
    options |= {f"users.{kind}": n for kind, n in scenario.users.items()}
    return options | {"tags": " ".join(how["tags"])}


def _use(uses: dict[str, CpuUse]) -> CpuUse:
    return uses.get(CLIENT, CpuUse(mean=0.0, busiest=0.0))


def _stored(result: Result, **known: Any) -> Run:
    waits = Histogram(result.waits)
    return Run(
        began_at=result.began_at,
        seconds=result.ended_at - result.began_at,
        rows=runs.rows_of(result),
        windows=result.windows,
        window_s=result.window_s,
        texts=result.texts,
        n_submitted=len(result.accepted),
        n_granted=result.n_granted,
        n_ended=result.n_ended,
        n_empty=result.n_empty,
        n_unanswered=result.n_unanswered,
        duplicates=result.duplicates,
        wait_p50_ms=waits.percentile(0.5),
        wait_p99_ms=waits.percentile(0.99),
        knee=result.knee,
        broken_by=result.broken_by,
        steps=result.steps,
        **known,
    )


def _locust(scenario: Scenario, how: dict[str, Any]) -> list[str]:
    """The words of Locust's own command line."""
    words = [*scenario.users, "--stop-timeout", str(STOP_S), "--exit-code-on-error=0"]
    if how["tags"]:
        words += ["--tags", *how["tags"]]
    if how["web_port"] is None:
        return [*words, "--headless", "--only-summary"]
    return [*words, "--web-host", "127.0.0.1", "--web-port", str(how["web_port"]), "--autostart", "--autoquit", "1"]


def _print(stored: Run) -> None:
    out = console()
    table = Table("request", "ok", "again", "failed", "rate", "p50 ms", "p95", "p99", "p99.9")
    for row in stored.rows:
        figures = (f"{one:.1f}" for one in (row.rate, row.p50_ms, row.p95_ms, row.p99_ms, row.p999_ms))
        table.add_row(row.name, str(row.n_ok), str(row.n_busy), str(row.n_failed), *figures)
    out.print(table)
    for text, n in stored.texts.items():
        out.print(f"{n} times: {text}")
    for one in stored.duplicates[:10]:
        out.print(f"duplicate: {one}")
    shares = ", ".join(f"{name} {use.mean:.0%}" for name, use in sorted(stored.cpu.items(), key=lambda p: -p[1].mean))
    out.print(f"of one core: {shares}")
    for t, text in stored.events:
        out.print(f"after {t:.1f} s: {text}")
    if stored.steps:
        out.print(f"knee: {stored.knee:.0f} jobs/s ({stored.broken_by or 'not broken'})")
    out.print(
        f"{stored.id}: {stored.n_submitted} jobs submitted, {stored.n_granted} given, {stored.n_ended} ended; "
        f"{len(stored.duplicates)} duplicates, {stored.n_lost} lost, {stored.n_unanswered} requests without an answer"
    )
    verdict = stored.verdict
    told = "no verdict" if verdict.outcome == "none" else verdict.outcome
    out.print("; ".join(filter(None, (told, *verdict.misses, verdict.note))))


@load.command("list")
@DIR
@OUTPUT
def list_all(folder: Path, output: str) -> None:
    """List the scenarios, and the runs that are stored in the cluster's folder.

    \b
    Examples:
      culm load list
      culm load list -o json
    """
    texts = {name: scenario.text for name, scenario in SCENARIOS.items()} | {LCG: LCG_TEXT}
    stored, unreadable = [], []
    for name in runs.names(folder):
        try:
            stored.append(runs.load(folder, name))
        except ClientFault as error:
            unreadable.append(error.message)
    if output == "json":
        told = [{"id": r.id, "scenario": r.scenario, "began_at": r.began_at, "verdict": r.verdict} for r in stored]
        click.echo(msgspec.json.encode({"scenarios": texts, "runs": told}))
        return
    out = console()
    table = Table("scenario", "load", "seconds", "what")
    for name, text in texts.items():
        one = SCENARIOS.get(name)
        full = "" if one is None else f"{one.rate:.0f}/s" if one.rate else f"{one.users['PilotUser']} pilots"
        table.add_row(name, full, "" if one is None else f"{one.seconds:.0f}", text)
    out.print(table)
    for text in unreadable:
        click.echo(f"cannot be read: {text}", err=True)
    if not stored:
        return
    table = Table("run", "began", "commit", "getJob/s", "p99 ms", "verdict")
    for run_ in stored:
        rows = {row.name: row for row in run_.rows}
        row = rows.get("getJob") or rows.get("job")
        figures = ("", "") if row is None else (f"{row.rate:.1f}", f"{row.p99_ms:.1f}")
        table.add_row(run_.id, utc(run_.began_at), run_.commit[:10], *figures, run_.verdict.outcome)
    out.print(table)


@load.command()
@DIR
@OUTPUT
@click.argument("first")
@click.argument("second")
def compare(folder: Path, output: str, first: str, second: str) -> None:
    """Compare two stored runs, FIRST and SECOND (an id of culm load list, or last): figures, and what else differs.

    \b
    Examples:
      culm load compare arrivals-20260101-120000 last
    """
    compared = runs.compare(runs.load(folder, first), runs.load(folder, second))
    if output == "json":
        click.echo(msgspec.json.encode(compared))
        return
    table = Table("", "figure", compared.first, compared.second, "second / first")
    for one in compared.figures:
        ratio = "" if one.ratio is None else f"{one.ratio:.2f}x"
        table.add_row(one.name, one.figure, f"{one.first:.1f}", f"{one.second:.1f}", ratio)
    out = console()
    out.print(table)
    for text in compared.differences:
        out.print(f"differs: {text}")


@load.command()
@DIR
@OUTPUT
@click.option("--to", "path", type=click.Path(dir_okay=False, path_type=Path), help="Where.  [default: with the run]")
@click.argument("run_id", metavar="RUN")
def report(folder: Path, output: str, path: Path | None, run_id: str) -> None:
    """Write a stored RUN (an id of culm load list, or last) as one HTML page with plots.

    \b
    Examples:
      culm load report last
      culm load report smoke-20260101-120000 --to smoke.html
    """
    _require_locust()
    from loadtest.report import page  # noqa: PLC0415  # matplotlib comes with Locust, and is slow to import

    stored = runs.load(folder, run_id)
    into = path or folder / runs.FOLDER / stored.id / "report.html"
    into.write_text(page(stored), encoding="utf-8")
    click.echo(msgspec.json.encode({"report": str(into)}) if output == "json" else into)
