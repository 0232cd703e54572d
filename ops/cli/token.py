"""`culm token issue|rotate|list`."""

import json
import sys
from pathlib import Path
from typing import Final, Literal

import click
import msgspec

from culm import access, topology_store
from culm.errors import ClientFault
from culm.tokens import KeyRing
from culm.wire import Principal
from ops.cli.options import AUTHORITY, DIR, OUTPUT
from ops.cluster.layout import Layout

DAY_S: Final = 86_400.0
MIN_VALID_S: Final = 60.0


@click.group()
def token() -> None:
    """Signed tokens of pilots, users and admins."""


@token.command()
@DIR
@AUTHORITY
@click.option("--vo", default="", help="The virtual organisation of a user.")
@click.option("--group", "groups", multiple=True, help="A working group of a user.")
@click.option("--role", "roles", multiple=True, help="Of a user: production, monitor (metrics), or manager:GROUP.")
@click.option("--queue", "queues", multiple=True, help="A computing queue of a pilot, or PREFIX*.")
@click.option("--days", type=click.FloatRange(min=0.0, max=3650.0, min_open=True), default=30.0, show_default=True)
@click.argument("kind", type=click.Choice(["pilot", "user", "admin", "peer"]))
@click.argument("subject")
def issue(
    folder: Path,
    *,
    authority: str,
    vo: str,
    days: float,
    kind: Literal["pilot", "user", "admin", "peer"],
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
    principal = Principal(role=kind, subject=subject, authority=authority, vo=vo, **lists)
    _require_use(principal, days)
    click.echo(ring.issue(principal, days * DAY_S))
    for pattern in _unmatched(folder, authority, principal.queues):
        click.echo(f"warning: no computing queue that is registered now matches {pattern!r}", err=True)
    sys.stderr.write("whoever has it may act: keep it in a file of mode 0600\n" if sys.stderr.isatty() else "")


def _require_use(principal: Principal, days: float) -> None:
    """Raises ClientFault(bad_token) for a token that could do nothing, or not what was asked for."""
    # "not .. <=": also for what is not a number.
    if not days * DAY_S >= MIN_VALID_S:
        raise ClientFault("bad_token", f"a token that is good for less than {MIN_VALID_S:.0f} s is of no use")
    if principal.role == "pilot" and not principal.queues:
        raise ClientFault("bad_token", "a pilot's token needs --queue")
    if "" in principal.queues:
        raise ClientFault("bad_token", "--queue '' is no computing queue: name one, or PREFIX*, or *")
    if principal.role != "pilot" and principal.queues:
        raise ClientFault("bad_token", f"--queue is for a pilot, the token is for a {principal.role}")
    if principal.role != "user" and (principal.roles or principal.groups):
        raise ClientFault("bad_token", f"--role and --group are for a user, the token is for a {principal.role}")
    for role in principal.roles:
        if role not in (access.PRODUCTION, access.MONITOR) and role.removeprefix("manager:") in {"", role}:
            raise ClientFault("bad_token", f"the role {role!r} is neither production, monitor nor manager:GROUP")


def _unmatched(folder: Path, authority: str, patterns: list[str]) -> list[str]:
    """Those that none of the computing queues match that this authority knows of."""
    home = Layout(folder).home(authority).topology
    known = topology_store.load(home, authority).site_of_queue if patterns else {}
    one = Principal(role="pilot", subject="", authority="")
    return [
        pattern
        for pattern in patterns
        if not any(
            access.allows_queue(msgspec.structs.replace(one, queues=[pattern]), queue, one.authority) for queue in known
        )
    ]


@token.command()
@DIR
@AUTHORITY
def rotate(folder: Path, authority: str) -> None:
    """Make a key that signs from now on. Tokens that are out stay good until they expire; nothing restarts.

    To withdraw an old key, and every token that it signed, remove its .pub from the folder `trusted` of that authority;
    the routers of the others follow.

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
    homes = Layout(folder).homes
    keys = sorted({path.stem for home in homes for path in home.trusted.glob("*.pub")})
    if not keys:
        raise ClientFault("no_keys", f"no key is trusted here; is {folder} a cluster?", http_status=404)
    tokens = sorted(path.name for home in homes for path in home.tokens.glob("*"))
    if output == "json":
        click.echo(json.dumps({"keys": keys, "tokens": tokens}))
        return
    click.echo("\n".join([*(f"key    {name}" for name in keys), *(f"token  {name}" for name in tokens)]))


def _ring(folder: Path, authority: str) -> KeyRing:
    ring = Layout(folder).home(authority).ring
    if not ring.kids():
        raise ClientFault("no_keys", f"{folder} holds no signing key of {authority}", http_status=404)
    return ring
