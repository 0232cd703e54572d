"""The claim: one transaction that gives ready jobs to a batch of get_job requests.

Hints are candidates, from Redis first and from InnoDB where Redis does not know or has too few; what counts is the
row lock on `ready` (SKIP LOCKED). Invariants: I3, a (job, attempt) is granted to one request id; I6, a repeated
request id gets its first answer while the leases live; I8, only slots that are open at the request's epoch; I13, a
row is taken only for a request whose offer its class fits.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec

from culm.errors import ClientFault, CulmError
from culm.states import Event, State
from culm.wire import Grant, ShardGetJob
from shard.database import ChangedUnderfootError, Row, Step, Transaction
from shard.hints import ClassKey, Hint
from shard.shelf import Shelf, read_claimed
from shard.terms import Terms
from shard.transitions import Change, job_of, lock_slots, note, require_open, writes

MAX_ROUNDS: Final = 4
CLASSES_PER_STATEMENT: Final = 100
TOKEN_BYTES: Final = 12
MAX_SPEC_BYTES: Final = 4 << 20
"""Of the jobs of one answer: it must fit into a frame. One job always does."""
MAX_BATCH_BYTES: Final = 16 << 20
"""Of all answers of a batch: they leave together, and who gets nothing for it is in the next one."""
_SPEC: Final = 16
_SIZE: Final = 17
"""Columns of `read_claimed`."""


@dataclass
class Seat:
    """One request in a batch, and what it gets."""

    call: ShardGetJob
    keys: tuple[ClassKey, ...]
    """The active classes that its offer fits, when the batch was made."""
    grants: list[Grant] = field(default_factory=list)
    taken: list[ClassKey] = field(default_factory=list)
    """The classes of what it newly got."""
    repeated: bool = False
    """Answered from the leases that its first try got, or refused: it takes nothing new."""
    cut: bool = False
    """It got less than it asked for and could have had: more would not fit into one answer."""
    later: bool = False
    """It gets nothing, for the answers of the batch are large enough without it: the next batch has it."""
    refusal: CulmError | None = None
    """Why it gets nothing, although others of the batch do."""


@dataclass
class Claimed:
    """What one claim did, for the caller to act on after the commit."""

    seats: list[Seat]
    from_database: list[Hint] = field(default_factory=list)
    """Taken by way of InnoDB: their hints in Redis are stale."""
    empty: list[ClassKey] = field(default_factory=list)
    """Classes that InnoDB had no row of."""
    unused: list[Hint] = field(default_factory=list)
    """Hints that were not needed: they belong back into Redis."""
    broken: set[int] = field(default_factory=set)
    """Jobs that could not be given, for their rows do not fit together."""
    contended: bool = False
    """Somebody else held candidates that we could have used: an empty answer would not be true."""


@dataclass
class _Group:
    """The seats that may take from the same classes: one candidate is as good as another for each of them."""

    keys: tuple[ClassKey, ...]
    seats: list[Seat]
    tried: set[int] = field(default_factory=set)
    won: list[Hint] = field(default_factory=list)

    @property
    def wanted(self) -> int:
        return sum(seat.call.n_jobs for seat in self.seats if not seat.repeated) - len(self.won)


def identity(call: ShardGetJob) -> tuple[str, str]:
    """What makes two calls the same request. Without trailing spaces, which the database does not compare."""
    return call.subject.rstrip(" "), call.request_id.rstrip(" ")


def groups_of(seats: Sequence[Seat]) -> list[tuple[tuple[ClassKey, ...], int]]:
    """The distinct sets of classes in the batch and how many jobs each wants, in the order of `claim`'s hints."""
    return [(group.keys, group.wanted) for group in _groups(seats)]


async def claim(
    tx: Transaction,
    seats: list[Seat],
    hints: Sequence[Sequence[Hint]],
    terms: Terms,
    broken: frozenset[int] = frozenset(),
) -> Claimed:
    """Give jobs to the seats, in the order in which they sit.

    Args:
        tx: a transaction of the claim pool.
        seats: without grants; they are filled.
        hints: per group of `groups_of`, the candidates from Redis; may be empty or wrong.
        terms: what holds where the computing queue has no time-outs of its own.
        broken: jobs that are not to be tried, found so before.

    Raises:
        Moved: a slot is not open here at that epoch.
        ChangedUnderfootError, DuplicateKeyError: run the transaction again.
    """
    _clear(seats)
    await lock_slots(tx, [ref for seat in seats for ref in seat.call.slots])
    await _answer_repeated(tx, seats)
    result = Claimed(seats)
    groups = _groups(seats)
    whole = [[hint for hint in some if hint.id not in broken] for some in hints]
    for group, some in zip(groups, whole, strict=False):
        result.unused += some[max(group.wanted, 0) :]
    await _win(tx, groups, [some[: max(group.wanted, 0)] for group, some in zip(groups, whole, strict=False)])
    for _ in range(MAX_ROUNDS):
        short = [group for group in groups if group.wanted > 0 and group.keys]
        if not short:
            break
        if not await _win_from_database(tx, short, groups, result, broken):
            break
    await _grant(tx, groups, terms, result)
    return result


def enough(seats: Sequence[Seat], hints: Sequence[Sequence[Hint]]) -> bool:
    """Whether there is a candidate for every job that a seat could get: then `claim_at_once` may do."""
    return all(group.wanted <= len(some) or not group.keys for group, some in zip(_groups(seats), hints, strict=True))


async def claim_at_once(
    tx: Transaction, seats: list[Seat], hints: Sequence[Sequence[Hint]], terms: Terms, shelf: Shelf
) -> Claimed:
    """The same as `claim`, where there is `enough` and everything is as it seems: one packet does it all.

    Nothing is locked or read before it is changed: every write is guarded by what it must find, the unique key of the
    leases finds the repeats of requests that could get something, and a look at the leases those that could not.

    Raises:
        Moved: a slot is not open here at that epoch.
        ChangedUnderfootError, DuplicateKeyError: something was not as it seemed; `claim` finds out what.
    """
    _clear(seats)
    result = Claimed(seats)
    groups = _groups(seats)
    for group, some in zip(groups, hints, strict=True):
        group.won = list(some[: group.wanted]) if group.keys else []
        result.unused += some[len(group.won) :]
    jobs = await _known(tx, [hint for group in groups for hint in group.won], shelf)
    leases, changes = _grants(groups, jobs, terms, result)
    if result.broken or any(hint.key not in group.keys for group in groups for hint in group.won):
        raise ChangedUnderfootError
    wanted = {ref for seat in seats for ref in seat.call.slots}
    asked = tuple(seat.call.request_id for seat in seats if not seat.grants)
    steps = [Step("lock_open_slots", [tuple({ref.slot for ref in wanted})])]
    if asked:
        steps.append(Step("find_answers", [asked], must_find=0))
    if changes:
        steps += writes(changes, tx.writer, leases)
    await _bring_large(tx, seats, jobs)
    answers = await tx.together(steps)
    require_open(wanted, answers[0])
    note(tx, changes)
    return result


async def _known(tx: Transaction, hints: Sequence[Hint], shelf: Shelf) -> dict[int, Row]:
    """The rows of `read_claimed`, from the shelf as far as it has them; they may be out of date."""
    jobs = {hint.id: row for hint in hints if (row := shelf.take(hint.id)) is not None}
    missing = [hint.id for hint in hints if hint.id not in jobs]
    if missing:
        jobs |= await _read_claimed(tx, missing)
    return jobs


def _clear(seats: Sequence[Seat]) -> None:
    for seat in seats:
        seat.grants.clear()
        seat.taken.clear()
        seat.repeated, seat.cut, seat.later, seat.refusal = False, False, False, None


def _groups(seats: Sequence[Seat]) -> list[_Group]:
    groups: dict[tuple[ClassKey, ...], _Group] = {}
    for seat in seats:
        groups.setdefault(seat.keys, _Group(seat.keys, [])).seats.append(seat)
    return list(groups.values())


async def _answer_repeated(tx: Transaction, seats: Sequence[Seat]) -> None:
    rows = await tx.fetch("find_answers", tuple({seat.call.request_id for seat in seats}))
    if not rows:
        return
    leases: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        leases.setdefault((row[0].rstrip(" "), row[1].rstrip(" ")), []).append(row)
    jobs = await _read_claimed(tx, [row[2] for row in rows])
    n_bytes = 0
    for seat in seats:
        for _, _, job_id, attempt, token, first_s, heartbeat_s in leases.get(identity(seat.call), []):
            seat.repeated = True
            if job_id not in jobs:
                continue
            if jobs[job_id][11] != seat.call.offer.queue:
                # Two tokens of one subject may be scoped differently (I13): a request is one computing queue's.
                seat.refusal = ClientFault("request_id_reused", "this request id was used for another computing queue")
            else:
                seat.grants.append(_grant_of(jobs[job_id], attempt, token, (first_s, heartbeat_s)))
        # All of its first answer, or nothing yet.
        size = sum(jobs[grant.id][_SIZE] for grant in seat.grants)
        if n_bytes and n_bytes + size > MAX_BATCH_BYTES:
            seat.grants.clear()
            seat.later = True
        n_bytes += size if seat.grants else 0
    await _bring_large(tx, seats, jobs)


async def _win(tx: Transaction, groups: Sequence[_Group], candidates: Sequence[list[Hint]]) -> int:
    """Lock candidates of each group, at most as many as it wants; how many were won."""
    asked = {hint.id for some in candidates for hint in some}
    if not asked:
        return 0
    rows = await tx.fetch("lock_ready", tuple(asked))
    locked = {row[0]: Hint(row[3], row[0], ClassKey(row[1], row[2])) for row in rows}
    n_won = 0
    for group, some in zip(groups, candidates, strict=False):
        keys = set(group.keys)
        for candidate in some:
            group.tried.add(candidate.id)
            hint = locked.get(candidate.id)
            # A hint may lie about its class: the row says what it is, and only fitting rows are taken.
            if hint is not None and hint.key in keys and group.wanted > 0:
                group.won.append(locked.pop(hint.id))
                n_won += 1
    return n_won


async def _win_from_database(
    tx: Transaction,
    groups: Sequence[_Group],
    all_groups: Sequence[_Group],
    result: Claimed,
    broken: frozenset[int],
) -> bool:
    """One more round with InnoDB's own order; whether another one may win more."""
    candidates = []
    result.contended = False
    # Rows that another group of this batch has won are still there, and our own lock would not hide them from us.
    own = broken.union(hint.id for group in all_groups for hint in group.won)
    for group in groups:
        found = await _best_in_database(tx, group, own, result)
        # What stands there but could not be locked before is in a rival's hands: he may yet give it back.
        result.contended = result.contended or any(hint.id in group.tried for hint in found)
        candidates.append([hint for hint in found if hint.id not in group.tried][: group.wanted])
    won_before = [len(group.won) for group in groups]
    n_candidates = sum(map(len, candidates))
    n_won = await _win(tx, groups, candidates)
    for group, n_before in zip(groups, won_before, strict=True):
        result.from_database += group.won[n_before:]
    result.contended = result.contended or n_won < n_candidates
    return n_candidates > 0


async def _best_in_database(tx: Transaction, group: _Group, own: frozenset[int], result: Claimed) -> list[Hint]:
    limit = group.wanted + len(group.tried | own)
    found: list[Hint] = []
    for start in range(0, len(group.keys), CLASSES_PER_STATEMENT):
        keys = group.keys[start : start + CLASSES_PER_STATEMENT]
        rows = await tx.fetch_rows("best_ready", [(key.slot, key.class_id, limit) for key in keys])
        hints = [Hint(row[3], row[0], ClassKey(row[1], row[2])) for row in rows]
        result.empty += set(keys) - {hint.key for hint in hints}
        found += hints
    return sorted(hint for hint in found if hint.id not in own)


async def _grant(tx: Transaction, groups: Sequence[_Group], terms: Terms, result: Claimed) -> None:
    won = [hint.id for group in groups for hint in group.won]
    if not won:
        return
    jobs = await _read_claimed(tx, won)
    leases, changes = _grants(groups, jobs, terms, result)
    if not changes:
        return
    await _bring_large(tx, result.seats, jobs)
    await tx.together(writes(changes, tx.writer, leases))
    note(tx, changes)


def _grants(
    groups: Sequence[_Group], jobs: Mapping[int, Row], terms: Terms, result: Claimed
) -> tuple[list[tuple[object, ...]], list[Change]]:
    """Fill the seats with what their groups won; the leases and changes that make it so."""
    winners = _seat_winners(groups)
    leases: list[tuple[object, ...]] = []
    changes: list[Change] = []
    n_bytes: dict[int, int] = {}
    n_in_all, full = 0, False
    secret = secrets.token_hex(TOKEN_BYTES * len(winners))
    for number, (seat, hint, ordinal) in enumerate(winners):
        call, row = seat.call, jobs.get(hint.id)
        if row is None or row[3] != State.ACTIVATED or hint.key != row[1:3]:
            # It stays where it is. Who gets nothing for it looks again, without it.
            result.broken.add(hint.id)
            result.contended = True
            continue
        size, of_seat = row[_SIZE], n_bytes.get(id(seat), 0)
        # From there on nobody: a lower job is not given before a higher one, however small it is.
        full = full or bool(n_in_all and n_in_all + size > MAX_BATCH_BYTES)
        if full or (of_seat and of_seat + size > MAX_SPEC_BYTES):
            # Still ready: for this pilot's next request, or another's.
            result.unused.append(hint)
            seat.cut, seat.later = bool(seat.grants), not seat.grants
            continue
        n_bytes[id(seat)] = of_seat + size
        n_in_all += size
        job = job_of((*row[:14], row[15]))
        attempt, token = job.attempt + 1, secret[number * 2 * TOKEN_BYTES : (number + 1) * 2 * TOKEN_BYTES]
        of_vo = terms.of(job.slot, job.vo)
        first_s = call.lease.first_s or of_vo.first_lease_s
        heartbeat_s = call.lease.heartbeat_s or of_vo.heartbeat_s
        who = (call.request_id, ordinal, call.subject)
        leases.append((job.id, attempt, token, *who, first_s, heartbeat_s, first_s))
        changes.append(
            Change(
                job=job,
                event=Event.CLAIM,
                actor=call.subject,
                detail=f"request {call.request_id} pilot {call.pilot.id}",
                attempt=attempt,
                queue=call.offer.queue,
                pilot=call.pilot.id,
                host=call.pilot.host,
            )
        )
        seat.grants.append(_grant_of(row, attempt, token, (first_s, heartbeat_s)))
        seat.taken.append(hint.key)
    return leases, changes


def _seat_winners(groups: Sequence[_Group]) -> list[tuple[Seat, Hint, int]]:
    """Who gets which: the best job to the first seat."""
    winners = []
    for group in groups:
        won = iter(sorted(group.won))
        for seat in group.seats:
            if seat.repeated:
                continue
            for ordinal in range(seat.call.n_jobs):
                hint = next(won, None)
                if hint is None:
                    break
                winners.append((seat, hint, ordinal))
    return winners


async def _read_claimed(tx: Transaction, ids: Sequence[int]) -> dict[int, Row]:
    return {row[0]: row for row in await read_claimed(tx, ids)}


async def _bring_large(tx: Transaction, seats: Sequence[Seat], jobs: Mapping[int, Row]) -> None:
    """Put the payloads that were too large for their rows into the grants: no more than a batch may give."""
    ids = [grant.id for seat in seats for grant in seat.grants if grant.id in jobs and jobs[grant.id][_SPEC] is None]
    if not ids:
        return
    specs: dict[int, bytes] = dict(await tx.fetch("specs_of", tuple(ids)))
    for seat in seats:
        seat.grants[:] = [
            msgspec.structs.replace(grant, spec=msgspec.Raw(specs[grant.id])) if grant.id in specs else grant
            for grant in seat.grants
        ]


def _grant_of(row: Row, attempt: int, token: str, lease: tuple[float, float]) -> Grant:
    return Grant(
        id=row[0],
        attempt=attempt,
        lease_token=token,
        lease_s=lease[0],
        heartbeat_s=lease[1],
        jobset=row[14],
        owner=row[9],
        vo=row[15],
        priority=row[8],
        spec=msgspec.Raw(row[_SPEC] or b""),
    )
