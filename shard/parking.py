"""Parked long polls: get_job requests that wait for a job to become ready.

Kept by slot and offer, so that a wake-up matches a class against the few distinct offers, not against every pilot;
inside an offer the one that was parked first is woken first. As many are woken as jobs became ready, no more.
"""

import heapq
from collections import defaultdict
from collections.abc import Callable
from typing import Final, Generic, Protocol, TypeVar

from culm.matching import Offer

MAX_OFFERS: Final = 2000
"""Different ones that may wait in a slot: each is matched with every class that becomes ready there."""


class Waiter(Protocol):
    """What can be parked."""

    @property
    def slots(self) -> tuple[int, ...]:
        """The slots whose jobs it may take."""
        ...

    @property
    def offer(self) -> Offer:
        """What it offers."""
        ...

    @property
    def arrived(self) -> int:
        """Its number in the order of arrival."""
        ...

    @property
    def n_jobs(self) -> int:
        """How many jobs it wants."""
        ...


W = TypeVar("W", bound=Waiter)


class Parking(Generic[W]):
    """The parked requests of one shard process."""

    def __init__(self) -> None:
        self._waiting: dict[int, dict[Offer, dict[int, W]]] = defaultdict(dict)
        self._n_waiting = 0

    def __len__(self) -> int:
        return self._n_waiting

    def park(self, waiter: W) -> bool:
        """Let it wait; False where too many different offers wait already."""
        for slot in waiter.slots:
            if waiter.offer not in self._waiting[slot] and len(self._waiting[slot]) >= MAX_OFFERS:
                return False
        self._n_waiting += 1
        for slot in waiter.slots:
            self._waiting[slot].setdefault(waiter.offer, {})[waiter.arrived] = waiter
        return True

    def leave(self, waiter: W) -> bool:
        """Take it out; False if it was not here."""
        found = False
        for slot in waiter.slots:
            offers = self._waiting[slot]
            queue = offers.get(waiter.offer, {})
            found = queue.pop(waiter.arrived, None) is not None or found
            if not queue:
                offers.pop(waiter.offer, None)
        self._n_waiting -= found
        return found

    def wake(self, slot: int, n_jobs: int, fits: Callable[[Offer], bool]) -> list[W]:
        """Take out those that wait longest among the fitting ones, until they want `n_jobs`."""
        offers = self._waiting[slot]
        # A dict keeps the order in which they were parked; one that was woken in vain and parked again kept its number.
        heads = [(next(iter(queue)), n, offer) for n, (offer, queue) in enumerate(offers.items()) if fits(offer)]
        heapq.heapify(heads)
        woken: list[W] = []
        while n_jobs > 0 and heads:
            arrived, n, offer = heads[0]
            oldest = offers[offer][arrived]
            self.leave(oldest)
            woken.append(oldest)
            n_jobs -= oldest.n_jobs
            left = offers.get(offer)
            if left:
                heapq.heapreplace(heads, (next(iter(left)), n, offer))
            else:
                heapq.heappop(heads)
        return woken

    def offers(self) -> list[tuple[int, Offer]]:
        """Each distinct offer that waits, by slot."""
        return [(slot, offer) for slot, offers in self._waiting.items() for offer in offers]

    def everyone(self) -> list[W]:
        """Take out all."""
        all_of_them = {w.arrived: w for offers in self._waiting.values() for q in offers.values() for w in q.values()}
        self._waiting.clear()
        self._n_waiting = 0
        return list(all_of_them.values())
