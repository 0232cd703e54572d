"""What has just happened: the committed changes of state, numbered, for those who follow them live.

A notice, not the truth: it is kept in memory and bounded. Who asks for what is gone, or for another life of this
shard, is told to begin anew (`reset`), and reads what is stored.
"""

import asyncio
import secrets
import time
from collections import deque
from collections.abc import Sequence
from typing import Final

from culm.wire import Happening, ShardHappenings, ShardHappeningsAnswer

KEPT: Final = 20_000
MAX_PER_ANSWER: Final = 2000
MAX_WAIT_S: Final = 30.0


class Happenings:
    """The ring of one shard."""

    def __init__(self, kept: int = KEPT) -> None:
        self._ring: deque[Happening] = deque(maxlen=kept)
        self._generation = secrets.token_hex(4)
        self._n = 0
        """The number of the newest."""
        self._more = asyncio.Event()

    def add(self, happened: Sequence[Happening]) -> None:
        """Changes whose transaction was committed, in their order."""
        self._ring.extend(happened)
        self._n += len(happened)
        self._wake()

    def doubt(self) -> None:
        """Nobody knows whether a transaction with changes was committed: those who follow must look for themselves."""
        self._generation = secrets.token_hex(4)
        self._ring.clear()
        self._wake()

    async def since(self, call: ShardHappenings) -> ShardHappeningsAnswer:
        """What came after a position, as soon as there is something, or nothing after `wait_s`. Safe to retry: yes.

        The position of a call with generation "" is now.
        """
        if not call.generation:
            return self._answer([], reset=False, seq=self._n)
        deadline = asyncio.get_running_loop().time() + min(call.wait_s, MAX_WAIT_S)
        while True:
            if call.generation != self._generation or not self._n - len(self._ring) <= call.seq <= self._n:
                return self._answer([], reset=True, seq=self._n)
            if call.seq < self._n:
                first = len(self._ring) - (self._n - call.seq)
                some = [self._ring[n] for n in range(first, min(first + MAX_PER_ANSWER, len(self._ring)))]
                return self._answer(some, reset=False, seq=call.seq + len(some))
            more = self._more
            try:
                async with asyncio.timeout_at(deadline):
                    await more.wait()
            except TimeoutError:
                return self._answer([], reset=False, seq=call.seq)

    def _answer(self, some: list[Happening], *, reset: bool, seq: int) -> ShardHappeningsAnswer:
        return ShardHappeningsAnswer(generation=self._generation, seq=seq, reset=reset, happened=some, at=time.time())

    def _wake(self) -> None:
        self._more.set()
        self._more = asyncio.Event()
