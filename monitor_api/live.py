"""The event stream: one long poll per shard however many readers there are, a bounded queue per reader.

An event's id is the position in every shard, so that a reader who lost his connection goes on without a gap; where
that cannot be done he is told `reset`, and looks at what is stored. Who does not read is cut off, not waited for.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Final

import msgspec

from culm import access
from culm.errors import ClientFault, CulmError
from culm.shard_links import ShardLinks
from culm.telemetry import SHED
from culm.topology import authority_of_slot
from culm.topology_store import TopologyCache
from culm.wire import Happening, Principal, ShardHappenings, ShardHappeningsAnswer
from monitor_api.metrics import CUT_OFF, EVENT_READERS

WAIT_S: Final = 20.0
PAUSE_S: Final = 0.5
"""Before a shard that gave no answer is asked again."""
SETTLE_S: Final = 0.1
"""Between two asks of a busy shard: events of a tenth of a second come together."""
MAX_QUEUED: Final = 100
"""Answers of shards that a reader may have before him: ten seconds of a busy shard."""
MAX_READERS: Final = 1000
KEEP_ALIVE_S: Final = 15.0
MAX_ID_CHARS: Final = 4000

_FULL: Final = SHED.labels("event_readers")

log = logging.getLogger("monitor.live")

Position = tuple[str, int]
"""Generation and number."""


class _Reader:
    """One open stream."""

    def __init__(self, who: Principal) -> None:
        self.who = who
        self.queue: asyncio.Queue[tuple[str, Position, list[Happening] | None]] = asyncio.Queue(MAX_QUEUED)
        self.too_slow = False


class Live:
    """The streams of one monitor."""

    def __init__(self, topology: TopologyCache, links: ShardLinks, deadline_s: float) -> None:
        self._topology = topology
        self._links = links
        self._deadline_s = deadline_s
        self._readers: set[_Reader] = set()
        self._positions: dict[str, Position] = {}
        self._pollers: dict[str, asyncio.Task[None]] = {}

    async def stream(self, who: Principal, last_id: str) -> AsyncGenerator[bytes, None]:
        """The chunks of a stream (text/event-stream) from after `last_id`, or from now if it is "".

        Raises ClientFault (forbidden, bad_event_id, too_many_readers).
        """
        access.require_role(who, "user", "admin")
        wanted = parse_id(last_id)
        if len(self._readers) >= MAX_READERS:
            _FULL.inc()
            raise ClientFault("too_many_readers", "there are too many event streams", http_status=503)
        reader = _Reader(who)
        # Before the look at what was missed: nothing can fall in between.
        self._readers.add(reader)
        EVENT_READERS.set(len(self._readers))
        try:
            self._follow()
            seen: dict[str, Position] = {}
            async for chunk in self._missed(reader, wanted, seen):
                yield chunk
            # The whole position at once, so that a reader who sees nothing for an hour can still go on from here.
            yield _comment(seen)
            while not reader.too_slow:
                try:
                    async with asyncio.timeout(KEEP_ALIVE_S):
                        shard, position, some = await reader.queue.get()
                except TimeoutError:
                    yield b": still here\n\n"
                    continue
                for chunk in _chunks(reader, seen, shard, position, some):
                    yield chunk
            CUT_OFF.inc()
        finally:
            self._readers.discard(reader)
            EVENT_READERS.set(len(self._readers))
            if not self._readers:
                await self.stop()

    async def stop(self) -> None:
        """End the polls. Safe to retry: yes."""
        pollers, self._pollers = list(self._pollers.values()), {}
        self._positions.clear()
        for task in pollers:
            task.cancel()
        await asyncio.gather(*pollers, return_exceptions=True)

    async def _missed(
        self, reader: _Reader, wanted: dict[str, Position], seen: dict[str, Position]
    ) -> AsyncIterator[bytes]:
        """What came between the reader's position and now, shard by shard."""
        for shard in list(self._topology.current.shards):
            position = wanted.get(shard, ("", 0))
            while True:
                try:
                    answer = await self._ask(shard, position, 0.0)
                except CulmError:
                    # The poll goes on trying; where the reader was is where he still is.
                    if position[0]:
                        seen[shard] = position
                    break
                if answer.reset:
                    yield _reset(shard)
                before, position = position, (answer.generation, answer.seq)
                for chunk in _chunks(reader, seen, shard, position, answer.happened):
                    yield chunk
                seen[shard] = position
                if not answer.happened or before == position:
                    break

    def _follow(self) -> None:
        for shard in self._topology.current.shards:
            if shard not in self._pollers:
                self._pollers[shard] = asyncio.get_running_loop().create_task(self._poll(shard), name=f"live-{shard}")

    async def _poll(self, shard: str) -> None:
        """Follow one shard while there are readers; the guard is that every failure is only a pause."""
        while True:
            position = self._positions.get(shard, ("", 0))
            try:
                answer = await self._ask(shard, position, WAIT_S if position[0] else 0.0)
            except CulmError as error:
                log.info("no events of %s: %s", shard, error)
                await asyncio.sleep(PAUSE_S)
                continue
            except Exception:  # a poll must outlive every fault: its readers would wait for ever
                log.exception("the events of %s", shard)
                await asyncio.sleep(PAUSE_S)
                continue
            now = (answer.generation, answer.seq)
            self._positions[shard] = now
            if answer.reset:
                self._tell(shard, now, None)
            elif answer.happened:
                self._tell(shard, now, answer.happened)
                await asyncio.sleep(SETTLE_S)

    def _tell(self, shard: str, position: Position, some: list[Happening] | None) -> None:
        for reader in self._readers:
            try:
                reader.queue.put_nowait((shard, position, some))
            except asyncio.QueueFull:
                reader.too_slow = True

    async def _ask(self, shard: str, position: Position, wait_s: float) -> ShardHappeningsAnswer:
        call = ShardHappenings(generation=position[0], seq=position[1], wait_s=wait_s)
        return await self._links.ask(
            shard, "happenings", call, ShardHappeningsAnswer, self._deadline_s + wait_s, waits=wait_s > 0
        )


def parse_id(text: str) -> dict[str, Position]:
    """The positions in an event's id, `shard=generation.number,..`. Raises ClientFault(bad_event_id)."""
    found: dict[str, Position] = {}
    with contextlib.suppress(ValueError):
        if len(text) > MAX_ID_CHARS:
            raise ValueError
        for part in text.split(",") if text else []:
            shard, _, position = part.partition("=")
            generation, _, number = position.rpartition(".")
            if not shard or not generation or not number.isdecimal():
                raise ValueError
            found[shard] = (generation, int(number))
        return found
    raise ClientFault("bad_event_id", f"{text[:80]!r} is no event id of ours")


def event_id(seen: dict[str, Position]) -> str:
    """The id of an event after which so much was seen."""
    return ",".join(f"{shard}={generation}.{number}" for shard, (generation, number) in sorted(seen.items()))


def _chunks(
    reader: _Reader, seen: dict[str, Position], shard: str, position: Position, some: list[Happening] | None
) -> list[bytes]:
    """What a reader is sent of an answer; nothing twice, nothing that he may not read."""
    before = seen.get(shard)
    seen[shard] = position
    if some is None:
        return [_reset(shard)]
    first = position[1] - len(some)
    if before is not None and before[0] == position[0]:
        some = some[max(0, before[1] - first) :]
        if before[1] > position[1]:
            seen[shard] = before
            return []
        if before[1] < first:
            # The poll began after what the reader has seen last: he asks again for what lies between.
            return [_reset(shard)]
    shown = [one for one in some if _may_see(reader.who, one)]
    if not shown:
        return []
    data = msgspec.json.encode(shown).decode()
    return [f"id: {event_id(seen)}\nevent: jobs\ndata: {data}\n\n".encode()]


def _may_see(who: Principal, one: Happening) -> bool:
    return access.may_read(who, vo=one.vo, owner=one.owner, authority=authority_of_slot(one.slot))


def _reset(shard: str) -> bytes:
    return f"event: reset\ndata: {msgspec.json.encode({'shard': shard}).decode()}\n\n".encode()


def _comment(seen: dict[str, Position]) -> bytes:
    return f"id: {event_id(seen)}\nevent: position\ndata: {{}}\n\n".encode()
