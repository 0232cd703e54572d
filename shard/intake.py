"""Submit: a shard's part of a call becomes jobs, all of it or nothing.

One key of one owner is one range of ids per slot (invariant I2): a repeat finds its first answer in `submission`,
also while the first is still under way, for then the insert waits on the unique key and fails.
"""

import hashlib
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import msgspec

from culm import access
from culm.errors import ClientFault, Conflict, Unavailable
from culm.ids import slot_of
from culm.matching import Requirements
from culm.priorities import default_priority
from culm.settings import DispatchSettings
from culm.states import Event, State, next_state
from culm.wire import (
    MAX_PARENT_DEPTH,
    Happening,
    JobSpec,
    Principal,
    ShardKnown,
    ShardKnownAnswer,
    ShardSubmit,
    ShardSubmitAnswer,
    SlotJobs,
    SubmitWarning,
)
from shard.classes import ClassRegistry
from shard.database import Database, Row, Transaction, for_rows
from shard.driver import DuplicateKeyError
from shard.hints import ClassKey, Hint
from shard.id_blocks import IdBlocks
from shard.ownership import Ownership
from shard.shelf import INLINE_BYTES, Shelf
from shard.terms import Terms, with_defaults
from shard.transitions import add_to_tallies, lock_slots

_ENCODER: Final = msgspec.msgpack.Encoder()
_CANONICAL: Final = msgspec.msgpack.Encoder(order="deterministic")
_ROWS_PER_STATEMENT: Final = 500


@dataclass(frozen=True)
class _Wanted:
    """One job of a call, with what it does not say filled in by the policy."""

    spec: JobSpec
    needs: Requirements
    class_id: int
    offset: int
    max_priority: int
    """0: no bound."""


class _Numbered(NamedTuple):
    """A part of a call with its jobs, whose ids follow each other."""

    part: SlotJobs
    jobs: list[_Wanted]
    first_id: int


@dataclass(frozen=True)
class _NewJob:
    id: int
    spec: JobSpec
    body: bytes
    """The spec as it is stored."""
    needs: Requirements
    class_id: int
    event: Event
    state: State
    priority: int
    depth: int

    @property
    def key(self) -> ClassKey:
        return ClassKey(slot_of(self.id), self.class_id)

    @property
    def ready(self) -> bool:
        return self.state is State.ACTIVATED


class Intake:
    """The submit use case. `announce` is called with the hints of the new ready jobs, before the answer.

    `warn` says which jobs nobody can run, by slot and needs, counted in their order.
    """

    def __init__(
        self,
        database: Database,
        classes: ClassRegistry,
        ownership: Ownership,
        settings: DispatchSettings,
        terms: Terms,
        *,
        warn: Callable[[Iterable[tuple[int, Requirements]]], list[SubmitWarning]],
        shelf: Shelf,
        announce: Callable[[Sequence[Hint]], Awaitable[None]],
    ) -> None:
        self._database = database
        self._classes = classes
        self._ownership = ownership
        self._settings = settings
        self._terms = terms
        self._warn = warn
        self._shelf = shelf
        self._announce = announce
        self._ids = IdBlocks(database)

    async def submit(self, call: ShardSubmit) -> ShardSubmitAnswer:
        """Accept the jobs, or find them accepted.

        Raises:
            Moved: a slot is not open here.
            Conflict: key_reused, the key was used for other jobs.
            ClientFault: unknown_parent, too_deep.
            Unavailable: too_many_classes, key_in_use, or as Database.run.

        Safe to retry: yes, by the key.
        """
        await self._ownership.require([part.at for part in call.parts])
        found = await self._database.run("read", lambda tx: self._find(tx, call))
        # Once: the policy of one moment holds for the whole call, however often its transaction runs.
        wanted = [(part, _wanted(call.principal, part, self._terms)) for part in call.parts]
        fresh = [one for one in wanted if one[0].at.slot not in found]
        if fresh:
            self._require_room(call, fresh)
            found |= await self._store(call, fresh)
        return ShardSubmitAnswer(
            first_ids=[found[part.at.slot] for part in call.parts],
            warnings=self._warn((part.at.slot, job.needs) for part, jobs in wanted for job in jobs),
        )

    async def known(self, call: ShardKnown) -> ShardKnownAnswer:
        """In which slots a key has stored jobs. Raises Unavailable. Safe to retry: yes."""
        rows = await self._database.run("read", lambda tx: tx.fetch("find_submissions", call.account, call.key))
        stored = {row[0] for row in rows}
        return ShardKnownAnswer(slots=[slot for slot in call.slots if slot in stored])

    def _require_room(self, call: ShardSubmit, wanted: Sequence[tuple[SlotJobs, list[_Wanted]]]) -> None:
        """Before anything is stored; two submits at once may pass both, which the bounds can bear."""
        limits = (self._settings.max_classes, self._settings.max_classes_per_owner)
        for part, jobs in wanted:
            of_part = {job.class_id for job in jobs if _is_ready(job.spec)}
            self._classes.require_room(part.at.slot, call.principal.account, of_part, limits)

    async def _store(self, call: ShardSubmit, wanted: Sequence[tuple[SlotJobs, list[_Wanted]]]) -> dict[int, int]:
        """Make the jobs of these parts of a call; the first id by slot."""
        numbered = [_Numbered(part, jobs, await self._ids.take(part.at.slot, len(jobs))) for part, jobs in wanted]
        try:
            jobs = await self._database.run("write", lambda tx: self._insert(tx, call, numbered))
        except DuplicateKeyError:
            found = await self._database.run("read", lambda tx: self._find(tx, call))
            if any(part.at.slot not in found for part, _ in wanted):
                raise Unavailable("key_in_use", "another call with this key is under way; repeat this one") from None
            return found
        # Only now: of a transaction that was rolled back and run again nothing may be known.
        for job in jobs:
            if not self._classes.knows(job.key):
                self._classes.learn(*job.key, _ENCODER.encode(job.needs), call.principal.account)
        self._shelf.put_if_room([_on_shelf(call, job) for job in jobs if job.ready])
        await self._announce([Hint(-job.priority, job.id, job.key) for job in jobs if job.ready])
        return {one.part.at.slot: one.first_id for one in numbered}

    async def _find(self, tx: Transaction, call: ShardSubmit) -> dict[int, int]:
        """The first id by slot of the parts that are stored.

        The parts of one call are stored together, but slots move: a repeat may bring one that another shard missed.
        """
        rows = await tx.fetch("find_submissions", call.principal.account, call.key)
        digests = {row[0]: row[1] for row in rows}
        # Of the whole call, whichever slots it went to; of the part where either side is of before.
        if any(row[4] and call.call_digest not in (b"", row[4]) for row in rows) or any(
            digests.get(part.at.slot, b"") not in (b"", _digest(call, part)) for part in call.parts
        ):
            raise Conflict("key_reused", "this idempotency key was used for other jobs")
        wanted = {part.at.slot for part in call.parts}
        return {row[0]: row[2] for row in rows if row[0] in wanted}

    async def _insert(self, tx: Transaction, call: ShardSubmit, numbered: Sequence[_Numbered]) -> list[_NewJob]:
        await lock_slots(tx, [one.part.at for one in numbered])
        owner = call.principal.account
        depths = _child_depths(call)
        serial = int((await tx.fetch("owner_active_jobs", owner))[0][0])
        submissions, made = [], list[_NewJob]()
        for part, wanted, first_id in numbered:
            slot = part.at.slot
            jobs = [
                _new_job(call.principal, one, first_id + index, serial + index, depths)
                for index, one in enumerate(wanted)
            ]
            serial += len(jobs)
            await self._insert_classes(tx, slot, jobs)
            await _insert_jobs(tx, call, slot, jobs)
            digests = (_digest(call, part), call.call_digest or None)
            submissions.append((slot, owner, call.key, digests[0], first_id, len(jobs), digests[1]))
            made += jobs
        tx.happened += [
            Happening(
                id=job.id,
                slot=job.key.slot,
                state=job.state,
                event=job.event,
                attempt=0,
                owner=owner,
                vo=call.principal.vo,
            )
            for job in made
        ]
        await tx.execute_rows("insert_submissions", sorted(submissions, key=lambda row: row[0]))
        await add_to_tallies(
            tx, Counter((job.key.slot, job.state, call.principal.vo) for job in made), Counter({owner: len(made)})
        )
        return made

    async def _insert_classes(self, tx: Transaction, slot: int, jobs: Sequence[_NewJob]) -> None:
        fresh = {job.class_id: job.needs for job in jobs if not self._classes.knows(job.key)}
        await tx.execute_rows(
            "insert_classes", [(slot, class_id, _ENCODER.encode(needs)) for class_id, needs in sorted(fresh.items())]
        )


def _wanted(principal: Principal, part: SlotJobs, terms: Terms) -> list[_Wanted]:
    """The jobs of a part, in its order. What many of them need is hashed once."""
    class_ids: dict[Requirements, int] = {}
    found = []
    for index, given in enumerate(part.specs):
        policy = terms.of(part.at.slot, principal.vo, given.queue)
        spec = with_defaults(given, policy)
        needs = _needs(principal, spec)
        class_id = class_ids.get(needs)
        if class_id is None:
            class_id = class_ids[needs] = needs.class_id()
        offset = part.offsets[index] if part.offsets else 0
        found.append(_Wanted(spec, needs, class_id, offset, policy.max_priority))
    return found


def _new_job(principal: Principal, wanted: _Wanted, identifier: int, serial: int, depths: dict[int, int]) -> _NewJob:
    spec, needs = wanted.spec, wanted.needs
    event = Event.SUBMIT_READY if _is_ready(spec) else Event.SUBMIT
    priority = default_priority(spec.label, serial=serial, offset=wanted.offset)
    if spec.priority is not None:
        # A user's own may order his jobs among each other, and only below what the formula gives him.
        priority = spec.priority if access.is_production(principal) else min(spec.priority, priority)
    if wanted.max_priority:
        priority = min(priority, wanted.max_priority)
    depth = 0 if spec.parent_id is None else depths[spec.parent_id]
    state = next_state(None, event)
    return _NewJob(identifier, spec, _ENCODER.encode(spec), needs, wanted.class_id, event, state, priority, depth)


def _needs(principal: Principal, spec: JobSpec) -> Requirements:
    return Requirements(
        label=spec.label,
        vo=principal.vo,
        cores=spec.cores or 1,
        memory_mb=spec.memory_mb,
        disk_mb=spec.disk_mb,
        walltime_s=spec.walltime_s,
        release=spec.release,
        platform=spec.platform,
        pilot_type=spec.pilot_type,
        queue=spec.queue,
    )


def _is_ready(spec: JobSpec) -> bool:
    return all(file.ready for file in spec.inputs)


async def _insert_jobs(tx: Transaction, call: ShardSubmit, slot: int, jobs: Sequence[_NewJob]) -> None:
    who = call.principal
    for start in range(0, len(jobs), _ROWS_PER_STATEMENT):
        some = jobs[start : start + _ROWS_PER_STATEMENT]
        rows = [
            (
                *(job.id, slot, job.class_id, job.state, job.spec.max_attempts, job.priority, call.jobset),
                *(job.spec.parent_id, job.depth, who.account, who.vo, job.spec.working_group, job.spec.label),
                *(job.spec.name, job.spec.queue),
            )
            for job in some
        ]
        ready = [(job.id, slot, job.class_id, -job.priority) for job in some if job.ready]
        await tx.together(
            [
                for_rows("insert_specs", [(job.id, job.body) for job in some]),
                for_rows("insert_jobs", rows),
                for_rows(
                    "insert_events", [(job.id, 1, job.event, None, job.state, 0, who.account, "") for job in some]
                ),
                *([for_rows("insert_ready", ready)] if ready else []),
            ]
        )


def _on_shelf(call: ShardSubmit, job: _NewJob) -> Row:
    """The job as `read_claimed` would read it."""
    who = call.principal
    return (
        *(job.id, slot_of(job.id), job.class_id, job.state, 1, 0, 0, job.spec.max_attempts, job.priority),
        *(who.account, 0, job.spec.queue, "", "", call.jobset, who.vo),
        *(job.body if len(job.body) <= INLINE_BYTES else None, len(job.body)),
    )


def _child_depths(call: ShardSubmit) -> dict[int, int]:
    """The depth of each parent's children; the router asked the parents' shards."""
    depths = {}
    for parent in {spec.parent_id for part in call.parts for spec in part.specs if spec.parent_id is not None}:
        if parent not in call.parent_depths:
            raise ClientFault("unknown_parent", f"job {parent} is not known", http_status=404)
        depths[parent] = call.parent_depths[parent] + 1
        if depths[parent] > MAX_PARENT_DEPTH:
            raise ClientFault("too_deep", f"job {parent} is {MAX_PARENT_DEPTH} jobs deep already")
    return depths


def _digest(call: ShardSubmit, part: SlotJobs) -> bytes:
    return hashlib.blake2b(_CANONICAL.encode((call.jobset, part.specs)), digest_size=16).digest()
