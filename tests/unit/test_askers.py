"""Who asked: sums over a window, the latest offers, and bounds on all of it."""

import asyncio
from typing import Any, cast

import msgspec
import pytest

from culm.errors import ClientFault
from culm.matching import Offer
from culm.wire import PilotInfo, Principal, ShardPilots, ShardPilotsAnswer
from shard.askers import BUCKET_S, MAX_OFFERS, MAX_PILOTS, WINDOW_S, Askers, Recent
from shard.database import Database

ADMIN = Principal(role="admin", subject="root", authority="central")
USER = Principal(role="user", subject="ann", authority="central", vo="atlas")
PILOT = Principal(role="pilot", subject="pilots", authority="central", queues=["*"])


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
    askers.asked(offer(1), PilotInfo(id="p1"))
    clock.at += 10.0
    askers.asked(offer(2), PilotInfo(id="p2"))
    askers.asked(offer(1), PilotInfo(id="p1"))
    assert askers.offers("q") == [offer(1), offer(2)]
    assert (askers.n_pilots("q"), askers.n_asked("q"), askers.last_at("q")) == (2, 3, clock.at)
    clock.at += WINDOW_S + BUCKET_S
    assert (askers.offers("q"), askers.n_pilots("q"), askers.n_asked("q")) == ([], 0, 0)
    assert askers.last_at("q") > 0


def test_what_is_remembered_is_bounded(askers: Askers) -> None:
    for n in range(3 * MAX_PILOTS):
        askers.asked(offer(n), PilotInfo(id=f"p{n}"))
    assert len(askers.offers("q")) == MAX_OFFERS
    assert askers.offers("q")[0] == offer(3 * MAX_PILOTS - 1)
    assert askers.n_pilots("q") == MAX_PILOTS


def test_what_was_given_is_counted_by_queue_and_by_slot(askers: Askers, clock: Hands) -> None:
    askers.given("q", "p1", [1, 1, 2])
    askers.given("other", "p1", [2])
    assert (askers.n_given("q"), askers.n_given("other")) == (3, 1)
    assert [askers.n_given_of(slot) for slot in (1, 2, 3)] == [2, 2, 0]
    clock.at += WINDOW_S + BUCKET_S
    assert (askers.n_given("q"), askers.n_given_of(2)) == (0, 0)


# --- pilots that were seen


LATER = 60.0


async def seen(askers: Askers, who: Principal = ADMIN, **changes: Any) -> ShardPilotsAnswer:
    call = ShardPilots(**({"principal": who, "since_s": 3600.0, "limit": 100} | changes))
    return await askers.seen("us1", "central", call)


async def test_what_pilots_asked_and_got_is_told_the_latest_first(askers: Askers, clock: Hands) -> None:
    askers.asked(offer(), PilotInfo(id="p1", host="old"))
    askers.given("q", "p1", [1, 1])
    clock.at += LATER
    for _ in range(2):
        askers.asked(offer(), PilotInfo(id="p2", host="node2"))
    clock.at += LATER
    askers.asked(offer(), PilotInfo(id="p1", host="node1"))
    answer = await seen(askers)
    assert [(one.id, one.host, one.n_asked, one.n_answered, one.n_jobs) for one in answer.pilots] == [
        ("p1", "node1", 2, 1, 2),
        ("p2", "node2", 2, 0, 0),
    ]
    first, second = answer.pilots
    assert (first.first_at, first.last_at, first.last_job_at) == (
        clock.at - 2 * LATER, clock.at, clock.at - 2 * LATER,
    )  # fmt: skip
    assert second.last_job_at is None
    [queue] = answer.queues
    assert (queue.queue, queue.last_asked_at, queue.n_pilots, queue.n_asked, queue.n_given) == ("q", clock.at, 2, 4, 2)


async def test_a_claim_that_gave_nothing_new_counts_as_no_answer(askers: Askers) -> None:
    askers.asked(offer(), PilotInfo(id="p1"))
    askers.given("q", "p1", [])
    [one] = (await seen(askers)).pilots
    assert (one.n_answered, one.last_job_at) == (0, None)


async def test_only_who_asked_lately_is_told_and_only_of_the_queues_that_are_meant(
    askers: Askers, clock: Hands
) -> None:
    askers.asked(offer(), PilotInfo(id="p1"))
    clock.at += LATER
    askers.asked(msgspec.structs.replace(offer(), queue="other"), PilotInfo(id="p2"))
    assert [one.id for one in (await seen(askers)).pilots] == ["p2", "p1"]
    assert [one.id for one in (await seen(askers, since_s=LATER - 1)).pilots] == ["p2"]
    named = await seen(askers, queues=["q", "never seen"])
    assert ([one.id for one in named.pilots], [one.queue for one in named.queues]) == (["p1"], ["q"])


async def test_beyond_the_limit_the_oldest_are_left_out_and_counted(askers: Askers, clock: Hands) -> None:
    for n in range(10):
        clock.at += 1
        askers.asked(offer(), PilotInfo(id=f"p{n}"))
    answer = await seen(askers, limit=3)
    assert ([one.id for one in answer.pilots], answer.n_left_out) == (["p9", "p8", "p7"], 7)


async def test_a_user_is_told_of_the_pilots_that_may_take_jobs_of_his_vo(askers: Askers) -> None:
    for name, vos in (("any", None), ("atlas", frozenset({"atlas"})), ("cms", frozenset({"cms", "lhcb"}))):
        askers.asked(msgspec.structs.replace(offer(), vos=vos), PilotInfo(id=name))
    assert {one.id for one in (await seen(askers, USER)).pilots} == {"any", "atlas"}
    assert {one.id for one in (await seen(askers)).pilots} == {"any", "atlas", "cms"}
    other = await seen(askers, msgspec.structs.replace(ADMIN, authority="CERN"))
    assert (other.pilots, other.queues, other.n_left_out) == ([], [], 0)
    with pytest.raises(ClientFault, match="role"):
        await seen(askers, PILOT)


async def test_a_page_of_many_pilots_lets_others_have_their_turn(askers: Askers, clock: Hands) -> None:
    for n in range(20):
        for pilot in range(MAX_PILOTS):
            askers.asked(msgspec.structs.replace(offer(), queue=f"q{n:02d}"), PilotInfo(id=f"p{pilot}"))
        clock.at += 1
    n_turns = 0

    async def others() -> None:
        nonlocal n_turns
        while True:
            n_turns += 1
            if n_turns == 3:
                # A pilot asks, and a computing queue is forgotten, in the middle of it.
                askers.asked(msgspec.structs.replace(offer(), queue="q19"), PilotInfo(id="p0", host="new"))
                del cast("Any", askers)._queues["q18"]
            await asyncio.sleep(0)

    working = asyncio.create_task(others())
    answer = await seen(askers, limit=3)
    working.cancel()
    assert n_turns >= 4
    assert (answer.pilots[0].queue, answer.pilots[0].id, answer.pilots[0].host) == ("q19", "p0", "new")
    assert len(answer.queues) == 19
    assert answer.n_left_out == 19 * MAX_PILOTS - 3


def test_all_that_was_given_is_counted_together(askers: Askers, clock: Hands) -> None:
    askers.given("q", "p1", [1, 1, 2])
    askers.given("other", "p2", [3])
    assert askers.n_given_in_all() == 4
    clock.at += WINDOW_S + BUCKET_S
    assert askers.n_given_in_all() == 0
