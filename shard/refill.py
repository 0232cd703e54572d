"""Keeping the dispatch queue whole: which classes may be taken from Redis, and making the others so again.

A class is *dirty* when Redis may lack one of its best jobs: after a start, a flush, a failure. Dispatch reads InnoDB
for a dirty class, so a loss costs speed and never order. A refill reads the best of the class from InnoDB and puts them
back. A class is *low* when little is left of its capped set: a top-up adds what comes next, and dispatch goes on.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import islice

from culm.errors import CulmError
from culm.settings import DispatchSettings
from shard.classes import ClassRegistry
from shard.database import Database, Row, Transaction
from shard.dispatch_queue import DispatchQueue, QueueLostError
from shard.hints import ClassKey, Hint
from shard.shelf import Shelf, read_claimed

SWEPT_PER_TURN = 50
CLASSES_PER_STATEMENT = 100
LEFTOVERS_PER_TURN = 100
READ_AHEAD = 100
"""Jobs in one statement: their payloads may be large."""

log = logging.getLogger("shard.refill")


class Refill:
    """Dirty classes of one shard process, and the two background turns that mend them."""

    def __init__(
        self,
        database: Database,
        queue: DispatchQueue,
        classes: ClassRegistry,
        settings: DispatchSettings,
        shelf: Shelf,
    ) -> None:
        self.shelf = shelf
        self._database = database
        self._queue = queue
        self._classes = classes
        self._settings = settings
        self.n_begun = 0
        """Grows with every refill that begins: a take that crosses one cannot be relied on."""
        self.n_topped_up = 0
        self.in_flight: set[int] = set()
        """Jobs that a claim has under way: InnoDB shows them as ready until it commits, and a hint would be stale."""
        self._dirty: set[ClassKey] = set()
        self._low: set[ClassKey] = set()
        self._taken: set[int] | None = None
        """What was claimed by way of InnoDB while a refill is under way."""
        self._refilling: set[ClassKey] = set()
        self._wanted = asyncio.Event()
        self._sweep: deque[ClassKey] = deque()

    def clean(self, keys: Iterable[ClassKey]) -> bool:
        """Whether all of these may be taken from Redis."""
        keys = set(keys)
        return bool(self._queue.generation) and self._dirty.isdisjoint(keys) and self._refilling.isdisjoint(keys)

    def mark(self, keys: Iterable[ClassKey]) -> None:
        """These need a refill."""
        self._dirty.update(keys)
        if self._dirty:
            self._wanted.set()

    def low(self, keys: Iterable[ClassKey]) -> None:
        """Of these there is little left in Redis, and more in InnoDB."""
        self._low.update(keys)
        if self._low:
            self._wanted.set()

    def taken(self, ids: Iterable[int]) -> None:
        """These were claimed by way of InnoDB, and that is committed."""
        if self._taken is not None:
            self._taken.update(ids)

    def lost(self) -> None:
        """The queue failed or was flushed: everything needs a refill."""
        self.mark(self._classes.active())
        self._wanted.set()

    async def load(self) -> list[ClassKey]:
        """Find the classes with ready jobs in InnoDB, known here or not; all of them. Raises Unavailable.

        Safe to retry: yes.
        """
        rows = await self._database.run("read", lambda tx: tx.fetch("active_classes"))
        ready = [ClassKey(*row) for row in rows]
        await self.meet(ready)
        ready = [key for key in ready if self._classes.knows(key)]
        inactive = set(ready) - set(self._classes.active())
        self._classes.announce(inactive)
        self.mark(inactive)
        return ready

    async def meet(self, keys: Iterable[ClassKey]) -> None:
        """Learn those of these classes that are not known.

        They are of a submit whose outcome was not told, imported with a slot, or were forgotten while they were idle.
        Raises Unavailable. Safe to retry: yes.
        """
        strangers = [key for key in keys if not self._classes.knows(key)]
        for start in range(0, len(strangers), CLASSES_PER_STATEMENT):
            some = strangers[start : start + CLASSES_PER_STATEMENT]
            for row in await self._database.run("read", partial(_read_classes, keys=some)):
                self._classes.learn(*row)

    async def turn(self) -> None:
        """Wait until a refill is wanted, then mend what is dirty. Raises Unavailable."""
        await self._wanted.wait()
        self._wanted.clear()
        try:
            if not self._queue.generation and await self._queue.begin():
                self._dirty.update(self._classes.active())
            for key in list(self._dirty):
                await self._refill(key)
            for key in list(self._low):
                self._low.discard(key)
                if key not in self._dirty:
                    await self._top_up(key)
        except QueueLostError as error:
            log.info("refill put off: %s", error)
            await asyncio.sleep(self._settings.breaker_s)
        except CulmError:
            await asyncio.sleep(self._settings.breaker_s)
            raise
        finally:
            if self._dirty or self._low or not self._queue.generation:
                self._wanted.set()

    async def sweep(self) -> None:
        """Refresh a few classes, in turn: a hint may be lost, or left over, without a trace. Raises Unavailable."""
        await self.load()
        active = self._classes.active()
        if not self._sweep:
            self._sweep.extend(active)
        self.mark(self._sweep.popleft() for _ in range(min(SWEPT_PER_TURN, len(self._sweep))))
        # What is left of classes without ready jobs: no claim takes it, so only this takes it away.
        with contextlib.suppress(QueueLostError):
            self.mark(islice(set(await self._queue.classes()).difference(active), LEFTOVERS_PER_TURN))

    async def _refill(self, key: ClassKey) -> None:
        generation, cap = self._queue.generation, self._settings.cap
        # Not dirty any more: what marks it from here on wants another refill. Not clean before the end of this one.
        self._dirty.discard(key)
        self._refilling.add(key)
        self.n_begun += 1
        try:
            self._taken = set()
            await self._queue.open_refill(key)
            announced = self._classes.announced(key)
            # As of before the read: what is given up later is pushed back, and kept.
            in_flight = frozenset(self.in_flight)
            rows = await self._database.run(
                "read", lambda tx: tx.fetch_rows("best_ready", [(key.slot, key.class_id, cap + 1 + len(in_flight))])
            )
            if not rows:
                self._classes.seen_empty(key, announced)
            gone = in_flight | self._taken
            best = sorted(_hint(row) for row in rows if row[0] not in gone)
            await self._queue.close_refill(key, best[:cap], more=len(best) > cap)
        except BaseException:
            self._dirty.add(key)
            raise
        finally:
            self._refilling.discard(key)
            self._taken = None
        if self._queue.generation != generation:
            self._dirty.add(key)
        await self._read_ahead(best[:cap])

    async def _top_up(self, key: ClassKey) -> None:
        """Add what comes next of a class, whose hints are taken on meanwhile."""
        cap = self._settings.cap
        self._taken = set()
        try:
            floor = await self._queue.open_top_up(key)
            if floor is None:
                return
            rows = await self._database.run(
                "read",
                lambda tx: tx.fetch(
                    "next_ready", key.slot, key.class_id, floor.ranking, floor.ranking, floor.id, cap + 1
                ),
            )
            following = sorted(_hint(row) for row in rows if row[0] not in self._taken)
            if not await self._queue.close_top_up(floor, following[:cap], more=len(following) > cap):
                return
        except BaseException:
            # It may be open still.
            self._dirty.add(key)
            raise
        finally:
            self._taken = None
        self.n_topped_up += 1
        await self._read_ahead(following[:cap])

    async def _read_ahead(self, hints: Sequence[Hint]) -> None:
        """Put on the shelf what the next claims will ask for."""
        if not self._settings.shelf_mb:
            return
        lacking = self.shelf.lacks(hint.id for hint in hints)
        for start in range(0, len(lacking), READ_AHEAD):
            some = tuple(lacking[start : start + READ_AHEAD])
            rows = await self._database.run("read", partial(read_claimed, ids=some))
            self.shelf.put(rows)


async def _read_classes(tx: Transaction, keys: Sequence[ClassKey]) -> Sequence[Row]:
    return await tx.fetch_rows("read_classes", keys)


def _hint(row: Row) -> Hint:
    return Hint(row[3], row[0], ClassKey(row[1], row[2]))
