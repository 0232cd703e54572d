"""Banned owners: what they have ready here is held back, and let go when they are let in again.

The topology says who is banned. What becomes ready of a banned owner later (a job that is given back) is held back by
the next look; the router takes nothing new of him.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from culm.clock import Clock, SystemClock
from culm.errors import CulmError
from culm.ids import slot_of
from culm.states import Event, State
from culm.topology import Topology, authority_of_slot
from culm.wire import SlotRef
from shard.database import Database, Row, Transaction
from shard.hints import Hint, Notices
from shard.ownership import Ownership
from shard.transitions import Change, apply, lock_jobs, lock_slots

BATCH: Final = 200
"""Jobs that one transaction changes."""
EXAMINED: Final = 2000
"""Rows that one statement looks at."""
LOOK_S: Final = 30.0
"""Between two looks at the same bans."""
ACTOR: Final = "bans"

log = logging.getLogger("shard.bans")

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
        """Hold back and let go. Raises CulmError of the last owner that could not be done. Safe to retry: yes."""
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
        failed: CulmError | None = None
        for owner in sorted(held | {account for _, account in bans}):
            try:
                await self._look_at(owner, held=owner in held)
            except CulmError as error:
                # The others are banned all the same; of this one the next turn finds what is left.
                log.warning("bans of %s: %s", owner, error)
                failed = error
        if failed is not None:
            raise failed
        self._seen, self._next_look = bans, now + LOOK_S

    async def _look_at(self, owner: str, *, held: bool) -> None:
        """Go through all hot jobs of an owner in steps; who has none that are not final is passed over."""
        after, nothing_held = _BEFORE_ALL, True
        [[n_active]] = await self._database.run("read", partial(_active, owner=owner))
        while n_active:
            rows = await self._database.run("read", partial(_states, owner=owner, after=after))
            if not rows:
                break
            after = rows[-1][0], rows[-1][1]
            pending = [row[1] for row in rows if row[2] == State.PENDING]
            let_go = [one for one in pending if self._concerns(owner, one, Event.LET_GO)] if held else []
            nothing_held = nothing_held and len(let_go) == len(pending)
            ready = [row[1] for row in rows if row[2] == State.ACTIVATED]
            hold_back = [one for one in ready if self._concerns(owner, one, Event.HOLD_BACK)]
            await self._change(owner, let_go, Event.LET_GO, "the ban was lifted")
            await self._change(owner, hold_back, Event.HOLD_BACK, "the owner is banned")
            nothing_held = nothing_held and not hold_back
        if held and nothing_held:
            await self._database.run("write", partial(_forget, owner=owner))

    async def _change(self, owner: str, ids: Sequence[int], event: Event, detail: str) -> None:
        for start in range(0, len(ids), BATCH):
            some = ids[start : start + BATCH]
            gone, came = await self._database.run(
                "write", partial(self._make, owner=owner, ids=some, what=(event, detail))
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


async def _active(tx: Transaction, owner: str) -> list[Row]:
    return await tx.fetch("owner_active_jobs", owner)


async def _states(tx: Transaction, owner: str, after: _Place) -> list[Row]:
    at, identifier = after
    return await tx.fetch("states_of_owner", owner, at, at, identifier, EXAMINED)


async def _forget(tx: Transaction, owner: str) -> None:
    await tx.execute("delete_held_owner", owner)
