"""Each function of the dispatch queue on a real Valkey: order, cap and floor, refills, lost generations, rubbish."""

import itertools
import random
import secrets
from collections.abc import AsyncIterator
from typing import Any

import pytest

from culm.settings import DispatchSettings
from shard.dispatch_queue import DispatchQueue, QueueLostError, Taken, Wanted
from shard.hints import ClassKey, Hint
from tests import servers

A = ClassKey(1, 11)
B = ClassKey(1, 22)
CAP = 5


class _ManualClock:
    """The breaker's time."""

    def __init__(self) -> None:
        self.at = 0.0

    def now(self) -> float:
        return self.at

    def monotonic(self) -> float:
        return self.at


@pytest.fixture
def clock() -> _ManualClock:
    return _ManualClock()


@pytest.fixture
async def queue(valkey: servers.Server, clock: _ManualClock) -> AsyncIterator[DispatchQueue]:
    """A queue under a prefix of its own, with a generation."""
    settings = DispatchSettings(cap=CAP, redis_timeout_s=5.0)
    made = DispatchQueue(secrets.token_hex(6), f"unix://{valkey.socket}?db=15", settings, clock)
    assert await made.begin()
    yield made
    await made.close()


def _hint(identifier: int, ranking: int = 0, key: ClassKey = A) -> Hint:
    return Hint(ranking, identifier, key)


async def _take(queue: DispatchQueue, n_jobs: int, *keys: ClassKey) -> list[int]:
    [hints] = (await queue.take([Wanted(n_jobs, keys or (A,))])).hints
    return [hint.id for hint in hints]


async def _stored(queue: DispatchQueue, key: ClassKey = A) -> list[int]:
    return sorted(hint.id for hint in await queue.everything() if hint.key == key)


async def _refill(queue: DispatchQueue, best: list[Hint], *, more: bool, key: ClassKey = A) -> None:
    await queue.open_refill(key)
    await queue.close_refill(key, best, more=more)


# --- push and take ---------------------------------------------------------------------------------------------------


async def test_what_was_pushed_is_taken_once_the_best_first_then_the_oldest(queue: DispatchQueue) -> None:
    await queue.push([_hint(3, -10), _hint(1, -20), _hint(2, -20), _hint(4, 5)])
    assert await _take(queue, 3) == [1, 2, 3]
    assert await _take(queue, 3) == [4]
    assert await _take(queue, 3) == []


async def test_a_hint_comes_back_as_it_was_given(queue: DispatchQueue) -> None:
    hints = [_hint(2**53 - 1, -1_000_000), _hint(7, 2_000_000_000), _hint(5, 0)]
    await queue.push(hints)
    assert (await queue.take([Wanted(9, (A,))])).hints == [sorted(hints)]


async def test_a_push_may_be_repeated(queue: DispatchQueue) -> None:
    for _ in range(3):
        await queue.push([_hint(1), _hint(2)])
    assert await _take(queue, 9) == [1, 2]


async def test_pushing_and_removing_nothing_asks_nobody(queue: DispatchQueue) -> None:
    queue.generation = "not the stored one"
    await queue.push([])
    await queue.remove([])


async def test_several_classes_are_merged_in_the_order_of_dispatch(queue: DispatchQueue) -> None:
    await queue.push([_hint(1, -1, A), _hint(2, -3, B), _hint(3, -2, A), _hint(4, -2, B)])
    assert await _take(queue, 3, A, B) == [2, 3, 4]
    assert await _take(queue, 3, A, B) == [1]


async def test_each_group_is_answered_for_itself_and_nothing_twice(queue: DispatchQueue) -> None:
    await queue.push([_hint(1, -1, A), _hint(2, -2, A), _hint(3, 0, B)])
    taken = await queue.take([Wanted(1, (A,)), Wanted(5, (A, B)), Wanted(1, (B,))])
    assert [[hint.id for hint in some] for some in taken.hints] == [[2], [1, 3], []]


async def test_a_group_without_classes_gets_nothing(queue: DispatchQueue) -> None:
    await queue.push([_hint(1)])
    assert (await queue.take([Wanted(3, ())])).hints == [[]]
    assert await queue.take([]) == Taken([], [])


async def test_removed_hints_are_gone(queue: DispatchQueue) -> None:
    await queue.push([_hint(1), _hint(2), _hint(3, key=B)])
    await queue.remove([_hint(1), _hint(3, key=B), _hint(99)])
    assert await _take(queue, 9, A, B) == [2]


# --- cap and floor ---------------------------------------------------------------------------------------------------


async def test_a_full_class_keeps_its_best(queue: DispatchQueue) -> None:
    await queue.push([_hint(n, ranking=n % 4) for n in range(1, 12)])
    best = sorted((n % 4, n) for n in range(1, 12))[:CAP]
    assert await _take(queue, CAP) == [n for _, n in best]


async def test_what_ranks_below_the_floor_stays_away_and_what_ranks_above_comes_in(queue: DispatchQueue) -> None:
    await queue.push([_hint(n, ranking=10) for n in range(1, CAP + 3)])
    await queue.push([_hint(50, ranking=11), _hint(51, ranking=10), _hint(52, ranking=9)])
    stored = await _stored(queue)
    assert 52 in stored
    assert not {50, 51} & set(stored)
    assert len(stored) == CAP


async def test_below_a_floor_nothing_comes_in_even_when_all_was_taken(queue: DispatchQueue) -> None:
    """What is between the floor and the new one is in InnoDB only."""
    await queue.push([_hint(n, ranking=10) for n in range(1, CAP + 3)])
    assert len(await _take(queue, CAP)) == CAP
    await queue.push([_hint(60, ranking=12)])
    assert await _stored(queue) == []


async def test_a_class_that_runs_low_above_a_floor_is_told(queue: DispatchQueue) -> None:
    await queue.push([_hint(n) for n in range(1, CAP + 3)])
    assert (await queue.take([Wanted(1, (A,))])).low == []
    assert (await queue.take([Wanted(1, (A,))])).low == [A]


async def test_a_class_without_a_floor_is_never_low(queue: DispatchQueue) -> None:
    await queue.push([_hint(1), _hint(2)])
    assert (await queue.take([Wanted(2, (A,))])).low == []
    assert (await queue.take([Wanted(2, (A,))])).low == []


async def test_a_class_that_ran_dry_above_its_floor_holds_back_worse_ones_of_another(queue: DispatchQueue) -> None:
    """What is below A's floor ranks before B's: InnoDB must be asked."""
    await queue.push([_hint(n, -100) for n in range(1, CAP + 3)])
    await queue.push([_hint(70, -5, B)])
    taken = await queue.take([Wanted(CAP + 3, (A, B))])
    assert [hint.id for hint in taken.hints[0]] == [1, 2, 3, 4, 5]
    assert taken.low == [A]
    assert await _stored(queue, B) == [70]


async def test_better_ones_of_another_class_pass_a_class_that_ran_dry(queue: DispatchQueue) -> None:
    await queue.push([_hint(n, -100) for n in range(1, CAP + 3)])
    await queue.push([_hint(70, -500, B), _hint(71, -50, B)])
    assert await _take(queue, 20, A, B) == [70, 1, 2, 3, 4, 5]


async def test_random_pushes_and_takes_never_break_the_order(queue: DispatchQueue) -> None:
    """Against a list: whatever the cap cut off, no worse job is given before a better one that is in InnoDB."""
    dice = random.Random(11)
    waiting: list[Hint] = []
    numbers = itertools.count(1)
    for _ in range(150):
        if dice.random() < 0.6:
            made = [
                _hint(next(numbers), dice.randrange(6), dice.choice([A, B])) for _ in range(dice.randrange(1, CAP * 2))
            ]
            waiting += made
            await queue.push(made)
        else:
            wanted = dice.randrange(1, 8)
            taken = await queue.take([Wanted(wanted, (A, B))])
            waiting.sort()
            assert taken.hints[0] == waiting[: len(taken.hints[0])]
            del waiting[: len(taken.hints[0])]
            for key in taken.low:
                best = sorted(hint for hint in waiting if hint.key == key)
                await _refill(queue, best[:CAP], more=len(best) > CAP, key=key)
    assert waiting


# --- refills ---------------------------------------------------------------------------------------------------------


async def test_a_refill_takes_away_what_is_stale_and_brings_the_best(queue: DispatchQueue) -> None:
    await queue.push([_hint(1), _hint(2)])
    await _refill(queue, [_hint(2), _hint(3)], more=False)
    assert await _take(queue, 9) == [2, 3]


async def test_a_refill_of_an_empty_class_leaves_nothing_in_valkey(queue: DispatchQueue) -> None:
    await queue.push([_hint(n) for n in range(1, CAP + 3)])
    await _refill(queue, [], more=False)
    prefix = queue._prefix
    assert await queue._redis.keys(f"{prefix}*") == [f"{prefix}generation".encode()]


async def test_a_refill_lifts_the_floor_when_innodb_holds_no_more(queue: DispatchQueue) -> None:
    await queue.push([_hint(n) for n in range(1, CAP + 3)])
    await _refill(queue, [_hint(6), _hint(7)], more=False)
    await queue.push([_hint(90, ranking=99)])
    assert await _take(queue, 9) == [6, 7, 90]


async def test_a_refill_that_could_not_bring_all_sets_a_floor(queue: DispatchQueue) -> None:
    await _refill(queue, [_hint(1, 1), _hint(2, 2)], more=True)
    await queue.push([_hint(3, 3), _hint(4, 2), _hint(5, 1)])
    assert await _stored(queue) == [1, 2, 5]


async def test_what_is_pushed_during_a_refill_is_kept_if_it_ranks_above_the_floor(queue: DispatchQueue) -> None:
    await queue.open_refill(A)
    await queue.push([_hint(50, -9), _hint(51, 99), _hint(3, 2)])
    await queue.close_refill(A, [_hint(1, 1), _hint(2, 2)], more=True)
    assert await _stored(queue) == [1, 2, 50]


async def test_what_a_full_push_cut_off_during_a_refill_stays_below_the_floor(queue: DispatchQueue) -> None:
    """The refill read InnoDB before those were there: they rank between what it brings and what was kept."""
    await queue.open_refill(A)
    await queue.push([_hint(n, -10) for n in range(50, 50 + CAP + 3)])
    await queue.close_refill(A, [_hint(1, 0), _hint(2, 0)], more=False)
    assert await _take(queue, 20) == [50, 51, 52, 53, 54]
    await queue.push([_hint(99, 0)])
    assert await _stored(queue) == []


async def test_a_refill_keeps_to_its_class(queue: DispatchQueue) -> None:
    await queue.push([_hint(1), _hint(2, key=B)])
    await _refill(queue, [], more=False)
    assert await _take(queue, 9, A, B) == [2]


# --- lost and strange ------------------------------------------------------------------------------------------------


def _calls(queue: DispatchQueue) -> dict[str, Any]:
    return {
        "push": lambda: queue.push([_hint(1)]),
        "take": lambda: queue.take([Wanted(1, (A,))]),
        "open_refill": lambda: queue.open_refill(A),
        "close_refill": lambda: queue.close_refill(A, [_hint(1)], more=True),
        "remove": lambda: queue.remove([_hint(1)]),
    }


CALLS = ("push", "take", "open_refill", "close_refill", "remove")


@pytest.mark.parametrize("name", CALLS)
async def test_after_a_flush_nothing_is_done_before_a_new_generation(queue: DispatchQueue, name: str) -> None:
    before = queue.generation
    await queue._redis.flushdb()
    with pytest.raises(QueueLostError):
        await _calls(queue)[name]()
    assert queue.generation == ""
    assert await queue.everything() == []
    assert await queue.begin()
    assert queue.generation not in ("", before)
    await _calls(queue)[name]()


async def test_whoever_begins_anew_finds_nothing_of_those_before_him(
    queue: DispatchQueue, valkey: servers.Server
) -> None:
    """A restarted shard refills only classes that have ready jobs: what is left of others would stay for ever."""
    await queue.push([_hint(1)])
    assert not await queue.begin()
    other = DispatchQueue(queue._prefix.split(":")[1], f"unix://{valkey.socket}?db=15", queue.settings)
    assert await other.begin()
    assert await other.everything() == []
    with pytest.raises(QueueLostError):
        await queue.push([_hint(2)])
    await other.close()


@pytest.mark.parametrize("rubbish", [b"", b"\xff\xfe", b"rubbish", b"0" * 5000 + b"!"])
async def test_a_generation_that_is_rubbish_is_replaced(queue: DispatchQueue, rubbish: bytes) -> None:
    await queue._redis.set(f"{queue._prefix}generation", rubbish)
    with pytest.raises(QueueLostError):
        await queue.push([_hint(1)])
    assert await queue.begin()
    await queue.push([_hint(1)])
    assert await _take(queue, 1) == [1]


async def test_a_generation_of_another_type_is_replaced(queue: DispatchQueue) -> None:
    name = f"{queue._prefix}generation"
    await queue._redis.delete(name)
    await queue._redis.rpush(name, b"rubbish")
    with pytest.raises(QueueLostError):
        await queue.push([_hint(1)])
    assert await queue.begin()
    await queue.push([_hint(1)])


@pytest.mark.parametrize("part", ["ready:1:11", "floors"])
async def test_keys_of_another_type_are_a_lost_queue_that_a_refill_mends(
    queue: DispatchQueue, clock: _ManualClock, part: str
) -> None:
    await queue._redis.set(f"{queue._prefix}{part}", b"rubbish")
    with pytest.raises(QueueLostError):
        await queue.take([Wanted(1, (A,))])
    clock.at += queue.settings.breaker_s
    await queue.begin()
    await _refill(queue, [_hint(1), _hint(2)], more=True)
    assert await _take(queue, 9) == [1, 2]


@pytest.mark.parametrize("member", [b"", b"x", b"-1", b"1", b"9" * 5000, b"12345678901234567", b"\xff\x00"])
async def test_members_that_are_no_ids_are_passed_over(queue: DispatchQueue, member: bytes) -> None:
    await queue.push([_hint(1)])
    await queue._redis.zadd(f"{queue._prefix}ready:1:11", {member: -99})
    assert await queue.everything() == [_hint(1)]
    assert await _take(queue, 9) == [1]


@pytest.mark.parametrize("score", [float("inf"), float("-inf"), 1.5, 1e300])
async def test_strange_scores_do_no_harm(queue: DispatchQueue, score: float) -> None:
    await queue._redis.zadd(f"{queue._prefix}ready:1:11", {f"{7:016d}": score})
    taken = await queue.take([Wanted(3, (A,))])
    assert [hint.id for hint in taken.hints[0]] == [7]


@pytest.mark.parametrize("floor", [b"", b"rubbish", b"1:", b"nan:3", b"99999999999999999999:0000000000000001"])
async def test_a_floor_that_is_rubbish_is_none(queue: DispatchQueue, floor: bytes) -> None:
    await queue._redis.hset(f"{queue._prefix}floors", "1:11", floor)
    await queue.push([_hint(1)])
    assert await _take(queue, 1) == [1]


async def test_names_of_other_keys_under_the_prefix_are_not_read_as_classes(queue: DispatchQueue) -> None:
    for name in ("ready:x:1", "ready:1", "ready:", "ready:1:2:3"):
        await queue._redis.zadd(f"{queue._prefix}{name}", {f"{7:016d}": 1})
    assert await queue.everything() == []


async def test_after_a_failure_the_breaker_keeps_us_away_for_its_time(clock: _ManualClock) -> None:
    with servers.cache_server() as own:
        queue = DispatchQueue("x", f"unix://{own.socket}", DispatchSettings(breaker_s=3.0, redis_timeout_s=5.0), clock)
        assert await queue.begin()
        own.kill()
        with pytest.raises(QueueLostError):
            await queue.push([_hint(1)])
        assert not queue.available
        own.start()
        with pytest.raises(QueueLostError, match="breaker"):
            await queue.begin()
        clock.at += 3.0
        assert queue.available
        assert await queue.begin()
        await queue.push([_hint(1)])
        assert await _take(queue, 1) == [1]
        await queue.close()


async def test_one_that_does_not_answer_is_given_up_in_time(clock: _ManualClock) -> None:
    with servers.cache_server() as own:
        settings = DispatchSettings(redis_timeout_s=0.05)
        queue = DispatchQueue("x", f"unix://{own.socket}", settings, clock)
        blocker = DispatchQueue("y", f"unix://{own.socket}", DispatchSettings(), clock)
        assert await queue.begin()
        await blocker._redis.execute_command("CLIENT", "PAUSE", "10000", "ALL")
        with pytest.raises(QueueLostError):
            await queue.push([_hint(1)])
        assert not queue.available
        await queue.close()
        await blocker.close()


# --- top-ups ---------------------------------------------------------------------------------------------------------


async def _with_floor(queue: DispatchQueue) -> None:
    """1 to 5 are here, 6 and more are left to InnoDB."""
    await queue.push([_hint(n) for n in range(1, 8)])


async def test_a_top_up_adds_what_comes_next(queue: DispatchQueue) -> None:
    await _with_floor(queue)
    assert await _take(queue, 3) == [1, 2, 3]
    floor = await queue.open_top_up(A)
    assert floor == _hint(5)
    assert await queue.close_top_up(floor, [_hint(6), _hint(7)], more=True)
    assert await _stored(queue) == [4, 5, 6, 7]
    assert await queue.open_top_up(A) == _hint(7)


async def test_without_more_in_innodb_there_is_no_floor_any_more(queue: DispatchQueue) -> None:
    await _with_floor(queue)
    floor = await queue.open_top_up(A)
    assert floor is not None
    assert await queue.close_top_up(floor, [], more=False)
    assert await queue.open_top_up(A) is None
    await queue.push([_hint(9)])
    # The cap holds again.
    assert await _stored(queue) == [1, 2, 3, 4, 5]


async def test_what_is_pushed_meanwhile_is_kept_and_not_taken_before_its_turn(queue: DispatchQueue) -> None:
    await _with_floor(queue)
    assert await _take(queue, 3) == [1, 2, 3]
    floor = await queue.open_top_up(A)
    assert floor is not None
    await queue.push([_hint(9), _hint(2, ranking=-1)])
    # 6 to 8 are known to InnoDB alone: 9 must wait for them.
    assert await _take(queue, 9) == [2, 4, 5]
    assert await _take(queue, 9) == []
    assert await queue.close_top_up(floor, [_hint(6), _hint(7), _hint(8)], more=False)
    assert await _take(queue, 9) == [6, 7, 8, 9]


async def test_what_was_pushed_below_the_new_floor_is_innodbs(queue: DispatchQueue) -> None:
    await _with_floor(queue)
    assert await _take(queue, 4) == [1, 2, 3, 4]
    floor = await queue.open_top_up(A)
    assert floor is not None
    await queue.push([_hint(20)])
    assert await queue.close_top_up(floor, [_hint(6), _hint(7)], more=True)
    assert await _stored(queue) == [5, 6, 7]


async def test_a_top_up_of_a_class_that_was_refilled_meanwhile_adds_nothing(queue: DispatchQueue) -> None:
    await _with_floor(queue)
    floor = await queue.open_top_up(A)
    assert floor is not None
    await _refill(queue, [_hint(1), _hint(2)], more=True)
    assert not await queue.close_top_up(floor, [_hint(6)], more=False)
    assert await _stored(queue) == [1, 2]
    assert await queue.open_top_up(A) == _hint(2)


async def test_a_top_up_that_brings_more_than_the_cap_leaves_the_rest_to_innodb(queue: DispatchQueue) -> None:
    await _with_floor(queue)
    floor = await queue.open_top_up(A)
    assert floor is not None
    assert await queue.close_top_up(floor, [_hint(n) for n in range(6, 11)], more=False)
    assert await _stored(queue) == [1, 2, 3, 4, 5]
    assert await queue.open_top_up(A) == _hint(5)


async def test_a_refill_ends_a_top_up_that_was_begun(queue: DispatchQueue) -> None:
    await _with_floor(queue)
    assert await queue.open_top_up(A) is not None
    await _refill(queue, [_hint(n) for n in range(1, 6)], more=False)
    await queue.push([_hint(8)])
    assert await _stored(queue) == [1, 2, 3, 4, 5]
