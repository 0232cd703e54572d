"""Putting a kept copy of a section back: at a new epoch, and so that no slot number is handed out twice.

A copy that is simply laid over the section would give the epochs and the slot numbers after it a second time: two
shards would then hold different jobs under one id. What an authority *decides* comes from the copy; what has *happened*
since (shards that joined, slots that were opened) is not undone by it. Pure; `culm.topology_store` reads and writes.
"""

from collections.abc import Iterable, Sequence

import msgspec

from culm.errors import Conflict
from culm.topology import Placement, Section, Shard, validate


class Copy(msgspec.Struct, frozen=True):
    """A section as it was found somewhere; `where` is for people."""

    where: str
    section: Section


def put_back(kept: Copy, others: Iterable[Copy], *, epoch: int, last_slot: int = -1) -> Section:
    """The section that stands for `kept` from now on.

    Sites, computing queues, regions, bans and policies are those of `kept`. Shards and the placement of slots are those
    of all copies together, the newest first: the jobs of a slot that `kept` does not know stay readable.

    Args:
        kept: what is put back.
        others: every other copy that was found, of any epoch.
        epoch: the highest that is known; the new one is one more.
        last_slot: the highest slot number that is known from elsewhere; -1 for none.

    Raises:
        Conflict: copies_differ, where two copies place a slot on two shards and neither is the later one.
        ClientFault: bad_topology.
    """
    copies = sorted([kept, *others], key=lambda copy: copy.section.epoch)
    shards: dict[str, Shard] = {}
    for copy in copies:
        shards |= copy.section.shards
    placement = _placement(copies)
    slots = [last_slot, *placement, *(copy.section.last_slot for copy in copies)]
    section = msgspec.structs.replace(
        kept.section, epoch=epoch + 1, shards=shards, placement=placement, last_slot=max(slots)
    )
    validate(section)
    return section


def _placement(copies: Sequence[Copy]) -> dict[int, Placement]:
    """Where every slot is by the newest word; `copies` from the oldest on."""
    said: dict[int, dict[Placement, Copy]] = {}
    for copy in copies:
        for slot, place in copy.section.placement.items():
            said.setdefault(slot, {})[place] = copy
    found = {}
    for slot, places in said.items():
        found[slot] = newest = max(places, key=lambda place: place.epoch)
        for place, copy in places.items():
            # One that was still said when the newest one held already is no earlier place of the slot: it is another
            # history.
            if place.shard != newest.shard and copy.section.epoch >= newest.epoch:
                raise Conflict(
                    "copies_differ",
                    f"slot {slot} is on {place.shard} in {copy.where} and on {newest.shard} in {places[newest].where}: "
                    "find out which shard has its jobs, and take the other copy away",
                )
    return dict(sorted(found.items()))
