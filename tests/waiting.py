"""Waiting in tests: on a condition, with a deadline, never for a fixed time."""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")

_POLL_S = 0.01


async def eventually(condition: Callable[[], T | Awaitable[T]], deadline_s: float, *, what: str = "") -> T:
    """Ask again until the condition is true; its value.

    Args:
        condition: a function or a coroutine function; what it raises is not swallowed.
        deadline_s: at most so long, in seconds.
        what: said when it did not come.

    Raises:
        AssertionError: with the last value, past the deadline.
    """
    end = time.monotonic() + deadline_s
    while True:
        value = condition()
        result: T = await value if inspect.isawaitable(value) else value
        if result:
            return result
        if time.monotonic() > end:
            raise AssertionError(_late(condition, result, deadline_s, what))
        await asyncio.sleep(_POLL_S)


def eventually_sync(condition: Callable[[], T], deadline_s: float, *, what: str = "") -> T:
    """The same for tests without an event loop."""
    end = time.monotonic() + deadline_s
    while True:
        result = condition()
        if result:
            return result
        if time.monotonic() > end:
            raise AssertionError(_late(condition, result, deadline_s, what))
        time.sleep(_POLL_S)


def _late(condition: Callable[[], object], result: object, deadline_s: float, what: str) -> str:
    name = what or getattr(condition, "__qualname__", repr(condition))
    return f"{name} did not become true in {deadline_s} s; last: {result!r}"
