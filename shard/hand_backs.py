"""Hand-backs: the jobs of a request whose client is gone are released, and a repeat of the request waits for that.

To find the leases of the first try while they are being taken back would be to lose them at once.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from culm.errors import CulmError

Release = Callable[[str, str], Awaitable[int]]
"""(subject, request id): give back what was granted and never seen; how many jobs."""
Key = tuple[str, str]
"""Subject and request id, without trailing spaces, which the database does not compare."""

log = logging.getLogger("shard.hand_backs")


class HandBacks:
    """Those of one shard process that are under way, the last one of each request."""

    def __init__(self, release: Release) -> None:
        self._release = release
        self._last: dict[Key, asyncio.Task[int]] = {}
        self._all: set[asyncio.Task[int]] = set()

    def __contains__(self, key: Key) -> bool:
        return key in self._last

    def begin(self, subject: str, request_id: str) -> "asyncio.Task[int]":
        """Release what a request got, in the background; how many jobs. Safe to retry: yes."""
        key = subject.rstrip(" "), request_id.rstrip(" ")
        task = self._last[key] = asyncio.get_running_loop().create_task(self._quietly(subject, request_id))
        self._all.add(task)
        task.add_done_callback(lambda done: self._ended(key, done))
        return task

    async def ended(self, key: Key) -> None:
        """Wait until none of a request is under way."""
        while key in self._last:
            await asyncio.wait([self._last[key]])

    async def stop(self) -> None:
        """Let all end."""
        await asyncio.gather(*self._all, return_exceptions=True)

    def _ended(self, key: Key, task: asyncio.Task[int]) -> None:
        self._all.discard(task)
        if self._last.get(key) is task:
            del self._last[key]

    async def _quietly(self, subject: str, request_id: str) -> int:
        try:
            return await self._release(subject, request_id)
        except CulmError as error:
            # The short first lease will do it.
            log.warning("could not give back request %s: %s", request_id, error)
            return 0
