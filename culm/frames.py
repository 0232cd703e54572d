"""Frames of the link: a 4-byte big-endian length and one MessagePack array `[kind, stream, verb, deadline_ms, body]`.

Trailing defaults may be missing. Frames written in one turn of the event loop leave in one write. Bodies are opaque
here, see `culm.wire`; the body of an ERROR is an `ErrorBody`.
"""

import asyncio
import enum
import logging
from collections import deque
from typing import Final

import msgspec

from culm.errors import Bug, ClientFault, Conflict, CulmError, Moved, Unavailable
from culm.wire import MAX_FRAME_BYTES, ErrorBody

VERSION: Final = 1
CHUNK_BYTES: Final = 1 << 20
"""Of one write; the transport holds about as much before it lets us wait."""
FULL_BYTES: Final = 64 << 20
"""So much waits to be sent: nothing large is added."""
MAX_UNSENT_BYTES: Final = 256 << 20
STUCK_S: Final = 10.0
"""The other side has taken nothing for so long."""
MAX_MESSAGE_CHARS: Final = 4000
"""Of an error: it may quote what was sent, and must itself fit into a frame."""

log = logging.getLogger("culm.link")


class Kind(enum.IntEnum):
    """What a frame is."""

    CALL = 0
    ANSWER = 1
    ERROR = 2
    CANCEL = 3
    PING = 4
    PONG = 5
    HELLO = 6


class Frame(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True, forbid_unknown_fields=False):
    """One frame; `stream` numbers the calls of one connection, in HELLO it is the protocol's version."""

    kind: Kind
    stream: int
    verb: str = ""
    deadline_ms: int = 0
    body: bytes = b""


_URGENT: Final = frozenset({Kind.PING, Kind.PONG})
_ENCODER: Final = msgspec.msgpack.Encoder()
_DECODER: Final = msgspec.msgpack.Decoder(Frame)
_ERROR_DECODER: Final = msgspec.msgpack.Decoder(ErrorBody)


def encode_frame(frame: Frame) -> bytes:
    """The bytes on the wire. Raises ClientFault(too_large)."""
    body = _ENCODER.encode(frame)
    if len(body) > MAX_FRAME_BYTES:
        raise ClientFault("too_large", f"a message of {len(body)} bytes exceeds {MAX_FRAME_BYTES}", http_status=413)
    return len(body).to_bytes(4, "big") + body


def error_body(error: CulmError) -> ErrorBody:
    """What crosses the wire of an error."""
    return ErrorBody(
        code=error.code,
        message=error.message[:MAX_MESSAGE_CHARS],
        retryable=error.retryable,
        retry_after_s=error.retry_after_s,
        details={**error.details, "status": error.http_status},
    )


def encode_error(error: CulmError) -> bytes:
    """The body of an ERROR frame."""
    return _ENCODER.encode(error_body(error))


def decode_error(data: bytes) -> CulmError:
    """The error in the body of an ERROR frame; where it cannot be read the outcome is unknown."""
    try:
        return error_from_body(_ERROR_DECODER.decode(data))
    except (msgspec.DecodeError, UnicodeDecodeError):
        return Unavailable("outcome_unknown", "an unreadable error came over the link")


def error_from_body(body: ErrorBody) -> CulmError:
    """The error as the other side raised it, of the kind that its status and code say."""
    details = dict(body.details)
    status = details.pop("status", 500)
    if body.code == "moved":
        return Moved(int(details.get("slot", -1)), int(details.get("epoch", 0)))
    if status == 409:
        return Conflict(body.code, body.message, details=details)
    if body.retryable:
        error: CulmError = Unavailable(
            body.code, body.message, retry_after_s=body.retry_after_s or 1.0, details=details
        )
        error.http_status = status
        return error
    if 400 <= status < 500:
        return ClientFault(body.code, body.message, http_status=status, details=details)
    return Bug(body.message)


class Connection(asyncio.Protocol):
    """Framing for both sides: reads whole frames, writes once per turn of the loop."""

    def __init__(self, name: str, says: str = "") -> None:
        self.name = name
        self.says = says or name
        """Who we are, in our HELLO."""
        self.transport: asyncio.Transport | None = None
        self.peer = ""
        self.heard_at = 0.0
        self._loop = asyncio.get_running_loop()
        self._received = bytearray()
        self._unsent: deque[bytes] = deque()
        self._n_unsent = 0
        self._is_paused = False
        self._stuck: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greet the other side."""
        self.transport = transport  # type: ignore[assignment]
        transport.set_write_buffer_limits(high=CHUNK_BYTES)  # type: ignore[attr-defined]
        self.heard_at = self._loop.time()
        self.send(Frame(Kind.HELLO, VERSION, self.says))

    def data_received(self, data: bytes) -> None:
        """Handle every whole frame there is; whatever is no frame ends the connection."""
        self.heard_at = self._loop.time()
        received = self._received
        received += data
        start = 0
        while len(received) - start >= 4:
            size = int.from_bytes(received[start : start + 4], "big")
            if size > MAX_FRAME_BYTES:
                self.refuse(f"a frame of {size} bytes")
                return
            end = start + 4 + size
            if len(received) < end:
                break
            try:
                frame = _DECODER.decode(memoryview(received)[start + 4 : end])
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                self.refuse(str(error))
                return
            start = end
            if not self._accept(frame):
                return
        if start:
            del received[:start]

    @property
    def is_full(self) -> bool:
        """Whether so much waits to be sent that nothing large should be added."""
        return self._n_unsent > FULL_BYTES

    def send(self, frame: Frame) -> None:
        """Queue a frame; it leaves at the end of this turn of the loop, or when what is before has been taken.

        Raises ClientFault(too_large).
        """
        data = encode_frame(frame)
        if self._n_unsent + len(data) > MAX_UNSENT_BYTES:
            self.refuse("the other side does not take what is sent")
            return
        if not self._unsent and not self._is_paused:
            self._loop.call_soon(self._flush)
        if self._is_paused and frame.kind in _URGENT:
            # Between whole frames: a sign of life must not wait for the megabytes before it. HELLO is gone by then.
            self._unsent.appendleft(data)
        else:
            self._unsent.append(data)
        self._n_unsent += len(data)

    def close(self) -> None:
        """Flush and end the connection."""
        if self.transport is not None:
            self.transport.writelines(self._unsent)
            self._drop_unsent()
            self.transport.close()

    def pause_writing(self) -> None:
        """Of the transport: it holds enough."""
        self._is_paused = True
        assert self.transport is not None
        self._watch_writing(self.transport.get_write_buffer_size() + 1)

    def resume_writing(self) -> None:
        """Of the transport: it has room again."""
        self._is_paused = False
        self._unwatch_writing()
        self._flush()

    def connection_lost(self, _exc: Exception | None) -> None:
        """The connection is gone, whoever ended it."""
        self.transport = None
        self._is_paused = False
        self._unwatch_writing()
        self._drop_unsent()

    def _flush(self) -> None:
        while self._unsent and not self._is_paused:
            if self.transport is None or self.transport.is_closing():
                self._drop_unsent()
                return
            chunk = [self._unsent.popleft()]
            size = len(chunk[0])
            while self._unsent and size + len(self._unsent[0]) <= CHUNK_BYTES:
                chunk.append(self._unsent.popleft())
                size += len(chunk[-1])
            self._n_unsent -= size
            self.transport.write(b"".join(chunk))

    def _watch_writing(self, n_before: int) -> None:
        n_left = self.transport.get_write_buffer_size() if self.transport is not None else 0
        if n_left >= n_before:
            self.refuse("the other side does not read")
        else:
            self._stuck = self._loop.call_later(STUCK_S, self._watch_writing, n_left)

    def _unwatch_writing(self) -> None:
        if self._stuck is not None:
            self._stuck.cancel()
            self._stuck = None

    def _drop_unsent(self) -> None:
        self._unsent.clear()
        self._n_unsent = 0

    def _accept(self, frame: Frame) -> bool:
        """Handle one frame; False once the connection was given up."""
        if not self.peer:
            if frame.kind is not Kind.HELLO or frame.stream != VERSION:
                self.refuse(f"{frame.kind.name} {frame.stream} instead of HELLO {VERSION}")
                return False
            self.peer = frame.verb or "?"
            self.ready()
            return True
        return self.handle(frame)

    def refuse(self, why: str) -> None:
        """End the connection at once: the other side does not keep to the protocol."""
        log.warning("link %s: closed, %s", self.name, why)
        # The received bytes may be exported by a decoder's memoryview here: drop the buffer, do not resize it.
        self._received = bytearray()
        self._drop_unsent()
        if self.transport is not None:
            self.transport.abort()

    def ready(self) -> None:
        """The other side said HELLO."""

    def handle(self, frame: Frame) -> bool:
        """One frame after HELLO."""
        raise NotImplementedError
