"""`culm token issue|rotate|list`."""

import json
import sys
from pathlib import Path
from typing import Literal

import click

from culm.errors import ClientFault
from culm.tokens import KeyRing
from culm.wire import Principal
from ops.cli.options import AUTHORITY, DIR, OUTPUT
from ops.cluster.layout import Layout


@click.group()
def token() -> None:
    """Signed tokens of pilots, users and admins."""


@token.command()
@DIR
@AUTHORITY
@click.option("--vo", default="", help="The virtual organisation of a user.")
@click.option("--group", "groups", multiple=True, help="A working group of a user.")
@click.option("--role", "roles", multiple=True, help="production, monitor (metrics), or manager:GROUP.")
@click.option("--queue", "queues", multiple=True, help="A computing queue of a pilot, or PREFIX*.")
@click.option("--days", type=click.FloatRange(min=0.0, max=3650.0, min_open=True), default=30.0, show_default=True)
@click.argument("kind", type=click.Choice(["pilot", "user", "admin"]))
@click.argument("subject")
def issue(
    folder: Path,
    *,
    authority: str,
    vo: str,
    days: float,
    kind: Literal["pilot", "user", "admin"],
    subject: str,
    **several: tuple[str, ...],
) -> None:
    """Print a token for SUBJECT.

    \b
    Examples:
      culm token issue user ann --vo atlas --group phys-higgs
      culm token issue pilot bnl-pilots --queue 'BNL*' --days 7
    """
    ring = _ring(folder, authority)
    lists = {name: list(values) for name, values in several.items()}
    if kind == "pilot" and not lists["queues"]:
        raise ClientFault("bad_token", "a pilot's token needs --queue")
    click.echo(ring.issue(Principal(role=kind, subject=subject, authority=authority, vo=vo, **lists), days * 86_400))
    sys.stderr.write("whoever has it may act: keep it in a file of mode 0600\n" if sys.stderr.isatty() else "")


@token.command()
@DIR
@AUTHORITY
def rotate(folder: Path, authority: str) -> None:
    """Make a key that signs from now on. Tokens that are out stay good until they expire; nothing restarts.

    To withdraw an old key, and every token that it signed, remove its .pub from the cluster's folder `trusted`.

    \b
    Examples:
      culm token rotate
      culm token rotate --authority CERN
    """
    click.echo(_ring(folder, authority).rotate())


@token.command("list")
@DIR
@OUTPUT
def list_tokens(folder: Path, output: str) -> None:
    """List the trusted keys and the command line's own tokens; never their text.

    \b
    Examples:
      culm token list
      culm token list -o json
    """
    layout = Layout(folder)
    keys = sorted(path.stem for path in layout.trusted.glob("*.pub"))
    if not keys:
        raise ClientFault("no_keys", f"{layout.trusted} holds no key; is {folder} a cluster?", http_status=404)
    tokens = sorted(path.name for path in layout.tokens.glob("*"))
    if output == "json":
        click.echo(json.dumps({"keys": keys, "tokens": tokens}))
        return
    click.echo("\n".join([*(f"key    {name}" for name in keys), *(f"token  {name}" for name in tokens)]))


def _ring(folder: Path, authority: str) -> KeyRing:
    layout = Layout(folder)
    ring = KeyRing(layout.keys / authority, layout.trusted, authority)
    if not ring.kids():
        raise ClientFault("no_keys", f"{layout.keys} holds no signing key of {authority}", http_status=404)
    return ring
