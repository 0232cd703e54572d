"""What keeps classes from the offers of pilots: the nearest offer says it, and others have their turn meanwhile."""

import asyncio

from culm.matching import Offer, Requirements
from shard.hints import ClassKey
from shard.why import MAX_CLASSES, MAX_OFFERS, _refused

SMALL = Offer(queue="q", labels=frozenset({"user"}), memory_mb=1000)
ONE_CORE = Offer(queue="q", labels=frozenset({"managed"}), memory_mb=500)


def needs(memory_mb: int) -> Requirements:
    return Requirements(label="user", vo="atlas", memory_mb=memory_mb)


async def test_a_class_that_any_offer_fits_is_not_refused_and_the_nearest_one_tells() -> None:
    seen = [(ClassKey(1, n), needs(memory_mb)) for n, memory_mb in enumerate((1000, 2000, 2000, 4000))]
    n_refused, refused = await _refused(seen, lambda _: [ONE_CORE, SMALL])
    assert n_refused == 3
    assert {what: len(keys) for what, keys in refused.items()} == {
        ("too_little_memory_mb", "2000", "1000"): 2,
        ("too_little_memory_mb", "4000", "1000"): 1,
    }
    assert await _refused(seen, lambda _: []) == (0, {})


async def test_many_classes_and_offers_let_others_have_their_turn() -> None:
    n_turns = 0

    async def others() -> None:
        nonlocal n_turns
        while True:
            n_turns += 1
            await asyncio.sleep(0)

    working = asyncio.create_task(others())
    seen = [(ClassKey(1, n), needs(5000 + n)) for n in range(MAX_CLASSES)]
    assert (await _refused(seen, lambda _: [SMALL] * MAX_OFFERS))[0] == MAX_CLASSES
    working.cancel()
    assert n_turns >= 10
