"""get_job: batches by nature, not by timer.

What arrived while the last commits were in flight is the next batch; one worker per claim connection. A request that
finds nothing may wait parked; it is woken by the announcement of a fitting job. A client that goes away while its
request waits or is being answered gives its job back at once.
"""

import asyncio
import contextlib
import itertools
import logging
from collections import Counter, defaultdict, deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from functools import partial

from prometheus_client import Counter as Metric
from prometheus_client import Gauge

from culm.errors import CulmError, Moved, Unavailable
from culm.matching import Offer
from culm.settings import ShardSettings
from culm.wire import GetJobAnswer, ShardGetJob
from shard.claim import Claimed, Seat, claim, groups_of
from shard.classes import ClassRegistry
from shard.database import Database, DuplicateKeyError
from shard.dispatch_queue import DispatchQueue, QueueLostError, Wanted
from shard.hints import ClassKey, Hint
from shard.ownership import Ownership
from shard.parking import Parking
from shard.refill import Refill

CONTENDED_PAUSE_S = 0.003
"""A rival holds the only candidates: he commits or gives up in about this time."""

_DISPATCHED = Metric("culm_jobs_dispatched_total", "Jobs given to pilots")
_BATCHES = Metric("culm_claim_batches_total", "Claim transactions")
_PARKED = Gauge("culm_parked_requests", "Long polls that wait for a job")
_PENDING = Gauge("culm_pending_requests", "get_job requests that wait for a claim")

log = logging.getLogger("shard.dispatch")

Release = Callable[[str, str], Awaitable[int]]
"""(subject, request id): give back what was granted and never seen."""


@dataclass(eq=False)
class _Request:
    call: ShardGetJob
    arrived: int
    answer: asyncio.Future[GetJobAnswer]
    deadline: float
    """Loop time until which it may wait."""
    n_clients: int = 0
    """Who waits for the answer; a repeat of a request under way joins it."""
    announced: int = 0
    """The slots' number of announcements when the batch was made: a later one means "look again"."""
    timer: asyncio.TimerHandle | None = field(default=None, repr=False)

    @property
    def slots(self) -> tuple[int, ...]:
        return tuple(ref.slot for ref in self.call.slots)

    @property
    def offer(self) -> Offer:
        return self.call.offer

    @property
    def n_jobs(self) -> int:
        return self.call.n_jobs

    @property
    def key(self) -> tuple[str, str]:
        return self.call.subject, self.call.request_id


@dataclass(frozen=True)
class DispatchParts:
    """What the dispatcher works with."""

    database: Database
    queue: DispatchQueue
    classes: ClassRegistry
    ownership: Ownership
    refill: Refill


class Dispatcher:
    """The get_job use case, and the announcement of ready jobs."""

    def __init__(self, parts: DispatchParts, settings: ShardSettings, release: Release) -> None:
        self._parts = parts
        self._settings = settings
        self._release = release
        self._pending: deque[_Request] = deque()
        self._arrived = asyncio.Event()
        self._numbers = itertools.count()
        self._requests: dict[tuple[str, str], _Request] = {}
        self._parking: Parking[_Request] = Parking()
        self._announced: dict[int, int] = defaultdict(int)
        self._workers: list[asyncio.Task[None]] = []
        self._side_tasks: set[asyncio.Task[None]] = set()
        self._stopping = False

    def start(self) -> None:
        """Start the claim workers."""
        loop = asyncio.get_running_loop()
        n_workers = self._settings.database.claim_connections
        self._workers = [loop.create_task(self._work(), name=f"claim-{n}") for n in range(n_workers)]

    async def stop(self) -> None:
        """Answer what is parked with "no job", let the claims under way end, then stop."""
        self._stopping = True
        for request in self._parking.everyone():
            self._answer(request, GetJobAnswer())
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, *self._side_tasks, return_exceptions=True)
        for request in list(self._pending):
            self._fail(request, Unavailable("stopping", "the shard is stopping"))

    async def get_job(self, call: ShardGetJob) -> GetJobAnswer:
        """Give jobs, at once or within `wait_s`; none is an answer.

        Raises:
            Moved: a slot is not open here.
            Unavailable: overloaded, stopping, or as Database.run.

        Safe to retry: yes, by the request id. When the caller is cancelled its jobs go back.
        """
        if self._stopping:
            raise Unavailable("stopping", "the shard is stopping")
        await self._parts.ownership.require(call.slots)
        request = self._requests.get((call.subject, call.request_id))
        if request is None:
            if len(self._pending) >= self._settings.dispatch.max_pending:
                raise Unavailable("overloaded", "too many get_job requests are waiting")
            loop = asyncio.get_running_loop()
            request = _Request(call, next(self._numbers), loop.create_future(), loop.time() + call.wait_s)
            self._requests[request.key] = request
            self._enqueue(request)
        request.n_clients += 1
        try:
            return await asyncio.shield(request.answer)
        except asyncio.CancelledError:
            request.n_clients -= 1
            if request.n_clients == 0:
                self._abandon(request)
            raise

    async def announce(self, hints: Sequence[Hint]) -> None:
        """Jobs became ready, and that is committed: tell Redis, then wake as many parked requests."""
        if not hints:
            return
        parts = self._parts
        counts = Counter(hint.key for hint in hints)
        parts.classes.announce(counts)
        for key in counts:
            self._announced[key.slot] += 1
        try:
            await parts.queue.push(hints)
        except QueueLostError:
            parts.refill.mark(counts)
            parts.refill.lost()
        for key, n_jobs in counts.items():
            for request in self._parking.wake(key.slot, n_jobs, partial(parts.classes.fits, key)):
                self._enqueue(request)

    def hand_back(self, subject: str, request_id: str) -> None:
        """The client of this request is gone: release what it got, in the background."""
        self._aside(self._release_quietly(subject, request_id))

    # --- one batch

    async def _work(self) -> None:
        # Not until it is cancelled: redis-py can swallow that (see service.Loops).
        while not self._stopping:
            await self._arrived.wait()
            batch = self._next_batch()
            if batch:
                await self._serve(batch)

    def _next_batch(self) -> list[_Request]:
        batch: list[_Request] = []
        n_jobs = 0
        while self._pending and (not batch or n_jobs + self._pending[0].n_jobs <= self._settings.dispatch.max_batch):
            request = self._pending.popleft()
            if request.n_clients == 0:
                self._answer(request, GetJobAnswer())
                continue
            n_jobs += request.n_jobs
            batch.append(request)
        if not self._pending:
            self._arrived.clear()
        _PENDING.set(len(self._pending))
        return batch

    async def _serve(self, batch: list[_Request]) -> None:
        """Claim for a batch. A failure is answered to each of it; it never ends the worker."""
        parts = self._parts
        for request in batch:
            request.announced = self._announcements(request)
        seats = [Seat(r.call, parts.classes.fitting(r.slots, r.offer)) for r in batch]
        announced = {key: parts.classes.announced(key) for seat in seats for key in seat.keys}
        hints = await self._take_hints(seats)
        try:
            claimed = await parts.database.run("claim", lambda tx: claim(tx, seats, hints, self._settings.timeouts))
        except Moved as moved:
            self._put_back([hint for some in hints for hint in some])
            self._refuse_moved(batch, moved)
        except DuplicateKeyError:
            # The same request id in two claims at once, by way of two routers: the next look finds the first's leases.
            self._put_back([hint for some in hints for hint in some])
            for request in batch:
                self._enqueue(request)
        except CulmError as error:
            self._put_back([hint for some in hints for hint in some])
            for request in batch:
                self._fail(request, error)
        except asyncio.CancelledError:
            for request in batch:
                self._fail(request, Unavailable("stopping", "the shard is stopping"))
            raise
        except Exception as error:  # the worker must outlive every fault; the batch is answered, not lost
            log.exception("a claim failed")
            self._put_back([hint for some in hints for hint in some])
            for request in batch:
                self._fail(request, Unavailable("claim_failed", f"the claim failed: {type(error).__name__}"))
        else:
            self._settle(batch, claimed, announced)

    async def _take_hints(self, seats: list[Seat]) -> list[list[Hint]]:
        """Candidates from Redis per group of the batch; none for groups whose classes are not whole there."""
        parts = self._parts
        groups = groups_of(seats)
        asked = [number for number, (keys, _) in enumerate(groups) if keys and parts.refill.clean(keys)]
        hints: list[list[Hint]] = [[] for _ in groups]
        if not asked:
            return hints
        n_begun = parts.refill.n_begun
        try:
            taken = await parts.queue.take([Wanted(groups[number][1], groups[number][0]) for number in asked])
        except QueueLostError:
            parts.refill.lost()
            return hints
        parts.refill.mark(taken.low)
        if parts.refill.n_begun != n_begun:
            # A refill has emptied a class meanwhile: what was taken may not be the best. InnoDB knows.
            parts.refill.mark(key for number in asked for key in groups[number][0])
            return hints
        for number, some in zip(asked, taken.hints, strict=True):
            hints[number] = some
        return hints

    def _settle(self, batch: list[_Request], claimed: Claimed, announced: dict[ClassKey, int]) -> None:
        _BATCHES.inc()
        for key in claimed.empty:
            self._parts.classes.seen_empty(key, announced[key])
        self._put_back(claimed.unused)
        if claimed.from_database:
            self._aside(self._remove_quietly(claimed.from_database))
        for request, seat in zip(batch, claimed.seats, strict=True):
            if seat.grants:
                _DISPATCHED.inc(0 if seat.repeated else len(seat.grants))
                self._answer(request, GetJobAnswer(jobs=list(seat.grants)))
            elif claimed.contended and seat.keys:
                asyncio.get_running_loop().call_later(CONTENDED_PAUSE_S, self._enqueue, request)
            else:
                self._park(request)

    def _park(self, request: _Request) -> None:
        loop = asyncio.get_running_loop()
        if request.answer.done():
            return
        if request.announced != self._announcements(request):
            # A job was announced after the look that found none: an empty answer might not be true any more.
            self._enqueue(request)
        elif request.deadline <= loop.time() or len(self._parking) >= self._settings.dispatch.max_parked:
            self._answer(request, GetJobAnswer())
        else:
            if request.timer is None:
                request.timer = loop.call_at(request.deadline, self._wait_is_over, request)
            self._parking.park(request)
            if request.n_clients == 0:
                # Its client went while it was in the claim: nobody waits, and it must not take a wake-up from others.
                self._abandon(request)
            _PARKED.set(len(self._parking))

    def _wait_is_over(self, request: _Request) -> None:
        if self._parking.leave(request):
            _PARKED.set(len(self._parking))
            self._answer(request, GetJobAnswer())

    # --- the ends of a request

    def _answer(self, request: _Request, answer: GetJobAnswer) -> None:
        self._forget(request)
        if not request.answer.done():
            request.answer.set_result(answer)
        if answer.jobs and request.n_clients == 0:
            self.hand_back(*request.key)

    def _fail(self, request: _Request, error: CulmError) -> None:
        self._forget(request)
        if not request.answer.done():
            request.answer.set_exception(error)
            # Nobody may be left to look at it, which is no fault.
            request.answer.exception()

    def _abandon(self, request: _Request) -> None:
        """The last client is gone: out of the parking, or the answer goes back when it comes."""
        if self._parking.leave(request):
            self._answer(request, GetJobAnswer())
        elif request.answer.done() and request.answer.exception() is None and request.answer.result().jobs:
            self.hand_back(*request.key)

    def _refuse_moved(self, batch: list[_Request], moved: Moved) -> None:
        """Refuse those that believe in another epoch; the others of the batch go on."""
        slot, epoch = moved.details["slot"], moved.details["epoch"]
        for request in batch:
            if any(ref.slot == slot and ref.epoch != epoch for ref in request.call.slots):
                self._fail(request, Moved(slot, epoch))
            else:
                self._enqueue(request)

    def _forget(self, request: _Request) -> None:
        if request.timer is not None:
            request.timer.cancel()
        if self._requests.get(request.key) is request:
            del self._requests[request.key]

    def _enqueue(self, request: _Request) -> None:
        self._pending.append(request)
        self._arrived.set()

    def _announcements(self, request: _Request) -> int:
        return sum(self._announced[slot] for slot in request.slots)

    # --- beside the path

    def _put_back(self, hints: Sequence[Hint]) -> None:
        if hints:
            self._aside(self._push_quietly(hints))

    def _aside(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._side_tasks.add(task)
        task.add_done_callback(self._side_tasks.discard)

    async def _push_quietly(self, hints: Sequence[Hint]) -> None:
        try:
            await self._parts.queue.push(hints)
        except QueueLostError:
            self._parts.refill.lost()

    async def _remove_quietly(self, hints: Sequence[Hint]) -> None:
        with contextlib.suppress(QueueLostError):
            await self._parts.queue.remove(hints)

    async def _release_quietly(self, subject: str, request_id: str) -> None:
        try:
            await self._release(subject, request_id)
        except CulmError as error:
            # The short first lease will do it.
            log.warning("could not give back request %s: %s", request_id, error)
