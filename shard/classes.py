"""The requirement classes of the slots served here, and which of them a pilot fits.

A class is *active* while it may have ready jobs: it becomes so when one of its jobs is announced, and ceases when
InnoDB was seen empty of it with nothing announced since. Only active classes are matched, and how many there may be
is bounded at the submit, so that a get_job costs no more for all the classes there ever were. One shard process
serves a partition, so this memory is the whole truth after `load`; it is read from InnoDB at the start.
"""

import itertools
from collections import defaultdict
from collections.abc import Collection, Iterable
from typing import Final

import msgspec

from culm.errors import Unavailable
from culm.matching import Offer, Requirements, matches
from shard.hints import ClassKey

MAX_REMEMBERED_OFFERS: Final = 256
"""Of one slot: pilots of a computing queue look alike."""
MAX_IDLE: Final = 5000
"""Classes that are remembered though they have no ready jobs; of the others InnoDB knows."""
FULL_RETRY_S: Final = 30.0

_DECODER = msgspec.msgpack.Decoder(Requirements)


class ClassRegistry:
    """Known and active classes by slot, with a memory of what each offer fits."""

    def __init__(self) -> None:
        self._known: dict[int, dict[int, Requirements]] = defaultdict(dict)
        self._active: dict[int, set[int]] = defaultdict(set)
        self._idle: dict[ClassKey, None] = {}
        """Known and not active, the longest so first."""
        self._numbers = itertools.count(1)
        self._announced: dict[ClassKey, int] = {}
        self._introduced_by: dict[ClassKey, str] = {}
        self._n_introduced: dict[tuple[int, str], set[int]] = defaultdict(set)
        self._matched: dict[int, dict[Offer, dict[int, bool]]] = defaultdict(dict)
        """By slot and offer, what each class was found to be: worked out once, whatever comes and goes."""
        self._fits: dict[int, dict[Offer, tuple[ClassKey, ...]]] = defaultdict(dict)

    def learn(self, slot: int, class_id: int, body: bytes, owner: str = "") -> None:
        """Remember a class as stored, and who brought it. Raises msgspec.DecodeError for a body that is none."""
        key = ClassKey(slot, class_id)
        self._known[slot][class_id] = _DECODER.decode(body)
        self._fits[slot].clear()
        if owner:
            self._introduced_by[key] = owner
        if class_id not in self._active[slot]:
            self._rest(key)

    def knows(self, key: ClassKey) -> bool:
        """Whether the class was learned."""
        return key.class_id in self._known[key.slot]

    def needs(self, key: ClassKey) -> Requirements | None:
        """What the jobs of a class need; None of a class that is not known here."""
        return self._known[key.slot].get(key.class_id)

    def require_room(self, slot: int, owner: str, class_ids: Collection[int], limits: tuple[int, int]) -> None:
        """Refuse a submit that would make too many classes active: every get_job of the slot pays for each.

        Args:
            slot: where the jobs go.
            owner: whose they are.
            class_ids: of the jobs.
            limits: how many classes of the slot may be active, and how many of those one owner may have brought.

        Raises Unavailable(too_many_classes).
        """
        active = self._active[slot]
        fresh = len(set(class_ids) - active)
        of_slot, of_owner = limits
        if fresh and len(active) + fresh > of_slot:
            raise _full(f"the place has jobs of {len(active)} different requirements, {of_slot} are allowed")
        n_own = len(self._n_introduced[slot, owner])
        if fresh and n_own + fresh > of_owner:
            raise _full(f"{owner} has ready jobs of {n_own} different requirements there, {of_owner} are allowed")

    def announce(self, keys: Iterable[ClassKey]) -> None:
        """Jobs of these classes became ready."""
        for key in keys:
            self._announced[key] = next(self._numbers)
            if key.class_id not in self._active[key.slot]:
                self._active[key.slot].add(key.class_id)
                self._idle.pop(key, None)
                self._fits[key.slot].clear()
                owner = self._introduced_by.get(key)
                if owner:
                    self._n_introduced[key.slot, owner].add(key.class_id)

    def announced(self, key: ClassKey) -> int:
        """A number that grows whenever a job of the class becomes ready."""
        return self._announced.get(key, 0)

    def seen_empty(self, key: ClassKey, announced: int) -> None:
        """InnoDB had no ready row of the class, read when `announced` was its number."""
        if self.announced(key) != announced or key.class_id not in self._active[key.slot]:
            return
        self._active[key.slot].discard(key.class_id)
        self._fits[key.slot].clear()
        owner = self._introduced_by.get(key)
        if owner:
            own = self._n_introduced[key.slot, owner]
            own.discard(key.class_id)
            if not own:
                del self._n_introduced[key.slot, owner]
        self._rest(key)

    def active(self) -> list[ClassKey]:
        """All active classes."""
        return [ClassKey(slot, class_id) for slot, classes in self._active.items() for class_id in classes]

    def fitting(self, slots: Iterable[int], offer: Offer) -> tuple[ClassKey, ...]:
        """The active classes of these slots that a pilot with this offer may take from."""
        found: tuple[ClassKey, ...] = ()
        for slot in slots:
            fits = self._fits[slot].get(offer)
            if fits is None:
                fits = self._match(slot, offer)
            found += fits
        return found

    def fits(self, key: ClassKey, offer: Offer) -> bool:
        """Whether one class fits an offer."""
        needs = self._known[key.slot].get(key.class_id)
        return needs is not None and matches(needs, offer)

    def _match(self, slot: int, offer: Offer) -> tuple[ClassKey, ...]:
        known, remembered = self._known[slot], self._matched[slot]
        matched = remembered.get(offer)
        if matched is None:
            if len(remembered) >= MAX_REMEMBERED_OFFERS:
                oldest = next(iter(remembered))
                del remembered[oldest]
                self._fits[slot].pop(oldest, None)
            matched = remembered[offer] = {}
        found = []
        for class_id in sorted(self._active[slot]):
            fit = matched.get(class_id)
            if fit is None:
                needs = known.get(class_id)
                if needs is None:
                    continue
                fit = matched[class_id] = matches(needs, offer)
            if fit:
                found.append(ClassKey(slot, class_id))
        fits = self._fits[slot][offer] = tuple(found)
        return fits

    def _rest(self, key: ClassKey) -> None:
        """A class without ready jobs; the longest idle one is forgotten when there are too many."""
        self._idle.pop(key, None)
        self._idle[key] = None
        if len(self._idle) > MAX_IDLE:
            oldest = next(iter(self._idle))
            del self._idle[oldest]
            self._known[oldest.slot].pop(oldest.class_id, None)
            self._announced.pop(oldest, None)
            self._introduced_by.pop(oldest, None)
            for matched in self._matched[oldest.slot].values():
                matched.pop(oldest.class_id, None)


def _full(text: str) -> Unavailable:
    return Unavailable(
        "too_many_classes",
        f"{text}: use fewer different figures, or wait until some have run",
        retry_after_s=FULL_RETRY_S,
    )
