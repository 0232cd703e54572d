"""The registry of requirement classes: which are active, which a pilot fits, and that no announcement is lost."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from culm.matching import Offer, Requirements
from shard.classes import MAX_REMEMBERED_OFFERS, ClassRegistry
from shard.hints import ClassKey

SMALL = Requirements(label="user", vo="atlas")
LARGE = Requirements(label="user", vo="atlas", cores=8)
WIDE = Offer(queue="q", labels=frozenset({"user"}), cores=8)
NARROW = Offer(queue="q", labels=frozenset({"user"}), cores=1)


def _key(needs: Requirements, slot: int = 1) -> ClassKey:
    return ClassKey(slot, needs.class_id())


def _learned(*slots: int) -> ClassRegistry:
    registry = ClassRegistry()
    for slot in slots or (1,):
        for needs in (SMALL, LARGE):
            registry.learn(slot, needs.class_id(), msgspec.msgpack.encode(needs))
    return registry


def test_a_class_is_known_once_it_was_learned() -> None:
    registry = ClassRegistry()
    assert not registry.knows(_key(SMALL))
    registry.learn(1, SMALL.class_id(), msgspec.msgpack.encode(SMALL))
    assert registry.knows(_key(SMALL))
    assert not registry.knows(_key(SMALL, slot=2))


@pytest.mark.parametrize("body", [b"", b"\xc1", b"\x93\x01\x02\x03", b"text"])
def test_a_body_that_is_no_class_is_refused(body: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        ClassRegistry().learn(1, 2, body)


def test_a_known_class_is_offered_only_while_it_is_active() -> None:
    registry = _learned()
    assert registry.fitting([1], WIDE) == ()
    registry.announce([_key(SMALL)])
    assert registry.fitting([1], WIDE) == (_key(SMALL),)
    registry.seen_empty(_key(SMALL), registry.announced(_key(SMALL)))
    assert registry.fitting([1], WIDE) == ()
    registry.announce([_key(SMALL)])
    assert registry.fitting([1], WIDE) == (_key(SMALL),)


def test_an_announcement_during_the_look_keeps_a_class_active() -> None:
    registry = _learned()
    registry.announce([_key(SMALL)])
    before = registry.announced(_key(SMALL))
    registry.announce([_key(SMALL)])
    registry.seen_empty(_key(SMALL), before)
    assert registry.active() == [_key(SMALL)]


def test_what_does_not_fit_is_not_offered() -> None:
    registry = _learned()
    registry.announce([_key(SMALL), _key(LARGE)])
    assert set(registry.fitting([1], WIDE)) == {_key(SMALL), _key(LARGE)}
    assert registry.fitting([1], NARROW) == (_key(SMALL),)
    assert registry.fits(_key(SMALL), NARROW)
    assert not registry.fits(_key(LARGE), NARROW)


def test_the_slots_are_asked_in_their_order_and_apart() -> None:
    registry = _learned(1, 2, 3)
    registry.announce([_key(SMALL, slot) for slot in (1, 2, 3)])
    assert registry.fitting([3, 1], NARROW) == (_key(SMALL, 3), _key(SMALL, 1))


def test_what_an_offer_fits_is_not_remembered_beyond_a_change() -> None:
    registry = _learned()
    registry.announce([_key(SMALL)])
    assert registry.fitting([1], WIDE) == (_key(SMALL),)
    registry.announce([_key(LARGE)])
    assert len(registry.fitting([1], WIDE)) == 2


def test_a_class_that_is_active_but_not_known_is_passed_over_until_it_is_learned() -> None:
    registry = ClassRegistry()
    registry.announce([_key(SMALL)])
    assert registry.fitting([1], WIDE) == ()
    assert not registry.fits(_key(SMALL), WIDE)
    registry.learn(1, SMALL.class_id(), msgspec.msgpack.encode(SMALL))
    assert registry.fitting([1], WIDE) == (_key(SMALL),)


def test_many_unlike_offers_are_all_answered_right_and_not_all_remembered() -> None:
    registry = _learned()
    registry.announce([_key(SMALL), _key(LARGE)])
    for n_mb in range(MAX_REMEMBERED_OFFERS * 2 + 1):
        offer = Offer(queue="q", labels=frozenset({"user"}), cores=8, memory_mb=n_mb)
        assert len(registry.fitting([1], offer)) == 2
    assert len(registry._fits[1]) <= MAX_REMEMBERED_OFFERS
    # The last ones are: one offer more does not make all the others to be worked out anew.
    assert offer in registry._matched[1]
    assert len(registry._matched[1]) == MAX_REMEMBERED_OFFERS


_events = st.lists(st.tuples(st.sampled_from(["submit", "take", "look", "see"]), st.booleans()), max_size=60)


@given(_events)
def test_a_class_with_ready_jobs_is_always_active(events: list[tuple[str, bool]]) -> None:
    """A look is two moments: what was announced when it began, and what it saw; jobs come and go between them."""
    registry = _learned()
    ready = {_key(SMALL): 0, _key(LARGE): 0}
    looks: dict[ClassKey, tuple[int, int]] = {}
    for what, large in events:
        key = _key(LARGE if large else SMALL)
        match what:
            case "submit":
                ready[key] += 1
                registry.announce([key])
            case "take":
                ready[key] = max(ready[key] - 1, 0)
            case "look":
                looks[key] = (registry.announced(key), ready[key])
            case "see" if key in looks:
                announced, seen = looks.pop(key)
                if not seen:
                    registry.seen_empty(key, announced)
        active = set(registry.active())
        assert all(key in active for key, n_ready in ready.items() if n_ready)
        assert set(registry.fitting([1], WIDE)) == active
