"""The slots of this shard: adopted from the topology, opened in InnoDB, checked in every write.

The row in InnoDB decides (invariant I8), the topology proposes: a slot that the topology places here and that was
never seen is opened; one that is known here is left as its row says, for moving is another use case.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence

from culm.errors import Moved
from culm.topology import Topology
from culm.wire import SlotRef
from shard.database import Database, Row, Transaction

log = logging.getLogger("shard.ownership")


class Ownership:
    """Which slots are open here, as last read from InnoDB: a shortcut for refusals, never a permission to write."""

    def __init__(self, shard: str, database: Database, topology: Callable[[], Topology]) -> None:
        self.shard = shard
        self.open: dict[int, int] = {}
        self._database = database
        self._topology = topology
        self._known: set[int] = set()
        self._adopting = asyncio.Lock()

    async def adopt(self) -> None:
        """Open what the topology newly places here; read again what is open. Raises Unavailable. Safe to retry: yes."""
        async with self._adopting:
            placed = {ref.slot: ref for ref in self._topology().slots_on(self.shard)}
            fresh = [ref for slot, ref in placed.items() if slot not in self._known]
            rows = await self._database.run("write", lambda tx: self._open(tx, fresh))
            # Only now: of a commit that failed nothing may be believed.
            self.open = {slot: epoch for slot, state, epoch in rows if state == "open"}
            self._known.update(row[0] for row in rows)
            if fresh:
                log.info("opened slots %s", [ref.slot for ref in fresh])

    def holds(self, slots: Sequence[SlotRef]) -> bool:
        """Whether all of these are open here, as far as is known; if not, `require` finds out more."""
        return all(self.open.get(ref.slot) == ref.epoch for ref in slots)

    async def require(self, slots: list[SlotRef]) -> None:
        """Refuse early what is not open here, after a look at the topology for a slot never heard of. Raises Moved."""
        if any(ref.slot not in self._known for ref in slots):
            await self.adopt()
        for ref in slots:
            if self.open.get(ref.slot) != ref.epoch:
                raise Moved(ref.slot, self.open.get(ref.slot, 0))

    async def _open(self, tx: Transaction, fresh: list[SlotRef]) -> Sequence[Row]:
        """Open these; all slots there are."""
        for ref in fresh:
            await tx.execute("open_slot", ref.slot, ref.epoch)
            await tx.execute("begin_sequence", ref.slot)
        return await tx.fetch("read_slots")
