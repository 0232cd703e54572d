"""Forwarding to the shard that serves a slot, and again when it says that the slot has moved."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import msgspec

from culm.errors import ClientFault, Moved
from culm.shard_links import ShardLinks
from culm.topology import Topology
from culm.topology_store import TopologyCache
from culm.wire import SlotRef
from router.metrics import MISROUTES

A = TypeVar("A", bound=msgspec.Struct)
T = TypeVar("T")

MOVED_PAUSES_S: Final = (0.0, 0.05, 0.2, 0.5)
"""How often and how long to wait for a topology that agrees with the shard."""


class Forward:
    """The way from this router to the shards."""

    def __init__(self, topology: TopologyCache, links: ShardLinks, deadline_s: float) -> None:
        self.links = links
        self.deadline_s = deadline_s
        self._topology = topology

    @property
    def topology(self) -> Topology:
        """The topology as last seen."""
        return self._topology.current

    def fresh_topology(self) -> Topology:
        """The topology after a look whether it has changed: cheap, for names that are not known yet."""
        self._topology.refresh_if_changed()
        return self._topology.current

    def resolve(self, find: Callable[[Topology], T]) -> T:
        """What `find` finds, after one look for a newer topology where it finds nothing.

        Another worker or process may have registered the name a moment ago. Raises as `find`.
        """
        try:
            return find(self.topology)
        except ClientFault:
            return find(self.fresh_topology())

    async def corrected(self, attempt: Callable[[Topology], Awaitable[T]]) -> T:
        """Run `attempt`, and again with a fresh topology while a shard answers "moved"; the last one's error stands.

        Raises whatever `attempt` raises, Moved after the last try.
        """
        topology = self.topology
        for pause_s in MOVED_PAUSES_S:
            try:
                return await attempt(topology)
            except Moved:
                MISROUTES.inc()
            if pause_s:
                await asyncio.sleep(pause_s)
            topology = self.fresh_topology()
            await self.links.refresh()
        return await attempt(topology)

    async def to_slot(self, slot: int, verb: str, message: Callable[[SlotRef], msgspec.Struct], answer: type[A]) -> A:
        """Ask the shard of a slot. Raises ClientFault(unknown_slot), and as ShardLinks.ask."""
        self.resolve(lambda topology: topology.place(slot))

        async def attempt(topology: Topology) -> A:
            ref = topology.slot(slot)
            return await self.links.ask(topology.place(slot).shard, verb, message(ref), answer, self.deadline_s)

        return await self.corrected(attempt)
