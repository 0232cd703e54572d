"""`culm topology show|history|diff`."""

from pathlib import Path

import click
import msgspec
from rich.table import Table

from culm import topology_store
from culm.errors import ClientFault
from culm.topology import Section
from ops import section_diff
from ops.cli.options import AUTHORITY, DIR, OUTPUT, console, utc
from ops.cli.registry import topology_of
from ops.cluster.layout import Layout


@click.group()
def topology() -> None:
    """Which slot lives on which shard, and who changed it."""


@topology.command()
@DIR
@AUTHORITY
@OUTPUT
def show(folder: Path, authority: str, output: str) -> None:
    """Show every section: its epoch, shards and regions.

    \b
    Examples:
      culm topology show
      culm topology show -o json
    """
    found = topology_of(folder, authority)
    if output == "json":
        click.echo(msgspec.json.encode(list(found.sections.values())))
        return
    table = Table("authority", "epoch", "shard", "slots", "regions", "link")
    for section in found.sections.values():
        for name, shard in section.shards.items():
            slots = sum(place.shard == name for place in section.placement.values())
            regions = ", ".join(region for region, one in section.regions.items() if name in one.shards)
            table.add_row(section.authority, str(section.epoch), name, str(slots), regions, shard.link)
    console().print(table)


@topology.command()
@DIR
@AUTHORITY
@OUTPUT
@click.option("--limit", type=click.IntRange(1, 100_000), default=20, show_default=True, help="The newest so many.")
def history(folder: Path, authority: str, output: str, limit: int) -> None:
    """Show who changed the section of an authority, when and why, newest first.

    \b
    Examples:
      culm topology history
      culm topology history --authority CERN -o json
    """
    rows = topology_store.changes(Layout(folder).home(authority).topology, authority, limit)
    if output == "json":
        click.echo(msgspec.json.encode(rows))
        return
    if not rows:
        click.echo(f"the section of {authority} has not been changed yet")
        return
    table = Table("epoch", "when", "who", "why")
    for row in rows:
        table.add_row(f"{row.from_epoch} -> {row.to_epoch}", utc(row.at), row.actor, row.reason)
    console().print(table)


@topology.command()
@DIR
@AUTHORITY
@OUTPUT
@click.argument("before", type=click.IntRange(min=1), required=False)
@click.argument("after", type=click.IntRange(min=1), required=False)
def diff(folder: Path, authority: str, output: str, before: int | None, after: int | None) -> None:
    """Show what differs between epochs BEFORE and AFTER of a section.

    AFTER is the present one, BEFORE the one before AFTER, unless named. The newest 200 epochs are kept.

    \b
    Examples:
      culm topology diff
      culm topology diff 3 7 --authority CERN
    """
    home = Layout(folder).home(authority)
    now = topology_store.load_section(home.topology, authority)
    new = now if after is None or after == now.epoch else topology_store.load_epoch(home.topology, authority, after)
    epoch = before if before is not None else new.epoch - 1
    old = topology_store.load_epoch(home.topology, authority, epoch) if epoch else Section(authority=authority, epoch=0)
    if old.epoch > new.epoch:
        raise ClientFault("bad_epoch", f"epoch {old.epoch} comes after {new.epoch}: name the older one first")
    found = section_diff.lines(old, new)
    if output == "json":
        click.echo(msgspec.json.encode({"from_epoch": old.epoch, "to_epoch": new.epoch, "changes": found}))
        return
    click.echo(f"{authority}, epoch {old.epoch} -> {new.epoch}" + ("" if found else ": no difference"))
    for line in found:
        click.echo(line)
