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
from ops.cli.options import DIR, OUTPUT, PORT, console
from ops.cluster import control
from ops.cluster.layout import Layout


@click.command()
@DIR
@PORT
@click.option("--foreground", is_flag=True, help="Stay until SIGTERM or Ctrl-C, then end the cluster.")
def up(folder: Path, port: int | None, *, foreground: bool) -> None:
    """Start a cluster on this machine: a router, three shards with their databases, the monitor.

    Ctrl-C before it is up ends what was begun.

    \b
    Examples:
      culm up
      culm up --dir /data/second --port 26080
      culm up --foreground
    """
    if foreground:
        control.become(layout_at(folder, port))
    start(folder, port)


def start(folder: Path, port: int | None) -> Layout:
    """Start, with a spinner; the layout of what runs."""
    layout = layout_at(folder, port)
    console = Console(stderr=True)
    with console.status("starting") as spinner:
        control.up(layout, spinner.update)
    click.echo(f"up: router {layout.router_url}, monitor {layout.monitor_url}, in {folder}", err=True)
    return layout


def layout_at(folder: Path, port: int | None) -> Layout:
    """At the port that was asked for, else where the cluster was before."""
    known = control.status(folder)
    return Layout(folder, port or (known.port if known else 0) or Layout(folder).port)


@click.command()
@DIR
def down(folder: Path) -> None:
    """Stop the cluster: exactly what `culm up` started. Its data stays.

    \b
    Examples:
      culm down
      culm down --dir /data/second
    """
    click.echo("stopped" if control.down(folder) else f"nothing runs in {folder}", err=True)


@click.command()
@DIR
@OUTPUT
def status(folder: Path, output: str) -> None:
    """Show the processes of the cluster. Exit code 4 if it is not up.

    \b
    Examples:
      culm status
      culm status -o json
    """
    told = control.status(folder)
    up_now = told is not None and told.alive
    if told is None or not up_now:
        click.echo(f"no cluster runs in {folder}: culm up --dir {folder}" if output == "table" else '{"phase": "down"}')
        sys.exit(exits.UNAVAILABLE)
    now = time.time()
    layout = Layout(folder, told.port)
    age_s = _since_s(told.began_at, now)
    if output == "json":
        rows = [
            {"name": p.name, "pid": p.pid, "state": p.state, "restarts": p.restarts, "for_s": _since_s(p.since, now)}
            for p in told.processes
        ]
        urls = {"router": layout.router_url, "monitor": layout.monitor_url}
        click.echo(json.dumps({"phase": told.phase, "port": told.port, "age_s": age_s, **urls, "processes": rows}))
        return
    click.echo(
        f"{told.phase}, {age_s:.0f} s old: router {layout.router_url}, monitor {layout.monitor_url}, in {folder}"
    )
    table = Table("process", "pid", "state", "restarts", "for")
    for p in told.processes:
        table.add_row(p.name, str(p.pid), p.state, str(p.restarts), f"{_since_s(p.since, now):.0f} s")
    console().print(table)


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
    found = sorted((folder / "logs").glob("*.log"))
    if names:
        unknown = set(names) - {path.stem for path in found}
        if unknown:
            raise ClientFault("no_log", f"no log of {', '.join(sorted(unknown))}", http_status=404)
        found = [path for path in found if path.stem in names]
    if not found:
        raise ClientFault("no_log", f"no logs in {folder}", http_status=404)
    # It takes our place: Ctrl-C and a closed pipe end it as they end any tail.
    os.execvp("tail", ["tail", "-n", "20", *(["-F"] if follow else []), *map(str, found)])  # noqa: S606
