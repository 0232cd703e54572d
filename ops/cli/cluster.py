"""`culm up`, `down`, `status`, `logs`."""

import json
import os
import sys
import time
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from culm.errors import ClientFault
from ops.cli import exits
from ops.cli.options import DIR, OUTPUT, PORT, Option, console
from ops.cluster import control
from ops.cluster.layout import FIRST_SHARDS, Layout

REGION: Option = click.option(
    "--region",
    type=click.Choice(list(FIRST_SHARDS)),
    default=None,
    help="Only this authority's part.  [default: all]",
)


@click.command()
@DIR
@PORT
@REGION
@click.option("--foreground", is_flag=True, help="Stay until SIGTERM or Ctrl-C, then end the cluster.")
def up(folder: Path, port: int | None, region: str | None, *, foreground: bool) -> None:
    """Start a cluster on this machine: three shards with their databases, routers and monitors.

    CERN is an authority of its own, with its own shard, router, monitor and supervisor: --region CERN starts it alone,
    --region central all but it.

    Ctrl-C before it is up ends what was begun.

    \b
    Examples:
      culm up
      culm up --dir /data/second --port 26080
      culm up --region CERN
      culm up --foreground
    """
    if foreground:
        sys.exit(control.stay(homes_at(folder, port, region)))
    start(folder, port, region)


def start(folder: Path, port: int | None, region: str | None = None) -> Layout:
    """Start, with a spinner; the home of the first that runs."""
    homes = homes_at(folder, port, region)
    console = Console(stderr=True)
    with console.status("starting") as spinner:
        control.up(homes, spinner.update)
    for home in homes:
        click.echo(f"up: {home.authority} router {home.router_url}, monitor {home.monitor_url}", err=True)
        told = control.status(home.folder)
        for process in told.processes if told is not None else ():
            if process.state != "up":
                click.echo(f"not up: {process.name}, {process.state}: culm logs {process.name}", err=True)
    return homes[0]


def homes_at(folder: Path, port: int | None, region: str | None) -> list[Layout]:
    """At the port that was asked for, else where the cluster was before."""
    layout = Layout(folder)
    known = [told.port + layout.port - home.port for home in layout.homes if (told := control.status(home.folder))]
    homes = Layout(folder, port or next(iter(known), layout.port)).homes
    return [home for home in homes if region in {None, home.authority}]


@click.command()
@DIR
@REGION
def down(folder: Path, region: str | None) -> None:
    """Stop the cluster: exactly what `culm up` started. Its data stays.

    \b
    Examples:
      culm down
      culm down --dir /data/second
      culm down --region CERN
    """
    stopped = control.down(homes_at(folder, None, region))
    click.echo(f"stopped {', '.join(stopped)}" if stopped else f"nothing runs in {folder}", err=True)


@click.command()
@DIR
@OUTPUT
def status(folder: Path, output: str) -> None:
    """Show the processes of the cluster. Exit code 4 if none is up.

    \b
    Examples:
      culm status
      culm status -o json
    """
    told = {home.authority: control.status(home.folder) for home in Layout(folder).homes}
    alive = {authority: one for authority, one in told.items() if one is not None and one.alive}
    if not alive:
        click.echo(f"no cluster runs in {folder}: culm up --dir {folder}" if output == "table" else '{"phase": "down"}')
        sys.exit(exits.UNAVAILABLE)
    phases = {authority: alive[authority].phase if authority in alive else "down" for authority in told}
    now = time.time()
    homes = {authority: Layout(folder, one.port, authority) for authority, one in alive.items()}
    if output == "json":
        rows = [
            {
                "name": p.name,
                "pid": p.pid,
                "state": p.state,
                "restarts": p.restarts,
                "authority": authority,
                "for_s": _since_s(p.since, now),
            }
            for authority, one in alive.items()
            for p in one.processes
        ]
        parts = {
            authority: {
                "phase": phases[authority],
                "age_s": _since_s(one.began_at, now),
                "port": one.port,
                "router": homes[authority].router_url,
                "monitor": homes[authority].monitor_url,
            }
            for authority, one in alive.items()
        }
        parts |= {authority: {"phase": "down"} for authority in told if authority not in parts}
        phase = "up" if set(phases.values()) == {"up"} else next(p for p in phases.values() if p != "up")
        click.echo(json.dumps({"phase": phase, "authorities": parts, "processes": rows}))
        return
    for authority, one in alive.items():
        home = homes[authority]
        urls = f"router {home.router_url}, monitor {home.monitor_url}"
        click.echo(f"{authority}: {one.phase}, {_since_s(one.began_at, now):.0f} s old: {urls}")
    table = Table("authority", "process", "pid", "state", "restarts", "for")
    for authority, one in alive.items():
        for p in one.processes:
            since = f"{_since_s(p.since, now):.0f} s"
            table.add_row(authority, p.name, str(p.pid), p.state, str(p.restarts), since)
    console().print(table)
    for authority, phase in phases.items():
        if phase != "up":
            click.echo(f"{authority}: {phase}")


def _since_s(at: float, now: float) -> float:
    return round(max(0.0, now - at), 1)


@click.command()
@DIR
@click.option("-f", "--follow", is_flag=True, help="Go on as they grow.")
@click.argument("names", nargs=-1)
def logs(folder: Path, follow: bool, names: tuple[str, ...]) -> None:
    """Show the last lines of the logs of NAMES, or of all processes.

    \b
    Examples:
      culm logs us1 router
      culm logs -f
    """
    found = [path for home in Layout(folder).homes for path in sorted(home.logs.glob("*.log"))]
    if names:
        unknown = set(names) - {path.stem for path in found}
        if unknown:
            raise ClientFault("no_log", f"no log of {', '.join(sorted(unknown))}", http_status=404)
        found = [path for path in found if path.stem in names]
    if not found:
        raise ClientFault("no_log", f"no logs in {folder}", http_status=404)
    # It takes our place: Ctrl-C and a closed pipe end it as they end any tail.
    os.execvp("tail", ["tail", "-n", "20", *(["-F"] if follow else []), *map(str, found)])  # noqa: S606
