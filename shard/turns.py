"""When a worker begins its next batch: batches grow with the load by themselves.

At once if no batch is under way. Beside one that is, only when as many wait as are in it: two batches of half of the
requests each cost less than one of nearly all and many of a few. And whatever is under way, when the first of those
that wait has waited for OVERDUE_S: a batch that is held up in the database holds up no other.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

OVERDUE_S: Final = 0.02


class Turns:
    """The turns of the workers that share one line; `n_waiting` says how many stand in it."""

    def __init__(self, n_waiting: Callable[[], int]) -> None:
        self._n_waiting = n_waiting
        self._under_way: list[int] = []
        self._may = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._is_overdue = False
        self._is_over = False

    def look(self) -> None:
        """Somebody came into the line, or back into it."""
        if self._may_begin():
            self._may.set()
        elif self._timer is None and self._n_waiting():
            self._timer = asyncio.get_running_loop().call_later(OVERDUE_S, self._overdue)

    async def wait(self) -> None:
        """Wait until a batch may begin, or all is over."""
        while not self._is_over and not self._may_begin():
            self._may.clear()
            await self._may.wait()

    @contextmanager
    def batch(self, size: int) -> Iterator[None]:
        """One batch, from its beginning to its end."""
        self._is_overdue = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._under_way.append(size)
        try:
            # Who is left behind by a batch that was full does not wait for its end.
            self.look()
            yield
        finally:
            self._under_way.remove(size)
            self.look()

    def over(self) -> None:
        """No worker waits any more."""
        self._is_over = True
        self._may.set()
        if self._timer is not None:
            self._timer.cancel()

    def _may_begin(self) -> bool:
        n_waiting = self._n_waiting()
        return n_waiting > 0 and (self._is_overdue or n_waiting >= min(self._under_way, default=1))

    def _overdue(self) -> None:
        self._timer = None
        self._is_overdue = True
        self._may.set()
