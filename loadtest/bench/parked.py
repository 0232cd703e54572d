"""Very many parked long polls, and how fast one of them wakes: a process of its own, for its ten thousand connections.

`python -m loadtest.bench.parked FILE` reads an Order from its standard input, opens a connection per poll, writes the
line `parked` once all polls are sent, waits for a line on its standard input, then submits single jobs one after the
other and takes the time from each submit to the poll that it wakes; a Result goes into FILE. Both are MessagePack.
"""

import asyncio
import sys
import time
from pathlib import Path
from typing import Final

import msgspec
import uvloop

from culm.client import Client
from culm.wire import GetJobAnswer, JobSpec, SubmitRequest

WAKE_S: Final = 10.0
"""A poll that is not woken in this time is not woken."""
CONNECTING: Final = 200
"""Connections that are opened at once."""
_ANSWER: Final = msgspec.msgpack.Decoder(GetJobAnswer)


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """`polls`: the whole requests, head and body, one per connection; `jobs`: what is submitted, one at a time."""

    host: str
    port: int
    polls: list[bytes]
    user_token: str
    jobs: list[JobSpec]


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """The time from each submit to the poll that got its job, and how many polls were answered in all."""

    wakes_ms: list[float]
    n_answered: int


class _Poll(asyncio.Protocol):
    def __init__(self, run: "_Run") -> None:
        self._run = run
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._run.transports.append(transport)  # type: ignore[arg-type]

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, found, body = self._received.partition(b"\r\n\r\n")
        if not found:
            return
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        if len(body) >= length:
            self._run.answered(body)


class _Run:
    def __init__(self) -> None:
        self.transports: list[asyncio.Transport] = []
        self.answers: list[tuple[float, bytes]] = []
        self.woken = asyncio.Event()

    def answered(self, body: bytes) -> None:
        self.answers.append((time.perf_counter(), body))
        self.woken.set()


async def run(order: Order) -> Result:
    """Park, wait for the word, wake. Raises TimeoutError when a job wakes nobody, ValueError when it wakes another."""
    loop = asyncio.get_running_loop()
    work = _Run()
    for start in range(0, len(order.polls), CONNECTING):
        some = order.polls[start : start + CONNECTING]
        await asyncio.gather(*(loop.create_connection(lambda: _Poll(work), order.host, order.port) for _ in some))
    for transport, poll in zip(work.transports, order.polls, strict=True):
        transport.write(poll)
    sys.stdout.write("parked\n")
    sys.stdout.flush()
    await loop.run_in_executor(None, sys.stdin.buffer.readline)
    if work.answers:
        raise ValueError(f"{len(work.answers)} polls were answered although there was no job")
    wakes = []
    async with Client(f"http://{order.host}:{order.port}", order.user_token) as client:
        for number, job in enumerate(order.jobs):
            work.woken.clear()
            begun = time.perf_counter()
            request = SubmitRequest(idempotency_key=f"wake-{number}-{begun}", jobs=[job])
            [identifier] = (await client.submit(request)).ids
            async with asyncio.timeout(WAKE_S):
                await work.woken.wait()
            at, body = work.answers[-1]
            if [grant.id for grant in _ANSWER.decode(body).jobs] != [identifier]:
                raise ValueError("a poll was answered without the job that woke it")
            wakes.append((at - begun) * 1000)
    for transport in work.transports:
        transport.abort()
    return Result(wakes_ms=wakes, n_answered=len(work.answers))


def main() -> None:
    """Read the order, run it, write the result."""
    size = int.from_bytes(sys.stdin.buffer.read(8), "big")
    order = msgspec.msgpack.decode(sys.stdin.buffer.read(size), type=Order)
    result = uvloop.run(run(order))
    Path(sys.argv[1]).write_bytes(msgspec.msgpack.encode(result))


if __name__ == "__main__":
    main()
