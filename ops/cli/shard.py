"""`culm shard list|show|add`."""

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any, Final

import click
import msgspec
from rich.console import Console
from rich.table import Table

from culm import topology_store
from culm.errors import ClientFault, Conflict, CulmError, Unavailable
from culm.registry_wire import ChangedAnswer, ShardRequest
from culm.section_changes import add_shard
from culm.topology import Section, Shard, Topology
from ops import section_diff
from ops.cli.options import AUTHORITY, DIR, OUTPUT, console, monitor, router
from ops.cli.registry import settle, topology_of
from ops.cluster import control, plan
from ops.cluster.layout import Layout, is_shard_name
from ops.engines import innodb

START_S: Final = 120.0
POLL_S: Final = 0.1


@click.command("list")
@DIR
@AUTHORITY
@OUTPUT
def list_shards(folder: Path, authority: str, output: str) -> None:
    """List all shards: their regions, how many slots they have, and whether they answer.

    \b
    Examples:
      culm shard list
      culm shard list -o json
    """
    topology = topology_of(folder, authority)
    rows = [_shown(topology, name) for name in sorted(topology.shards)]
    heard = asyncio.run(_heard(folder, authority))
    for row in rows:
        row["answers"] = heard.get(row["name"])
    if output == "json":
        click.echo(msgspec.json.encode(rows))
        return
    table = Table("shard", "authority", "regions", "slots", "weight", "answers", "link")
    for row in rows:
        numbers = (str(row["n_slots"]), str(row["weight"]))
        table.add_row(
            row["name"], row["authority"], ", ".join(row["regions"]), *numbers, _ANSWERS[row["answers"]], row["link"]
        )
    console().print(table)


_ANSWERS: Final = {True: "yes", False: "no", None: "not known"}


@click.command()
@DIR
@AUTHORITY
@OUTPUT
@click.argument("name")
def show(folder: Path, authority: str, output: str, name: str) -> None:
    """Show one shard: its regions, its sites, its slots.

    \b
    Examples:
      culm shard show us1
      culm shard show us1 -o json
    """
    topology = topology_of(folder, authority)
    if name not in topology.shards:
        raise ClientFault("unknown_shard", f"there is no shard {name!r} (culm shard list)", http_status=404)
    row = _shown(topology, name)
    row["answers"] = asyncio.run(_heard(folder, authority)).get(name)
    slots = [slot for slot, place in topology.placement.items() if place.shard == name]
    row["slots"] = sorted(slots)
    row["sites"] = sorted({topology.site_of_slot[slot] for slot in slots if slot in topology.site_of_slot})
    if output == "json":
        click.echo(msgspec.json.encode(row))
        return
    click.echo(f"{name} of {row['authority']}, at {row['link']}, weight {row['weight']}")
    click.echo(f"answers: {_ANSWERS[row['answers']]}")
    click.echo(f"regions: {', '.join(row['regions']) or 'none'}")
    click.echo(f"slots: {', '.join(map(str, row['slots'])) or 'none'}")
    click.echo(f"sites: {', '.join(row['sites']) or 'none'}")


@click.command()
@DIR
@AUTHORITY
@OUTPUT
@click.option("--region", default="", help="The region that it serves; made if it is new.")
@click.option("--strict", is_flag=True, help="Of a new region: its jobs lie on its own shards only.")
@click.option("--weight", type=click.IntRange(0, 100), default=1, show_default=True, help="Its share of new sites.")
@click.option("--link", default="", metavar="HOST:PORT", help="Of a shard that runs on another machine, with TLS.")
@click.option("--reason", default="", help="Kept in the audit.")
@click.option("--plan", "only_plan", is_flag=True, help="Say what would change, change nothing.")
@click.argument("name")
def add(folder: Path, *, authority: str, output: str, name: str, only_plan: bool, link: str, **wanted: Any) -> None:
    """Let shard NAME join a running cluster. No request fails, nothing moves.

    Without --link it is made here: its database, its Valkey and its process are started by the cluster's supervisor
    and are there again at the next `culm up`. May be repeated: what was done is not done twice.

    \b
    Examples:
      culm shard add asia1 --region ASIA --plan
      culm shard add asia1 --region ASIA --reason "the new region"
      culm shard add us2 --region US --link us2.example.org:25090
    """
    home = control.running(folder, authority)
    if not is_shard_name(name):
        raise ClientFault(
            "bad_name",
            f"{name!r}: a shard's name is up to 31 of a-z, 0-9 and -, a letter first; other processes have names like "
            "router, monitor, pilot-1, us1-db, us1-valkey",
        )
    address = f"tls:{link.removeprefix('tls:')}" if link else f"unix:{home.socket(name, 'link')}"
    before = topology_store.load_section(home.topology, authority)
    shard = Shard(link=address, weight=wanted["weight"])
    after = add_shard(before, name, shard, wanted["region"], strict=wanted["strict"])
    topology_store.require_free_names(home.topology, before, after)
    if only_plan:
        _tell(output, before, after, planned=True)
        return
    # All reasons to refuse are known by now but those that come with time: only then anything is started.
    if not link:
        _start(home, name)
    request = ShardRequest(name=name, link=address, expected_epoch=before.epoch, **wanted)

    async def ask() -> ChangedAnswer:
        async with router(folder, "admin", authority=authority) as client:
            answer = await client.post("shard", request, ChangedAnswer)
        await settle(folder, answer)
        return answer

    try:
        asyncio.run(ask())
    except (ClientFault, Conflict):
        # It is refused: the next `culm up` does not start it.
        home.joining(name).unlink(missing_ok=True)
        raise
    home.joining(name).unlink(missing_ok=True)
    _tell(output, before, topology_store.load_section(home.topology, authority), planned=False)


def _start(home: Layout, name: str) -> None:
    """Have the supervisor start the processes of a shard, unless they run. Raises CulmError(start_failed)."""
    with Console(stderr=True).status(f"making {name}") as spinner:
        home.data(name).mkdir(mode=0o700, parents=True, exist_ok=True)
        home.joining(name).touch(mode=0o600)
        # Here, and not in the supervisor only: what goes wrong is told to whoever asked for it.
        names = {process.name for process in plan.shard_processes(home, name, innodb.find(home.cache))}
        told = control.status(home.folder)
        if told is None or not told.alive:
            raise Unavailable("not_running", f"the supervisor of {home.authority} has ended: culm up")
        if not names <= {process.name for process in told.processes}:
            os.kill(told.pid, signal.SIGUSR1)
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            told = control.status(home.folder)
            up = {one.name for one in told.processes if one.state == "up"} if told is not None else set()
            if names <= up:
                return
            spinner.update(f"starting {', '.join(sorted(names - up))}")
            time.sleep(POLL_S)
    raise CulmError(
        "start_failed", f"{name} is not up after {START_S:.0f} s: culm logs {name}; then repeat this command"
    )


def _tell(output: str, before: Section, after: Section, *, planned: bool) -> None:
    found = section_diff.lines(before, after)
    if output == "json":
        told = {"from_epoch": before.epoch, "to_epoch": after.epoch, "planned": planned, "changes": found}
        click.echo(msgspec.json.encode(told))
        return
    if not found:
        click.echo(f"nothing to change at epoch {before.epoch}")
        return
    verb = "would change" if planned else "changed"
    click.echo(f"{verb} the section of {after.authority}, epoch {before.epoch} -> {after.epoch}:")
    for line in found:
        click.echo(f"  {line}")


def _shown(topology: Topology, name: str) -> dict[str, Any]:
    section = next(one for one in topology.sections.values() if name in one.shards)
    return {
        "name": name,
        "authority": section.authority,
        "link": section.shards[name].link,
        "weight": section.shards[name].weight,
        "regions": sorted(region for region, one in section.regions.items() if name in one.shards),
        "n_slots": sum(place.shard == name for place in topology.placement.values()),
    }


async def _heard(folder: Path, authority: str) -> dict[str, bool]:
    """Which shards answer the monitor; empty if the monitor itself does not."""
    try:
        async with monitor(folder, authority) as client:
            answer = await client.shards()
    except Unavailable:
        return {}
    return {row.name: row.answers for row in answer.shards}
