"""`culm replay`: a slice of a real grid's log through the cluster."""

import asyncio
import sys
from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from culm.errors import ClientFault
from culm.registry_wire import TopologyAnswer
from culm.topology import CENTRAL, Topology
from culm.wire import Principal
from loadtest import workload_log
from loadtest.replay import Plan, Replay, ReplayReport, queue_of
from ops.cli import exits
from ops.cli.options import DIR, OUTPUT, console, router, token
from ops.cli.registry import register_sites
from ops.cluster import control

TOKEN_S = 86_400.0
N_WAITS_SHOWN = 12


@click.command()
@DIR
@OUTPUT
@click.option("--jobs", "n_jobs", type=click.IntRange(1), default=1000, show_default=True, help="From the log's start.")
@click.option("--speed", type=click.FloatRange(1.0), default=1000.0, show_default=True, help="Log seconds a second.")
@click.option("--pilots", "n_pilots", type=click.IntRange(1, 5000), default=100, show_default=True)
@click.option("--patience", "patience_s", type=click.FloatRange(1.0), default=600.0, show_default=True, help="Seconds.")
@click.argument("log", type=click.Path(dir_okay=False, exists=True, path_type=Path))
def replay(folder: Path, output: str, n_jobs: int, log: Path, **how: float) -> None:
    """Replay a grid's job LOG (Standard Workload Format, also .gz): its users, groups and sites, scaled in time.

    The sites are registered first. The pilots are simulated: they sleep the scaled run time. Exit code 1 if a job was
    lost, run twice, or not finished in time.

    \b
    Examples:
      culm replay LCG-2005-1.swf.gz --jobs 5000 --speed 2000 --pilots 200
    """
    jobs = workload_log.read(log, n_jobs)
    plan = Plan(jobs, how["speed"], int(how["n_pilots"]), how["patience_s"])
    _, report = asyncio.run(send(folder, plan))
    if output == "json":
        click.echo(msgspec.json.encode(report))
    else:
        _print(report)
    if not report.clean:
        sys.exit(exits.FAILED)


async def send(folder: Path, plan: Plan) -> tuple[Replay, ReplayReport]:
    """Register the log's sites and replay it, with a progress bar; the clients' books, and what became of the jobs.

    Raises ClientFault(no_keys), Unavailable(not_running), and what no client could repair.
    """
    layout = control.running(folder)
    replay = Replay(plan)
    authority_of = await _register(folder, replay.sites)
    ring = layout.ring
    if not ring.kids():
        raise ClientFault("no_keys", f"{layout.keys} holds no signing key of {CENTRAL}", http_status=404)

    def user_token(user: str, group: str) -> str:
        who = Principal(role="user", subject=user, authority=CENTRAL, vo=group, groups=[group])
        return ring.issue(who, TOKEN_S)

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bars = [progress.add_task(text, total=len(plan.jobs)) for text in ("submitted", "finished ")]

        async def show() -> None:
            while True:
                for bar, n_done in zip(bars, (len(replay.accepted), len(replay.ended)), strict=True):
                    progress.update(bar, completed=n_done)
                await asyncio.sleep(0.2)

        showing = asyncio.create_task(show())
        try:
            report = await replay.run(
                layout.router_url,
                user_token,
                lambda site: token(folder, "pilot", authority_of[site]),
                token(folder, "admin"),
            )
        finally:
            showing.cancel()
            for bar, n_done in zip(bars, (len(replay.accepted), len(replay.ended)), strict=True):
                progress.update(bar, completed=n_done)
    return replay, report


async def _register(folder: Path, sites: list[str]) -> dict[str, str]:
    """Register the log's sites, each in its region, unless it is known; which authority decides about each."""
    async with router(folder, "admin") as client:
        known = Topology((await client.get("topology", {}, TopologyAnswer)).sections)
    regions = {
        site: known.sites[site].region if site in known.sites else workload_log.region_of(site) for site in sites
    }
    return await register_sites(folder, known, regions, queue_of, "replay of a log")


def _print(report: ReplayReport) -> None:
    out = console()
    table = Table("site", "jobs", "median wait", "p95", "longest")
    by_jobs = sorted(report.waits, key=lambda one: -one.n_jobs)
    for one in by_jobs[:N_WAITS_SHOWN]:
        table.add_row(one.site, str(one.n_jobs), f"{one.median_s:.2f} s", f"{one.p95_s:.2f} s", f"{one.max_s:.2f} s")
    out.print(table)
    if len(by_jobs) > N_WAITS_SHOWN:
        out.print(f"and {len(by_jobs) - N_WAITS_SHOWN} more sites (-o json shows all)")
    states = ", ".join(f"{n} {state}" for state, n in report.states.items())
    out.print(
        f"{report.submitted} submitted, {report.finished} finished in {report.took_s:.1f} s ({states}); "
        f"lost {report.lost}, twice {report.twice}, unfinished {report.unfinished}, "
        f"reports refused {report.refused_reports}",
    )
