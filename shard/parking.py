"""Parked long polls: get_job requests that wait for a job to become ready.

Kept by slot and offer, so that a wake-up matches a class against the few distinct offers, not against every pilot;
inside an offer the one that was parked first is woken first. As many are woken as jobs became ready, no more.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Generic, Protocol, TypeVar

from culm.matching import Offer


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

    def park(self, waiter: W) -> None:
        """Let it wait."""
        self._n_waiting += 1
        for slot in waiter.slots:
            self._waiting[slot].setdefault(waiter.offer, {})[waiter.arrived] = waiter

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
        woken: list[W] = []
        fitting = [offer for offer in self._waiting[slot] if fits(offer)]
        while n_jobs > 0:
            oldest = self._oldest(slot, fitting)
            if oldest is None:
                break
            self.leave(oldest)
            woken.append(oldest)
            n_jobs -= oldest.n_jobs
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

    def _oldest(self, slot: int, offers: Iterable[Offer]) -> W | None:
        queues = (self._waiting[slot].get(offer) for offer in offers)
        # A dict keeps the order of arrival, but one that was woken in vain and parked again has kept its number.
        heads = (next(iter(queue.values())) for queue in queues if queue)
        return min(heads, key=lambda waiter: waiter.arrived, default=None)
