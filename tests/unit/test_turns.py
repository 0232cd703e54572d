"""Turns of workers: a batch at once, one beside it when it is worth it, and none held up by another."""

import asyncio

import pytest

from shard.turns import Turns

DEADLINE_S = 5.0


class _Line:
    def __init__(self, n_waiting: int = 0) -> None:
        self.n = n_waiting
        self.turns = Turns(lambda: self.n)

    def come(self, n: int) -> None:
        """So many more wait."""
        for _ in range(n):
            self.n += 1
            self.turns.look()

    async def may_begin(self) -> bool:
        """Whether a worker that comes now does not have to wait."""
        waiting = asyncio.ensure_future(self.turns.wait())
        for _ in range(3):
            await asyncio.sleep(0)
        begun = waiting.done()
        waiting.cancel()
        return begun


async def test_nobody_begins_with_nothing_and_anybody_with_the_first() -> None:
    line = _Line()
    assert not await line.may_begin()
    line.come(1)
    assert await line.may_begin()


async def test_who_waits_for_work_is_woken_by_it() -> None:
    line = _Line()
    waiting = [asyncio.ensure_future(line.turns.wait()) for _ in range(2)]
    line.come(1)
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED, timeout=DEADLINE_S)
    assert any(one.done() for one in waiting)
    line.turns.over()
    await asyncio.gather(*waiting)


async def test_beside_a_batch_another_begins_when_as_many_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shard.turns.OVERDUE_S", 600.0)
    line = _Line(8)
    with line.turns.batch(8):
        line.n = 0
        line.come(7)
        assert not await line.may_begin()
        line.come(1)
        assert await line.may_begin()
        with line.turns.batch(3):
            line.n = 2
            assert not await line.may_begin()
            # The smaller of the two counts.
            line.come(1)
            assert await line.may_begin()
            line.n = 1
        assert not await line.may_begin()
    assert await line.may_begin()


async def test_the_end_of_a_batch_wakes_who_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shard.turns.OVERDUE_S", 600.0)
    line = _Line()
    with line.turns.batch(5):
        line.come(2)
        waiting = asyncio.ensure_future(line.turns.wait())
        await asyncio.sleep(0)
        assert not waiting.done()
    async with asyncio.timeout(DEADLINE_S):
        await waiting


async def test_a_batch_that_is_held_up_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shard.turns.OVERDUE_S", 0.01)
    line = _Line()
    with line.turns.batch(100):
        line.come(1)
        async with asyncio.timeout(DEADLINE_S):
            await line.turns.wait()
        with line.turns.batch(1):
            line.n = 0
            assert not await line.may_begin()
            # The next one that comes has a time of its own.
            line.come(1)
            async with asyncio.timeout(DEADLINE_S):
                await line.turns.wait()


async def test_when_all_is_over_nobody_waits() -> None:
    line = _Line()
    waiting = asyncio.ensure_future(line.turns.wait())
    await asyncio.sleep(0)
    line.turns.over()
    async with asyncio.timeout(DEADLINE_S):
        await waiting
    assert await line.may_begin()
