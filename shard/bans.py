"""Banned owners: what they have ready here is held back, and let go when they are let in again.

The topology says who is banned. What becomes ready of a banned owner later (a job that is given back) is held back by
the next look; the router takes nothing new of him.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from culm.clock import Clock, SystemClock
from culm.ids import slot_of
from culm.states import Event, State
from culm.topology import Topology, authority_of_slot
from culm.wire import SlotRef
from shard.database import Database, Transaction
from shard.hints import Hint, Notices
from shard.ownership import Ownership
from shard.transitions import Change, apply, lock_jobs, lock_slots

BATCH: Final = 200
LOOK_S: Final = 30.0
"""Between two looks at the same bans."""
ACTOR: Final = "bans"
_Place = tuple[str, int]
"""Of a job among its owner's: when it was made, its id."""
_BEFORE_ALL: Final[_Place] = ("1970-01-01", 0)


class Bans:
    """The background turn that keeps a shard in step with the bans."""

    def __init__(
        self,
        database: Database,
        ownership: Ownership,
        topology: Callable[[], Topology],
        notices: Notices,
        clock: Clock | None = None,
    ) -> None:
        self._database = database
        self._ownership = ownership
        self._topology = topology
        self._notices = notices
        self._clock: Clock = clock or SystemClock()
        self._seen: frozenset[tuple[str, str]] | None = None
        self._next_look = 0.0

    async def turn(self) -> None:
        """Hold back and let go. Raises Unavailable, Moved. Safe to retry: yes."""
        topology, authorities = self._topology(), {authority_of_slot(slot) for slot in self._ownership.open}
        bans = frozenset(
            (name, account)
            for name, section in topology.sections.items()
            for account in section.banned
            if name in authorities or account.partition(":")[0] == name
        )
        now = self._clock.monotonic()
        if bans == self._seen and now < self._next_look:
            return
        held = {row[0] for row in await self._database.run("read", lambda tx: tx.fetch("held_owners"))}
        for owner in sorted(held):
            if await self._each(owner, "held_of_owner", Event.LET_GO, "the ban was lifted"):
                await self._database.run("write", partial(_forget, owner=owner))
        for owner in sorted({account for _, account in bans}):
            await self._each(owner, "ready_of_owner", Event.HOLD_BACK, "the owner is banned")
        self._seen, self._next_look = bans, now + LOOK_S

    async def _each(self, owner: str, statement: str, event: Event, detail: str) -> bool:
        """Whether it concerned all that there were."""
        after, all_of_them = _BEFORE_ALL, True
        while True:
            rows = await self._database.run("read", partial(_find, statement=statement, owner=owner, after=after))
            if not rows:
                return all_of_them
            after = rows[-1]
            ids = [identifier for _, identifier in rows if self._concerns(owner, identifier, event)]
            all_of_them = all_of_them and len(ids) == len(rows)
            if ids:
                gone, came = await self._database.run(
                    "write", partial(self._make, owner=owner, ids=ids, what=(event, detail))
                )
                await self._notices.withdraw(gone)
                await self._notices.announce(came)

    def _concerns(self, owner: str, identifier: int, event: Event) -> bool:
        """A ban of one authority holds in its own slots only, unless it is the owner's."""
        slot = slot_of(identifier)
        if slot not in self._ownership.open:
            return False
        is_banned = self._topology().ban_of(owner, authority_of_slot(slot)) is not None
        return is_banned == (event is Event.HOLD_BACK)

    async def _make(
        self, tx: Transaction, owner: str, ids: Sequence[int], what: tuple[Event, str]
    ) -> tuple[list[Hint], list[Hint]]:
        """The hints that go and those that come."""
        event, detail = what
        opened = self._ownership.open
        await lock_slots(tx, [SlotRef(slot, opened.get(slot, 0)) for slot in {slot_of(i) for i in ids}])
        locked = await lock_jobs(tx, ids)
        wanted = State.ACTIVATED if event is Event.HOLD_BACK else State.PENDING
        jobs = [job for job in locked.jobs.values() if job.state is wanted]
        if event is Event.HOLD_BACK and jobs:
            await tx.execute("insert_held_owner", owner)
        came = await apply(tx, [Change(job=job, event=event, actor=ACTOR, detail=detail) for job in jobs])
        return [job.hint for job in jobs if event is Event.HOLD_BACK], came


async def _find(tx: Transaction, statement: str, owner: str, after: _Place) -> list[_Place]:
    at, identifier = after
    return [(row[0], row[1]) for row in await tx.fetch(statement, owner, at, at, identifier, BATCH)]


async def _forget(tx: Transaction, owner: str) -> None:
    await tx.execute("delete_held_owner", owner)
