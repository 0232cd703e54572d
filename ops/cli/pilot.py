"""`culm pilot run|build`."""

import os
import sys
from pathlib import Path

import click

from ops.cli.options import AUTHORITY, DIR
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
