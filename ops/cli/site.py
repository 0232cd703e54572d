"""`culm site import|list|show|set`, `culm topology show`."""

import asyncio
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import click
import msgspec
from rich.table import Table

from culm.errors import Conflict
from culm.registry_wire import ChangedAnswer, QueueRequest, SitesRequest
from culm.topology import CENTRAL, Queue, SiteRegistration, Topology
from culm.wire import SiteWhyAnswer
from ops import catalogue
from ops.cli.options import AUTHORITY, DIR, OUTPUT, console, require_whole, router, utc
from ops.cli.registry import fields, settle, topology_of

PATIENCE_S: Final = 10.0
"""How long a change is made anew while others change the same section."""
POLL_S: Final = 0.1


@click.group()
def site() -> None:
    """Sites and their computing queues."""


@site.command("list")
@DIR
@AUTHORITY
@OUTPUT
def list_sites(folder: Path, authority: str, output: str) -> None:
    """List all sites with their shard.

    \b
    Examples:
      culm site list
      culm site list -o json
    """
    known = topology_of(folder, authority)
    if output == "json":
        click.echo(msgspec.json.encode({name: _shown(known, name) for name in sorted(known.sites)}))
        return
    table = Table("site", "region", "shard", "queues", "online")
    for name, one in sorted(known.sites.items()):
        online = sum(queue.status == "online" for queue in one.queues.values())
        table.add_row(name, one.region, known.place(one.slots[0]).shard, str(len(one.queues)), str(online))
    console().print(table)


@site.command()
@DIR
@AUTHORITY
@OUTPUT
@click.argument("name")
def show(folder: Path, authority: str, output: str, name: str) -> None:
    """Show one site with its computing queues.

    \b
    Examples:
      culm site show BNL
      culm site show BNL -o json
    """
    known = topology_of(folder, authority)
    one = known.site(name)
    if output == "json":
        click.echo(msgspec.json.encode(_shown(known, name)))
        return
    click.echo(f"{name}, region {one.region}, slots {', '.join(map(str, one.slots))}")
    table = Table("computing queue", "status", "type", "cores", "memory MB", "walltime s", "releases", "reason")
    for queue_name, queue in sorted(one.queues.items()):
        numbers = (str(queue.cores), str(queue.memory_mb), str(queue.walltime_s), str(len(queue.releases)))
        table.add_row(queue_name, queue.status, queue.type, *numbers, queue.reason)
    console().print(table)


@site.command()
@DIR
@AUTHORITY
@OUTPUT
@click.argument("name")
def why(folder: Path, authority: str, output: str, name: str) -> None:
    """Say what the pilots of a site ask for, get, and are refused for.

    \b
    Examples:
      culm site why BNL
      culm site why BNL -o json
    """

    async def ask() -> SiteWhyAnswer:
        async with router(folder, authority=authority) as client:
            return await client.site_why(name)

    answer = asyncio.run(ask())
    if output == "json":
        click.echo(msgspec.json.encode(answer))
        require_whole(answer.missing_shards)
        return
    if not answer.queues:
        click.echo(f"{name} has no computing queue")
    for queue in answer.queues:
        because = f" ({queue.reason})" if queue.reason else ""
        asked = f"last asked {utc(queue.last_asked_at)}" if queue.last_asked_at else "never asked"
        lately = f"in {answer.window_s / 60:.0f} min: {queue.n_asked} requests of {queue.n_pilots} pilots"
        click.echo(f"{queue.queue}: {queue.status}{because}, {asked}; {lately}, {queue.n_given} jobs given")
        for one in queue.refused:
            needed = f"needed {one.needed}, offered {one.offered or 'none'}"
            click.echo(f"  {one.code}: {needed}; {one.n_classes} kinds of jobs, such as {one.example}")
    require_whole(answer.missing_shards)


@site.command("set")
@DIR
@AUTHORITY
@OUTPUT
@click.option("--reason", default="", help="Kept in the audit; marks a status as set by hand.")
@click.argument("queue")
@click.argument("changes", nargs=-1, required=True)
def set_fields(folder: Path, *, authority: str, output: str, reason: str, queue: str, changes: tuple[str, ...]) -> None:
    """Change fields of a computing queue, with the admin's token of the authority that it belongs to.

    What it says of time-outs and defaults comes before its jobs' VO (culm vo set) and the shard's settings; 0 says
    nothing.

    \b
    Examples:
      culm site set BNL-q status=offline --reason "cooling"
      culm site set BNL-q memory_mb=8000 heartbeat_s=1800 default_memory_mb=2000
    """
    wanted = fields(changes, Queue, "bad_queue")
    known = topology_of(folder, authority)
    owner = known.authority_of_region(known.queue(queue)[1].region)

    async def ask() -> ChangedAnswer:
        async with router(folder, "admin", authority=owner) as client:
            request = QueueRequest(queue=queue, changes=wanted, reason=reason)
            answer = await client.post("queue", request, ChangedAnswer)
        await settle(folder, answer)
        return answer

    answer = asyncio.run(ask())
    if output == "json":
        click.echo(msgspec.json.encode(answer))
    else:
        click.echo(f"{owner}: epoch {answer.epoch}")


@site.command()
@DIR
@AUTHORITY
@OUTPUT
@click.option("--region", required=True, help="Where it lies; a region has a shard (culm shard add).")
@click.option("--queue", "queues", multiple=True, help="A computing queue of it.  [default: NAME-q]")
@click.option("--reason", default="", help="Kept in the audit.")
@click.argument("name")
@click.argument("fields", nargs=-1)
def add(folder: Path, *, authority: str, output: str, region: str, reason: str, name: str, **many: Any) -> None:
    """Register site NAME with its computing queues; FIELD=VALUE are what each queue offers. May be repeated.

    Of a computing queue that is known only the fields that are named are changed.

    \b
    Examples:
      culm site add TOKYO --region ASIA
      culm site add TOKYO --region ASIA --queue TOKYO-short --queue TOKYO-long memory_mb=8000 cores=8
    """
    given = fields(many["fields"], Queue, "bad_queue")

    def made(before: Topology) -> list[SiteRegistration]:
        known = before.sites[name].queues if name in before.sites else {}
        # No reason: a status that an operator gave one for is kept where it is registered.
        queues = {
            queue: msgspec.structs.replace(known.get(queue, Queue()), **({"reason": ""} | given))
            for queue in many["queues"] or (f"{name}-q",)
        }
        return [SiteRegistration(name=name, region=region, queues=queues)]

    answer = _register(folder, authority, made, reason)
    if output == "json":
        click.echo(msgspec.json.encode(answer))
    else:
        click.echo(f"{answer.authority}: epoch {answer.epoch}")


@site.command("import")
@DIR
@AUTHORITY
@OUTPUT
@click.option("--reason", default="", help="Kept in the audit.")
@click.option("--dry-run", is_flag=True, help="Say what would be registered, change nothing.")
@click.argument("catalogue_file", type=click.Path(dir_okay=False, exists=True, path_type=Path))
def import_sites(
    folder: Path, *, authority: str, output: str, reason: str, dry_run: bool, catalogue_file: Path
) -> None:
    """Register the sites and computing queues of a catalogue (CSV, PanDA's schedconfig columns).

    Sites that are known are brought up to date; a status that an operator set with a reason stays, and so does every
    field that the file has no column for. A region nobody knows goes to the centre. May be repeated.

    \b
    Examples:
      culm site import schedconfig.csv --dry-run
      culm site import schedconfig.csv --reason "catalogue of May"
    """
    found = catalogue.read(catalogue_file)
    before = topology_of(folder, authority)

    def of(owner: str, known: Topology) -> list[SiteRegistration]:
        return [one for one in found.over(known.sites) if _owner(one, before) == owner]

    told = []
    for owner in sorted({_owner(one, before) for one in found.sites}):
        sites = of(owner, before)
        epoch = before.epochs[owner]
        if not dry_run:
            epoch = _register(folder, owner, partial(of, owner), reason).epoch
        told.append(
            {
                "authority": owner,
                "sites": len(sites),
                "new_sites": sum(one.name not in before.sites for one in sites),
                "queues": sum(len(one.queues) for one in sites),
                "epoch": epoch,
            }
        )
    if output == "json":
        click.echo(msgspec.json.encode(told))
        return
    for row in told:
        click.echo(
            "{authority}: {sites} sites ({new_sites} new), {queues} computing queues, epoch {epoch}".format(**row)
        )


def _shown(known: Topology, name: str) -> dict[str, Any]:
    """A site with all its fields, also those that are as by default: a program must not have to know the defaults."""
    one = known.site(name)
    queues = {queue: msgspec.structs.asdict(described) for queue, described in one.queues.items()}
    shards = sorted({known.place(slot).shard for slot in one.slots})
    return {"region": one.region, "slots": one.slots, "shards": shards, "queues": queues}


def _owner(site: SiteRegistration, known: Topology) -> str:
    return known.authority_of_region(site.region) if site.region in known.regions else CENTRAL


def _register(
    folder: Path, authority: str, made: Callable[[Topology], list[SiteRegistration]], reason: str
) -> ChangedAnswer:
    """Register what is `made` from the topology as it is: made anew where somebody else has changed it meanwhile."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        known = topology_of(folder, authority)
        request = SitesRequest(sites=made(known), reason=reason, expected_epoch=known.epochs.get(authority))
        try:
            return asyncio.run(_post(folder, authority, request))
        except Conflict as error:
            if error.code != "epoch_changed" or time.monotonic() > deadline:
                raise
        time.sleep(POLL_S)


async def _post(folder: Path, authority: str, request: SitesRequest) -> ChangedAnswer:
    async with router(folder, "admin", authority=authority) as client:
        answer = await client.post("sites", request, ChangedAnswer)
    await settle(folder, answer)
    return answer
