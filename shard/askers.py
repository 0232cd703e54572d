"""Who asks for work: per computing queue the last offers, pilots and answers, so that "why" can be answered.

Kept in memory, bounded, and touched in passing by every get_job; when a computing queue last asked is stored every few
seconds, so that a restart does not forget it.
"""

import heapq
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Final, TypeVar

from culm import access
from culm.clock import Clock, SystemClock
from culm.matching import Offer
from culm.wire import PilotInfo, PilotSeen, QueueSeen, ShardPilots, ShardPilotsAnswer
from shard.database import Database, Transaction

WINDOW_S: Final = 300.0
"""What counts as lately."""
BUCKET_S: Final = 10.0
MAX_OFFERS: Final = 16
"""Distinct offers of one computing queue."""
MAX_PILOTS: Final = 1000
MAX_QUEUES: Final = 20_000


K = TypeVar("K")
V = TypeVar("V")


class Recent:
    """A sum over the window, in buckets."""

    def __init__(self) -> None:
        self._buckets: deque[tuple[int, int]] = deque()

    def add(self, now: float, n: int) -> None:
        """Count something that happens now, seconds of any clock."""
        number = int(now / BUCKET_S)
        if self._buckets and self._buckets[-1][0] == number:
            n += self._buckets.pop()[1]
        self._buckets.append((number, n))
        self._drop(number)

    def total(self, now: float) -> int:
        """How many in the window that ends now."""
        self._drop(int(now / BUCKET_S))
        return sum(n for _, n in self._buckets)

    def _drop(self, number: int) -> None:
        while self._buckets and self._buckets[0][0] <= number - WINDOW_S / BUCKET_S:
            self._buckets.popleft()


@dataclass(slots=True)
class _Pilot:
    """One pilot of a computing queue, since it was first seen."""

    first_at: float
    last_at: float = 0.0
    host: str = ""
    vos: frozenset[str] | None = None
    """Whose jobs it takes, as it last said; None is any."""
    n_asked: int = 0
    n_answered: int = 0
    n_jobs: int = 0
    last_job_at: float | None = None


@dataclass
class _Queue:
    last_at: float = 0.0
    """When it last asked, unix time; 0: never."""
    offers: OrderedDict[Offer, float] = field(default_factory=OrderedDict)
    """When each was last made, the latest last."""
    pilots: OrderedDict[str, _Pilot] = field(default_factory=OrderedDict)
    """The one that asked last is the last."""
    asked: Recent = field(default_factory=Recent)
    given: Recent = field(default_factory=Recent)


class Askers:
    """The memory of a shard of who asked it."""

    def __init__(self, database: Database, clock: Clock | None = None) -> None:
        self._database = database
        self._clock: Clock = clock or SystemClock()
        self._queues: OrderedDict[str, _Queue] = OrderedDict()
        self._given_of_slot: dict[int, Recent] = defaultdict(Recent)
        self._given_in_all = Recent()
        self._unsaved: set[str] = set()

    def asked(self, offer: Offer, pilot: PilotInfo) -> None:
        """A get_job came."""
        now, one = self._clock.now(), self._queue(offer.queue)
        one.last_at = now
        one.asked.add(now, 1)
        _touch(one.offers, offer, now, MAX_OFFERS)
        seen = one.pilots.get(pilot.id) or _Pilot(first_at=now)
        seen.last_at, seen.host, seen.vos = now, pilot.host, offer.vos
        seen.n_asked += 1
        _touch(one.pilots, pilot.id, seen, MAX_PILOTS)
        self._unsaved.add(offer.queue)

    def given(self, queue: str, pilot: str, slots: Iterable[int]) -> None:
        """A claim gave jobs to a pilot of a computing queue; the slot of each."""
        now = self._clock.now()
        n_jobs = 0
        for slot, n in Counter(slots).items():
            self._given_of_slot[slot].add(now, n)
            n_jobs += n
        one = self._queue(queue)
        one.given.add(now, n_jobs)
        self._given_in_all.add(now, n_jobs)
        seen = one.pilots.get(pilot)
        if seen is not None and n_jobs:
            seen.n_answered += 1
            seen.n_jobs += n_jobs
            seen.last_job_at = now

    def queues(self) -> list[str]:
        """The computing queues that ever asked here, as far as is remembered."""
        return list(self._queues)

    def last_at(self, queue: str) -> float:
        """When a computing queue last asked here, unix time; 0 if it never did."""
        known = self._queues.get(queue)
        return known.last_at if known is not None else 0.0

    def offers(self, queue: str) -> list[Offer]:
        """What its pilots offered lately, the latest first."""
        known, since = self._queues.get(queue), self._clock.now() - WINDOW_S
        return [offer for offer, at in reversed(known.offers.items()) if at >= since] if known is not None else []

    def n_pilots(self, queue: str) -> int:
        """How many different pilots of it asked lately (at most 1,000 are told apart)."""
        known, since = self._queues.get(queue), self._clock.now() - WINDOW_S
        if known is None:
            return 0
        return sum(1 for _ in takewhile(lambda one: one.last_at >= since, reversed(known.pilots.values())))

    def n_asked(self, queue: str) -> int:
        """How often it asked lately."""
        known = self._queues.get(queue)
        return known.asked.total(self._clock.now()) if known is not None else 0

    def n_given(self, queue: str) -> int:
        """How many jobs it got lately."""
        known = self._queues.get(queue)
        return known.given.total(self._clock.now()) if known is not None else 0

    def n_given_of(self, slot: int) -> int:
        """How many jobs of a slot were dispatched lately."""
        known = self._given_of_slot.get(slot)
        return known.total(self._clock.now()) if known is not None else 0

    def n_given_in_all(self) -> int:
        """How many jobs were dispatched lately, of all slots."""
        return self._given_in_all.total(self._clock.now())

    async def seen(self, shard: str, call: ShardPilots) -> ShardPilotsAnswer:
        """The pilots that asked lately, the latest first; a user's are those that may take jobs of his VO.

        Raises ClientFault(forbidden). Safe to retry: yes.
        """
        access.require_role(call.principal, "user", "admin")
        since, is_user, vo = self._clock.now() - call.since_s, call.principal.role == "user", call.principal.vo
        names = sorted(self._queues.keys() if call.queues is None else self._queues.keys() & set(call.queues))
        found: list[tuple[float, str, str]] = []
        for name in names:
            for pilot, one in reversed(self._queues[name].pilots.items()):
                if one.last_at < since:
                    break
                if not is_user or one.vos is None or vo in one.vos:
                    found.append((one.last_at, name, pilot))
        latest = heapq.nlargest(call.limit, found)
        return ShardPilotsAnswer(
            shard=shard,
            window_s=WINDOW_S,
            queues=[
                QueueSeen(
                    queue=name,
                    last_asked_at=self.last_at(name) or None,
                    n_pilots=self.n_pilots(name),
                    n_asked=self.n_asked(name),
                    n_given=self.n_given(name),
                )
                for name in names
            ],
            pilots=[_shown(pilot, name, self._queues[name].pilots[pilot]) for _, name, pilot in latest],
            n_left_out=len(found) - len(latest),
        )

    async def load(self) -> None:
        """Remember what was stored. Raises Unavailable. Safe to retry: yes."""
        for queue, microseconds in await self._database.run("read", lambda tx: tx.fetch("read_asked", MAX_QUEUES)):
            one = self._queue(queue)
            one.last_at = max(one.last_at, microseconds / 1_000_000)

    async def save(self) -> None:
        """One turn of a background loop: store when those that asked since the last turn did. Raises Unavailable."""
        names, self._unsaved = self._unsaved, set()
        rows = [(name, self._queues[name].last_at) for name in sorted(names) if name in self._queues]
        try:
            await self._database.run("write", lambda tx: _save(tx, rows))
        except BaseException:
            self._unsaved |= names
            raise

    def _queue(self, name: str) -> _Queue:
        one = self._queues.get(name)
        if one is None:
            one = self._queues[name] = _Queue()
            if len(self._queues) > MAX_QUEUES:
                self._queues.popitem(last=False)
        return one


def _shown(identifier: str, queue: str, one: _Pilot) -> PilotSeen:
    return PilotSeen(
        id=identifier,
        host=one.host,
        queue=queue,
        first_at=one.first_at,
        last_at=one.last_at,
        n_asked=one.n_asked,
        n_answered=one.n_answered,
        n_jobs=one.n_jobs,
        last_job_at=one.last_job_at,
    )


def _touch(known: OrderedDict[K, V], key: K, value: V, most: int) -> None:
    known[key] = value
    known.move_to_end(key)
    if len(known) > most:
        known.popitem(last=False)


async def _save(tx: Transaction, rows: list[tuple[str, float]]) -> None:
    for start in range(0, len(rows), 500):
        await tx.execute_rows("save_asked", rows[start : start + 500])
