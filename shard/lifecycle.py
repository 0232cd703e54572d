"""What happens to a job after it was granted, or instead: heartbeat, report, cancel, release.

Every write by a pilot names attempt and lease token; what does not match the lease gets 409 and changes nothing
(invariants I4, I5). A repeated final report is answered from `report`, as the first was; a repeated event of the
data side gets the present state, if the job's history has it.
"""

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any, Final, TypedDict

import msgspec

from culm import access
from culm.errors import ClientFault, Conflict, CulmError
from culm.ids import slot_of
from culm.states import FINAL, LEASED, PILOT_EVENTS, TRANSITIONS, UNREADY, Event, State, next_state
from culm.topology import authority_of_slot
from culm.wire import (
    CancelAnswer,
    CancelledJob,
    CancelOutcome,
    HeartbeatAnswer,
    JobError,
    Principal,
    ReportAnswer,
    ReportRequest,
    ShardCancel,
    ShardHeartbeat,
    ShardReport,
    SlotRef,
)
from shard.archive import find_archived, find_archived_rows
from shard.database import Database, Row, Transaction
from shard.hints import Hint, Notices
from shard.metrics import HUNG_UP_JOBS
from shard.ownership import Ownership
from shard.terms import Terms, silence_s
from shard.transitions import Change, Job, Lease, Locked, apply, lock_jobs, lock_slots, lost

HEARTBEAT_STATES: Final = LEASED - {State.SENT}
DATA_EVENTS: Final = frozenset(
    {
        Event.INPUTS_MISSING,
        Event.ASSIGN,
        Event.INPUTS_READY,
        Event.MOVE_OUTPUTS,
        Event.MERGE,
        Event.FINISH,
        Event.FAIL,
    }
)
"""What the data side may say; it ends only jobs that no worker runs."""
AFTER_WORKER: Final = frozenset({State.HOLDING, State.TRANSFERRING, State.MERGING})
_DATA_MAY_END: Final = UNREADY | AFTER_WORKER
REPORTED: Final = frozenset(PILOT_EVENTS) - {State.STARTING, State.RUNNING}
"""What a pilot reports; that it is at work it says by heartbeats."""
HUNG_UP: Final = "the client was gone"
"""Begins the detail of a release that no pilot asked for."""
_IDS_PER_TRANSACTION: Final = 200
_ENDED_PER_CALL: Final = 10_000
_ENDING_S: Final = 3.0
"""Of a jobset in one call: the answer fits into a frame and comes before the router gives up."""
GIVEN_BACK: Final = 1
"""Our own code: PanDA has none for it."""
_CANCELLED: Final[CancelOutcome] = "cancelled"
ENCODER: Final = msgspec.msgpack.Encoder()
_DECODER: Final = msgspec.msgpack.Decoder(ReportRequest)


class _OfJob(TypedDict):
    """What decides who may do something with a job."""

    vo: str
    owner: str
    authority: str


class Lifecycle:
    """The use cases of a job's life after its submit."""

    def __init__(
        self, database: Database, ownership: Ownership, notices: Notices, terms: Terms, max_releases: int
    ) -> None:
        self._database = database
        self._ownership = ownership
        self._notices = notices
        self._terms = terms
        self._max_releases = max_releases

    async def heartbeat(self, call: ShardHeartbeat) -> HeartbeatAnswer:
        """Extend the lease; move the state on if the pilot is further.

        Raises:
            Conflict: lease_lost, this attempt or token holds no lease: end the payload.
            ClientFault: bad_state, forbidden.
            Moved, Unavailable: as Database.run.

        Safe to retry: yes.
        """
        if call.request.state not in HEARTBEAT_STATES:
            raise ClientFault("bad_state", f"a heartbeat cannot say {call.request.state}")
        await self._ownership.require([call.at])
        return await self._database.run("write", lambda tx: self._heartbeat(tx, call))

    async def report(self, call: ShardReport) -> ReportAnswer:
        """Store what became of a job.

        Raises:
            Conflict: lease_lost (a stale attempt too), bad_transition.
            ClientFault: unknown_job, bad_report, forbidden.
            Moved, Unavailable: as Database.run.

        Safe to retry: yes; the repeat of an accepted report gets its answer.
        """
        _check_report(call)
        await self._ownership.require([call.at])
        answer, hints = await self._database.run("write", lambda tx: self._report(tx, call))
        await self._notices.announce(hints)
        return answer

    async def cancel(self, call: ShardCancel) -> CancelAnswer:
        """End jobs: at once where no worker runs them, else by telling their pilots. Safe to retry: yes.

        Raises Moved, Unavailable.
        """
        await self._ownership.require(call.slots)
        if call.jobset is None:
            ended = await self._cancel_ids(call.principal, call.ids)
            return CancelAnswer(jobs=ended)
        # What a moved slot left behind here is not ours to end.
        slots = tuple(ref.slot for ref in call.slots) or tuple(self._ownership.open)
        loop = asyncio.get_running_loop()
        until = loop.time() + _ENDING_S
        ended, after = list[CancelledJob](), call.after
        while True:
            rows = await self._database.run("read", partial(_of_jobset, at=(call.jobset, after, slots)))
            if not rows:
                return CancelAnswer(jobs=ended)
            after = rows[-1][0]
            told, ids = _sorted_out(call.principal, rows)
            ended += told + await self._cancel_ids(call.principal, ids)
            if len(ended) >= _ENDED_PER_CALL or loop.time() > until:
                return CancelAnswer(jobs=ended, next=after)

    async def release_request(self, subject: str, request_id: str) -> int:
        """Give back the jobs that this get_job was granted, unless a sign of life came; how many.

        Raises Moved, Unavailable. Safe to retry: yes.
        """
        hints = await self._database.run("write", lambda tx: self._release(tx, subject, request_id))
        await self._notices.announce(hints)
        return len(hints)

    def lease_s(self, state: State, job: Job, lease: Lease) -> float:
        """How long a job may be silent in the state that it has now, seconds."""
        return silence_s(state, self._terms.of(job.slot, job.vo, job.queue), (lease.first_s, lease.heartbeat_s))

    async def _heartbeat(self, tx: Transaction, call: ShardHeartbeat) -> HeartbeatAnswer:
        await lock_slots(tx, [call.at])
        request = call.request
        locked = await lock_jobs(tx, [request.id])
        if request.id not in locked.jobs:
            raise await _late(tx, call.principal, request.id, request.attempt)
        job, lease = _leased_to(locked, call.principal, request.id, (request.attempt, request.lease_token))
        state = job.state
        event = PILOT_EVENTS[request.state]
        # A heartbeat that was overtaken by a later one says nothing new: the state never goes back.
        if (state, event) in TRANSITIONS:
            state = next_state(state, event)
            await apply(tx, [Change(job=job, event=event, actor=call.principal.account)])
        lease_s = self.lease_s(state, job, lease)
        await tx.execute("extend_lease", lease_s, job.id)
        command = "cancel" if job.cancel_requested else None
        return HeartbeatAnswer(state=state, lease_s=lease_s, heartbeat_s=lease.heartbeat_s, command=command)

    async def _report(self, tx: Transaction, call: ShardReport) -> tuple[ReportAnswer, list[Hint]]:
        await lock_slots(tx, [call.at])
        if call.request.event is not None:
            return await self._report_of_data(tx, call)
        request = call.request
        locked = await lock_jobs(tx, [request.id])
        # After the lock: of equal reports at once, all but the first find what the first has left.
        first = await _first_answer(tx, request)
        if first is not None:
            return first, []
        if request.id not in locked.jobs:
            raise await _late(tx, call.principal, request.id, request.attempt)
        job, lease = _leased_to(locked, call.principal, request.id, (request.attempt, request.lease_token))
        event = PILOT_EVENTS[request.state or State.SENT]
        if event is Event.RELEASE and job.cancel_requested:
            event = Event.CANCEL
        said = request.state
        if said in AFTER_WORKER and (said == job.state or await _was_said(tx, job, event)):
            return ReportAnswer(id=job.id, attempt=job.attempt, state=said), []
        return await self._make_reported(tx, call, job, (event, lease))

    async def _report_of_data(self, tx: Transaction, call: ShardReport) -> tuple[ReportAnswer, list[Hint]]:
        request, event = call.request, call.request.event
        assert event is not None
        locked = await lock_jobs(tx, [request.id])
        job = locked.jobs.get(request.id)
        if job is None:
            return await _late_data(tx, call, event), []
        if not access.may_speak_for_data(call.principal, **_of(job)):
            raise access.forbidden("only the data side (role production) of the job's VO may say this")
        if await _is_repeat(tx, job, event):
            return ReportAnswer(id=job.id, attempt=job.attempt, state=job.state), []
        if event in (Event.FINISH, Event.FAIL) and job.state not in _DATA_MAY_END:
            raise Conflict("bad_transition", f"{event} is not the data side's to say for a job that is {job.state}")
        return await self._make_reported(tx, call, job, (event, locked.leases.get(job.id)))

    async def _make_reported(
        self, tx: Transaction, call: ShardReport, job: Job, what: tuple[Event, Lease | None]
    ) -> tuple[ReportAnswer, list[Hint]]:
        """Make the transition, keep the report if it ends the attempt, else renew the lease."""
        event, lease = what
        n_hung_up = 0
        if event is Event.RELEASE and not self.is_free(job):
            n_hung_up = int((await tx.fetch("count_events_of", job.id, event, f"{HUNG_UP}%"))[0][0])
        change, request = self.reported(call, job, event, n_hung_up)
        state = change.target
        hints = await apply(tx, [change])
        if state not in LEASED and lease is not None:
            await tx.execute("insert_report", job.id, job.attempt, lease.token, state, ENCODER.encode(request))
        elif lease is not None:
            await tx.execute("extend_lease", self.lease_s(state, job, lease), job.id)
        return ReportAnswer(id=job.id, attempt=job.attempt, state=state), hints

    def is_free(self, job: Job) -> bool:
        """Whether it may be given back for nothing, whatever it was given back for before."""
        return job.attempt - 1 - job.lost < self._max_releases

    def reported(self, call: ShardReport, job: Job, event: Event, n_hung_up: int = 0) -> tuple[Change, ReportRequest]:
        """The transition that a report makes, and what is kept of it; so often its client was gone, if it is not free.

        Raises Conflict(bad_transition).
        """
        request, actor = call.request, call.principal.account
        detail = request.error.text if request.error else ""
        if event is Event.RELEASE:
            if job.state in AFTER_WORKER:
                raise Conflict("bad_transition", f"job {job.id} is {job.state}: its work was done")
            change = (
                lost(job, actor, request.error) if request.error else self._given_back(job, actor, detail, n_hung_up)
            )
            # A job may be given back often: its story is in the events.
            return change, msgspec.structs.replace(request, stdout_tail="", stderr_tail="")
        return Change(job=job, event=event, actor=actor, detail=detail, error=request.error), request

    async def _cancel_ids(self, principal: Principal, ids: Sequence[int]) -> list[CancelledJob]:
        ended: list[CancelledJob] = []
        for start in range(0, len(ids), _IDS_PER_TRANSACTION):
            some = list(dict.fromkeys(ids[start : start + _IDS_PER_TRANSACTION]))
            outcomes, gone = await self._database.run("write", partial(self._cancel, principal=principal, ids=some))
            await self._notices.withdraw(gone)
            ended += outcomes
        return ended

    async def _cancel(
        self, tx: Transaction, principal: Principal, ids: Sequence[int]
    ) -> tuple[list[CancelledJob], list[Hint]]:
        """The outcome of each, and the hints of those that were ready."""
        await lock_slots(tx, self._slots_of(ids))
        locked = await lock_jobs(tx, ids)
        missing = [identifier for identifier in ids if identifier not in locked.jobs]
        archived = await find_archived_rows(tx, missing)
        known = locked.jobs | {identifier: _archived_job(row) for identifier, row in archived.items()}
        outcomes = {identifier: _cancel_outcome(principal, known.get(identifier)) for identifier in ids}
        requested = tuple(i for i, outcome in outcomes.items() if outcome == "requested")
        if requested:
            await tx.execute("request_cancel", requested)
        ended = [locked.jobs[i] for i, outcome in outcomes.items() if outcome == _CANCELLED]
        await apply(tx, [Change(job=job, event=Event.CANCEL, actor=principal.account) for job in ended])
        told = [
            CancelledJob(id=i, outcome=outcome, state=_state_after(outcome, known.get(i)))
            for i, outcome in outcomes.items()
        ]
        return told, [job.hint for job in ended if job.state is State.ACTIVATED]

    async def _release(self, tx: Transaction, subject: str, request_id: str) -> list[Hint]:
        ids = [row[0] for row in await tx.fetch("leases_of_request", request_id, subject)]
        if not ids:
            return []
        await lock_slots(tx, self._slots_of(ids))
        locked = await lock_jobs(tx, ids)
        # Again, now locked: a job may have ended, and be another request's since.
        still = {row[0] for row in await tx.fetch("leases_of_request", request_id, subject)}
        # No pilot has seen it: that costs nothing, however often it happens.
        detail = f"{HUNG_UP}: request {request_id}"
        changes = [
            Change(job=job, event=Event.CANCEL if job.cancel_requested else Event.RELEASE, actor=subject, detail=detail)
            for job in locked.jobs.values()
            if job.state is State.SENT and job.id in still
        ]
        HUNG_UP_JOBS.inc(len(changes))
        return await apply(tx, changes)

    def _given_back(self, job: Job, actor: str, detail: str, n_hung_up: int) -> Change:
        """Free, but not for ever: a job that every pilot gives back would go round for good."""
        n_before = job.attempt - 1 - job.lost - n_hung_up
        if n_before >= self._max_releases:
            return lost(job, actor, JobError(plane="culm", code=GIVEN_BACK, text=f"given back {n_before + 1} times"))
        return Change(job=job, event=Event.RELEASE, actor=actor, detail=detail)

    def _slots_of(self, ids: Sequence[int]) -> list[SlotRef]:
        """The slots of jobs at the epochs that we know; the lock checks them."""
        return [SlotRef(slot, self._ownership.open.get(slot, 0)) for slot in {slot_of(i) for i in ids}]


def _leased_to(locked: Locked, principal: Principal, identifier: int, held: tuple[int, str]) -> tuple[Job, Lease]:
    """The job and its lease, if this (attempt, token) holds it."""
    job, lease = locked.jobs.get(identifier), locked.leases.get(identifier)
    if job is None:
        raise _unknown(identifier)
    if not access.allows_queue(principal, job.queue, authority_of_slot(job.slot)):
        raise access.forbidden(f"the token is not scoped for the computing queue {job.queue}")
    if lease is None or (lease.attempt, lease.token) != held:
        raise _lease_lost(job, held[0])
    return job, lease


def holds(job: Job, lease: Lease, call: ShardHeartbeat | ShardReport) -> bool:
    """Whether this pilot's attempt and token are the lease's, and the computing queue one of his."""
    return (lease.attempt, lease.token) == (call.request.attempt, call.request.lease_token) and access.allows_queue(
        call.principal, job.queue, authority_of_slot(job.slot)
    )


async def _is_repeat(tx: Transaction, job: Job, event: Event) -> bool:
    """Whether an event of the data side is known: the job is where it leads, or has been there.

    No event of the data side happens twice in the life of a job, so what stands in the history was said before.
    """
    if _leads_to(event, job.state):
        return True
    return (job.state, event) not in TRANSITIONS and bool(await tx.fetch("find_event", job.id, event))


async def _was_said(tx: Transaction, job: Job, event: Event) -> bool:
    """Whether this attempt has said so before, and the data side has gone on since."""
    return (job.state, event) not in TRANSITIONS and bool(
        await tx.fetch("find_event_of_attempt", job.id, event, job.attempt)
    )


async def _first_answer(tx: Transaction, request: ReportRequest) -> ReportAnswer | None:
    rows: Sequence[Sequence[Any]] = await tx.fetch("find_report", request.id, request.attempt)
    if not rows:
        archived = (await find_archived(tx, [request.id])).get(request.id)
        reports = archived.reports if archived is not None else []
        rows = [(one[4], one[2], one[3]) for one in reports if one[0] == request.attempt]
    if not rows:
        return None
    token, state, body = rows[0]
    if token != request.lease_token:
        raise Conflict("lease_lost", f"attempt {request.attempt} of job {request.id} was reported by its holder")
    if request.state is not State.ACTIVATED and _DECODER.decode(body).state is State.ACTIVATED:
        raise Conflict("lease_lost", f"attempt {request.attempt} of job {request.id} was given back")
    return ReportAnswer(id=request.id, attempt=request.attempt, state=State(state))


async def _late(tx: Transaction, principal: Principal, identifier: int, attempt: int) -> CulmError:
    """What a pilot is told that speaks of a job which is not in the hot tables: as if it still were."""
    row = (await find_archived_rows(tx, [identifier])).get(identifier)
    if row is None:
        return _unknown(identifier)
    job = _archived_job(row)
    if not access.allows_queue(principal, job.queue, authority_of_slot(job.slot)):
        return access.forbidden(f"the token is not scoped for the computing queue {job.queue}")
    return _lease_lost(job, attempt)


async def _late_data(tx: Transaction, call: ShardReport, event: Event) -> ReportAnswer:
    """The data side speaks of an archived job: a repeat gets its state, else it raises as for a hot one."""
    identifier = call.request.id
    archived = (await find_archived(tx, [identifier])).get(identifier)
    if archived is None:
        raise _unknown(identifier)
    job = _archived_job(archived.row)
    if not access.may_speak_for_data(call.principal, **_of(job)):
        raise access.forbidden("only the data side (role production) of the job's VO may say this")
    if event in {one[2] for one in archived.events} or _leads_to(event, job.state):
        return ReportAnswer(id=job.id, attempt=job.attempt, state=job.state)
    raise Conflict("bad_transition", f"{event} is not possible for a job that is {job.state}")


def _archived_job(row: Sequence[Any]) -> Job:
    """The part that decides who may do what; it is final, so nothing of it can change."""
    return Job(
        id=row[0],
        slot=row[1],
        class_id=0,
        state=State(row[2]),
        version=0,
        attempt=row[10],
        lost=row[22],
        max_attempts=row[11],
        priority=row[9],
        owner=row[5],
        cancel_requested=bool(row[18]),
        queue=row[3],
        pilot=row[16],
        host=row[17],
        vo=row[6],
        working_group=row[7],
    )


def _lease_lost(job: Job, attempt: int) -> Conflict:
    return Conflict(
        "lease_lost",
        f"attempt {attempt} of job {job.id} holds no lease",
        details={"state": job.state, "attempt": job.attempt},
    )


def _leads_to(event: Event, state: State) -> bool:
    return any(target is state and e is event for (_, e), target in TRANSITIONS.items())


def _check_report(call: ShardReport) -> None:
    request = call.request
    if (request.state is None) == (request.event is None):
        raise ClientFault("bad_report", "a report says either a state (pilot) or an event (data side)")
    if request.event is not None and request.event not in DATA_EVENTS:
        raise ClientFault("bad_report", f"{request.event} is not an event of the data side")
    if request.state is not None and request.state not in REPORTED:
        raise ClientFault("bad_report", f"{request.state} is said by a heartbeat, not by a report")
    if request.state is not None and not request.lease_token:
        raise ClientFault("bad_report", "the lease token is missing")


async def _of_jobset(tx: Transaction, at: tuple[int, int, tuple[int, ...]]) -> list[Row]:
    jobset, after, slots = at
    return await tx.fetch("jobs_of_jobset", jobset, after, slots, _IDS_PER_TRANSACTION)


def _sorted_out(principal: Principal, rows: Sequence[Row]) -> tuple[list[CancelledJob], list[int]]:
    """The outcomes that need no lock, and the jobs that do. Of what the caller may not see nothing is said."""
    told: list[CancelledJob] = []
    ids: list[int] = []
    for identifier, slot, state, owner, vo, working_group in rows:
        of_job: _OfJob = {"vo": vo, "owner": owner, "authority": authority_of_slot(slot)}
        if not access.may_end(principal, working_group=working_group, **of_job):
            if access.may_read(principal, **of_job):
                told.append(CancelledJob(id=identifier, outcome="forbidden"))
        elif State(state) in FINAL:
            # Final for good: it needs no lock to say so.
            told.append(CancelledJob(id=identifier, outcome="already_final", state=State(state)))
        else:
            ids.append(identifier)
    return told, ids


def _cancel_outcome(principal: Principal, job: Job | None) -> CancelOutcome:
    if job is None:
        return "not_found"
    if not access.may_end(principal, working_group=job.working_group, **_of(job)):
        return "forbidden"
    if job.state in FINAL:
        return "already_final"
    # Where a worker runs it, the pilot is told at its next heartbeat; else nobody needs to be asked.
    return "requested" if job.state in LEASED - AFTER_WORKER else "cancelled"


def _of(job: Job) -> _OfJob:
    return {"vo": job.vo, "owner": job.owner, "authority": authority_of_slot(job.slot)}


def _state_after(outcome: CancelOutcome, job: Job | None) -> State | None:
    if job is None or outcome == "forbidden":
        return None
    return State.CANCELLED if outcome == _CANCELLED else job.state


def _unknown(identifier: int) -> ClientFault:
    return ClientFault("unknown_job", f"job {identifier} is not known", http_status=404)
