"""Options that many commands share, and the client that they speak through."""

import os
import re
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Protocol, TypeVar

import click
from rich.console import Console

from culm.client import Client
from culm.errors import ClientFault, Unavailable
from culm.topology import CENTRAL
from ops.cli.text import Plain
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


def _remember(context: click.Context, parameter: click.Parameter, value: object) -> None:
    context.meta[f"culm.{parameter.name}"] = value


def WHO(function: F) -> F:  # noqa: N802  # used as the others
    """Whose jobs are meant, and with whose rights: what `router` shows as its token."""
    of_role = click.option(
        "--as",
        "role",
        type=click.Choice(["user", "admin"]),
        default="user",
        show_default=True,
        envvar="CULM_AS",
        expose_value=False,
        callback=_remember,
        help="With the cluster's own token of user demo, who sees VO demo, or of an admin. [$CULM_AS]",
    )
    of_file = click.option(
        "--token-file",
        type=click.Path(dir_okay=False, path_type=Path),
        envvar="CULM_TOKEN_FILE",
        expose_value=False,
        callback=_remember,
        help="With a token of your own (culm token issue). [$CULM_TOKEN_FILE]",
    )
    return of_role(of_file(function))


_TOKEN = re.compile(r"[\w-]+(\.[\w-]+){2}", re.ASCII)
_PIPE_WIDTH = 240
"""Columns of a table that goes to a file or another program: nothing is cut off."""


def console() -> Console:
    """Where tables go. Names and texts are shown as they are: nothing in them is obeyed."""
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else _PIPE_WIDTH
    return Plain(width)


def utc(at: float) -> str:
    """A time for people, seconds since the epoch."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(at))


def require_whole(missing: Collection[str]) -> None:
    """After what is known was shown: raises Unavailable(missing_shards) where a shard gave no answer.

    A script must not take a part for the whole.
    """
    if missing:
        raise Unavailable("missing_shards", f"no answer from {', '.join(missing)}: what is shown is not all")


def token(folder: Path, role: str, authority: str = CENTRAL) -> str:
    """The command line's own token of a role. Raises ClientFault (no_token, bad_token_file)."""
    path = Layout(folder).home(authority).tokens / f"{authority}.{role}"
    return _token_in(path, f"remove it; culm down, then culm up, makes a new one of {folder}")


def _token_in(path: Path, advice: str) -> str:
    try:
        text = path.read_bytes().decode("ascii", errors="replace").strip()
    except OSError as error:
        raise ClientFault("no_token", f"{path} cannot be read ({error.strerror}): {advice}") from None
    if not _TOKEN.fullmatch(text):
        raise ClientFault("bad_token_file", f"{path} holds no token: {advice}")
    return text


def acts_by_default() -> bool:
    """Whether the options of WHO were left as they are."""
    said = click.get_current_context().meta
    return said.get("culm.token_file") is None and said.get("culm.role") == "user"


def router(folder: Path, role: str = "user", *, authority: str = CENTRAL) -> Client:
    """A client of an authority's router; a "user" is who the options of WHO say. Raises Unavailable(not_running)."""
    url = control.running(folder, authority).router_url
    context = click.get_current_context(silent=True)
    said = context.meta if context is not None and role == "user" else {}
    file: Path | None = said.get("culm.token_file")
    if file is not None:
        return Client(url, _token_in(file, "culm token issue prints one"), patience_s=10.0)
    return Client(url, token(folder, said.get("culm.role", role), authority), patience_s=10.0)


def monitor(folder: Path, authority: str = CENTRAL, *, patience_s: float = 10.0) -> Client:
    """A client of an authority's monitor. Raises Unavailable(not_running)."""
    url = control.running(folder, authority).monitor_url
    return Client(url, token(folder, "admin", authority), patience_s=patience_s)
