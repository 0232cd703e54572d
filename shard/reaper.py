"""The reaper: ends what nobody speaks for any more, by the database's clock alone.

After a restart of the shard, its database or the last of its routers it waits one grace period, for heartbeats could
not come meanwhile.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from culm.clock import Clock, SystemClock
from culm.errors import Unavailable
from culm.ids import id_range, slot_of
from culm.states import UNREADY, Event, State
from culm.wire import JobError, SlotRef
from shard.classes import ClassRegistry
from shard.database import Database, Row, Transaction
from shard.hints import ClassKey, Hint, Notices
from shard.metrics import LEASES_EXPIRED, LEASES_STUCK
from shard.ownership import Ownership
from shard.terms import Terms
from shard.transitions import Change, Job, apply, lock_jobs, lock_slots, lost

BATCH: Final = 200
ERRORS_KEPT_HOURS: Final = 24 * 30
MAX_EXAMINED: Final = 5000
"""Rows that one look for old jobs goes through."""
ACTOR: Final = "reaper"
CONTENDED: Final = "contended"
_MICROSECONDS: Final = 1_000_000

# Codes of panda-server's jobDispatcher (Watcher): 100 lost heartbeat, 101 recovery failed, 102 no reply to a sent job.
NO_REPLY: Final = JobError(plane="jobDispatcher", code=102, text="no reply to sent job")
LOST_HEARTBEAT: Final = JobError(plane="jobDispatcher", code=100, text="lost heartbeat")
RECOVERY_FAILED: Final = JobError(plane="jobDispatcher", code=101, text="job recovery failed")
TRANSFER_TIMEOUT: Final = JobError(plane="taskBuffer", code=101, text="transfer timeout")
_ERRORS: Final = {
    State.SENT: NO_REPLY,
    State.STARTING: LOST_HEARTBEAT,
    State.RUNNING: LOST_HEARTBEAT,
    State.HOLDING: RECOVERY_FAILED,
    State.MERGING: RECOVERY_FAILED,
    State.TRANSFERRING: TRANSFER_TIMEOUT,
}

_EXPIRED: Final = {event: LEASES_EXPIRED.labels(event) for event in (Event.EXPIRE, Event.LOSE, Event.CANCEL)}

log = logging.getLogger("shard.reaper")


@dataclass(frozen=True)
class _Look:
    """How jobs are looked for that have waited too long."""

    stop: str
    """The statement that says where a stretch of ids ends."""
    statement: str
    """Finds what is old by the shortest time-out of the slot: id and age in microseconds first."""
    arguments: tuple[object, ...]
    is_old: Callable[[int, Row], bool]
    """Whether a row of a slot is old by the time-out of its own."""


class Reaper:
    """The background turns that end leases and jobs."""

    def __init__(
        self,
        database: Database,
        ownership: Ownership,
        classes: ClassRegistry,
        terms: Terms,
        notices: Notices,
        *,
        grace_s: float,
        heard_since: Callable[[], float | None] = lambda: 0.0,
        clock: Clock | None = None,
    ) -> None:
        self._database = database
        self._ownership = ownership
        self._classes = classes
        self._terms = terms
        self._notices = notices
        self._grace_s = grace_s
        self._heard_since = heard_since
        self._clock: Clock = clock or SystemClock()
        self._started = self._clock.monotonic()
        self._looked_at: dict[tuple[str, int], int] = {}
        """By statement and slot, the last id up to which old jobs were looked for."""

    @property
    def waits(self) -> bool:
        """Whether the grace period after a restart still runs, or nobody could have spoken: no router is there."""
        heard_since = self._heard_since()
        if heard_since is None:
            return True
        since = max(self._started, self._database.connected_since, heard_since)
        return self._clock.monotonic() - since < self._grace_s

    async def end_leases(self) -> int:
        """End the leases that have expired; how many. Raises Unavailable. Safe to retry: yes."""
        # Read first: this is also what notices that the database was away.
        ids = [row[0] for row in await self._database.run("read", lambda tx: tx.fetch("expired_leases", BATCH))]
        n_ended = 0
        while ids and not self.waits:
            hints, changes = await self._ended(ids)
            for change in changes:
                _EXPIRED[change.event].inc()
            await self._notices.announce(hints)
            n_ended += len(changes)
            if len(changes) < BATCH:
                break
            ids = [row[0] for row in await self._database.run("read", lambda tx: tx.fetch("expired_leases", BATCH))]
        return n_ended

    async def drop_old_errors(self) -> int:
        """Forget errors that were counted long ago, a few at a time; how many rows. Raises Unavailable."""
        before = int(self._clock.now()) // 3600 - ERRORS_KEPT_HOURS
        return await self._database.run("write", lambda tx: tx.execute("drop_old_errors", before))

    async def _ended(self, ids: Sequence[int]) -> tuple[list[Hint], list[Change]]:
        """End a batch; one by one where that cannot be done together, so that one bad job holds up no other."""
        try:
            return await self._database.run("write", partial(self._end_leases, ids=ids))
        except Unavailable as error:
            if error.code != CONTENDED:
                raise
        hints: list[Hint] = []
        changes: list[Change] = []
        for identifier in ids:
            try:
                some, made = await self._database.run("write", partial(self._end_leases, ids=[identifier]))
            except Unavailable as error:
                if error.code != CONTENDED:
                    raise
                LEASES_STUCK.inc()
                log.warning("the lease of job %d cannot be ended; do its rows fit together? (culm audit)", identifier)
                continue
            hints += some
            changes += made
        return hints, changes

    async def close_old(self) -> int:
        """Close jobs that nobody took, or whose inputs never came, in time; how many. Raises Unavailable."""
        n_closed = 0
        if self.waits:
            return 0
        opened = dict(self._ownership.open)
        rows = await self._database.run("read", lambda tx: tx.fetch("counts"))
        states = {(row[0], row[1]) for row in rows if row[3] > 0}
        for slot, epoch in opened.items():
            at, (activated_s, unready_s) = SlotRef(slot, epoch), self._terms.shortest(slot)
            if (slot, State.ACTIVATED) in states:
                ready = _Look("stop_ready_by_id", "old_ready", (activated_s,), self._is_old_ready)
                n_closed += await self._close(at, ready)
            if any((slot, state) in states for state in UNREADY):
                of_states = (tuple(sorted(UNREADY)), unready_s)
                n_closed += await self._close(at, _Look("stop_by_id", "old_unready", of_states, self._is_old_unready))
        return n_closed

    def _is_old_ready(self, slot: int, row: Row) -> bool:
        needs = self._classes.needs(ClassKey(slot, row[2]))
        # Of a class that is not known here yet: the sweep learns it, the next turn knows.
        return needs is not None and row[1] >= _MICROSECONDS * self._terms.of(slot, needs.vo, needs.queue).activated_s

    def _is_old_unready(self, slot: int, row: Row) -> bool:
        return bool(row[1] >= _MICROSECONDS * self._terms.of(slot, row[2], row[3]).unready_s)

    async def _close(self, at: SlotRef, look: "_Look") -> int:
        """Close what is old in one stretch of a slot's ids; how many. The next turn goes on behind it.

        In stretches, for what is old depends on the job: those that may wait for long must not hide the others.
        """
        first, last = id_range(at.slot)
        place = look.statement, at.slot
        first = max(first, self._looked_at.get(place, 0) + 1)
        stop = await self._database.run("read", lambda tx: tx.fetch(look.stop, first, last, MAX_EXAMINED - 1))
        until = stop[0][0] if stop else last
        rows = await self._database.run("read", lambda tx: tx.fetch(look.statement, first, until, *look.arguments))
        ids = [row[0] for row in rows if look.is_old(at.slot, row)][:BATCH]
        # At the end it begins anew.
        self._looked_at[place] = ids[-1] if len(ids) == BATCH else until if stop else 0
        if not ids:
            return 0

        async def work(tx: Transaction) -> list[Job]:
            await lock_slots(tx, [at])
            locked = await lock_jobs(tx, ids)
            # Again, now locked: one may have been taken and given back since, and is not old any more.
            again = await tx.fetch(look.statement, ids[0], ids[-1], *look.arguments)
            still = {row[0] for row in again if look.is_old(at.slot, row)}
            old = [job for job in locked.jobs.values() if job.id in still]
            await apply(tx, [Change(job=job, event=Event.CLOSE, actor=ACTOR, detail="expired") for job in old])
            return old

        closed = await self._database.run("write", work)
        await self._notices.withdraw([job.hint for job in closed if job.state is State.ACTIVATED])
        return len(closed)

    async def _end_leases(self, tx: Transaction, ids: Sequence[int]) -> tuple[list[Hint], list[Change]]:
        opened = self._ownership.open
        here = [identifier for identifier in ids if slot_of(identifier) in opened]
        if not here:
            return [], []
        await lock_slots(tx, [SlotRef(slot, opened[slot]) for slot in {slot_of(identifier) for identifier in here}])
        # Again, now locked: a heartbeat may have come since.
        expired = [row[0] for row in await tx.fetch("lock_expired", tuple(here))]
        locked = await lock_jobs(tx, expired)
        changes = [_end(job) for job in locked.jobs.values()]
        return await apply(tx, changes), changes


def _end(job: Job) -> Change:
    """What becomes of a job whose lease has ended."""
    error = _ERRORS[job.state]
    if job.cancel_requested:
        return Change(job=job, event=Event.CANCEL, actor=ACTOR, detail=error.text)
    return lost(job, ACTOR, error)
