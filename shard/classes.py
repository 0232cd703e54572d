"""The requirement classes of the slots served here, and which of them a pilot fits.

A class is *active* while it may have ready jobs: it becomes so when one of its jobs is announced, and ceases when
InnoDB was seen empty of it with nothing announced since. Only active classes are matched, so that an empty get_job
costs no more for all the classes there ever were. One shard process serves a partition, so this memory is the whole
truth after `load`; it is read from InnoDB at the start.
"""

from collections import defaultdict
from collections.abc import Iterable

import msgspec

from culm.matching import Offer, Requirements, matches
from shard.hints import ClassKey

MAX_REMEMBERED_OFFERS = 256
"""Of one slot: pilots of a computing queue look alike."""

_DECODER = msgspec.msgpack.Decoder(Requirements)


class ClassRegistry:
    """Known and active classes by slot, with a memory of what each offer fits."""

    def __init__(self) -> None:
        self._known: dict[int, dict[int, Requirements]] = defaultdict(dict)
        self._active: dict[int, set[int]] = defaultdict(set)
        self._announced: dict[ClassKey, int] = defaultdict(int)
        self._fits: dict[int, dict[Offer, tuple[ClassKey, ...]]] = defaultdict(dict)

    def learn(self, slot: int, class_id: int, body: bytes) -> None:
        """Remember a class as stored. Raises msgspec.DecodeError for a body that is none."""
        self._known[slot][class_id] = _DECODER.decode(body)
        self._fits[slot].clear()

    def knows(self, key: ClassKey) -> bool:
        """Whether the class was learned."""
        return key.class_id in self._known[key.slot]

    def announce(self, keys: Iterable[ClassKey]) -> None:
        """Jobs of these classes became ready."""
        for key in keys:
            self._announced[key] += 1
            if key.class_id not in self._active[key.slot]:
                self._active[key.slot].add(key.class_id)
                self._fits[key.slot].clear()

    def announced(self, key: ClassKey) -> int:
        """A number that grows whenever a job of the class becomes ready."""
        return self._announced[key]

    def seen_empty(self, key: ClassKey, announced: int) -> None:
        """InnoDB had no ready row of the class, read when `announced` was its number."""
        if self._announced[key] == announced and key.class_id in self._active[key.slot]:
            self._active[key.slot].discard(key.class_id)
            self._fits[key.slot].clear()

    def active(self) -> list[ClassKey]:
        """All active classes."""
        return [ClassKey(slot, class_id) for slot, classes in self._active.items() for class_id in classes]

    def fitting(self, slots: Iterable[int], offer: Offer) -> tuple[ClassKey, ...]:
        """The active classes of these slots that a pilot with this offer may take from."""
        found: tuple[ClassKey, ...] = ()
        for slot in slots:
            remembered = self._fits[slot]
            fits = remembered.get(offer)
            if fits is None:
                known = self._known[slot]
                fits = tuple(
                    ClassKey(slot, c) for c in sorted(self._active[slot] & known.keys()) if matches(known[c], offer)
                )
                if len(remembered) >= MAX_REMEMBERED_OFFERS:
                    remembered.clear()
                remembered[offer] = fits
            found += fits
        return found

    def fits(self, key: ClassKey, offer: Offer) -> bool:
        """Whether one class fits an offer."""
        needs = self._known[key.slot].get(key.class_id)
        return needs is not None and matches(needs, offer)
