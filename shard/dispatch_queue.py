"""The Redis-cached dispatch queue: hints of which jobs are ready, best first. The only module that imports redis.

Nothing here is believed: a hint is verified by the claim in InnoDB. Every failure, time-out, flush or strange value
ends in `QueueLostError`; dispatch then reads InnoDB until the refill has made the classes whole again.
"""

import asyncio
import logging
import re
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Final

import redis.asyncio as redis
from redis.commands.core import AsyncScript
from redis.exceptions import RedisError

from culm.clock import Clock, SystemClock
from culm.settings import DispatchSettings
from shard.hints import ClassKey, Hint
from shard.metrics import REDIS_FAILURES, REDIS_OPEN

LOW_PART: Final = 4
"""A class is low when less than this part of the cap is left of it: there must be enough while more is fetched."""
_ID_DIGITS: Final = 16
_NAME: Final = re.compile(r"^-- name: (\w+)$", re.MULTILINE)

log = logging.getLogger("shard.dispatch_queue")


class QueueLostError(Exception):
    """The dispatch queue did not answer, or it is not the one that we filled. Never leaves the shard."""


@dataclass(frozen=True)
class Wanted:
    """So many jobs, from any of these classes."""

    n_jobs: int
    keys: tuple[ClassKey, ...]


@dataclass(frozen=True)
class Taken:
    """The hints for each Wanted, in the order of dispatch, and the classes that need a refill."""

    hints: list[list[Hint]]
    low: list[ClassKey]


class DispatchQueue:
    """One shard's hints. After a failure the breaker keeps us away for `breaker_s`."""

    def __init__(self, shard: str, url: str, settings: DispatchSettings, clock: Clock | None = None) -> None:
        self.settings = settings
        self.generation = ""
        self._prefix = f"culm:{shard}:"
        self._clock: Clock = clock or SystemClock()
        self._closed_until = 0.0
        self._redis = redis.Redis.from_url(
            url, socket_timeout=settings.redis_timeout_s * 4, socket_connect_timeout=settings.redis_timeout_s * 4
        )
        self._scripts = {name: self._redis.register_script(text) for name, text in _load_scripts().items()}

    @property
    def available(self) -> bool:
        """False while the breaker is open."""
        return self._clock.monotonic() >= self._closed_until

    async def begin(self) -> bool:
        """Go on with the generation that we know, or begin an empty one; True then: all classes need a refill.

        Raises QueueLostError. Safe to retry: yes.
        """
        answer: bytes = await self._call("begin", [uuid.uuid4().hex])
        stored = answer.decode()
        changed = stored != self.generation
        self.generation = stored
        return changed

    async def push(self, hints: Iterable[Hint]) -> None:
        """Add hints of committed ready rows. Raises QueueLostError. Safe to retry: yes."""
        arguments: list[Any] = [self.settings.cap]
        for hint in hints:
            arguments += (_class(hint.key), hint.ranking, _member(hint.id))
        if len(arguments) > 1:
            await self._call("push", arguments)

    async def take(self, wanted: Sequence[Wanted]) -> Taken:
        """Take the best hints of each group out of the queue. Raises QueueLostError; what was taken then is lost."""
        arguments: list[Any] = [self.settings.cap // LOW_PART]
        for group in wanted:
            arguments += (group.n_jobs, len(group.keys), *map(_class, group.keys))
        answer = await self._call("take", arguments)
        hints = [_hints(flat) for flat in answer[1:-1]]
        return Taken(hints, [key for key in map(_key, answer[-1]) if key])

    async def open_refill(self, key: ClassKey) -> None:
        """Begin to make a class whole: from now until `close_refill` every push is kept. Raises QueueLostError."""
        await self._call("open_refill", [_class(key)])

    async def close_refill(self, key: ClassKey, best: Sequence[Hint], *, more: bool) -> None:
        """End it with the best of InnoDB; `more` if InnoDB holds further ones. Raises QueueLostError."""
        arguments: list[Any] = [_class(key), int(more)]
        for hint in best:
            arguments += (hint.ranking, _member(hint.id))
        await self._call("close_refill", arguments)

    async def open_top_up(self, key: ClassKey) -> Hint | None:
        """Begin to add what comes next; the worst hint that is surely here, below which InnoDB is to be read.

        None where everything is here. Until `close_top_up` every push is kept. Raises QueueLostError.
        """
        answer = await self._call("open_top_up", [_class(key)])
        return None if len(answer) == 1 else Hint(int(answer[1]), int(answer[2]), key)

    async def close_top_up(self, floor: Hint, following: Sequence[Hint], *, more: bool) -> bool:
        """End it with what InnoDB has below `floor`; `more` if it holds further ones. Raises QueueLostError.

        False if the floor is another one by now, and nothing was added.
        """
        arguments: list[Any] = [_class(floor.key), self.settings.cap, int(more), floor.ranking, _member(floor.id)]
        for hint in following:
            arguments += (hint.ranking, _member(hint.id))
        return bool((await self._call("close_top_up", arguments))[0] == 0)

    async def remove(self, hints: Iterable[Hint]) -> None:
        """Forget hints of jobs that are not ready any more. Raises QueueLostError. Safe to retry: yes."""
        arguments: list[Any] = []
        for hint in hints:
            arguments += (_class(hint.key), _member(hint.id))
        if arguments:
            await self._call("remove", arguments)

    async def classes(self) -> list[ClassKey]:
        """The classes that hints are stored of. Raises QueueLostError. Safe to retry: yes."""
        if not self.available:
            raise QueueLostError("the breaker is open")
        start = f"{self._prefix}ready:"
        try:
            names = [name async for name in self._redis.scan_iter(match=f"{start}*", count=1000)]
        except (RedisError, OSError) as error:
            raise QueueLostError("classes") from error
        return [key for name in names if (key := _key(name.removeprefix(start.encode())))]

    async def everything(self) -> list[Hint]:
        """Every hint that is stored, for the audit. Raises QueueLostError. Safe to retry: yes."""
        found: list[Hint] = []
        try:
            for key in await self.classes():
                name = f"{self._prefix}ready:{_class(key)}"
                pairs: list[Any] = await self._redis.zrange(name, 0, -1, withscores=True)
                found += [Hint(int(score), int(member), key) for member, score in pairs if _is_member(member)]
        except (RedisError, OSError) as error:
            raise QueueLostError("everything") from error
        return found

    async def close(self) -> None:
        """Close the connections."""
        await self._redis.aclose()

    async def _call(self, name: str, arguments: list[Any]) -> Any:
        if not self.available:
            raise QueueLostError("the breaker is open")
        script: AsyncScript = self._scripts[name]
        try:
            async with asyncio.timeout(self.settings.redis_timeout_s):
                answer = await script(keys=[self._prefix], args=[self.generation, *arguments])
        except (RedisError, OSError, TimeoutError, UnicodeDecodeError) as error:
            REDIS_FAILURES.inc()
            REDIS_OPEN.set(1)
            self.generation = ""
            self._closed_until = self._clock.monotonic() + self.settings.breaker_s
            log.warning("dispatch queue: %s failed: %s", name, type(error).__name__)
            raise QueueLostError(name) from error
        REDIS_OPEN.set(0)
        if isinstance(answer, list) and answer[0] == -1:
            self.generation = ""
            raise QueueLostError("another generation")
        return answer


def _load_scripts() -> dict[str, str]:
    text = resources.files("shard").joinpath("lua/dispatch_queue.lua").read_text(encoding="utf-8")
    pieces = _NAME.split(text)
    bodies = dict(zip(pieces[1::2], pieces[2::2], strict=True))
    common = bodies.pop("common")
    return {name: common + body for name, body in bodies.items()}


def _class(key: ClassKey) -> str:
    return f"{key.slot}:{key.class_id}"


def _member(identifier: int) -> str:
    return f"{identifier:0{_ID_DIGITS}d}"


def _is_member(text: bytes) -> bool:
    return len(text) == _ID_DIGITS and text.isdigit()


def _key(text: bytes) -> ClassKey | None:
    slot, _, class_id = text.decode(errors="replace").partition(":")
    return ClassKey(int(slot), int(class_id)) if slot.isdecimal() and class_id.isdecimal() else None


def _hints(flat: Sequence[bytes]) -> list[Hint]:
    """Rubbish is passed over: a hint that cannot be one is worth nothing."""
    found = []
    for class_text, ranking, member in zip(flat[::3], flat[1::3], flat[2::3], strict=True):
        key = _key(class_text)
        if key and _is_member(member):
            found.append(Hint(int(ranking), int(member), key))
    return found
