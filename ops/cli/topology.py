"""`culm topology show|history|diff|restore`."""

import contextlib
import getpass
import os
import time
from collections.abc import Iterator
from pathlib import Path

import click
import msgspec
from rich.table import Table

from culm import topology_store
from culm.errors import ClientFault, CulmError
from culm.put_back import Copy
from culm.topology import CENTRAL, Section
from culm.topology_store import Restored, Who
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
        epoch = topology_store.load_section(Layout(folder).home(authority).topology, authority).epoch
        click.echo(f"nothing is recorded of the section of {authority}, which is at epoch {epoch}")
        return
    table = Table("epoch", "when", "who", "why")
    for row in rows:
        table.add_row(f"{row.from_epoch} -> {row.to_epoch}", utc(row.at), row.actor, row.reason)
    console().print(table)


@topology.command()
@DIR
@AUTHORITY
@OUTPUT
@click.argument("before", type=click.IntRange(min=0), required=False)
@click.argument("after", type=click.IntRange(min=1), required=False)
def diff(folder: Path, authority: str, output: str, before: int | None, after: int | None) -> None:
    """Show what differs between epochs BEFORE and AFTER of a section.

    AFTER is the present one, BEFORE the one that AFTER was made from, unless named; 0 is before the first. The newest
    200 epochs are kept.

    \b
    Examples:
      culm topology diff
      culm topology diff 3 7 --authority CERN
    """
    home = Layout(folder).home(authority)
    now = topology_store.load_section(home.topology, authority)
    new = now if after is None or after == now.epoch else topology_store.load_epoch(home.topology, authority, after)
    epoch = before if before is not None else topology_store.forerunner(home.topology, authority, new.epoch)
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


@topology.command()
@DIR
@AUTHORITY
@OUTPUT
@click.option(
    "--from",
    "source",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The copy to put back.  [default: the newest that is found]",
)
@click.option("--reason", default="", help="Kept in the audit.")
@click.option(
    "--last-slot",
    type=click.IntRange(min=0),
    help="The highest slot number that may have been handed out, where nothing that is left says it.",
)
@click.option("--plan", "only_plan", is_flag=True, help="Say what would change, change nothing.")
def restore(
    folder: Path,
    *,
    authority: str,
    output: str,
    source: Path | None,
    reason: str,
    last_slot: int | None,
    only_plan: bool,
) -> None:
    """Put a kept copy of the section of an authority back, when the section is lost, broken or wrong.

    Never copy a file of the history over the section: it would give epochs and slot numbers out a second time. This
    looks at the history, the audit, the copies that the other authorities have and what the running routers know, goes
    on one epoch after the highest of all, and leaves shards and placement as the newest copy has them.

    \b
    Examples:
      culm topology restore --plan
      culm topology restore --reason "the disk was full"
      culm topology restore --from topology/history/central-41.json --plan
    """
    home = Layout(folder).home(authority)
    kept = Copy(str(source), topology_store.read_copy(source, authority)) if source is not None else None
    others = list(_copies_elsewhere(home, authority))
    said = f"put back{f' from {source}' if source is not None else ''}{f': {reason}' if reason else ''}"
    done = topology_store.restore(
        home.topology,
        authority,
        Who(actor=f"local:{_login()}", reason=said, at=time.time()),
        kept=kept,
        others=others,
        last_slot=last_slot,
        only_plan=only_plan,
    )
    _tell_restored(done, output, planned=only_plan)


def _copies_elsewhere(home: Layout, authority: str) -> Iterator[Copy]:
    """What the other homes on this machine keep of a section, and what the routers that run here know of it."""
    for other in home.homes:
        if other.authority != authority:
            yield from topology_store.copies(other.topology, authority)
        # One that does not run, or whose token is gone, knows nothing more.
        with contextlib.suppress(CulmError):
            section = topology_of(home.home(CENTRAL).folder, other.authority).sections.get(authority)
            if section is not None:
                yield Copy(f"the router of {other.authority}", section)


def _login() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        # A container's user may have no name.
        return str(os.getuid())


def _tell_restored(done: Restored, output: str, *, planned: bool) -> None:
    changed = done.after is not done.before
    # Of a section that is lost there is nothing to compare with: what the copy itself says.
    before = done.before or done.kept.section
    found = section_diff.lines(before, done.after) if changed else []
    if output == "json":
        told = {"from_epoch": done.kept.section.epoch, "to_epoch": done.after.epoch, "copy": done.kept.where}
        click.echo(msgspec.json.encode(told | {"planned": planned, "changes": found}))
        return
    authority = done.after.authority
    if not changed:
        click.echo(f"the section of {authority} is whole at epoch {done.after.epoch}: nothing to put back")
        return
    verb = "would put back" if planned else "put back"
    click.echo(f"{verb} {done.kept.where} (epoch {done.kept.section.epoch}) as epoch {done.after.epoch} of {authority}")
    against = f"epoch {before.epoch}, which is in force" if done.before is not None else f"epoch {before.epoch}"
    click.echo(f"against {against}:" if found else f"no difference to {against}")
    for line in found:
        click.echo(f"  {line}")
