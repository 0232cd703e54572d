"""Signs of life: heartbeats and reports of pilots, many in one transaction.

As with claims, what arrived while the last commits were in flight is the next batch. A batch takes what is plain: a
lease that is the caller's, a transition that is possible. Whatever else there is to say (a stale attempt, a repeated
report, a slot that has moved) is said by `shard.lifecycle`, in a transaction of its own, so that no caller can spoil
another's. Invariants I4 and I5 are kept by the same locks and rules as there.
"""

import asyncio
import contextlib
import itertools
import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from culm.errors import CulmError, Unavailable
from culm.states import LEASED, PILOT_EVENTS, TRANSITIONS, Event, State
from culm.telemetry import SHED
from culm.wire import HeartbeatAnswer, ReportAnswer, ShardHeartbeat, ShardReport
from shard.database import Database, Step, Transaction, for_rows
from shard.driver import DuplicateKeyError
from shard.hints import Hint, Notices
from shard.lifecycle import AFTER_WORKER, ENCODER, HEARTBEAT_STATES, REPORTED, Lifecycle, holds
from shard.metrics import SIGN_BATCHES, SIGNS_PENDING
from shard.ownership import Ownership
from shard.transitions import Change, Job, Lease, job_of, note, writes
from shard.turns import Turns

N_WORKERS: Final = 2
MAX_BATCH: Final = 128
MAX_PENDING: Final = 20_000
MAX_PER_JOB: Final = 16
"""Words about one job that wait for the one before: a pilot has one under way, a second after a lost answer."""
STOP_S: Final = 10.0

_FULL: Final = SHED.labels("signs")

log = logging.getLogger("shard.signs")

Call = ShardHeartbeat | ShardReport
Answer = HeartbeatAnswer | ReportAnswer


@dataclass(eq=False, slots=True)
class _Sign:
    call: Call
    answer: "asyncio.Future[Answer]"


@dataclass
class _Plan:
    """What a batch comes to: the answers of those that were plain, and what makes them true."""

    answers: dict[_Sign, Answer]
    changes: list[Change]
    extended: dict[float, list[int]]
    """Jobs by the seconds that their leases have from now on."""
    reports: list[tuple[object, ...]]


class Signs:
    """The batches of one shard process."""

    def __init__(self, database: Database, ownership: Ownership, lifecycle: Lifecycle, notices: Notices) -> None:
        self._database = database
        self._ownership = ownership
        self._lifecycle = lifecycle
        self._notices = notices
        self._pending: deque[_Sign] = deque()
        self._turns = Turns(lambda: len(self._pending))
        self._workers: list[asyncio.Task[None]] = []
        self._singles: set[asyncio.Task[None]] = set()
        self._behind: dict[int, deque[_Sign]] = {}
        """By job about which a word is pending or being said, those that wait for its end: words keep their order."""
        self._n_behind = 0
        self._stopping = False

    def start(self) -> None:
        """Start the workers."""
        loop = asyncio.get_running_loop()
        self._workers = [loop.create_task(self._work(), name=f"signs-{n}") for n in range(N_WORKERS)]

    async def stop(self) -> None:
        """Answer what has been begun, then stop."""
        self._stopping = True
        self._turns.over()
        if self._workers:
            _, late = await asyncio.wait(self._workers, timeout=STOP_S)
            for worker in late:
                worker.cancel()
        await asyncio.gather(*self._workers, *self._singles, return_exceptions=True)
        for sign in itertools.chain(self._pending, *self._behind.values()):
            _refuse(sign, Unavailable("stopping", "the shard is stopping"))

    def begin(self, call: Call) -> "asyncio.Future[Answer] | None":
        """Take on a heartbeat or a pilot's report; None for what is not plain at first sight.

        A report is done even if the future is cancelled: the pilot has said it.
        Raises Unavailable(overloaded, stopping).
        """
        request = call.request
        if isinstance(call, ShardHeartbeat):
            plain = request.state in HEARTBEAT_STATES
        else:
            plain = call.request.event is None and request.state in REPORTED and bool(request.lease_token)
        if not plain or not self._workers or not self._ownership.holds([call.at]):
            return None
        if self._stopping:
            raise Unavailable("stopping", "the shard is stopping")
        if len(self._pending) + self._n_behind >= MAX_PENDING:
            _FULL.inc()
            raise Unavailable("overloaded", "too many heartbeats and reports are waiting")
        sign = _Sign(call, asyncio.get_running_loop().create_future())
        behind = self._behind.get(request.id)
        if behind is None:
            self._behind[request.id] = deque()
            self._pending.append(sign)
            self._turns.look()
        elif len(behind) >= MAX_PER_JOB:
            _FULL.inc()
            raise Unavailable("overloaded", f"too many heartbeats and reports of job {request.id} are waiting")
        else:
            behind.append(sign)
            self._n_behind += 1
        return sign.answer

    async def _work(self) -> None:
        while not self._stopping or self._pending:
            await self._turns.wait()
            batch = self._next_batch()
            if batch:
                with self._turns.batch(len(batch)):
                    await self._serve(batch)

    def _next_batch(self) -> list[_Sign]:
        """Words about different jobs, for of each at most one is pending. Who sent a heartbeat and went is left out."""
        batch: list[_Sign] = []
        while self._pending and len(batch) < MAX_BATCH:
            sign = self._pending.popleft()
            if sign.answer.cancelled() and isinstance(sign.call, ShardHeartbeat):
                self._said(sign)
            else:
                batch.append(sign)
        SIGNS_PENDING.set(len(self._pending) + self._n_behind)
        return batch

    async def _serve(self, batch: list[_Sign]) -> None:
        """One transaction for all that is plain; a failure is answered to each, and never ends the worker."""
        answers: dict[_Sign, Answer] = {}
        try:
            answers, hints = await self._database.run("write", partial(self._apply, batch=batch))
            SIGN_BATCHES.inc()
            await self._notices.announce(hints)
        except (CulmError, DuplicateKeyError) as error:
            # Each for itself finds out whose fault it is, and the others are none the worse for it.
            log.debug("a batch of %d signs: %s", len(batch), error)
        except Exception:  # the worker must outlive every fault
            log.exception("a batch of signs failed")
        for sign in batch:
            answer = answers.get(sign)
            if answer is not None:
                self._said(sign)
            if answer is None:
                task = asyncio.get_running_loop().create_task(self._alone(sign))
                self._singles.add(task)
                task.add_done_callback(self._singles.discard)
            elif not sign.answer.done():
                sign.answer.set_result(answer)

    async def _alone(self, sign: _Sign) -> None:
        call = sign.call
        try:
            answer: Answer
            if isinstance(call, ShardHeartbeat):
                answer = await self._lifecycle.heartbeat(call)
            else:
                answer = await self._lifecycle.report(call)
        except CulmError as error:
            _refuse(sign, error)
        except Exception as error:  # as in _serve
            log.exception("a sign of job %d failed", call.request.id)
            _refuse(sign, Unavailable("sign_failed", f"it failed: {type(error).__name__}"))
        else:
            if not sign.answer.done():
                sign.answer.set_result(answer)
        finally:
            self._said(sign)

    def _said(self, sign: _Sign) -> None:
        """The next word about its job has its turn."""
        behind = self._behind[sign.call.request.id]
        if behind:
            self._n_behind -= 1
            self._pending.append(behind.popleft())
        else:
            del self._behind[sign.call.request.id]
        self._turns.look()

    async def _apply(self, tx: Transaction, batch: Sequence[_Sign]) -> tuple[dict[_Sign, Answer], list[Hint]]:
        ids = tuple(sorted(sign.call.request.id for sign in batch))
        slots = tuple({sign.call.at.slot for sign in batch})
        opened, leases, jobs = await tx.together(
            [
                Step("lock_open_slots", [slots]),
                Step("lock_leases_of_jobs", [ids]),
                Step("lock_jobs", [ids]),
            ]
        )
        plan = self._plan(
            batch,
            {row[0]: row[1] for row in opened},
            {row[0]: Lease(*row) for row in leases},
            {row[0]: job_of(row) for row in jobs},
        )
        steps = writes(plan.changes, tx.writer) if plan.changes else []
        for lease_s, some in sorted(plan.extended.items()):
            steps.append(Step("extend_leases", [lease_s, tuple(sorted(some))], must_find=len(some)))
        if plan.reports:
            steps.append(for_rows("insert_reports", plan.reports))
        await tx.together(steps)
        note(tx, plan.changes)
        return plan.answers, [change.job.hint for change in plan.changes if change.target is State.ACTIVATED]

    def _plan(
        self, batch: Sequence[_Sign], opened: dict[int, int], leases: dict[int, Lease], jobs: dict[int, Job]
    ) -> _Plan:
        plan = _Plan({}, [], {}, [])
        for sign in batch:
            call = sign.call
            job, lease = jobs.get(call.request.id), leases.get(call.request.id)
            plain = job is not None and lease is not None and opened.get(call.at.slot) == call.at.epoch
            if not plain or job is None or lease is None or not holds(job, lease, call):
                continue
            # What cannot be is for the lifecycle to refuse.
            with contextlib.suppress(CulmError):
                if isinstance(call, ShardHeartbeat):
                    self._plan_heartbeat(plan, sign, job, lease)
                else:
                    self._plan_report(plan, sign, job, lease)
        return plan

    def _plan_heartbeat(self, plan: _Plan, sign: _Sign, job: Job, lease: Lease) -> None:
        call: Any = sign.call
        state, event = job.state, PILOT_EVENTS[call.request.state]
        if (state, event) in TRANSITIONS:
            change = Change(job=job, event=event, actor=call.principal.account)
            plan.changes.append(change)
            state = change.target
        lease_s = self._lifecycle.lease_s(state, job, lease)
        plan.extended.setdefault(lease_s, []).append(job.id)
        command = "cancel" if job.cancel_requested else None
        plan.answers[sign] = HeartbeatAnswer(
            state=state, lease_s=lease_s, heartbeat_s=lease.heartbeat_s, command=command
        )

    def _plan_report(self, plan: _Plan, sign: _Sign, job: Job, lease: Lease) -> None:
        call: Any = sign.call
        if call.request.state == job.state and job.state in AFTER_WORKER:
            plan.answers[sign] = ReportAnswer(id=job.id, attempt=job.attempt, state=job.state)
            return
        event = PILOT_EVENTS[call.request.state]
        if event is Event.RELEASE and job.cancel_requested:
            event = Event.CANCEL
        if event is Event.RELEASE and not self._lifecycle.is_free(job):
            return
        change, request = self._lifecycle.reported(call, job, event)
        plan.changes.append(change)
        if change.target not in LEASED:
            plan.reports.append((job.id, job.attempt, lease.token, change.target, ENCODER.encode(request)))
        else:
            plan.extended.setdefault(self._lifecycle.lease_s(change.target, job, lease), []).append(job.id)
        plan.answers[sign] = ReportAnswer(id=job.id, attempt=job.attempt, state=change.target)


def _refuse(sign: _Sign, error: CulmError) -> None:
    if not sign.answer.done():
        sign.answer.set_exception(error)
        # Nobody may be left to look at it, which is no fault.
        sign.answer.exception()
