"""The fast lane: what pilots ask all day, without a web framework's request for each.

A connection is aiohttp's own RequestHandler. Where the bytes that came are exactly one complete request for a hot verb,
with a head that aiohttp's parser has read as such before, it is served here; whatever else comes, now or later in that
request, is passed on to aiohttp byte for byte, and the connection stays with it. So nobody but aiohttp ever judges
what is unusual, and both ways give the same answers (tests/integration/test_lane.py compares them).

The lane keeps no more than one request under way on a connection, holds back what was sent ahead of its answer, and
stops reading meanwhile.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable
from typing import Any, Final, NamedTuple

import msgspec
from aiohttp import HttpVersion11, web
from aiohttp.base_protocol import BaseProtocol
from aiohttp.helpers import rfc822_formatted_time
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.http_parser import HttpRequestParser
from aiohttp.web_protocol import RequestHandler

from culm import access, get_job_times, telemetry
from culm.errors import Bug, ClientFault, CulmError, Moved
from culm.matching import Offer
from culm.tokens import Verifier
from culm.topology import Topology
from culm.wire import (
    MAX_BODY_BYTES,
    GetJobAnswer,
    GetJobRequest,
    HeartbeatRequest,
    LeaseTimes,
    Principal,
    ReportRequest,
    ShardGetJob,
    SlotRef,
)
from router import dialects, door, pilots
from router.forward import Forward
from router.resolve import lease_times, offer_of, pilot_slots

MAX_HEAD_BYTES: Final = 4096
MAX_HEADS: Final = 4096
"""Heads that are remembered: those of one client are alike but for the length."""
MAX_HELD_BYTES: Final = 256 << 10
"""Of a request that came in part; a larger one is for aiohttp."""
HOLD_S: Final = 1.0
"""So long its rest may take to come; then aiohttp waits for it."""
MAX_PLACES: Final = 10_000
"""Remembered answers to where the jobs of a pilot like this one are."""

_SEE_LOG: Final = "the request failed, see the log of the router"

log = logging.getLogger("router.lane")

_KINDS: Final[dict[str, type[msgspec.Struct]]] = {
    "get_job": GetJobRequest,
    "heartbeat": HeartbeatRequest,
    "report": ReportRequest,
}
_VERBS: Final = {f"/v1/{verb}": verb for verb in _KINDS}
_EMPTY: Final = msgspec.msgpack.encode(GetJobAnswer())
_ANSWER: Final = msgspec.msgpack.Decoder(GetJobAnswer)


class Head(NamedTuple):
    """What a head says, of the few there are for the hot verbs."""

    verb: str
    dialect: str
    authorization: str
    n_bytes: int
    """Of the body."""


class _Place(NamedTuple):
    """Where the jobs of pilots like one are: on one shard."""

    shard: str
    slots: list[SlotRef]
    offer: Offer
    lease: LeaseTimes


class Lane:
    """What the connections of one worker share."""

    def __init__(self, forward: Forward, verifier: Verifier, orphans: pilots.Orphans) -> None:
        self._forward = forward
        self._verifier = verifier
        self._orphans = orphans
        self._heads: dict[bytes, Head] = {}
        self._places: dict[tuple[object, ...], _Place] = {}
        self._placed_by: Topology | None = None
        self._decoders: dict[tuple[str, str], Any] = {
            (dialect, verb): decoder(kind)
            for verb, kind in _KINDS.items()
            for dialect, decoder in (
                (dialects.JSON, msgspec.json.Decoder),
                (dialects.MSGPACK, msgspec.msgpack.Decoder),
            )
        }

    def head(self, data: bytes) -> Head | None:
        """What these bytes, up to the empty line, say; None for a head that is aiohttp's to judge."""
        known = self._heads.get(data)
        if known is None and len(data) <= MAX_HEAD_BYTES:
            known = read_head(data)
            if known is not None:
                if len(self._heads) >= MAX_HEADS:
                    self._heads.clear()
                self._heads[data] = known
        return known

    def serve(self, connection: "Connection", head: Head, body: bytes) -> bool:
        """Begin to answer; False for a request that is refused, which is aiohttp's to say."""
        try:
            principal = self._verifier.verify(head.authorization)
            message = self._decoders[head.dialect, head.verb].decode(body)
        except (ClientFault, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return False
        asked = _Asked(self, connection, head, principal=principal, message=message)
        if head.verb != "get_job":
            asked.run()
            return True
        try:
            begun = self._begin(principal, head.authorization, message)
        except CulmError as error:
            asked.fail(error)
            return True
        if begun is None:
            asked.run()
        else:
            future, asked.shard = begun
            connection.under_way = future
            future.add_done_callback(asked.answered)
        return True

    def _begin(
        self, principal: Principal, authorization: str, request: GetJobRequest
    ) -> "tuple[asyncio.Future[bytes], str] | None":
        """Ask the one shard there is for this pilot; None where there are several, or a word to say about it."""
        place = self._place(principal, authorization, request)
        if place is None:
            return None
        message = ShardGetJob(
            slots=place.slots,
            request_id=request.request_id,
            subject=principal.account,
            offer=place.offer,
            pilot=request.pilot,
            lease=place.lease,
            n_jobs=request.n_jobs,
            wait_s=request.wait_s,
        )
        deadline_s = self._forward.deadline_s + request.wait_s
        future = self._forward.links.begin(place.shard, "get_job", message, deadline_s, waits=request.wait_s > 0)
        return None if future is None else (future, place.shard)

    def _place(self, principal: Principal, authorization: str, request: GetJobRequest) -> _Place | None:
        topology = self._forward.topology
        if topology is not self._placed_by or len(self._places) >= MAX_PLACES:
            self._placed_by = topology
            self._places.clear()
        limits = (request.cores, request.memory_mb, request.disk_mb, request.walltime_s)
        key = (authorization, request.queue, request.label, request.pilot.type, *limits)
        place = self._places.get(key)
        if place is None:
            place = self._find(topology, principal, request)
            if place is not None:
                self._places[key] = place
        return place

    def _find(self, topology: Topology, principal: Principal, request: GetJobRequest) -> _Place | None:
        try:
            _, site, queue = topology.queue(request.queue)
        except ClientFault:
            return None
        authority = topology.authority_of_region(site.region)
        allowed = (
            principal.role in ("pilot", "admin")
            and access.allows_queue(principal, request.queue, authority)
            and topology.ban_of(principal.account, authority) is None
        )
        if not allowed or queue.status != "online" or len(site.slots) > 1:
            return None
        shards = pilot_slots(topology, site, request.pilot.id)
        if len(shards) > 1:
            return None
        [(shard, slots)] = shards
        return _Place(shard, slots, offer_of(principal, request, queue), lease_times(queue))

    def use_case(self, principal: Principal, message: msgspec.Struct) -> Awaitable[msgspec.Struct]:
        """The ordinary way of a verb."""
        if isinstance(message, GetJobRequest):
            return pilots.get_job(self._forward, self._orphans, principal, message)
        if isinstance(message, HeartbeatRequest):
            return pilots.heartbeat(self._forward, principal, message)
        assert isinstance(message, ReportRequest)
        return pilots.report(self._forward, principal, message)

    def give_back(self, answer: GetJobAnswer, principal: Principal, request: GetJobRequest) -> None:
        """Nobody is there any more for these jobs."""
        self._orphans.unsent(pilots.shards_of(self._forward.topology, answer), principal, request)


class Connection(RequestHandler):
    """One client's connection."""

    def __init__(self, manager: web.Server, lane: Lane, **options: Any) -> None:
        super().__init__(manager, **options)
        self.under_way: asyncio.Future[Any] | None = None
        """What answers the request that the lane has taken on; None while it has none."""
        self._lane: Lane | None = lane
        self._busy = False
        self._held = b""
        self._rest_by: asyncio.TimerHandle | None = None

    def data_received(self, data: bytes) -> None:
        """Serve a request of the lane, or pass on."""
        if self._lane is None or self._force_close or self._close:
            super().data_received(data)
            return
        if self._held:
            data = self._held + data
            self._held = b""
        if self._busy:
            self._held = data
            if self.transport is not None:
                self.transport.pause_reading()
            return
        self._take(self._lane, data)

    def connection_lost(self, exc: BaseException | None) -> None:
        """The client is gone: whatever was asked for it is given up."""
        self._forget_rest()
        if self.under_way is not None:
            self.under_way.cancel()
        super().connection_lost(exc)

    def resume_writing(self) -> None:
        """The client reads again."""
        super().resume_writing()
        if self._busy and self.under_way is None:
            self._free()

    def done(self, data: bytes) -> None:
        """Send an answer of the lane, and go on."""
        self.under_way = None
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(data)
        self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
        # As RequestHandler tells its own shutdown.
        self._request_in_progress = False
        if self._handler_waiter is not None and not self._handler_waiter.done():
            self._handler_waiter.set_result(None)
        # A client that does not read its answers is not asked for more.
        if not self._paused:
            self._free()

    def _take(self, lane: Lane, data: bytes) -> None:
        self._forget_rest()
        end = data.find(b"\r\n\r\n", 0, MAX_HEAD_BYTES) + 4
        head = lane.head(data[:end]) if end >= 4 else None
        if head is None:
            self._leave(data)
            return
        n_bytes = end + head.n_bytes
        if len(data) < n_bytes:
            if n_bytes > MAX_HELD_BYTES:
                self._leave(data)
            else:
                self._held = data
                self._rest_by = self._loop.call_later(HOLD_S, self._too_slow)
            return
        self._busy = self._request_in_progress = True
        self._held = data[n_bytes:]
        if not lane.serve(self, head, data[end:n_bytes]):
            self._busy = self._request_in_progress = False
            self._held = b""
            self._leave(data)
        elif self._held and self._busy and self.transport is not None:
            self.transport.pause_reading()

    def _leave(self, data: bytes) -> None:
        """For good: the parser may hold a part of a request from now on."""
        self._lane = None
        super().data_received(data)

    def _too_slow(self) -> None:
        data, self._held = self._held, b""
        self._leave(data)

    def _free(self) -> None:
        if self._held:
            # In a turn of its own: a client that sent thousands ahead does not keep all others waiting.
            self._loop.call_soon(self._next)
        else:
            self._busy = False

    def _next(self) -> None:
        self._busy = False
        data, self._held = self._held, b""
        if self.transport is not None and not self.transport.is_closing():
            self.transport.resume_reading()
            self.data_received(data)

    def _forget_rest(self) -> None:
        if self._rest_by is not None:
            self._rest_by.cancel()
            self._rest_by = None

    def _process_keepalive(self) -> None:
        if self._busy:
            self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
        super()._process_keepalive()


class _Asked:
    """One request of the lane."""

    __slots__ = ("_connection", "_head", "_lane", "_message", "_principal", "_started", "shard")

    def __init__(self, lane: Lane, connection: Connection, head: Head, *, principal: Principal, message: Any) -> None:
        self._lane = lane
        self._connection = connection
        self._head = head
        self._principal = principal
        self._message = message
        self._started = time.perf_counter()
        self.shard = ""

    def answered(self, future: "asyncio.Future[bytes]") -> None:
        """The one shard's answer to a get_job came, as bytes."""
        try:
            body = future.result()
            has_jobs = body != _EMPTY
            if self._head.dialect != dialects.MSGPACK or (has_jobs and self._is_gone()):
                self._send_decoded(_ANSWER.decode(body))
                return
        except asyncio.CancelledError:
            self._client_gone()
        except Moved:
            self.run()
        except CulmError as error:
            self.fail(error)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            self.fail(Bug(f"shard {self.shard} answered get_job with what is no GetJobAnswer: {error}"))
        else:
            self._observe(has_jobs=has_jobs)
            self._connection.done(response(dialects.MSGPACK, body))

    def run(self) -> None:
        """The ordinary way, in a task."""
        task = asyncio.get_running_loop().create_task(_gather(self._lane.use_case(self._principal, self._message)))
        self._connection.under_way = task
        task.add_done_callback(self._ran)

    def _ran(self, task: "asyncio.Task[msgspec.Struct]") -> None:
        try:
            answer = task.result()
        except asyncio.CancelledError:
            self._client_gone()
        except CulmError as error:
            self.fail(error)
        except Exception as error:  # the last guard of a request, as in culm.service
            log.exception("%s failed", self._head.verb, exc_info=error)
            self.fail(Bug(_SEE_LOG))
        else:
            if isinstance(answer, GetJobAnswer):
                self._send_decoded(answer)
            else:
                telemetry.REQUESTS.labels(self._head.verb, "ok").observe(time.perf_counter() - self._started)
                self._connection.done(response(self._head.dialect, dialects.encoded(self._head.dialect, answer)))

    def fail(self, error: CulmError) -> None:
        """Refuse it."""
        elapsed_s = time.perf_counter() - self._started
        telemetry.REQUESTS.labels(self._head.verb, error.code).observe(elapsed_s)
        if self._head.verb == "get_job":
            get_job_times.refused(elapsed_s, error, waits=self._message.wait_s > 0)
        refusal = dialects.encode_error(self._head.dialect, error)
        headers = "".join(f"{name}: {value}\r\n" for name, value in refusal.headers.items())
        body = refusal.body
        assert isinstance(body, bytes)
        status = f"HTTP/1.1 {refusal.status} {refusal.reason}\r\n{headers}"
        self._connection.done(
            f"{status}Content-Length: {len(body)}\r\nDate: {rfc822_formatted_time()}\r\n\r\n".encode() + body
        )

    def _send_decoded(self, answer: GetJobAnswer) -> None:
        if answer.jobs and self._is_gone():
            self._lane.give_back(answer, self._principal, self._message)
            self._client_gone()
            return
        dialect = self._head.dialect
        try:
            body = dialects.encoded(dialect, dialects.grants_in(dialect, answer))
        except Exception:  # the last guard of a request: the jobs are granted, and nobody would ever hear of it
            log.exception("an answer cannot be written")
            self._lane.give_back(answer, self._principal, self._message)
            self.fail(Bug(_SEE_LOG))
            return
        self._observe(has_jobs=bool(answer.jobs))
        self._connection.done(response(dialect, body))

    def _is_gone(self) -> bool:
        # Before the write: a pilot that has read its answer closes at once, and is not gone for that.
        return door.has_hung_up(self._connection.transport)

    def _client_gone(self) -> None:
        telemetry.REQUESTS.labels(self._head.verb, "client_gone").observe(time.perf_counter() - self._started)
        self._connection.done(b"")

    def _observe(self, *, has_jobs: bool) -> None:
        elapsed_s = time.perf_counter() - self._started
        get_job_times.answered(elapsed_s, waits=self._message.wait_s > 0, has_jobs=has_jobs)


async def _gather(work: Awaitable[msgspec.Struct]) -> msgspec.Struct:
    return await work


def read_head(data: bytes) -> Head | None:
    """What aiohttp's parser makes of a head; None unless it is plainly that of a hot verb's request."""
    loop = asyncio.get_running_loop()
    parser = HttpRequestParser(BaseProtocol(loop), loop, 2**16, max_line_size=8190, max_field_size=8190)
    try:
        messages, upgraded, _ = parser.feed_data(data)
    except (HttpProcessingError, ValueError):
        return None
    if upgraded or len(messages) != 1:
        return None
    said = messages[0][0]
    headers = said.headers
    lengths, types = headers.getall("Content-Length", []), headers.getall("Content-Type", [])
    tokens = headers.getall("Authorization", [])
    verb = _VERBS.get(said.path)
    plain = (
        verb is not None
        and said.method == "POST"
        and said.version == HttpVersion11
        and not (said.should_close or said.compression or said.upgrade or said.chunked)
        and not any(name in headers for name in ("Expect", "Transfer-Encoding", "Content-Encoding"))
        and len(lengths) == len(types) == len(tokens) == 1
        and types[0] in (dialects.JSON, dialects.MSGPACK)
        and lengths[0].isascii()
        and lengths[0].isdecimal()
        and 0 < int(lengths[0]) <= MAX_BODY_BYTES
    )
    return Head(str(verb), types[0], tokens[0], int(lengths[0])) if plain else None


def response(dialect: str, body: bytes) -> bytes:
    """A good answer, as aiohttp would send it."""
    return b"%s%d\r\nDate: %s\r\n\r\n%s" % (_START[dialect], len(body), rfc822_formatted_time().encode(), body)


_START: Final = {
    dialect: f"HTTP/1.1 200 OK\r\nContent-Type: {dialect}\r\nContent-Length: ".encode()
    for dialect in (dialects.JSON, dialects.MSGPACK)
}
