"""`culm pilot run|build|list`."""

import asyncio
import os
import sys
from pathlib import Path

import click
import msgspec
from rich.table import Table

from culm.wire import PilotsAnswer
from ops.cli.options import AUTHORITY, DIR, OUTPUT, console, monitor, require_whole, utc
from ops.cluster import control
from ops.pilot_zipapp import build as build_zipapp


@click.group()
def pilot() -> None:
    """The pilot: pulls jobs and runs them."""


@pilot.command()
@DIR
@AUTHORITY
@click.option("--queue", required=True, help="The computing queue to ask for.")
@click.option("--max-jobs", type=int, default=0, help="End after so many jobs.")
@click.option("--idle-exit", type=float, default=0.0, help="End after so many seconds without work.")
@click.argument("more", nargs=-1)
def run(*, folder: Path, authority: str, queue: str, max_jobs: int, idle_exit: float, more: tuple[str, ...]) -> None:
    """Run a pilot here against the cluster, until SIGTERM or as the options say.

    Options of the pilot itself (docs/pilot.md) go after `--`.

    \b
    Examples:
      culm pilot run --queue BNL-q --max-jobs 1
      culm pilot run --queue BNL-q --idle-exit 60
      culm pilot run --queue BNL-q -- --wait 5 --heartbeat 10
    """
    layout = control.running(folder, authority)
    command = [
        *(sys.executable, "-P", "-m", "pilot", "--server", layout.router_url, "--queue", queue),
        *("--token-file", str(layout.tokens / f"{authority}.pilot"), "--work-dir", str(layout.folder / "pilots")),
        *("--max-jobs", str(max_jobs), "--idle-exit", str(idle_exit), *more),
    ]
    os.execv(sys.executable, command)  # noqa: S606  # no shell: the arguments are passed as they are


@pilot.command()
@click.argument("target", type=click.Path(dir_okay=False, path_type=Path), default=Path("culm-pilot.pyz"))
def build(target: Path) -> None:
    """Build the pilot's zipapp: one file for any worker node with Python 3.11.

    \b
    Examples:
      culm pilot build
      culm pilot build /tmp/culm-pilot.pyz
    """
    try:
        click.echo(build_zipapp(target))
    except OSError as error:
        raise click.ClickException(f"{target} cannot be written: {error.strerror}") from None


@pilot.command("list")
@DIR
@AUTHORITY
@OUTPUT
@click.option("--site", default="", help="For the computing queues of this site.")
@click.option(
    "--minutes", type=click.IntRange(1, 1440), default=60, show_default=True, help="Asked in the last so many."
)
@click.option("--limit", type=click.IntRange(1, 1000), default=200, show_default=True)
def list_pilots(*, folder: Path, authority: str, output: str, site: str, minutes: int, limit: int) -> None:
    """List the pilots that asked for work lately, the latest first: where, how often, and what they got.

    Counts of a pilot are from when a shard first saw it; a shard that was restarted begins anew.

    \b
    Examples:
      culm pilot list
      culm pilot list --site BNL --minutes 10 -o json
    """

    async def ask() -> PilotsAnswer:
        async with monitor(folder, authority) as client:
            return await client.pilots(site=site, minutes=minutes, limit=limit)

    answer = asyncio.run(ask())
    if output == "json":
        click.echo(msgspec.json.encode(answer))
        require_whole(answer.missing_shards)
        return
    if answer.pilots:
        table = Table("pilot", "host", "site", "queue", "last asked", "requests", "with jobs", "jobs", "last job")
        for row in answer.pilots:
            numbers = (str(row.n_asked), str(row.n_answered), str(row.n_jobs))
            last = utc(row.last_job_at) if row.last_job_at else "never"
            table.add_row(row.id, row.host, row.site, row.queue, utc(row.last_at), *numbers, last)
        console().print(table)
    else:
        click.echo(f"no pilot asked in the last {minutes} minutes")
    if answer.n_left_out:
        click.echo(f"at least {answer.n_left_out} more are not shown (--limit)", err=True)
    require_whole(answer.missing_shards)
