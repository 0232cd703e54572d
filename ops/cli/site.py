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

from culm.errors import ClientFault, Conflict
from culm.registry_wire import ChangedAnswer, QueueRequest, SitesRequest, SlotsRequest
from culm.section_changes import register_sites
from culm.topology import CENTRAL, Queue, SiteRegistration, Topology
from culm.wire import SiteWhyAnswer
from culm.words import counted
from ops import catalogue
from ops.cli.options import AUTHORITY, DIR, OUTPUT, console, require_whole, router, utc
from ops.cli.registry import fields, settle, topology_of
from ops.cli.text import say
from ops.cli.vo import said

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
    where = ", ".join(f"slot {slot} on {known.place(slot).shard}" for slot in one.slots)
    click.echo(f"{name}, region {one.region}, {where}")
    table = Table(
        "computing queue", "status", "type", "cores", "memory MB", "walltime s", "releases", "reason", "policy"
    )
    for queue_name, queue in sorted(one.queues.items()):
        numbers = (str(queue.cores), str(queue.memory_mb), str(queue.walltime_s), str(len(queue.releases)))
        table.add_row(queue_name, queue.status, queue.type, *numbers, queue.reason, said(queue))
    console().print(table)


@site.command()
@DIR
@AUTHORITY
@OUTPUT
@click.argument("name")
def why(folder: Path, authority: str, output: str, name: str) -> None:
    """Say what the pilots of a site ask for, get, and are refused for. Exit code 4 if a shard gave no answer.

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
    else:
        _show_why(answer)
    require_whole(answer.missing_shards)


def _show_why(answer: SiteWhyAnswer) -> None:
    if not answer.queues:
        click.echo(f"{answer.site} has no computing queue")
    for queue in answer.queues:
        because = f" ({queue.reason})" if queue.reason else ""
        asked = f"last asked {utc(queue.last_asked_at)}" if queue.last_asked_at else "never asked"
        asking = f"{counted(queue.n_asked, 'request')} of {counted(queue.n_pilots, 'pilot')}"
        lately = f"in {answer.window_s / 60:.0f} min: {asking}"
        say(f"{queue.queue}: {queue.status}{because}, {asked}; {lately}, {counted(queue.n_given, 'job')} given")
        for one in queue.refused:
            needed = f"needed {one.needed}, offered {one.offered or 'none'}"
            kinds = counted(one.n_classes, "kind of job", "kinds of jobs")
            say(f"  {one.code}: {needed}; {kinds}, such as {one.example}")


@site.command("set")
@DIR
@AUTHORITY
@OUTPUT
@click.option(
    "--reason",
    default="",
    help="Kept in the audit, and with the computing queue: an import leaves its status alone.  [default: set by NAME]",
)
@click.option("--slots", "n_slots", type=click.IntRange(min=1), help="Of a hot site: spread it over so many slots.")
@click.argument("queue")
@click.argument("changes", nargs=-1)
def set_fields(folder: Path, *, queue: str, changes: tuple[str, ...], n_slots: int | None, **rest: Any) -> None:
    """Change fields of a computing queue, with the admin's token of the authority that it belongs to.

    With --slots QUEUE names a site: its jobs that come from now on spread over that many slots, which may lie on
    several shards of its region; its pilots take from all of them. What is there stays where it is, and a site never
    gets fewer slots.

    What it says of time-outs and defaults comes before its jobs' VO (culm vo set) and the shard's settings; 0 says
    nothing.

    \b
    Examples:
      culm site set BNL-q status=offline --reason "cooling"
      culm site set BNL-q memory_mb=8000 heartbeat_s=1800 default_memory_mb=2000
      culm site set BNL --slots 4 --reason "half of all jobs"
    """
    authority, output, reason = rest["authority"], rest["output"], rest["reason"]
    if (n_slots is None) == (not changes):
        raise ClientFault("bad_queue", "exactly one is needed: fields of a computing queue, or a site and --slots")
    request: QueueRequest | SlotsRequest
    if n_slots is not None:
        verb, request = "slots", SlotsRequest(site=queue, n_slots=n_slots, reason=reason)
    else:
        verb, request = "queue", QueueRequest(queue=queue, changes=fields(changes, Queue, "bad_queue"), reason=reason)
    known = topology_of(folder, authority)
    owner = known.authority_of_region((known.site(queue) if verb == "slots" else known.queue(queue)[1]).region)

    async def ask() -> ChangedAnswer:
        async with router(folder, "admin", authority=owner) as client:
            answer = await client.post(verb, request, ChangedAnswer)
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
    Columns: nickname (the computing queue), site and region; if there is no site: siteid.
    And if it has them: status, maxtime (s), memory (MB), releases (A|B), cmtconfig. Others are named, and not used.

    \b
    Examples:
      culm site import schedconfig.csv --dry-run
      culm site import schedconfig.csv --reason "catalogue of May"
    """
    found = catalogue.read(catalogue_file)
    before = topology_of(folder, authority)

    def of(owner: str, known: Topology) -> list[SiteRegistration]:
        return [one for one in found.over(known.sites) if _owner(one, before) == owner]

    told: list[dict[str, Any]] = []
    for owner in sorted({_owner(one, before) for one in found.sites}):
        sites = of(owner, before)
        epoch = before.epochs[owner]
        if dry_run:
            # What would be refused is refused now.
            register_sites(before.sections[owner], sites)
        else:
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
    for line in found.remarks():
        say(line, err=True)
    if output == "json":
        click.echo(msgspec.json.encode(told))
        return
    for row in told:
        click.echo(
            f"{row['authority']}: {counted(row['sites'], 'site')} ({row['new_sites']} new), "
            f"{counted(row['queues'], 'computing queue')}, epoch {row['epoch']}"
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
