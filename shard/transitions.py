"""The one place where a job changes its state: row, event, tallies, and the narrow tables, in one transaction.

Invariants kept here: only declared transitions (I7); exactly the activated jobs have a `ready` row and exactly the
leased ones a `lease` row; one event per transition, numbered without gaps by `job.version`; tallies follow.

The caller holds the locks, in the order slot (shared), ready, lease, job: see `lock_jobs`.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from culm.errors import Moved
from culm.states import FINAL, LEASED, TRANSITIONS, Event, State, next_state
from culm.wire import Happening, JobError, SlotRef
from shard.database import ChangedUnderfootError, Row, Step, Transaction, for_rows
from shard.hints import ClassKey, Hint

MAX_DETAIL_CHARS: Final = 255
MAX_ACTOR_CHARS: Final = 160


@dataclass(frozen=True, slots=True)
class Job:
    """The part of a job's row that transitions need."""

    id: int
    slot: int
    class_id: int
    state: State
    version: int
    attempt: int
    lost: int
    max_attempts: int
    priority: int
    owner: str
    cancel_requested: bool
    queue: str
    pilot: str
    host: str
    vo: str = ""
    working_group: str = ""

    @property
    def hint(self) -> Hint:
        """The hint of this job when it is ready."""
        return Hint(-self.priority, self.id, ClassKey(self.slot, self.class_id))


Counted = tuple[int, State, str]
"""Slot, state and VO: what jobs are counted by."""


@dataclass(frozen=True, slots=True)
class Lease:
    """The part of a lease's row that transitions need."""

    id: int
    attempt: int
    token: str
    first_s: float
    heartbeat_s: float


@dataclass(frozen=True, slots=True)
class Locked:
    """Jobs that this transaction holds, and the leases of those that have one."""

    jobs: dict[int, Job]
    leases: dict[int, Lease]


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One transition to make. None keeps what the row has."""

    job: Job
    event: Event
    actor: str
    detail: str = ""
    attempt: int | None = None
    lost: int | None = None
    queue: str | None = None
    pilot: str | None = None
    host: str | None = None
    error: JobError | None = None
    target: State = field(init=False)

    def __post_init__(self) -> None:
        """Raises Conflict(bad_transition)."""
        object.__setattr__(self, "target", next_state(self.job.state, self.event))


def lost(job: Job, actor: str, error: JobError) -> Change:
    """What becomes of a job whose attempt came to nothing: again while attempts remain, else it has failed."""
    if (job.state, Event.EXPIRE) in TRANSITIONS and job.lost + 1 < job.max_attempts:
        return Change(job=job, event=Event.EXPIRE, actor=actor, detail=error.text, lost=job.lost + 1)
    return Change(job=job, event=Event.LOSE, actor=actor, detail=error.text, lost=job.lost + 1, error=error)


async def lock_slots(tx: Transaction, slots: Iterable[SlotRef]) -> None:
    """The ownership check (invariant I8): share-locks the slots. Raises Moved where one is not open at that epoch."""
    wanted = set(slots)
    require_open(wanted, await tx.fetch("lock_open_slots", tuple({ref.slot for ref in wanted})))


def require_open(wanted: Iterable[SlotRef], rows: Sequence[Row]) -> None:
    """What `lock_open_slots` found must be what was wanted. Raises Moved."""
    opened = {row[0]: row[1] for row in rows}
    for ref in wanted:
        if opened.get(ref.slot) != ref.epoch:
            raise Moved(ref.slot, opened.get(ref.slot, 0))


async def lock_jobs(tx: Transaction, ids: Sequence[int]) -> Locked:
    """Lock jobs for a transition, whatever state they are in. Unknown ids are missing in the answer.

    Raises ChangedUnderfootError when a job went from one narrow table to another between our locks.
    """
    wanted = tuple(ids)
    if not wanted:
        return Locked({}, {})
    ready = {row[0] for row in await tx.fetch("lock_ready_of_jobs", wanted)}
    leases = {row[0]: Lease(*row) for row in await tx.fetch("lock_leases_of_jobs", wanted)}
    jobs = {row[0]: job_of(row) for row in await tx.fetch("lock_jobs", wanted)}
    for job in jobs.values():
        if (job.state is State.ACTIVATED) != (job.id in ready) or (job.state in LEASED) != (job.id in leases):
            raise ChangedUnderfootError
    return Locked(jobs, leases)


def job_of(row: Row) -> Job:
    """A Job from the columns of `lock_jobs`, in its order."""
    values = list(row)
    values[3] = State(values[3])
    values[10] = bool(values[10])
    return Job(*values)


async def apply(tx: Transaction, changes: Sequence[Change]) -> list[Hint]:
    """Make the transitions; the hints of what became ready, to be announced after the commit.

    Raises ChangedUnderfootError where a row was not as the caller read it.
    """
    if not changes:
        return []
    steps = writes(changes, tx.writer)
    await tx.together(steps)
    note(tx, changes)
    return [change.job.hint for change in changes if change.target is State.ACTIVATED]


def writes(changes: Sequence[Change], writer: int, leases: Sequence[tuple[object, ...]] = ()) -> list[Step]:
    """What makes these transitions, in the sequence of the lock order.

    Each step is guarded by what it must find: a job that is not as `changes` believe makes `together` raise
    ChangedUnderfootError.

    Args:
        changes: at least one.
        writer: of the transaction.
        leases: rows of `insert_leases`: those of a claim, which alone knows their terms.
    """
    granted = _steps(("insert_leases", leases))
    return [*_narrow(changes), *granted, *_change(changes), _events(changes), *_counts(changes, writer)]


def note(tx: Transaction, changes: Sequence[Change]) -> None:
    """What is told of them, to those who follow live and in the metrics, when the transaction is committed."""
    tx.happened += [_happening(change) for change in changes]
    tx.failed += [change.error for change in changes if change.target is State.FAILED]


async def add_to_tallies(tx: Transaction, tally: Counter[Counted], owners: Counter[str]) -> None:
    """Keep the counts, in this connection's own rows."""
    await tx.together(_tallies(tally, owners, tx.writer))


def _tallies(tally: Counter[Counted], owners: Counter[str], writer: int) -> list[Step]:
    # Sorted, so that the rows are always locked in one order.
    of_states = [(*key, writer, n) for key, n in sorted(tally.items()) if n]
    of_owners = [(owner, writer, n) for owner, n in sorted(owners.items()) if n]
    return _steps(("add_to_tally", of_states), ("add_to_owner_tally", of_owners))


def _counts(changes: Sequence[Change], writer: int) -> list[Step]:
    tally: Counter[Counted] = Counter()
    owners: Counter[str] = Counter()
    for change in changes:
        job = change.job
        tally[job.slot, job.state, job.vo] -= 1
        tally[job.slot, change.target, job.vo] += 1
        if change.target in FINAL:
            owners[job.owner] -= 1
    failed = [change for change in changes if change.target is State.FAILED]
    return _tallies(tally, owners, writer) + _errors(failed, writer)


def _errors(failed: Sequence[Change], writer: int) -> list[Step]:
    """By code and hour; a job that failed without a word counts as what it is, plane ''."""
    errors: Counter[tuple[int, str, int, str]] = Counter()
    examples: dict[tuple[int, str, int, str], int] = {}
    for change in failed:
        plane, code = (change.error.plane, change.error.code) if change.error else ("", 0)
        key = (change.job.slot, plane, code, change.job.vo)
        errors[key] += 1
        examples[key] = change.job.id
    return _steps(("add_to_error_tally", [(*key, writer, n, examples[key]) for key, n in sorted(errors.items())]))


def _narrow(changes: Sequence[Change]) -> list[Step]:
    unready = tuple(c.job.id for c in changes if c.job.state is State.ACTIVATED)
    unleased = tuple(c.job.id for c in changes if c.job.state in LEASED and c.target not in LEASED)
    ready = [c.job for c in changes if c.target is State.ACTIVATED]
    steps = []
    if unready:
        steps.append(Step("delete_ready", [unready], must_find=len(unready)))
    if unleased:
        steps.append(Step("delete_leases", [unleased], must_find=len(unleased)))
    return steps + _steps(("insert_ready", [(job.id, job.slot, job.class_id, -job.priority) for job in ready]))


def _steps(*of_rows: tuple[str, Sequence[tuple[object, ...]]]) -> list[Step]:
    return [for_rows(name, rows) for name, rows in of_rows if rows]


def _change(changes: Sequence[Change]) -> list[Step]:
    # The UPDATEs find a row only in its old version and change `modified_at`: found is changed.
    claims = [change for change in changes if change.event is Event.CLAIM]
    plain = [change for change in changes if change.event is not Event.CLAIM and _only_state(change)]
    others = [change for change in changes if change.event is not Event.CLAIM and not _only_state(change)]
    steps = [make(some) for make, some in ((_claim, claims), (_advance, plain)) if some]
    if others:
        steps.append(for_rows("change_jobs", [_row(change) for change in others], must_find=len(others)))
    return steps


def _only_state(change: Change) -> bool:
    return all(
        value is None for value in (change.attempt, change.lost, change.queue, change.pilot, change.host, change.error)
    )


def _advance(changes: Sequence[Change]) -> Step:
    ids = [change.job.id for change in changes]
    flags = [int(_still_to_cancel(change)) for change in changes]
    found = (tuple(ids), ids, [change.job.version for change in changes])
    return Step(
        "advance_jobs", [ids, [change.target for change in changes], ids, flags, *found], must_find=len(changes)
    )


def _still_to_cancel(change: Change) -> bool:
    # A request to cancel ends with the attempt that it was made for.
    return change.job.cancel_requested and change.target in LEASED


def _claim(changes: Sequence[Change]) -> Step:
    """A claim of many jobs changes less than other transitions do, and is the one that must be cheap."""
    ids = [change.job.id for change in changes]
    places = (ids, [change.queue for change in changes], ids, [change.pilot for change in changes])
    hosts = (ids, [change.host for change in changes])
    found = (tuple(ids), ids, [change.job.version for change in changes])
    return Step("claim_jobs", [*places, *hosts, *found], must_find=len(changes))


def _events(changes: Sequence[Change]) -> Step:
    return for_rows("insert_events", [_event(change) for change in changes])


def _row(change: Change) -> tuple[object, ...]:
    job, error, target = change.job, change.error, change.target
    return (
        job.id,
        job.version + 1,
        target,
        job.attempt if change.attempt is None else change.attempt,
        job.lost if change.lost is None else change.lost,
        job.queue if change.queue is None else change.queue,
        job.pilot if change.pilot is None else change.pilot,
        job.host if change.host is None else change.host,
        int(_still_to_cancel(change)),
        error.plane if error else None,
        error.code if error else None,
        error.text if error else None,
    )


def _happening(change: Change) -> Happening:
    job = change.job
    return Happening(
        id=job.id,
        slot=job.slot,
        state=change.target,
        event=change.event,
        attempt=job.attempt if change.attempt is None else change.attempt,
        owner=job.owner,
        vo=job.vo,
    )


def _event(change: Change) -> tuple[object, ...]:
    job = change.job
    attempt = job.attempt if change.attempt is None else change.attempt
    detail = change.detail[:MAX_DETAIL_CHARS]
    return (
        job.id,
        job.version + 1,
        change.event,
        job.state,
        change.target,
        attempt,
        change.actor[:MAX_ACTOR_CHARS],
        detail,
    )
