"""Options that many commands share, and the client that they speak through."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import click
from rich.console import Console

from culm.client import Client
from culm.errors import ClientFault
from culm.topology import CENTRAL
from ops.cli import exits
from ops.cluster import control
from ops.cluster.layout import DEFAULT_PORT, FIRST_SHARDS, Layout, default_folder

F = TypeVar("F", bound=Callable[..., object] | click.Command)


class Option(Protocol):
    """A decorator that adds an option and leaves the function's type alone."""

    def __call__(self, function: F, /) -> F:
        """Add it."""
        ...


def _absolute(_context: click.Context, _parameter: click.Parameter, value: Path | None) -> Path:
    return value.absolute() if value is not None else default_folder()


DIR: Option = click.option(
    "--dir",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    callback=_absolute,
    help="The cluster's folder.  [default: $CULM_DIR, else ~/.culm/demo]",
)
PORT: Option = click.option(
    "--port",
    type=click.IntRange(1, 65532),
    help=f"The central router's port; its monitor and CERN's router and monitor have the next three."
    f"  [default: {DEFAULT_PORT}, or where it was before]",
)
OUTPUT: Option = click.option(
    "-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True
)
AUTHORITY: Option = click.option(
    "--authority",
    type=click.Choice(list(FIRST_SHARDS)),
    default=CENTRAL,
    show_default=True,
    envvar="CULM_AUTHORITY",
    help="Whose router to ask, with whose token. [$CULM_AUTHORITY]",
)


_PIPE_WIDTH = 240
"""Columns of a table that goes to a file or another program: nothing is cut off."""


def console() -> Console:
    """Where tables go. Names and texts are shown as they are: no markup in them is obeyed."""
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else _PIPE_WIDTH
    return Console(width=width, markup=False, highlight=False)


def require_whole(missing_shards: Sequence[str]) -> None:
    """Say which shards gave no answer, and end with exit code 4: what was printed is not all there is."""
    if missing_shards:
        click.echo(f"no answer from {', '.join(missing_shards)}", err=True)
        sys.exit(exits.UNAVAILABLE)


def utc(at: float) -> str:
    """A time for people, seconds since the epoch."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(at))


def token(folder: Path, role: str, authority: str = CENTRAL) -> str:
    """The command line's own token of a role. Raises ClientFault(no_token)."""
    path = Layout(folder).home(authority).tokens / f"{authority}.{role}"
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        raise ClientFault("no_token", f"cannot read {path}; is {folder} a cluster?") from None


def router(folder: Path, role: str = "user", *, authority: str = CENTRAL) -> Client:
    """A client of an authority's router. Raises Unavailable(not_running)."""
    url = control.running(folder, authority).router_url
    return Client(url, token(folder, role, authority), patience_s=10.0)


def monitor(folder: Path, authority: str = CENTRAL, *, patience_s: float = 10.0) -> Client:
    """A client of an authority's monitor. Raises Unavailable(not_running)."""
    url = control.running(folder, authority).monitor_url
    return Client(url, token(folder, "admin", authority), patience_s=patience_s)
