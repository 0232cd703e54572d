"""`culm user ban|unban|list`."""

import asyncio
from pathlib import Path

import click
import msgspec
from rich.table import Table

from culm.errors import ClientFault
from culm.registry_wire import BanRequest, ChangedAnswer
from culm.topology import SLOT_BLOCKS
from ops.cli.options import AUTHORITY, DIR, OUTPUT, console, router
from ops.cli.registry import settle, topology_of


@click.group()
def user() -> None:
    """Accounts: ban, unban, list."""


@user.command()
@DIR
@AUTHORITY
@OUTPUT
@click.option("--reason", required=True, help="Told to the account, and kept in the audit.")
@click.argument("account")
def ban(folder: Path, authority: str, output: str, reason: str, account: str) -> None:
    """Ban ACCOUNT (AUTHORITY:SUBJECT): it submits nothing and takes nothing; what it has ready is held back.

    \b
    Examples:
      culm user ban central:ann --reason "her token was stolen"
    """
    _require_account(account)
    _tell(output, asyncio.run(_change(folder, authority, BanRequest(account=account, reason=reason))))


@user.command()
@DIR
@AUTHORITY
@OUTPUT
@click.argument("account")
def unban(folder: Path, authority: str, output: str, account: str) -> None:
    """Let ACCOUNT in again; its jobs that were held back are ready again.

    \b
    Examples:
      culm user unban central:ann
    """
    _require_account(account)
    if account not in topology_of(folder, authority).sections[authority].banned:
        raise ClientFault("not_banned", f"{account} is not banned by {authority} (culm user list)", http_status=404)
    _tell(output, asyncio.run(_change(folder, authority, BanRequest(account=account, banned=False))))


@user.command("list")
@DIR
@AUTHORITY
@OUTPUT
def list_banned(folder: Path, authority: str, output: str) -> None:
    """List who is banned, by which authority and why.

    \b
    Examples:
      culm user list
      culm user list -o json
    """
    sections = topology_of(folder, authority).sections.values()
    rows = [
        (section.authority, account, why) for section in sections for account, why in sorted(section.banned.items())
    ]
    if output == "json":
        keys = ("authority", "account", "reason")
        click.echo(msgspec.json.encode([dict(zip(keys, row, strict=True)) for row in rows]))
        return
    if not rows:
        click.echo("nobody is banned")
        return
    table = Table("by", "account", "reason")
    for row in rows:
        table.add_row(*row)
    console().print(table)


def _require_account(account: str) -> None:
    """Raises ClientFault(bad_account)."""
    authority, _, subject = account.partition(":")
    if not subject:
        raise ClientFault("bad_account", f"{account!r} is not AUTHORITY:SUBJECT, such as central:ann")
    if authority not in SLOT_BLOCKS:
        known = ", ".join(SLOT_BLOCKS)
        raise ClientFault("bad_account", f"there is no authority {authority!r}: an account is of one of {known}")


async def _change(folder: Path, authority: str, request: BanRequest) -> ChangedAnswer:
    async with router(folder, "admin", authority=authority) as client:
        answer = await client.post("ban", request, ChangedAnswer)
    await settle(folder, answer)
    return answer


def _tell(output: str, answer: ChangedAnswer) -> None:
    if output == "json":
        click.echo(msgspec.json.encode(answer))
    else:
        click.echo(f"{answer.authority}: epoch {answer.epoch}")
