"""The listening socket of a worker, with a bound on the connections behind it."""

import asyncio
import select
import socket
import ssl
from collections.abc import Callable
from typing import Final

import msgspec
from aiohttp import web

from culm.errors import Conflict, Unavailable
from culm.frames import error_body

BACKLOG: Final = 4096
LINGER_S: Final = 1.0
"""How long a refused client may take to read why."""
RETRY_AFTER_S: Final = 1.0
KEEPALIVE_S: Final = 75.0
"""A connection on which nothing is asked for so long is closed."""


def require_free(host: str, port: int) -> None:
    """Raises Conflict(port_busy) if anybody listens there: the workers' sockets would share the port with him."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            raise Conflict("port_busy", f"cannot listen at {host}:{port}: {error.strerror}") from None


def bound(host: str, port: int) -> socket.socket:
    """A socket that shares the port with the other workers. Raises OSError."""
    shared = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    shared.bind((host, port))
    return shared


async def listen(
    server: web.Server,
    connection: Callable[[], asyncio.BaseProtocol],
    at: socket.socket,
    max_connections: int,
    tls: ssl.SSLContext | None = None,
    *,
    shed: Callable[[], None] = lambda: None,
) -> asyncio.Server:
    """Serve each client with a `connection`; who comes when `max_connections` are open gets 503 and is shown out.

    `shed` is called then. This module is imported before it is known where the metrics are kept: it may define none.
    """

    def next_protocol() -> asyncio.BaseProtocol:
        if len(server.connections) < max_connections:
            return connection()
        shed()
        return _Refusal()

    return await asyncio.get_running_loop().create_server(next_protocol, sock=at, backlog=BACKLOG, ssl=tls)


def has_hung_up(transport: asyncio.BaseTransport | None) -> bool:
    """Whether the client is gone, as the kernel knows it now: the event loop hears of it some turns later."""
    if transport is None or transport.is_closing():
        return True
    watched = select.poll()
    watched.register(transport.get_extra_info("socket").fileno(), select.POLLRDHUP)
    return bool(watched.poll(0))


class _Refusal(asyncio.Protocol):
    """Answers the first bytes of a request, whatever they are, and ends the connection."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._answered = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        self._timer = asyncio.get_running_loop().call_later(LINGER_S, transport.abort)  # type: ignore[attr-defined]

    def data_received(self, _data: bytes) -> None:
        # Half closed, not closed: unread bytes of a closed socket would cost the client our answer.
        if self._transport is not None and not self._answered:
            self._answered = True
            self._transport.write(_ANSWER)
            if self._transport.can_write_eof():
                self._transport.write_eof()

    def connection_lost(self, _exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()


def _answer() -> bytes:
    error = error_body(Unavailable("too_many_connections", "this worker has no room", retry_after_s=RETRY_AFTER_S))
    body = msgspec.json.encode({"error": error})
    head = (
        "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nConnection: close\r\n"
        f"Retry-After: {RETRY_AFTER_S:.0f}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


_ANSWER: Final = _answer()
