"""The benchmark's client: many connections in one process of its own, each asking again as soon as it is answered.

`python -m loadtest.bench.traffic FILE` reads an Order from its standard input and writes a Result into FILE, both as
MessagePack. It is as cheap as can be, for it runs beside what it measures; its processor time is reported and never
counted with the others'.
"""

import asyncio
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec
import uvloop

STALL_S: Final = 60.0
"""No answer at all for so long ends the run with an error."""


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What to send.

    `bodies`: each is sent once, by whichever connection is free; then the run is over.
    """

    host: str
    port: int
    path: str
    token: str
    content_type: str
    bodies: list[bytes]
    n_clients: int
    rate: float = 0.0
    """Requests per second at most, all clients together; 0: as fast as they are answered."""


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What came back, in the order of the answers."""

    wall_s: float
    cpu_s: float
    n_requests: int
    latencies_ms: list[float]
    """Of those that were answered with 200."""
    statuses: dict[int, int]
    answers: list[bytes]
    refused_ms: list[float] = []
    """The latencies of the others."""


class _Client(asyncio.Protocol):
    """One connection; `next_body` gives its next request, or None when there is no more."""

    def __init__(self, run: "_Run") -> None:
        self._run = run
        self._received = b""
        self._sent_at = 0.0
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        received = self._received + data if self._received else data
        end = received.find(b"\r\n\r\n")
        if end < 0:
            self._received = received
            return
        head = received[:end].lower()
        at = head.find(b"content-length: ")
        stop = head.find(b"\r\n", at)
        length = int(head[at + 16 : stop if stop > 0 else None])
        if len(received) < end + 4 + length:
            self._received = received
            return
        self._received = b""
        self._run.answered(int(received[9:12]), received[end + 4 :], time.perf_counter() - self._sent_at)
        self.ask()

    def ask(self) -> None:
        """Send the next request, or be done."""
        pause_s = self._run.pause_s()
        if pause_s > 0:
            asyncio.get_running_loop().call_later(pause_s, self._send)
        else:
            self._send()

    def _send(self) -> None:
        request = self._run.next_request()
        if request is None or self.transport is None:
            self._run.idle()
            return
        self._sent_at = time.perf_counter()
        self.transport.write(request)

    def connection_lost(self, _exc: Exception | None) -> None:
        self._run.lost()


class _Run:
    def __init__(self, order: Order, done: asyncio.Event) -> None:
        self._head = (
            f"POST {order.path} HTTP/1.1\r\nHost: {order.host}:{order.port}\r\nAuthorization: Bearer {order.token}\r\n"
            f"Content-Type: {order.content_type}\r\nAccept: {order.content_type}\r\n"
        ).encode()
        self._bodies = iter(order.bodies)
        self._n_idle = 0
        self._rate = order.rate
        self._began = time.perf_counter()
        self._n_begun = 0
        self._n_clients = order.n_clients
        self._done = done
        self.n_lost = 0
        self.latencies: list[float] = []
        self.refused: list[float] = []
        self.statuses: dict[int, int] = {}
        self.answers: list[bytes] = []

    def pause_s(self) -> float:
        """How long the next request has to wait for the rate to hold."""
        if not self._rate:
            return 0.0
        self._n_begun += 1
        return self._began + self._n_begun / self._rate - time.perf_counter()

    def next_request(self) -> bytes | None:
        body = next(self._bodies, None)
        return None if body is None else b"%sContent-Length: %d\r\n\r\n%s" % (self._head, len(body), body)

    def answered(self, status: int, body: bytes, seconds: float) -> None:
        (self.latencies if status == 200 else self.refused).append(seconds * 1000)
        self.statuses[status] = self.statuses.get(status, 0) + 1
        self.answers.append(body)

    def idle(self) -> None:
        self._n_idle += 1
        if self._n_idle == self._n_clients:
            self._done.set()

    def lost(self) -> None:
        if not self._done.is_set():
            self.n_lost += 1
            self._done.set()


async def run(order: Order) -> Result:
    """Send all. Raises ConnectionError when a connection is lost, TimeoutError when nothing is answered for long."""
    done = asyncio.Event()
    work = _Run(order, done)
    loop = asyncio.get_running_loop()
    make: Callable[[], _Client] = lambda: _Client(work)  # noqa: E731
    clients = [(await loop.create_connection(make, order.host, order.port))[1] for _ in range(order.n_clients)]
    cpu, wall = time.process_time(), time.perf_counter()
    for client in clients:
        client.ask()
    seen = -1
    while not done.is_set():
        try:
            async with asyncio.timeout(STALL_S):
                await done.wait()
        except TimeoutError:
            if len(work.answers) == seen:
                raise
            seen = len(work.answers)
    if work.n_lost:
        raise ConnectionError("the server closed a connection")
    wall_s, cpu_s = time.perf_counter() - wall, time.process_time() - cpu
    for client in clients:
        if client.transport is not None:
            client.transport.abort()
    return Result(
        wall_s=wall_s,
        cpu_s=cpu_s,
        n_requests=len(work.answers),
        latencies_ms=work.latencies,
        statuses=work.statuses,
        answers=work.answers,
        refused_ms=work.refused,
    )


def main() -> None:
    """Read the order, run it, write the result."""
    order = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=Order)
    result = uvloop.run(run(order))
    Path(sys.argv[1]).write_bytes(msgspec.msgpack.encode(result))


if __name__ == "__main__":
    main()
