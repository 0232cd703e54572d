"""`culm vo set|list|show`: the policy of a VO, as each authority has it."""

import asyncio
from pathlib import Path

import click
import msgspec
from rich.table import Table

from culm.errors import ClientFault
from culm.policies import Policy
from culm.registry_wire import ChangedAnswer, VoRequest
from ops.cli.options import AUTHORITY, DIR, OUTPUT, console, router
from ops.cli.registry import fields, settle, topology_of


@click.group()
def vo() -> None:
    """Time-outs of a VO's jobs, and what a submit gets that does not say."""


@vo.command("set")
@DIR
@AUTHORITY
@OUTPUT
@click.option("--reason", default="", help="Kept in the audit.")
@click.option("--epoch", type=int, default=None, help="Only if the section is at this epoch.")
@click.argument("name")
@click.argument("changes", nargs=-1, required=True)
def set_fields(
    folder: Path, *, authority: str, output: str, reason: str, epoch: int | None, name: str, changes: tuple[str, ...]
) -> None:
    """Change the policy of VO NAME, FIELD=VALUE, in the section of one authority: it holds in the slots of that one.

    A computing queue's own word comes first (culm site set), the shard's settings last. 0 takes back what was said.

    \b
    Time-outs, seconds: first_lease_s heartbeat_s holding_s transferring_s activated_s unready_s
    Defaults: default_cores default_memory_mb default_disk_mb default_walltime_s default_max_attempts
    A bound: max_priority

    \b
    Examples:
      culm vo set atlas heartbeat_s=1800 default_memory_mb=2000 --reason "short jobs"
      culm vo set atlas heartbeat_s=0 --authority CERN
    """
    request = VoRequest(vo=name, changes=fields(changes, Policy, "bad_vo"), expected_epoch=epoch, reason=reason)

    async def ask() -> ChangedAnswer:
        async with router(folder, "admin", authority=authority) as client:
            answer = await client.post("vo", request, ChangedAnswer)
        await settle(folder, answer)
        return answer

    answer = asyncio.run(ask())
    if output == "json":
        click.echo(msgspec.json.encode(answer))
    else:
        click.echo(f"{answer.authority}: epoch {answer.epoch}")


@vo.command("list")
@DIR
@AUTHORITY
@OUTPUT
def list_vos(folder: Path, authority: str, output: str) -> None:
    """List the VOs that have a policy, by authority, with what it says.

    \b
    Examples:
      culm vo list
      culm vo list -o json
    """
    known = _policies(folder, authority)
    if output == "json":
        click.echo(msgspec.json.encode(known))
        return
    if not any(known.values()):
        click.echo("no VO has a policy: the settings of the shards hold for all")
        return
    table = Table("authority", "VO", "policy")
    for owner, vos in known.items():
        for name, policy in vos.items():
            table.add_row(owner, name, said(policy))
    console().print(table)


@vo.command()
@DIR
@AUTHORITY
@OUTPUT
@click.argument("name")
def show(folder: Path, authority: str, output: str, name: str) -> None:
    """Show what each authority says of VO NAME, field by field; "-" leaves it to the shard's settings.

    \b
    Examples:
      culm vo show atlas
      culm vo show atlas -o json
    """
    known = {owner: vos[name] for owner, vos in _policies(folder, authority).items() if name in vos}
    if not known:
        raise ClientFault("unknown_vo", f"no authority has a policy of VO {name!r}", http_status=404)
    if output == "json":
        click.echo(msgspec.json.encode({owner: msgspec.structs.asdict(policy) for owner, policy in known.items()}))
        return
    table = Table("field", *known)
    for field in Policy.__struct_fields__:
        table.add_row(
            field, *(f"{getattr(policy, field):g}" if getattr(policy, field) else "-" for policy in known.values())
        )
    console().print(table)


def _policies(folder: Path, authority: str) -> dict[str, dict[str, Policy]]:
    """By authority and VO, in the order of their names."""
    sections = topology_of(folder, authority).sections
    return {owner: dict(sorted(sections[owner].vos.items())) for owner in sorted(sections)}


def said(policy: Policy) -> str:
    """The fields in which a policy, or a computing queue, says something, as `culm vo set` and `site set` take them."""
    values = ((field, getattr(policy, field)) for field in Policy.__struct_fields__)
    return " ".join(f"{field}={value:g}" for field, value in values if value)
