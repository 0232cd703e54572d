"""The shelf: what a claim needs to know of ready jobs, read ahead and kept in memory.

A hint like those in Redis, never the truth: a claim that uses it is guarded by the job's version and by its ready row,
and looks into InnoDB where the shelf has nothing. Filled by the refill, which knows what comes next, and by a submit
while there is room.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Final

from shard.database import Row, Transaction
from shard.metrics import SHELF_BYTES, SHELF_TAKEN

ROW_BYTES: Final = 1500
"""About what a row costs beside its payload: eighteen Python values and their container."""
INLINE_BYTES: Final = 64 << 10
"""A larger payload is not in its row: a look at many jobs must not read megabytes of each."""
_SPEC: Final = 16

_FOUND, _MISSED = SHELF_TAKEN.labels("yes"), SHELF_TAKEN.labels("no")


async def read_claimed(tx: Transaction, ids: Sequence[int]) -> Sequence[Row]:
    """What a claim needs to know of jobs: a `Job` without its jobset and VO, these, the payload or None, its bytes."""
    return await tx.fetch("read_claimed", INLINE_BYTES, tuple(ids))


class Shelf:
    """Rows of `read_claimed` by job id, bounded by about `max_bytes`; the longest there go first."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._rows: OrderedDict[int, Row] = OrderedDict()
        self._n_bytes = 0

    def __len__(self) -> int:
        return len(self._rows)

    def put(self, rows: Iterable[Row]) -> None:
        """Keep these, in the place of others where it must be."""
        for row in rows:
            self.drop([row[0]])
            self._rows[row[0]] = row
            self._n_bytes += _size(row)
        while self._n_bytes > self._max_bytes and self._rows:
            self._n_bytes -= _size(self._rows.popitem(last=False)[1])
        SHELF_BYTES.set(self._n_bytes)

    def put_if_room(self, rows: Sequence[Row]) -> None:
        """Keep these as far as nothing else must go for them."""
        room = self._max_bytes - self._n_bytes
        for number, row in enumerate(rows):
            room -= _size(row)
            if room < 0:
                self.put(rows[:number])
                return
        self.put(rows)

    def lacks(self, ids: Iterable[int]) -> list[int]:
        """Those that are not here."""
        return [identifier for identifier in ids if identifier not in self._rows]

    def take(self, identifier: int) -> Row | None:
        """One row, which leaves the shelf: the job will not be as it says any more."""
        row = self._rows.pop(identifier, None)
        if row is None:
            _MISSED.inc()
            return None
        _FOUND.inc()
        self._n_bytes -= _size(row)
        return row

    def drop(self, ids: Iterable[int]) -> None:
        """Forget these."""
        for identifier in ids:
            row = self._rows.pop(identifier, None)
            if row is not None:
                self._n_bytes -= _size(row)


def _size(row: Row) -> int:
    return ROW_BYTES + len(row[_SPEC] or b"")
