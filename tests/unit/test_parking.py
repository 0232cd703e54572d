"""Parked requests: who is woken, in which order, and that none is kept that has left."""

import itertools
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from culm.matching import Offer
from shard.parking import Parking

WIDE = Offer(queue="q", labels=frozenset({"user"}), cores=8)
NARROW = Offer(queue="q", labels=frozenset({"user"}), cores=1)
_numbers = itertools.count()


@dataclass(eq=False)
class _Waiter:
    offer: Offer = WIDE
    slots: tuple[int, ...] = (1,)
    n_jobs: int = 1
    arrived: int = field(default_factory=lambda: next(_numbers))


def _all(_offer: Offer) -> bool:
    return True


def _parked(*waiters: _Waiter) -> Parking[_Waiter]:
    parking: Parking[_Waiter] = Parking()
    for waiter in waiters:
        parking.park(waiter)
    return parking


def test_the_one_that_waits_longest_is_woken_first() -> None:
    first, second, third = _Waiter(NARROW), _Waiter(WIDE), _Waiter(NARROW)
    parking = _parked(third, second, first)
    assert parking.wake(1, 1, _all) == [second]
    assert parking.wake(1, 1, _all) == [third]
    parking = _parked(first, second, third)
    assert parking.wake(1, 2, _all) == [first, second]
    assert parking.wake(1, 2, _all) == [third]
    assert len(parking) == 0


def test_only_offers_that_fit_are_woken() -> None:
    narrow, wide = _Waiter(NARROW), _Waiter(WIDE)
    parking = _parked(narrow, wide)
    assert parking.wake(1, 5, lambda offer: offer.cores > 1) == [wide]
    assert parking.wake(1, 5, lambda offer: offer.cores > 1) == []
    assert len(parking) == 1


def test_only_those_of_the_slot_are_woken() -> None:
    here, there = _Waiter(slots=(1,)), _Waiter(slots=(2,))
    parking = _parked(here, there)
    assert parking.wake(2, 5, _all) == [there]
    assert parking.wake(3, 5, _all) == []


def test_one_that_waits_for_two_slots_is_woken_once() -> None:
    waiter = _Waiter(slots=(1, 2))
    parking = _parked(waiter)
    assert len(parking) == 1
    assert parking.wake(2, 5, _all) == [waiter]
    assert parking.wake(1, 5, _all) == []
    assert len(parking) == 0


def test_wishes_for_several_jobs_count_as_several() -> None:
    many, one, other = _Waiter(n_jobs=3), _Waiter(), _Waiter()
    parking = _parked(many, one, other)
    assert parking.wake(1, 4, _all) == [many, one]
    assert len(parking) == 1


def test_a_wish_larger_than_what_is_there_is_woken_all_the_same() -> None:
    many, one = _Waiter(n_jobs=100), _Waiter()
    parking = _parked(many, one)
    assert parking.wake(1, 2, _all) == [many]
    assert parking.wake(1, 1, _all) == [one]


def test_no_jobs_wake_nobody() -> None:
    parking = _parked(_Waiter())
    assert parking.wake(1, 0, _all) == []
    assert len(parking) == 1


def test_one_that_left_is_not_woken_and_leaves_once() -> None:
    waiter = _Waiter(slots=(1, 2))
    parking = _parked(waiter)
    assert parking.leave(waiter)
    assert not parking.leave(waiter)
    assert parking.wake(1, 1, _all) == []
    assert len(parking) == 0


def test_everyone_is_taken_out_once_each() -> None:
    waiters = [_Waiter(slots=(1, 2)), _Waiter(NARROW), _Waiter(slots=(2,))]
    parking = _parked(*waiters)
    assert sorted(w.arrived for w in parking.everyone()) == [w.arrived for w in waiters]
    assert len(parking) == 0
    assert parking.everyone() == []
    assert not any(parking.leave(waiter) for waiter in waiters)


def test_one_that_was_woken_in_vain_waits_on() -> None:
    first, second = _Waiter(NARROW), _Waiter(WIDE)
    parking = _parked(first, second)
    assert parking.wake(1, 1, _all) == [first]
    parking.park(first)
    # It has kept its number: before the one that came later with another offer.
    assert parking.wake(1, 2, _all) == [first, second]


def test_the_offers_that_wait_are_told_once_each() -> None:
    parking = _parked(_Waiter(WIDE, slots=(1, 2)), _Waiter(WIDE), _Waiter(NARROW))
    assert sorted((slot, offer.cores) for slot, offer in parking.offers()) == [(1, 1), (1, 8), (2, 8)]
    parking.everyone()
    assert parking.offers() == []


def test_of_many_unlike_offers_each_is_matched_once_and_the_oldest_are_woken() -> None:
    offers = [Offer(queue="q", labels=frozenset({"user"}), walltime_s=n) for n in range(300)]
    waiters = [_Waiter(offers[n % 300]) for n in range(600)]
    parking = _parked(*waiters)
    looked_at: list[Offer] = []

    def fits(offer: Offer) -> bool:
        looked_at.append(offer)
        return offer.walltime_s % 2 == 0

    assert parking.wake(1, 400, fits) == [w for w in waiters if w.offer.walltime_s % 2 == 0]
    assert len(looked_at) == 300
    assert len(parking) == 300


def test_too_many_unlike_offers_are_not_parked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shard.parking.MAX_OFFERS", 1)
    parking = _parked(_Waiter(NARROW))
    assert not parking.park(_Waiter(WIDE))
    assert not parking.park(_Waiter(WIDE, slots=(2, 1)))
    assert parking.offers() == [(1, NARROW)]
    assert parking.park(_Waiter(NARROW))
    assert parking.park(_Waiter(WIDE, slots=(2,)))
    assert len(parking) == 3


_steps = st.lists(
    st.tuples(
        st.sampled_from(["park", "leave", "wake"]),
        st.integers(0, 9),
        st.integers(1, 3),
        st.sampled_from([WIDE, NARROW]),
    ),
    max_size=40,
)


@given(_steps)
def test_it_counts_right_and_wakes_exactly_those_inside(steps: list[tuple[str, int, int, Offer]]) -> None:
    parking: Parking[_Waiter] = Parking()
    inside: dict[int, _Waiter] = {}
    known: dict[int, _Waiter] = {}
    for what, number, n_jobs, offer in steps:
        if what == "park" and number not in inside:
            known[number] = inside[number] = _Waiter(offer, slots=(number % 2, 5), n_jobs=n_jobs, arrived=number)
            parking.park(inside[number])
        elif what == "leave" and number in known:
            assert parking.leave(known[number]) == (inside.pop(number, None) is not None)
        elif what == "wake":
            fitting = [w for _, w in sorted(inside.items()) if w.offer == offer]
            woken = parking.wake(5, n_jobs, lambda one, offer=offer: one == offer)
            assert all(waiter in fitting for waiter in woken)
            wanted = sum(waiter.n_jobs for waiter in woken)
            assert wanted >= n_jobs or len(woken) == len(fitting)
            assert not woken or wanted - woken[-1].n_jobs < n_jobs
            for waiter in woken:
                del inside[waiter.arrived]
        assert len(parking) == len(inside)
