"""The changes of a section: pure, from one section to the next, of a later epoch, or to the same if nothing changes.

Nothing moves by itself: the default placement (weighted consistent hashing) is applied once, when a slot is handed
out, and stored.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Final

import msgspec
from uhashring import HashRing

from culm import policies
from culm.errors import ClientFault, Conflict
from culm.topology import (
    MAX_BANNED,
    Placement,
    Queue,
    Region,
    Section,
    Shard,
    Site,
    SiteRegistration,
    slot_block,
    validate,
)

MAX_SLOTS_PER_SITE: Final = 64


def register_sites(section: Section, wanted: Iterable[SiteRegistration]) -> Section:
    """The section with these sites added or brought up to date, one epoch later; the same section if nothing changes.

    A known site keeps its slots and region. A computing queue that the registration does not name stays. A status
    that an operator set stays too, unless the registration says otherwise (`Queue.reason` marks it). Pure.

    Raises:
        Conflict: site_in_other_region, queue_of_other_site, out_of_slots, or no_shard (for a region that is new).
        ClientFault: bad_topology.
    """
    epoch = section.epoch + 1
    sites, placement, regions = dict(section.sites), dict(section.placement), dict(section.regions)
    owner = {queue: name for name, site in sites.items() for queue in site.queues}
    free = _free_slots(section)
    for registration in wanted:
        for queue in registration.queues:
            if owner.setdefault(queue, registration.name) != registration.name:
                raise Conflict("queue_of_other_site", f"computing queue {queue} belongs to site {owner[queue]}")
        known = sites.get(registration.name)
        if known is None:
            region = regions.get(registration.region)
            if region is None:
                region = regions[registration.region] = _new_region(section, registration.region, next(free))
                placement[region.slot] = Placement(region.shards[0], epoch)
            slot = next(free)
            placement[slot] = Placement(str(_ring(section, region.shards).get_node(registration.name)), epoch)
            sites[registration.name] = Site(region=registration.region, slots=[slot], queues=registration.queues)
        elif known.region != registration.region:
            raise Conflict("site_in_other_region", f"site {registration.name} belongs to region {known.region}")
        else:
            sites[registration.name] = msgspec.structs.replace(
                known, queues=known.queues | _keep_operator_status(known.queues, registration.queues)
            )
    if sites == section.sites and regions == section.regions:
        return section
    changed = msgspec.structs.replace(section, epoch=epoch, sites=sites, regions=regions, placement=placement)
    validate(changed)
    return changed


def set_slots(section: Section, site: str, n_slots: int) -> Section:
    """The section with a hot site over so many slots, one epoch later; the same section if it has as many.

    The new ones go to the region's shards by their weights, to whichever has the fewest of the site; nothing moves. A
    site never gets fewer: its jobs would have to move.

    Raises:
        Conflict: slots_cannot_shrink, out_of_slots, no_shard.
        ClientFault: unknown_site, too_many_slots.
    """
    known = section.sites.get(site)
    if known is None:
        raise ClientFault("unknown_site", f"no site {site!r} is registered in {section.authority}", http_status=404)
    if n_slots > MAX_SLOTS_PER_SITE:
        raise ClientFault("too_many_slots", f"a site has at most {MAX_SLOTS_PER_SITE} slots")
    if n_slots < len(known.slots):
        raise Conflict("slots_cannot_shrink", f"{site} has {len(known.slots)} slots with its jobs; they stay")
    if n_slots == len(known.slots):
        return section
    epoch, region, free = section.epoch + 1, section.regions[known.region], _free_slots(section)
    placement, slots = dict(section.placement), list(known.slots)
    weights = _weights(section, region.shards)
    held = Counter(placement[slot].shard for slot in slots)
    for slot in itertools.islice(free, n_slots - len(slots)):
        shard = min(weights, key=lambda name: (held[name] / weights[name], name))
        held[shard] += 1
        placement[slot] = Placement(shard, epoch)
        slots.append(slot)
    sites = section.sites | {site: msgspec.structs.replace(known, slots=slots)}
    changed = msgspec.structs.replace(section, epoch=epoch, sites=sites, placement=placement)
    validate(changed)
    return changed


def add_shard(section: Section, name: str, shard: Shard, region: str, *, strict: bool = False) -> Section:
    """The section with a shard more, one epoch later; the same section if it is there already. Nothing moves.

    Args:
        section: what to build on.
        name: of the shard.
        shard: its link and weight.
        region: takes the shard for the sites registered there from now on; made, with a slot on this shard, if it is
            new; "" leaves the shard to regions that come later.
        strict: of a new region.

    Raises:
        Conflict: shard_exists (with another link or weight, or outside of the region), out_of_slots.
        ClientFault: bad_topology.
    """
    known = section.shards.get(name)
    at_home = not region or (region in section.regions and name in section.regions[region].shards)
    if known is not None:
        if known != shard or not at_home:
            raise Conflict("shard_exists", f"shard {name} exists with other properties: link {known.link}")
        return section
    epoch = section.epoch + 1
    regions, placement = dict(section.regions), dict(section.placement)
    if region in regions:
        regions[region] = msgspec.structs.replace(regions[region], shards=[*regions[region].shards, name])
    elif region:
        slot = next(_free_slots(section))
        regions[region] = Region(slot=slot, shards=[name], strict=strict)
        placement[slot] = Placement(name, epoch)
    shards = section.shards | {name: shard}
    changed = msgspec.structs.replace(section, epoch=epoch, shards=shards, regions=regions, placement=placement)
    validate(changed)
    return changed


def set_ban(section: Section, account: str, reason: str | None) -> Section:
    """The section with an account banned for a reason, or let in again (None), one epoch later; the same if it is so.

    Raises ClientFault (bad_account, too_many_bans).
    """
    if section.banned.get(account) == reason:
        return section
    banned = {name: why for name, why in section.banned.items() if name != account}
    if reason is not None:
        banned[account] = reason
    if len(banned) > MAX_BANNED:
        raise ClientFault("too_many_bans", f"{MAX_BANNED} accounts are banned already")
    changed = msgspec.structs.replace(section, epoch=section.epoch + 1, banned=banned)
    try:
        # As it will be read again: the account's form is checked there.
        msgspec.json.decode(msgspec.json.encode(changed), type=Section)
    except msgspec.ValidationError:
        told = f"{account[:160]!r} is not AUTHORITY:SUBJECT, or the reason is too long"
        raise ClientFault("bad_account", told) from None
    return changed


def set_vo(section: Section, vo: str, /, **changes: object) -> Section:
    """The section with fields of a VO's policy changed, one epoch later; the same section if nothing changes.

    Raises ClientFault: bad_vo as `culm.policies.changed`, bad_topology.
    """
    vos = policies.changed(section.vos, vo, changes)
    if vos == section.vos:
        return section
    changed = msgspec.structs.replace(section, epoch=section.epoch + 1, vos=vos)
    validate(changed)
    return changed


def set_queue(section: Section, queue: str, /, **changes: object) -> Section:
    """The section with fields of one computing queue changed, one epoch later.

    Raises:
        ClientFault: unknown_queue, or bad_queue for a field or a value that a computing queue cannot have.
    """
    for name, site in section.sites.items():
        if queue in site.queues:
            try:
                described = msgspec.convert(msgspec.to_builtins(site.queues[queue]) | changes, Queue)
            except msgspec.ValidationError as error:
                raise ClientFault("bad_queue", f"computing queue {queue}: {error}") from None
            moved = msgspec.structs.replace(site, queues=site.queues | {queue: described})
            changed = msgspec.structs.replace(section, epoch=section.epoch + 1, sites=section.sites | {name: moved})
            validate(changed)
            return changed
    raise ClientFault("unknown_queue", f"no computing queue {queue!r} is registered", http_status=404)


def _keep_operator_status(known: dict[str, Queue], wanted: dict[str, Queue]) -> dict[str, Queue]:
    """A push of the catalogue never overwrites what an operator set by hand and gave a reason for."""
    return {
        name: msgspec.structs.replace(queue, status=known[name].status, reason=known[name].reason)
        if name in known and known[name].reason and not queue.reason
        else queue
        for name, queue in wanted.items()
    }


def _new_region(section: Section, name: str, slot: int) -> Region:
    shards = sorted(section.shards.keys() - {s for r in section.regions.values() if r.strict for s in r.shards})
    if not shards:
        raise Conflict("no_shard", f"authority {section.authority} has no shard for the new region {name}")
    return Region(slot=slot, shards=[_ring(section, shards).get_node(name)])


def _weights(section: Section, shards: Iterable[str]) -> dict[str, int]:
    weights = {name: section.shards[name].weight for name in shards if section.shards[name].weight > 0}
    if not weights:
        raise Conflict("no_shard", "every shard of that region has weight 0")
    return weights


def _ring(section: Section, shards: Iterable[str]) -> HashRing:
    return HashRing(nodes={name: {"weight": weight} for name, weight in _weights(section, shards).items()})


def _free_slots(section: Section) -> Iterator[int]:
    first, last = slot_block(section.authority)
    start = max(section.last_slot, first - 1, *section.placement) + 1
    yield from range(start, last + 1)
    raise Conflict("out_of_slots", f"authority {section.authority} has used up its block of slot numbers")
