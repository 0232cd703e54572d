"""Who asked: sums over a window, the latest offers, and bounds on all of it."""

from typing import Any, cast

import pytest

from culm.matching import Offer
from shard.askers import BUCKET_S, MAX_OFFERS, MAX_PILOTS, WINDOW_S, Askers, Recent
from shard.database import Database


class Hands:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.at = 1_000_000.0

    def now(self) -> float:
        return self.at

    def monotonic(self) -> float:
        return self.at


def offer(memory_mb: int = 0) -> Offer:
    return Offer(queue="q", labels=frozenset({"user"}), memory_mb=memory_mb)


@pytest.fixture
def clock() -> Hands:
    return Hands()


@pytest.fixture
def askers(clock: Hands) -> Askers:
    return Askers(cast("Database", None), clock)


def test_a_sum_forgets_what_lies_before_its_window() -> None:
    recent = Recent()
    for second in range(1000):
        recent.add(float(second), 1)
    assert WINDOW_S - BUCKET_S <= recent.total(999.0) <= WINDOW_S
    assert len(cast("Any", recent)._buckets) <= WINDOW_S / BUCKET_S
    assert recent.total(999.0 + WINDOW_S) == 0


def test_the_latest_offers_of_a_queue_are_known_for_a_while(askers: Askers, clock: Hands) -> None:
    assert (askers.offers("q"), askers.last_at("q"), askers.n_pilots("q")) == ([], 0.0, 0)
    askers.asked(offer(1), "p1")
    clock.at += 10.0
    askers.asked(offer(2), "p2")
    askers.asked(offer(1), "p1")
    assert askers.offers("q") == [offer(1), offer(2)]
    assert (askers.n_pilots("q"), askers.n_asked("q"), askers.last_at("q")) == (2, 3, clock.at)
    clock.at += WINDOW_S + BUCKET_S
    assert (askers.offers("q"), askers.n_pilots("q"), askers.n_asked("q")) == ([], 0, 0)
    assert askers.last_at("q") > 0


def test_what_is_remembered_is_bounded(askers: Askers) -> None:
    for n in range(3 * MAX_PILOTS):
        askers.asked(offer(n), f"p{n}")
    assert len(askers.offers("q")) == MAX_OFFERS
    assert askers.offers("q")[0] == offer(3 * MAX_PILOTS - 1)
    assert askers.n_pilots("q") == MAX_PILOTS


def test_what_was_given_is_counted_by_queue_and_by_slot(askers: Askers, clock: Hands) -> None:
    askers.given("q", [1, 1, 2])
    askers.given("other", [2])
    assert (askers.n_given("q"), askers.n_given("other")) == (3, 1)
    assert [askers.n_given_of(slot) for slot in (1, 2, 3)] == [2, 2, 0]
    clock.at += WINDOW_S + BUCKET_S
    assert (askers.n_given("q"), askers.n_given_of(2)) == (0, 0)
