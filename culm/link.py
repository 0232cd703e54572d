"""The link: framed MessagePack between a router (or the monitor) and a shard, many calls at once on one connection.

The frames are those of `culm.frames`. The connecting side sends CALL, CANCEL and PING, the accepting side ANSWER, ERROR
and PONG; both begin with HELLO. Every CALL gets exactly one ANSWER or ERROR, also after a CANCEL, so that an answer
that crossed the CANCEL is seen by the caller's side as an orphan and can be given back.
"""

import asyncio
import contextlib
import itertools
import logging
import ssl
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from culm import address
from culm.errors import Bug, ClientFault, CulmError, Unavailable
from culm.frames import Connection, Frame, Kind, decode_error, encode_error
from culm.settings import TlsSettings
from culm.telemetry import OTHER_NAME, SHED

ROUTER: Final = "router"
MONITOR: Final = "monitor"
HELLO_TIMEOUT_S: Final = 2.0
MAX_CALLS_PER_CONNECTION: Final = 65_536
"""A guard: above what a client's window and waiting calls come to."""

_FULL_WINDOW: Final = SHED.labels("link_window")
_FULL_WAITING: Final = SHED.labels("link_waiting")
_FULL_LINK: Final = SHED.labels("link_calls")

log = logging.getLogger("culm.link")


# --- the accepting side ----------------------------------------------------------------------------------------------

Handler = Callable[[str, bytes, float], Awaitable[bytes]]
"""(verb, body, deadline in seconds from now) -> answer's body; raises CulmError."""
Begun = tuple["asyncio.Future[Any]", Callable[["asyncio.Future[Any]"], bytes]]
Begin = Callable[[str, bytes], Begun | None]
"""(verb, body) -> what will be done, and what makes the answer's body of it then and raises CulmError; None for a call
that the handler is to answer. Cancelled where the caller is gone. For the calls that are many: they need no task."""
Undelivered = Callable[[str, bytes, bytes], None]
"""(verb, body, answer): the answer could not be sent, its effect should be undone."""


class LinkServer:
    """Accepts connections and runs one task per call that `begin` does not take."""

    def __init__(
        self, name: str, handler: Handler, undelivered: Undelivered, begin: Begin = lambda _verb, _body: None
    ) -> None:
        self.name = name
        self.handler = handler
        self.begin = begin
        self.undelivered = undelivered
        self.connections: set[_ServerConnection] = set()
        self.routers_since: float | None = None
        """Monotonic time since which there is a router without a break; None while there is none."""
        self._server: asyncio.Server | None = None

    async def start(self, where: str, tls: TlsSettings | None = None) -> None:
        """Listen. Raises ClientFault (address.parse, address.prepare_socket) and OSError."""
        loop = asyncio.get_running_loop()
        target = address.parse(where)
        if target.kind == "unix":
            address.prepare_socket(target.path)
            self._server = await loop.create_unix_server(self._connection, target.path)
            return
        context = address.server_tls(tls) if target.kind == "tls" else None
        self._server = await loop.create_server(self._connection, target.host, target.port, ssl=context)

    async def stop(self, timeout_s: float) -> None:
        """Accept no more, let the calls under way end for at most `timeout_s`, then cancel them."""
        if self._server is not None:
            self._server.close()
        tasks = [task for connection in self.connections for task in connection.tasks.values()]
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=timeout_s)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late, timeout=1.0)
        for connection in list(self.connections):
            connection.close()

    def look(self) -> None:
        """Somebody has greeted, or gone."""
        if not any(one.peer not in ("", MONITOR) for one in self.connections):
            self.routers_since = None
        elif self.routers_since is None:
            self.routers_since = time.monotonic()

    def _connection(self) -> "_ServerConnection":
        return _ServerConnection(self)


class _ServerConnection(Connection):
    def __init__(self, server: LinkServer) -> None:
        super().__init__(server.name)
        self.server = server
        self.tasks: dict[int, asyncio.Future[Any]] = {}
        self._hello_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.server.connections.add(self)
        self._hello_timer = self._loop.call_later(HELLO_TIMEOUT_S, self._no_hello)

    def connection_lost(self, _exc: Exception | None) -> None:
        super().connection_lost(_exc)
        self.server.connections.discard(self)
        self.server.look()
        if self._hello_timer is not None:
            self._hello_timer.cancel()
        for task in list(self.tasks.values()):
            task.cancel()

    def ready(self) -> None:
        self.server.look()

    def handle(self, frame: Frame) -> bool:
        match frame.kind:
            case Kind.CALL:
                self._call(frame)
            case Kind.CANCEL:
                task = self.tasks.get(frame.stream)
                if task is not None:
                    task.cancel()
            case Kind.PING:
                self.send(Frame(Kind.PONG, frame.stream))
            case _:
                self.refuse(f"{frame.kind.name} is not for this side")
                return False
        return True

    def _no_hello(self) -> None:
        if not self.peer:
            self.refuse("no HELLO in time")

    def _call(self, frame: Frame) -> None:
        if frame.stream in self.tasks:
            self.refuse(f"stream {frame.stream} is in use")
            return
        if len(self.tasks) >= MAX_CALLS_PER_CONNECTION:
            _FULL_LINK.inc()
            self._send_error(frame.stream, Unavailable("overloaded", "too many calls on this link"))
            return
        try:
            begun = self.server.begin(frame.verb, frame.body)
        except CulmError as error:
            self._send_error(frame.stream, error)
            return
        if begun is not None:
            self.tasks[frame.stream] = begun[0]
            begun[0].add_done_callback(partial(self._done, frame, begun[1]))
            return
        task = self.tasks[frame.stream] = self._loop.create_task(self._run(frame))
        task.add_done_callback(partial(self._ended, frame.stream))

    def _done(
        self, frame: Frame, finish: Callable[["asyncio.Future[Any]"], bytes], future: "asyncio.Future[Any]"
    ) -> None:
        self.tasks.pop(frame.stream, None)
        try:
            answer = finish(future)
        except asyncio.CancelledError:
            self._send_error(frame.stream, Unavailable("cancelled", "the call was cancelled"))
        except CulmError as error:
            self._send_error(frame.stream, error)
        except Exception:  # as in _run
            log.exception("link %s: %s failed", self.name, frame.verb)
            self._send_error(frame.stream, Bug(f"{frame.verb} failed, see the log of {self.name}"))
        else:
            self._answer(frame, answer)

    def _ended(self, stream: int, task: asyncio.Task[None]) -> None:
        self.tasks.pop(stream, None)
        if task.cancelled():
            # By a CANCEL in the same read as the CALL, before its first step: it is owed its one answer too.
            self._send_error(stream, Unavailable("cancelled", "the call was cancelled"))

    async def _run(self, frame: Frame) -> None:
        try:
            answer = await self.server.handler(frame.verb, frame.body, frame.deadline_ms / 1000)
            self._answer(frame, answer)
        except asyncio.CancelledError:
            # Either the caller's CANCEL, which is owed its one answer, or the connection or the process ends.
            self._send_error(frame.stream, Unavailable("cancelled", "the call was cancelled"))
        except CulmError as error:
            self._send_error(frame.stream, error)
        except Exception:  # the last guard of a call: whatever it was must not end the connection of all others
            log.exception("link %s: %s failed", self.name, frame.verb)
            self._send_error(frame.stream, Bug(f"{frame.verb} failed, see the log of {self.name}"))

    def _answer(self, call: Frame, answer: bytes) -> None:
        if self.transport is not None and not self.transport.is_closing():
            if self.is_full:
                self._send_error(call.stream, Unavailable("overloaded", "the answers before this one are not taken"))
            else:
                try:
                    self.send(Frame(Kind.ANSWER, call.stream, body=answer))
                except ClientFault as error:  # larger than a frame may be
                    self._send_error(call.stream, error)
                else:
                    return
        self.server.undelivered(call.verb, call.body, answer)

    def _send_error(self, stream: int, error: CulmError) -> None:
        self.send(Frame(Kind.ERROR, stream, body=encode_error(error)))


# --- the connecting side ---------------------------------------------------------------------------------------------


@dataclass
class _Call:
    verb: str
    body: bytes
    answer: asyncio.Future[bytes]
    waits: bool


@dataclass(frozen=True)
class LinkOptions:
    """How a client of the link behaves."""

    stall_s: float = 0.6
    """No byte for so long after a ping: the shard is taken for dead."""
    window: int = 4096
    """Calls under way at most, not counting those that wait; beyond it Unavailable(overloaded)."""
    waiting: int = 20_000
    """Calls that wait for something to happen at most (long polls); beyond it Unavailable(overloaded)."""
    tls: TlsSettings | None = None
    says: str = ROUTER
    """Who we are: pilots speak by way of routers, which a monitor is not."""
    orphan: Callable[[str, bytes, bytes], None] = field(default=lambda _verb, _body, _answer: None)
    """Called with (verb, body, answer) when an answer comes for a caller that is gone."""
    timed: Callable[[float], None] = field(default=lambda _elapsed_s: None)
    """Called with the time of each call that was not cancelled and does not wait, whatever came of it."""


class LinkClient:
    """One connection to one shard that is made again whenever it breaks; never more than one at a time.

    Who greets with another name than `name` is not asked anything: an address that is used again, or that two names
    share, would answer for two shards. A `name` of "" takes whoever is there.
    """

    def __init__(self, name: str, where: str, options: LinkOptions) -> None:
        self.name = name
        self.where = where
        self.options = options
        self._connection: _ClientConnection | None = None
        self._streams = itertools.count(1)
        self._up = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._never_up = True
        self._new_until = 0.0
        self._stranger = ""
        """Who answered at the address at the last try, if it was another one."""
        if name:
            # There from the start, as 0.
            OTHER_NAME.labels(name)

    @property
    def connected(self) -> bool:
        """Whether a call would leave now."""
        return self._connection is not None

    @property
    def peer(self) -> str:
        """The name that the other side gave, "" while there is no connection."""
        return self._connection.peer if self._connection is not None else ""

    @property
    def new(self) -> bool:
        """Whether it is on its way to its first connection: a shard that has just joined is not down."""
        return self._never_up and asyncio.get_running_loop().time() < self._new_until

    def start(self) -> None:
        """Connect, and keep connected, in the background."""
        if self._keeper is None:
            self._new_until = asyncio.get_running_loop().time() + self.options.stall_s
            self._keeper = asyncio.get_running_loop().create_task(self._keep())

    async def stop(self) -> None:
        """End the connection; calls under way fail with Unavailable."""
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
            self._keeper = None

    async def wait_connected(self, timeout_s: float) -> bool:
        """Wait for the connection at most so long; whether there is one."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._up.wait()
        return self.connected

    async def call(self, verb: str, body: bytes, deadline_s: float, *, waits: bool = False) -> bytes:
        """Ask the shard; the answer's body. A call that `waits` there leaves the window to the others.

        Raises:
            Unavailable: shard_down (nothing was sent), outcome_unknown, deadline, overloaded.
            CulmError: whatever the shard answered.

        Safe to retry: as the verb is. When the caller is cancelled the shard is told.
        """
        answer = self.begin(verb, body, deadline_s, waits=waits)
        try:
            return await answer
        except asyncio.CancelledError:
            # An answer that came in the same turn of the loop: nobody else will see it.
            if not answer.cancelled() and answer.exception() is None:
                self.options.orphan(verb, body, answer.result())
            raise

    def begin(self, verb: str, body: bytes, deadline_s: float, *, waits: bool = False) -> "asyncio.Future[bytes]":
        """The same as a future. Who cancels it is gone: the shard is told.

        Raises Unavailable: shard_down (nothing was sent), overloaded; the rest is the future's.
        """
        connection = self._connection
        if connection is None:
            told = f": {self._stranger} answers at {self.where}" if self._stranger else ""
            raise Unavailable("shard_down", f"shard {self.name} is not reachable{told}", details={"shard": self.name})
        n_waiting = connection.n_waiting
        if n_waiting >= self.options.waiting if waits else len(connection.calls) - n_waiting >= self.options.window:
            (_FULL_WAITING if waits else _FULL_WINDOW).inc()
            raise Unavailable("overloaded", f"too many requests under way to shard {self.name}")
        if connection.is_full:
            raise Unavailable("overloaded", f"shard {self.name} has not taken the requests before this one")
        loop = asyncio.get_running_loop()
        stream = next(self._streams)
        call = _Call(verb, body, loop.create_future(), waits)
        connection.send(Frame(Kind.CALL, stream, verb, int(deadline_s * 1000), body))
        connection.calls[stream] = call
        connection.n_waiting += waits
        timer = loop.call_later(deadline_s, self._too_late, connection, stream, call, deadline_s)
        sent_at = None if waits else time.perf_counter()
        call.answer.add_done_callback(partial(self._ended, connection, stream, timer, sent_at))
        return call.answer

    def _ended(
        self,
        connection: "_ClientConnection",
        stream: int,
        timer: asyncio.TimerHandle,
        sent_at: float | None,
        answer: "asyncio.Future[bytes]",
    ) -> None:
        """`sent_at` is None of a call that waits."""
        timer.cancel()
        if answer.cancelled():
            connection.send(Frame(Kind.CANCEL, stream))
        elif sent_at is not None:
            self.options.timed(time.perf_counter() - sent_at)

    def _too_late(self, connection: "_ClientConnection", stream: int, call: "_Call", deadline_s: float) -> None:
        if not call.answer.done():
            text = f"shard {self.name} gave no answer in {deadline_s:.1f} s"
            call.answer.set_exception(Unavailable("deadline", text, details={"shard": self.name}))
            connection.send(Frame(Kind.CANCEL, stream))

    async def _keep(self) -> None:
        pause_s = 0.05
        try:
            while True:
                connection = await self._connect()
                if connection is not None:
                    pause_s = 0.05
                    self._connection = connection
                    self._never_up = False
                    self._up.set()
                    await self._watch(connection)
                    self._forget(connection)
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 1.5, 1.0)
        finally:
            if self._connection is not None:
                self._connection.close()
                self._forget(self._connection)

    async def _connect(self) -> "_ClientConnection | None":
        loop = asyncio.get_running_loop()
        connection = _ClientConnection(self.name, self.options)
        welcome = False
        try:
            target = address.parse(self.where)
            async with asyncio.timeout(self.options.stall_s):
                if target.kind == "unix":
                    await loop.create_unix_connection(lambda: connection, target.path)
                else:
                    context = address.client_tls(self.options.tls) if target.kind == "tls" else None
                    await loop.create_connection(lambda: connection, target.host, target.port, ssl=context)
                await connection.greeted.wait()
                welcome = self._is_meant(connection.peer)
        except (OSError, TimeoutError, ssl.SSLError, ClientFault) as error:
            log.debug("link to %s: %s", self.name, error)
        finally:
            # A stopped process still accepts: without this each try would leave an open connection behind.
            if not welcome and connection.transport is not None:
                connection.transport.abort()
        return connection if welcome else None

    def _is_meant(self, peer: str) -> bool:
        """Whether the shard that greeted is the one that the topology names; one under two names counts twice."""
        if self.name in {"", peer}:
            self._stranger = ""
            return True
        OTHER_NAME.labels(self.name).inc()
        if peer != self._stranger:
            log.error("link to %s: the shard at %s is %s: nothing is asked there", self.name, self.where, peer[:128])
        self._stranger = peer[:128]
        return False

    async def _watch(self, connection: "_ClientConnection") -> None:
        """Ping until the connection is lost, or silent for longer than the stall time after a ping."""
        loop = asyncio.get_running_loop()
        interval_s = self.options.stall_s / 4
        for number in itertools.count(1):
            pinged_at = loop.time()
            connection.send(Frame(Kind.PING, number))
            while connection.heard_at < pinged_at:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(interval_s):
                        await connection.lost.wait()
                        return
                if connection.heard_at < pinged_at and loop.time() - pinged_at > self.options.stall_s:
                    log.warning("link to %s: no sign of life in %.1f s", self.name, self.options.stall_s)
                    return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval_s):
                    await connection.lost.wait()
                    return

    def _forget(self, connection: "_ClientConnection") -> None:
        self._connection = None
        self._up.clear()
        if connection.transport is not None:
            connection.transport.abort()
        connection.fail_all(self.name)


class _ClientConnection(Connection):
    def __init__(self, name: str, options: LinkOptions) -> None:
        super().__init__(name, options.says)
        self.calls: dict[int, _Call] = {}
        self.n_waiting = 0
        self.greeted = asyncio.Event()
        self.lost = asyncio.Event()
        self._orphan = options.orphan

    def ready(self) -> None:
        self.greeted.set()

    def connection_lost(self, _exc: Exception | None) -> None:
        super().connection_lost(_exc)
        self.lost.set()

    def handle(self, frame: Frame) -> bool:
        if frame.kind is Kind.PONG:
            return True
        if frame.kind not in (Kind.ANSWER, Kind.ERROR):
            self.refuse(f"{frame.kind.name} is not for this side")
            return False
        call = self.calls.pop(frame.stream, None)
        # Not before its answer: thousands that hang up at once are no calls under way that others must wait for.
        self.n_waiting -= call is not None and call.waits
        if call is None:
            log.warning("link to %s: an answer for stream %d, which nobody asked", self.name, frame.stream)
        elif call.answer.done():
            # The caller timed out or was cancelled, and the answer crossed our CANCEL.
            if frame.kind is Kind.ANSWER:
                self._orphan(call.verb, call.body, frame.body)
        elif frame.kind is Kind.ANSWER:
            call.answer.set_result(frame.body)
        else:
            call.answer.set_exception(decode_error(frame.body))
        return True

    def fail_all(self, shard: str) -> None:
        """The connection is gone: the outcome of what was under way is unknown."""
        calls, self.calls = self.calls, {}
        self.n_waiting = 0
        for call in calls.values():
            if not call.answer.done():
                call.answer.set_exception(
                    Unavailable("outcome_unknown", f"the link to shard {shard} broke", details={"shard": shard})
                )
