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
from loadtest import runs, verdicts
from loadtest.book import Result
from loadtest.latencies import Histogram
from loadtest.orders import Order
from loadtest.runs import CLIENT, CpuUse, Run
from loadtest.scenarios import LCG, LCG_TEXT, SCENARIOS, Scenario
from loadtest.verdicts import Slo
from ops import load_bed
from ops.cli import exits
from ops.cli.options import DIR, OUTPUT, console
from ops.cluster import control

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
@click.option("--slo", type=click.Path(dir_okay=False, exists=True, path_type=Path), help="TOML; what must hold.")
@click.option("--json", "as_json", is_flag=True, help="After the table, the run as one JSON object on the last line.")
@click.argument("scenario", type=click.Choice([*SCENARIOS, LCG]), metavar="SCENARIO")
def run(folder: Path, output: str, scenario: str, **how: Any) -> None:
    """Run a SCENARIO (culm load list) against the cluster that is up, and judge it.

    It takes sites of its own (LOAD-..), submits jobs for them and ends those that are left. Exit code 0 if what must hold
    held, 1 if not, 4 if there is no verdict for the clients were the bottleneck.

    \b
    Examples:
      culm load run smoke
      culm load run arrivals --rate 200 --seconds 60 --slo slo.toml
      culm load run ramp --web 8089
    """
    if importlib.util.find_spec("locust") is None:
        raise ClientFault("no_locust", "Locust is not installed here: bin/culm load installs it", http_status=404)
    chosen = _chosen(SCENARIOS[scenario], how)
    stored = asyncio.run(_run(folder, scenario, chosen, how))
    runs.store(folder, stored)
    if output == "json":
        click.echo(msgspec.json.encode(stored))
    else:
        _print(stored)
        if how["as_json"]:
            click.echo(msgspec.json.encode(stored))
    _exit(stored)


def _exit(stored: Run) -> None:
    match stored.verdict.outcome:
        case "missed":
            sys.exit(exits.FAILED)
        case "none":
            sys.exit(exits.UNAVAILABLE)


def _chosen(scenario: Scenario, how: dict[str, Any]) -> Scenario:
    """The scenario as the options want it. Raises ClientFault(bad_option)."""
    if how["n_users"] is not None:
        if scenario.rate:
            raise ClientFault("bad_option", "this scenario's load is a rate (open loop): --rate, not --users")
        scenario = replace(scenario, users=scenario.users | {"PilotUser": how["n_users"]})
    if how["rate"] is not None:
        if not scenario.rate:
            raise ClientFault("bad_option", "this scenario's load is a number of pilots (closed loop): --users")
        scenario = replace(scenario, rate=how["rate"])
    if how["seconds"] is not None:
        scenario = replace(scenario, seconds=how["seconds"])
    return replace(scenario, slo=verdicts.read(how["slo"])) if how["slo"] is not None else scenario


async def _run(folder: Path, name: str, scenario: Scenario, how: dict[str, Any]) -> Run:
    home = control.running(folder)
    valid_s = scenario.seconds + load_bed.SPARE_S
    seed = how["seed"] if how["seed"] is not None else time.time_ns() % 2**31
    run_id = f"{name}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
    place = folder / runs.FOLDER / run_id
    place.mkdir(mode=0o700, parents=True)
    spinner = Console(stderr=True).status(f"{name}: registering sites, feeding jobs")
    with spinner:
        machine = await asyncio.to_thread(load_bed.machine, folder)
        token, jobset = load_bed.user_token(home, valid_s), load_bed.new_jobset()
        targets = await load_bed.targets(folder, scenario, valid_s)
        fed = await load_bed.feed(home, token, targets, jobset, scenario.backlog, seed)
        order = Order(
            router=home.router_url,
            monitor=home.monitor_url,
            targets=targets,
            user_token=token,
            jobset=jobset,
            users=scenario.users,
            shape=scenario.shape,
            rate=scenario.rate,
            seconds=scenario.seconds,
            window_s=max(1.0, scenario.seconds / N_WINDOWS),
            seed=seed,
            backlog=scenario.backlog,
            n_beats=scenario.n_beats,
            job_s=scenario.job_s,
            ramp_p99_ms=scenario.slo.p99_ms.get("getJob", 500.0),
            fed=fed,
            began=str(place / "began"),
            into=str(place / "result.json"),
        )
        clients = load_bed.Clients(home, place, order, _locust(scenario, how))
        spinner.update(f"{name}: {scenario.seconds:.0f} s")
        result = await clients.run(load_bed.event(home, scenario, scenario.seconds, how["shard"]))
        spinner.update(f"{name}: looking for what became of the jobs")
        n_lost = await load_bed.count_lost(home, token, jobset, result.accepted, result.n_ended)
        await load_bed.clear(home, token, jobset)
    uses = clients.cpu.uses()
    options: dict[str, float | int | str] = {
        key: value
        for key, value in msgspec.to_builtins(replace(scenario, slo=Slo())).items()
        if isinstance(value, float | int | str) and key != "text"
    }
    options |= {f"users.{kind}": n for kind, n in scenario.users.items()}
    options["tags"] = " ".join(how["tags"])
    slo = scenario.slo
    verdict = verdicts.judge(slo, runs.facts_of(result, n_lost, _use(uses).busiest))
    return _stored(
        result,
        id=run_id,
        scenario=name,
        commit=load_bed.commit(),
        seed=seed,
        options=options,
        settings=load_bed.settings_of(home),
        machine=machine,
        cpu=uses,
        events=clients.events,
        n_lost=n_lost,
        slo=slo,
        verdict=verdict,
    )


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
        n_unsent=result.n_unsent,
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
    words = [*(kind for kind, n in scenario.users.items() if n), "--stop-timeout", str(STOP_S), "--exit-code-on-error=0"]
    if how["tags"]:
        words += ["--tags", *how["tags"]]
    if how["web_port"] is None:
        return [*words, "--headless", "--only-summary"]
    return [*words, "--web-host", "127.0.0.1", "--web-port", str(how["web_port"]), "--autostart", "--autoquit", "5"]


def _print(stored: Run) -> None:
    out = console()
    table = Table("request", "ok", "again", "failed", "rate", "p50 ms", "p95", "p99", "p99.9")
    for row in stored.rows:
        figures = (f"{one:.1f}" for one in (row.rate, row.p50_ms, row.p95_ms, row.p99_ms, row.p999_ms))
        table.add_row(row.name, str(row.n_ok), str(row.n_busy), str(row.n_failed), *figures)
    out.print(table)
    for text, n in stored.texts.items():
        out.print(f"failed {n} times: {text}")
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
        f"{len(stored.duplicates)} duplicates, {stored.n_lost} lost, {stored.n_unsent} arrivals unsent"
    )
    verdict = stored.verdict
    out.print("; ".join(filter(None, (verdict.outcome if verdict.outcome != "none" else "", *verdict.misses, verdict.note))))
