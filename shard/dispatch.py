"""get_job: batches by nature, not by timer.

What arrived while the last commits were in flight is the next batch; one worker per claim connection, which take turns
(`shard.turns`). A request that finds nothing may wait parked; it is woken by the announcement of a fitting job. A
client that goes away while its request waits or is being answered gives its job back at once.
"""

import asyncio
import contextlib
import itertools
import logging
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial

from culm.errors import ClientFault, CulmError, Moved, Unavailable
from culm.settings import ShardSettings
from culm.telemetry import SHED
from culm.wire import GetJobAnswer, ShardGetJob
from shard.askers import Askers
from shard.claim import Claimed, Seat, claim, claim_at_once, enough, groups_of, identity
from shard.classes import ClassRegistry
from shard.database import Database, Transaction
from shard.dispatch_queue import DispatchQueue, QueueLostError, Wanted
from shard.driver import DuplicateKeyError
from shard.hand_backs import HandBacks, Release
from shard.hints import ClassKey, Hint
from shard.metrics import BROKEN, CLAIM_BATCHES, DISPATCHED, PARKED, PENDING
from shard.ownership import Ownership
from shard.parking import Parking
from shard.refill import Refill
from shard.request import Request, Wake
from shard.terms import Terms
from shard.turns import Turns

CONTENDED_PAUSE_S = 0.003
"""A rival holds the only candidates: he commits or gives up in about this time."""
PATIENCE_S = 2.0
"""So long past its deadline a request looks again for a reason, before it is answered all the same."""
MAX_KEYS_PER_BATCH = 4096
"""Classes that one batch may ask Redis for, over all its different offers; the rest is the next batch."""
OFFERS_PER_TURN = 20
"""Of the loop, when all that wait are looked at."""
MAX_BROKEN = 10_000
MAX_COLLISIONS = 5
"""Claims of one request that may hit a unique key."""

_FULL = SHED.labels("get_jobs")

log = logging.getLogger("shard.dispatch")


@dataclass(frozen=True)
class DispatchParts:
    """What the dispatcher works with."""

    database: Database
    queue: DispatchQueue
    classes: ClassRegistry
    ownership: Ownership
    refill: Refill
    askers: Askers
    terms: Terms


class Dispatcher:
    """The get_job use case, and the announcement of ready jobs."""

    def __init__(self, parts: DispatchParts, settings: ShardSettings, release: Release) -> None:
        self._parts = parts
        self._settings = settings
        self._pending: deque[Request] = deque()
        self._turns = Turns(lambda: len(self._pending))
        self._numbers = itertools.count()
        self._requests: dict[tuple[str, str], Request] = {}
        self._parking: Parking[Request] = Parking()
        self._workers: list[asyncio.Task[None]] = []
        self._side_tasks: set[asyncio.Task[None]] = set()
        self._hand_backs = HandBacks(release)
        self._broken: set[int] = set()
        """Jobs whose rows do not fit together: no claim tries them again. The audit names them."""
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
        self._turns.over()
        if self._workers:
            _, late = await asyncio.wait(self._workers, timeout=self._settings.stop_s)
            for worker in late:
                worker.cancel()
        for request in list(self._pending):
            self._fail(request, Unavailable("stopping", "the shard is stopping"))
        await asyncio.gather(*self._workers, *self._side_tasks, return_exceptions=True)
        await self._hand_backs.stop()

    async def get_job(self, call: ShardGetJob) -> GetJobAnswer:
        """Give jobs, at once or within `wait_s`; none is an answer.

        Raises:
            Moved: a slot is not open here.
            ClientFault: request_id_reused, it was another computing queue's.
            Unavailable: overloaded, stopping, contended, or as Database.run.

        Safe to retry: yes, by the request id. When the caller is cancelled its jobs go back.
        """
        future = self.begin(call)
        if future is None:
            await self._parts.ownership.require(call.slots)
            key = identity(call)
            await self._hand_backs.ended(key)
            future = self._join(call, key)
        return await future

    def begin(self, call: ShardGetJob) -> "asyncio.Future[GetJobAnswer] | None":
        """The same without a wait of its own, for a request that has nothing to wait for first; else None.

        Who cancels the future is gone: the jobs go back. Raises as `get_job`.
        """
        if self._stopping:
            raise Unavailable("stopping", "the shard is stopping")
        key = identity(call)
        if key in self._hand_backs or not self._parts.ownership.holds(call.slots):
            return None
        return self._join(call, key)

    def _join(self, call: ShardGetJob, key: tuple[str, str]) -> "asyncio.Future[GetJobAnswer]":
        self._parts.askers.asked(call.offer, call.pilot)
        loop = asyncio.get_running_loop()
        request = self._requests.get(key)
        if request is None:
            if len(self._pending) >= self._settings.dispatch.max_pending:
                _FULL.inc()
                raise Unavailable("overloaded", "too many get_job requests are waiting")
            slots = tuple([ref.slot for ref in call.slots])
            request = Request(call, next(self._numbers), key, slots, loop.time() + call.wait_s)
            self._requests[key] = request
            self._enqueue(request)
        elif request.offer.queue != call.offer.queue:
            raise ClientFault("request_id_reused", "this request id is in use for another computing queue")
        return request.join(self._abandon)

    async def announce(self, hints: Sequence[Hint]) -> None:
        """Jobs became ready, and that is committed: tell Redis, then wake as many parked requests."""
        if not hints:
            return
        parts = self._parts
        counts = Counter(hint.key for hint in hints)
        try:
            await parts.refill.meet(counts)
        except CulmError as error:
            log.warning("a class is not known, the sweep will find its jobs: %s", error)
        parts.classes.announce(counts)
        try:
            await parts.queue.push(hints)
        except QueueLostError:
            parts.refill.mark(counts)
            parts.refill.lost()
        finally:
            # Also when the caller is cancelled here: the jobs are ready all the same.
            for key, n_jobs in counts.items():
                self._wake(Wake(key, n_jobs))

    async def look_again(self) -> None:
        """Nobody may wait whom an active class fits: he looked in vain, so an announcement was lost since."""
        for n, (slot, offer) in enumerate(self._parking.offers(), start=1):
            for key in self._parts.classes.fitting([slot], offer)[:1]:
                self._wake(Wake(key, None))
            if n % OFFERS_PER_TURN == 0:
                # Each may be matched with a thousand classes: the others have their turn in between.
                await asyncio.sleep(0)

    async def withdraw(self, hints: Sequence[Hint]) -> None:
        """Jobs ceased to be ready, and that is committed: their hints go. Safe to retry: yes."""
        if hints:
            self._parts.refill.shelf.drop(hint.id for hint in hints)
            await self._remove_quietly(hints)

    def hand_back(self, subject: str, request_id: str) -> "asyncio.Task[int]":
        """The client of this request is gone: release what it got, in the background; how many jobs."""
        return self._hand_backs.begin(subject, request_id)

    # --- one batch

    async def _work(self) -> None:
        # Not until it is cancelled: redis-py can swallow that (see service.Loops), and what was begun is ended.
        while not self._stopping:
            await self._turns.wait()
            batch = self._next_batch()
            if batch:
                with self._turns.batch(len(batch)):
                    await self._serve(batch)

    def _next_batch(self) -> list[Request]:
        batch: list[Request] = []
        n_jobs = 0
        while self._pending and (not batch or n_jobs + self._pending[0].n_jobs <= self._settings.dispatch.max_batch):
            request = self._pending.popleft()
            if request.n_clients == 0:
                self._answer(request, GetJobAnswer())
                continue
            n_jobs += request.n_jobs
            batch.append(request)
        PENDING.set(len(self._pending))
        return batch

    async def _serve(self, batch: list[Request]) -> None:
        """Claim for a batch. A failure is answered to each of it; it never ends the worker."""
        parts = self._parts
        hints: list[list[Hint]] = []
        in_flight: set[int] = set()
        try:
            seats = self._seats(batch)
            announced: dict[ClassKey, int] = {}
            for keys in {seat.keys for seat in seats}:
                looked_at = {key: parts.classes.announced(key) for key in keys}
                announced |= looked_at
                for request, seat in zip(batch, seats, strict=True):
                    if seat.keys == keys:
                        request.looked_at = looked_at
            hints = await self._take_hints(seats)
            in_flight = {hint.id for some in hints for hint in some}
            parts.refill.in_flight |= in_flight
            at_once = enough(seats, hints) and not any(request.n_collisions for request in batch)
            claimed = await parts.database.run("claim", self._claim(seats, hints, at_once=at_once))
            self._settle(batch, claimed, announced)
        except Moved as moved:
            await self._push_quietly([hint for some in hints for hint in some])
            self._refuse_moved(batch, moved)
        except DuplicateKeyError:
            # The same request id in two claims at once, by way of two routers: the next look finds the first's leases.
            await self._push_quietly([hint for some in hints for hint in some])
            self._collided(batch)
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
        finally:
            parts.refill.in_flight -= in_flight

    def _claim(
        self, seats: list[Seat], hints: list[list[Hint]], *, at_once: bool
    ) -> Callable[[Transaction], Awaitable[Claimed]]:
        """The claim's transaction; at once the first time if it may, with a look at everything when it runs again."""
        terms, broken = self._parts.terms, frozenset(self._broken)
        shelf = self._parts.refill.shelf
        tries = itertools.count()

        async def work(tx: Transaction) -> Claimed:
            if at_once and next(tries) == 0:
                return await claim_at_once(tx, seats, hints, terms, shelf)
            return await claim(tx, seats, hints, terms, broken)

        return work

    def _seats(self, batch: list[Request]) -> list[Seat]:
        """The seats of a batch; what would make it too wide is taken out of it, and is the next one's."""
        seats: list[Seat] = []
        seen: set[tuple[ClassKey, ...]] = set()
        n_keys = 0
        for request in batch:
            keys = self._parts.classes.fitting(request.slots, request.offer)
            if keys not in seen:
                n_keys += len(keys)
                if seats and n_keys > MAX_KEYS_PER_BATCH:
                    self._pending.extendleft(reversed(batch[len(seats) :]))
                    del batch[len(seats) :]
                    self._turns.look()
                    break
                seen.add(keys)
            seats.append(Seat(request.call, keys))
        return seats

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
        parts.refill.low(taken.low)
        if parts.refill.n_begun != n_begun:
            # A refill has emptied a class meanwhile: what was taken may not be the best. InnoDB knows.
            parts.refill.mark(key for number in asked for key in groups[number][0])
            return hints
        for number, some in zip(asked, taken.hints, strict=True):
            hints[number] = some
        return hints

    def _settle(self, batch: list[Request], claimed: Claimed, announced: dict[ClassKey, int]) -> None:
        CLAIM_BATCHES.inc()
        for key in claimed.empty:
            self._parts.classes.seen_empty(key, announced[key])
        self._put_back(claimed.unused)
        if claimed.broken:
            BROKEN.inc(len(claimed.broken))
            log.error("passed over, their rows do not fit together (culm audit): %s", sorted(claimed.broken)[:20])
            if len(self._broken) < MAX_BROKEN:
                self._broken |= claimed.broken
        # What was won and not granted is put back: its hint must not be taken out again.
        put_back = {hint.id for hint in claimed.unused}
        if leased := [hint for hint in claimed.from_database if hint.id not in put_back]:
            self._parts.refill.taken(hint.id for hint in leased)
            self._parts.refill.shelf.drop(hint.id for hint in leased)
            self._aside(self._remove_quietly(leased))
        DISPATCHED.inc(sum(len(seat.taken) for seat in claimed.seats))
        for request, seat in zip(batch, claimed.seats, strict=True):
            if seat.refusal is not None:
                self._turn_away(request, seat.refusal)
            elif seat.grants:
                slots = (key.slot for key in seat.taken)
                self._parts.askers.given(seat.call.offer.queue, seat.call.pilot.id, slots)
                full = seat.repeated or seat.cut or claimed.contended or len(seat.grants) == request.n_jobs
                request.woken = _left_over(request.woken, seat.taken) if full else None
                self._answer(request, GetJobAnswer(jobs=list(seat.grants)))
            elif seat.later or (claimed.contended and seat.keys):
                self._again_soon(request)
            else:
                request.woken = None
                self._park(request)

    def _again_soon(self, request: Request) -> None:
        loop = asyncio.get_running_loop()
        if loop.time() > request.deadline + PATIENCE_S:
            self._fail(request, Unavailable("contended", "others hold the jobs that fit", retry_after_s=0.5))
        else:
            loop.call_later(CONTENDED_PAUSE_S, self._enqueue, request)

    def _collided(self, batch: list[Request]) -> None:
        for request in batch:
            request.n_collisions += 1
            if request.n_collisions < MAX_COLLISIONS:
                self._enqueue(request)
            else:
                log.error("request %s of %s collides in every claim", request.call.request_id, request.call.subject)
                self._fail(request, Unavailable("contended", "the claim met another one every time"))

    def _park(self, request: Request) -> None:
        now = asyncio.get_running_loop().time()
        if request.done:
            return
        if self._announced_since(request) and now < request.deadline + PATIENCE_S:
            # A job was announced after the look that found none: an empty answer might not be true any more.
            self._enqueue(request)
        elif request.deadline <= now or len(self._parking) >= self._settings.dispatch.max_parked:
            self._answer(request, GetJobAnswer())
        else:
            if not self._parking.park(request):
                self._answer(request, GetJobAnswer())
                return
            if request.timer is None:
                request.timer = asyncio.get_running_loop().call_at(request.deadline, self._wait_is_over, request)
            if request.n_clients == 0:
                # Its client went while it was in the claim: nobody waits, and it must not take a wake-up from others.
                self._abandon(request)
            PARKED.set(len(self._parking))

    def _announced_since(self, request: Request) -> bool:
        classes = self._parts.classes
        fitting = classes.fitting(request.slots, request.offer)
        return any(classes.announced(key) != request.looked_at.get(key) for key in fitting)

    def _wake(self, wake: Wake) -> None:
        """Wake as many parked requests as want these jobs; one where their number is not known."""
        n_left = 1 if wake.n_jobs is None else wake.n_jobs
        for request in self._parking.wake(wake.key.slot, n_left, partial(self._parts.classes.fits, wake.key)):
            share = None if wake.n_jobs is None else min(n_left, request.n_jobs)
            n_left -= request.n_jobs
            request.woken = Wake(wake.key, share)
            self._enqueue(request)
        PARKED.set(len(self._parking))

    def _wait_is_over(self, request: Request) -> None:
        if self._parking.leave(request):
            PARKED.set(len(self._parking))
            if self._parts.classes.fitting(request.slots, request.offer):
                # There may be a job whose announcement was lost: no empty answer without a look.
                self._enqueue(request)
            else:
                self._answer(request, GetJobAnswer())

    # --- the ends of a request

    def _answer(self, request: Request, answer: GetJobAnswer) -> None:
        self._forget(request)
        request.give(answer)
        if answer.jobs and request.n_clients == 0:
            self.hand_back(*request.key)
        if request.woken is not None:
            wake, request.woken = request.woken, None
            self._wake(wake)

    def _fail(self, request: Request, error: CulmError) -> None:
        self._forget(request)
        request.refuse(error)

    def _turn_away(self, request: Request, error: CulmError) -> None:
        """Fail one that others need not share the fate of: what it was woken for is theirs."""
        self._fail(request, error)
        if request.woken is not None:
            wake, request.woken = request.woken, None
            self._wake(wake)

    def _abandon(self, request: Request) -> None:
        """The last client is gone: out of the parking, or the answer goes back when it comes."""
        if self._parking.leave(request):
            self._answer(request, GetJobAnswer())
        elif request.answer is not None and request.answer.jobs:
            self.hand_back(*request.key)

    def _refuse_moved(self, batch: list[Request], moved: Moved) -> None:
        """Refuse those that believe in another epoch; the others of the batch go on."""
        slot, epoch = moved.details["slot"], moved.details["epoch"]
        for request in batch:
            if any(ref.slot == slot and ref.epoch != epoch for ref in request.call.slots):
                self._turn_away(request, Moved(slot, epoch))
            else:
                self._enqueue(request)

    def _forget(self, request: Request) -> None:
        if request.timer is not None:
            request.timer.cancel()
        if self._requests.get(request.key) is request:
            del self._requests[request.key]

    def _enqueue(self, request: Request) -> None:
        if self._stopping:
            self._fail(request, Unavailable("stopping", "the shard is stopping"))
            return
        self._pending.append(request)
        self._turns.look()

    # --- beside the path

    def _put_back(self, hints: Sequence[Hint]) -> None:
        if hints:
            self._aside(self._push_quietly(hints))

    def _aside(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._side_tasks.add(task)
        task.add_done_callback(self._side_tasks.discard)
        return task

    async def _push_quietly(self, hints: Sequence[Hint]) -> None:
        try:
            await self._parts.queue.push(hints)
        except QueueLostError:
            self._parts.refill.lost()

    async def _remove_quietly(self, hints: Sequence[Hint]) -> None:
        with contextlib.suppress(QueueLostError):
            await self._parts.queue.remove(hints)


def _left_over(wake: Wake | None, taken: Sequence[ClassKey]) -> Wake | None:
    """What is to be passed on of a wake-up after its request took these."""
    if wake is None or wake.n_jobs is None:
        return wake
    n_left = wake.n_jobs - taken.count(wake.key)
    return Wake(wake.key, n_left) if n_left > 0 else None
