"""Job numbers in blocks: InnoDB hands out a block per slot, memory the numbers in it.

A block that a crash loses leaves a gap, never a number given twice. On a move `slot_sequence` is the high-water mark.
"""

import asyncio
from collections import defaultdict
from dataclasses import dataclass

from culm.ids import job_id
from shard.database import Database, Transaction

BLOCK = 1000


@dataclass
class _Block:
    next_seq: int = 0
    end: int = 0


class IdBlocks:
    """Ranges of ids per slot."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._blocks: dict[int, _Block] = defaultdict(_Block)
        self._locks: dict[int, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def take(self, slot: int, n_ids: int) -> int:
        """The first of `n_ids` contiguous new ids. Raises Unavailable. Safe to retry: yes, it leaves a gap."""
        async with self._locks[slot]:
            block = self._blocks[slot]
            if block.end - block.next_seq < n_ids:
                size = max(BLOCK, n_ids)
                block.next_seq = await self._database.run("write", lambda tx: _reserve(tx, slot, size))
                block.end = block.next_seq + size
            first = block.next_seq
            block.next_seq += n_ids
            return job_id(slot, first)


async def _reserve(tx: Transaction, slot: int, size: int) -> int:
    rows = await tx.fetch("lock_sequence", slot)
    await tx.execute("advance_sequence", size, slot)
    return int(rows[0][0])
