"""The event stream: one long poll per shard however many readers there are, a bounded queue per reader.

An event's id is the position in every shard, so that a reader who lost his connection goes on without a gap; where
that cannot be done he is told `reset`, and looks at what is stored. Who does not read is cut off, not waited for; whose
token is not good any more is told so (`end`), and reads no further.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Final

import msgspec

from culm import access
from culm.errors import ClientFault, CulmError, Unavailable
from culm.shard_links import ShardLinks
from culm.telemetry import SHED
from culm.topology import authority_of_slot
from culm.topology_store import TopologyCache
from culm.wire import Happening, Principal, ShardHappenings, ShardHappeningsAnswer
from monitor_api.metrics import CUT_OFF, ENDED, EVENT_READERS

WAIT_S: Final = 20.0
PAUSE_S: Final = 0.5
"""Before a shard that gave no answer is asked again."""
SETTLE_S: Final = 0.1
"""Between two asks of a busy shard: events of a tenth of a second come together."""
MAX_QUEUED: Final = 100
"""Answers of shards that a reader may have before him: ten seconds of a busy shard."""
MAX_READERS: Final = 1000
MAX_OF_ACCOUNT: Final = 10
"""Streams of one account: nobody takes the places of all."""
KEEP_ALIVE_S: Final = 15.0
_STILL_HERE: Final = b": still here\n\n"
MAX_ID_CHARS: Final = 4000

_FULL: Final = SHED.labels("event_readers")

log = logging.getLogger("monitor.live")

Position = tuple[str, int]
"""Generation and number."""


Verify = Callable[[], Principal]
"""Who the token of a stream speaks for. Raises ClientFault where it is not good, or not any more."""
_Told = tuple[str, Position, list[Happening] | None]
"""What a shard said, up to which position; None: it does not know what came before that."""


class _Reader:
    """One open stream."""

    def __init__(self, verify: Verify) -> None:
        self.who = verify()
        self.queue: asyncio.Queue[_Told | None] = asyncio.Queue(MAX_QUEUED)
        """None is a call to look at what ends the stream."""
        self.too_slow = False
        self.refused: ClientFault | None = None
        """Why the token is not good any more."""
        self._verify = verify

    @property
    def over(self) -> bool:
        """Whether nothing more is to be read: asked before everything that is sent."""
        if self.refused is None:
            try:
                self._verify()
            except ClientFault as error:
                self.refused = error
        return self.too_slow or self.refused is not None

    def tell(self, told: _Told | None) -> None:
        """Never waits: who has so much before him is too slow."""
        try:
            self.queue.put_nowait(told)
        except asyncio.QueueFull:
            self.too_slow = True


class Live:
    """The streams of one monitor."""

    def __init__(self, topology: TopologyCache, links: ShardLinks, deadline_s: float) -> None:
        self._topology = topology
        self._links = links
        self._deadline_s = deadline_s
        self._readers: set[_Reader] = set()
        self._positions: dict[str, Position] = {}
        self._pollers: dict[str, asyncio.Task[None]] = {}

    async def stream(self, verify: Verify, last_id: str) -> AsyncGenerator[bytes, None]:
        """The chunks of a stream (text/event-stream) from after `last_id`, or from now if it is "".

        It ends, with the event `end`, as soon as `verify` refuses.

        Raises ClientFault (forbidden, bad_event_id, too_many_readers of one account, and what `verify` raises),
        Unavailable(too_many_readers).
        """
        reader = _Reader(verify)
        access.require_role(reader.who, "user", "admin")
        wanted = parse_id(last_id)
        self._require_room(reader.who.account)
        # Before the look at what was missed: nothing can fall in between.
        self._readers.add(reader)
        EVENT_READERS.set(len(self._readers))
        try:
            await self.follow()
            seen: dict[str, Position] = {}
            async for chunk in self._missed(reader, wanted, seen):
                yield chunk
            # The whole position at once, so that a reader who sees nothing for an hour can still go on from here.
            yield _comment(seen)
            while not reader.over:
                try:
                    async with asyncio.timeout(KEEP_ALIVE_S):
                        told = await reader.queue.get()
                except TimeoutError:
                    yield _STILL_HERE
                    continue
                # What was waiting when the token ended is not for him any more.
                for chunk in [] if told is None or reader.over else _chunks(reader.who, seen, *told):
                    yield chunk
            if reader.refused is not None:
                ENDED.inc()
                yield _end(reader.refused)
            else:
                CUT_OFF.inc()
        finally:
            self._readers.discard(reader)
            EVENT_READERS.set(len(self._readers))
            if not self._readers:
                await self.stop()

    async def follow(self) -> None:
        """One turn of a background loop: poll the shards of the topology, while anybody reads. Safe to retry: yes."""
        if not self._readers:
            return
        shards = self._topology.current.shards
        gone = [self._pollers.pop(shard) for shard in self._pollers.keys() - shards.keys()]
        for shard in self._positions.keys() - shards.keys():
            del self._positions[shard]
        for shard in shards.keys() - self._pollers.keys():
            self._pollers[shard] = asyncio.get_running_loop().create_task(self._poll(shard), name=f"live-{shard}")
        for task in gone:
            task.cancel()
        await asyncio.gather(*gone, return_exceptions=True)

    async def look_at_tokens(self) -> None:
        """One turn of a background loop: wake the readers whose tokens are not good any more."""
        for reader in self._readers:
            if reader.over:
                reader.tell(None)

    async def stop(self) -> None:
        """End the polls. Safe to retry: yes."""
        pollers, self._pollers = list(self._pollers.values()), {}
        self._positions.clear()
        for task in pollers:
            task.cancel()
        await asyncio.gather(*pollers, return_exceptions=True)

    def _require_room(self, account: str) -> None:
        if len(self._readers) >= MAX_READERS:
            _FULL.inc()
            raise Unavailable("too_many_readers", "there are too many event streams", retry_after_s=KEEP_ALIVE_S)
        if sum(reader.who.account == account for reader in self._readers) >= MAX_OF_ACCOUNT:
            _FULL.inc()
            told = f"{account} has {MAX_OF_ACCOUNT} event streams open: end one"
            raise ClientFault("too_many_readers", told, http_status=429)

    async def _missed(
        self, reader: _Reader, wanted: dict[str, Position], seen: dict[str, Position]
    ) -> AsyncIterator[bytes]:
        """What came between the reader's position and now, shard by shard."""
        for shard in list(self._topology.current.shards):
            position = wanted.get(shard, ("", 0))
            if position[0]:
                seen[shard] = position
            while not reader.over:
                try:
                    answer = await self._ask(shard, position, 0.0)
                except CulmError:
                    # The poll goes on trying; where the reader was is where he still is.
                    yield _STILL_HERE
                    break
                before, position = position, (answer.generation, answer.seq)
                if answer.reset:
                    yield _reset(shard)
                elif before[0]:
                    for chunk in _chunks(reader.who, seen, shard, position, answer.happened):
                        yield chunk
                seen[shard] = position
                if not answer.happened or self._is_at(shard, position):
                    break

    def _is_at(self, shard: str, position: Position) -> bool:
        """Whether the poll has told no more than that: what comes now waits in the reader's queue."""
        told = self._positions.get(shard, ("", 0))
        return told[0] == position[0] and told[1] <= position[1]

    async def _poll(self, shard: str) -> None:
        """Follow one shard while there are readers; the guard is that every failure is only a pause."""
        failed = False
        while True:
            position = self._positions.get(shard, ("", 0))
            try:
                answer = await self._ask(shard, position, WAIT_S if position[0] else 0.0)
            except CulmError as error:
                if not failed:
                    log.info("no events of %s: %s", shard, error)
                failed = True
                await asyncio.sleep(PAUSE_S)
                continue
            except Exception:  # a poll must outlive every fault: its readers would wait for ever
                log.exception("the events of %s", shard)
                await asyncio.sleep(PAUSE_S)
                continue
            failed = False
            now = (answer.generation, answer.seq)
            self._positions[shard] = now
            if answer.reset:
                self._tell(shard, now, None)
            elif answer.happened or not position[0]:
                # The first answer tells nothing but where it begins: a reader who was not there looks for himself.
                self._tell(shard, now, answer.happened)
                await asyncio.sleep(SETTLE_S)

    def _tell(self, shard: str, position: Position, some: list[Happening] | None) -> None:
        for reader in self._readers:
            reader.tell((shard, position, some))

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
    who: Principal, seen: dict[str, Position], shard: str, position: Position, some: list[Happening] | None
) -> list[bytes]:
    """What a reader is sent of an answer; nothing twice, nothing that he may not read."""
    before = seen.get(shard)
    seen[shard] = position
    if some is None or before is None or before[0] != position[0]:
        return [_reset(shard)]
    if before[1] > position[1]:
        seen[shard] = before
        return []
    first = position[1] - len(some)
    if before[1] < first:
        # The poll began after what the reader has seen last: he asks again for what lies between.
        return [_reset(shard)]
    shown = [one for one in some[before[1] - first :] if _may_see(who, one)]
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


def _end(why: ClientFault) -> bytes:
    return f"event: end\ndata: {msgspec.json.encode({'code': why.code}).decode()}\n\n".encode()
