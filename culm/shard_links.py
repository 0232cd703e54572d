"""The links to all shards, kept in step with the topology."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Final, TypeVar

import msgspec

from culm.errors import Bug, CulmError, Unavailable
from culm.link import LinkClient, LinkOptions
from culm.topology import Topology

A = TypeVar("A", bound=msgspec.Struct)

_ENCODER: Final = msgspec.msgpack.Encoder()


Orphan = Callable[[str, str, bytes, bytes], None]
"""(shard, verb, body, answer) of an answer whose caller is gone."""
Timed = Callable[[float], None]
"""Told how long each call took; see LinkOptions.timed."""


class ShardLinks:
    """One link per shard of the topology; `on_orphan` gets answers whose callers are gone.

    `timed` makes what is told the times of a shard's calls.
    """

    def __init__(
        self, topology: Callable[[], Topology], options: LinkOptions, timed: Callable[[str], Timed] | None = None
    ) -> None:
        self.on_orphan: Orphan = lambda _shard, _verb, _body, _answer: None
        self._topology = topology
        self._options = options
        self._timed = timed or (lambda _shard: options.timed)
        self._links: dict[str, LinkClient] = {}

    async def refresh(self) -> None:
        """Connect to new shards, leave those that are gone or moved to another address."""
        shards = self._topology().shards
        for name, link in list(self._links.items()):
            if name not in shards or shards[name].link != link.where:
                # Out first: while one waits for its end another call may come here.
                gone = self._links.pop(name, None)
                if gone is not None:
                    await gone.stop()
        for name, shard in shards.items():
            if name not in self._links:
                options = replace(self._options, orphan=partial(self._orphan, name), timed=self._timed(name))
                self._links[name] = LinkClient(name, shard.link, options)
                self._links[name].start()

    async def stop(self) -> None:
        """End all links."""
        await asyncio.gather(*(link.stop() for link in self._links.values()))

    async def ask(
        self,
        shard: str,
        verb: str,
        message: msgspec.Struct,
        answer: type[A],
        deadline_s: float,
        *,
        waits: bool = False,
    ) -> A:
        """One call; its decoded answer. `waits` as in LinkClient.call.

        Raises as LinkClient.call, Unavailable(shard_down) for an unknown shard, Bug for an answer that is not ours.
        """
        if shard not in self._links:
            # It may have joined a moment ago.
            await self.refresh()
        link = self._links.get(shard)
        if link is None:
            raise Unavailable("shard_down", f"shard {shard} is not known here yet", details={"shard": shard})
        if link.new:
            await link.wait_connected(min(deadline_s, self._options.stall_s))
        body = await link.call(verb, _ENCODER.encode(message), deadline_s, waits=waits)
        try:
            return msgspec.msgpack.decode(body, type=answer)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            # A CulmError, so that whoever asks many shards loses this one's answer only.
            raise Bug(f"shard {shard} answered {verb} with what is no {answer.__name__}: {error}") from None

    def begin(
        self, shard: str, verb: str, message: msgspec.Struct, deadline_s: float, *, waits: bool = False
    ) -> "asyncio.Future[bytes] | None":
        """One call as LinkClient.begin, its answer not decoded; None to a shard that `ask` would have to wait for.

        Raises as LinkClient.begin.
        """
        link = self._links.get(shard)
        if link is None or link.new:
            return None
        return link.begin(verb, _ENCODER.encode(message), deadline_s, waits=waits)

    def any_connected(self, shards: Iterable[str]) -> bool:
        """Whether at least one of these can be asked now."""
        return any(shard in self._links and self._links[shard].connected for shard in shards)

    async def who_answers(self, where: str, timeout_s: float) -> str:
        """The name of the shard at an address that need not be in the topology; "" if none answers in time."""
        link = LinkClient("", where, self._options)
        link.start()
        try:
            await link.wait_connected(timeout_s)
            return link.peer
        finally:
            await link.stop()

    async def ask_many(
        self, calls: Sequence[tuple[str, msgspec.Struct]], verb: str, answer: type[A], deadline_s: float
    ) -> list[A | CulmError]:
        """One call to each of several shards at once; per call its answer or its error."""

        async def one(shard: str, message: msgspec.Struct) -> A | CulmError:
            try:
                return await self.ask(shard, verb, message, answer, deadline_s)
            except CulmError as error:
                return error

        return await asyncio.gather(*(one(shard, message) for shard, message in calls))

    def _orphan(self, shard: str, verb: str, body: bytes, answer: bytes) -> None:
        self.on_orphan(shard, verb, body, answer)
