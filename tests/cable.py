"""The network between a pilot and a router, which a test can cut: an HTTP proxy in the test's event loop."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from tests.servers import free_ports


@dataclass
class Passed:
    """One request that the router has answered, and what it said."""

    verb: str
    request: dict[str, Any]
    answer: dict[str, Any]
    delivered: bool


@dataclass
class Cable:
    """Every request of the client has a connection of its own, as urllib does it."""

    target: str
    url: str
    swallow: set[str] = field(default_factory=set)
    """Verbs whose requests reach the router, and whose answers get lost."""
    cut: set[str] = field(default_factory=set)
    """Verbs that do not reach the router."""
    n_jobs: int = 1
    """How many jobs a get_job asks for, whatever the client wrote."""
    refused: list[str] = field(default_factory=list)
    """The verbs that were cut, one for each try."""
    asked: list[str] = field(default_factory=list)
    """The verbs that went to the router, answered or not."""
    passed: list[Passed] = field(default_factory=list)

    def requests(self, verb: str) -> list[dict[str, Any]]:
        """What the router was asked, in order."""
        return [passed.request for passed in self.passed if passed.verb == verb]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                await self._pass_on(reader, writer)
        finally:
            writer.close()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        verb = head.split(b" ", 2)[1].rpartition(b"/")[2].decode()
        body = await reader.readexactly(_length(head))
        if verb in self.cut:
            self.refused.append(verb)
            return
        self.asked.append(verb)
        if verb == "get_job" and self.n_jobs > 1:
            wider = json.dumps(json.loads(body) | {"n_jobs": self.n_jobs}).encode()
            head = head.replace(b": %d\r\n" % len(body), b": %d\r\n" % len(wider))
            body = wider
        answer = await self._ask(head + body, reader)
        if answer is None:
            return
        delivered = verb not in self.swallow
        if delivered:
            writer.write(answer)
            await writer.drain()
        self.passed.append(Passed(verb, json.loads(body), json.loads(answer.partition(b"\r\n\r\n")[2]), delivered))

    async def _ask(self, request: bytes, client: asyncio.StreamReader) -> bytes | None:
        """The router's answer; None if the client has hung up meanwhile, which the router is told."""
        parts = urlsplit(self.target)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        writer.write(request)
        answered = asyncio.ensure_future(reader.read())
        gone = asyncio.ensure_future(client.read(1))
        try:
            await asyncio.wait({answered, gone}, return_when=asyncio.FIRST_COMPLETED)
            return answered.result() if answered.done() else None
        finally:
            for task in (answered, gone):
                task.cancel()
            await asyncio.gather(answered, gone, return_exceptions=True)
            writer.close()


def _length(head: bytes) -> int:
    [length] = [line.partition(b":")[2] for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
    return int(length)


@asynccontextmanager
async def cable(target: str) -> AsyncIterator[Cable]:
    """A way to a router that can be cut."""
    port = free_ports(1)
    laid = Cable(target, f"http://127.0.0.1:{port}")
    server = await asyncio.start_server(laid.serve, "127.0.0.1", port)
    try:
        yield laid
    finally:
        server.close()
