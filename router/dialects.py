"""JSON and MessagePack over HTTP: the same messages, chosen by content type; and errors in either."""

import asyncio
from typing import Any, Final, TypeVar

import msgspec
from aiohttp import web
from aiohttp.http_exceptions import PayloadEncodingError

from culm import service
from culm.errors import ClientFault, CulmError
from culm.wire import MAX_BODY_BYTES, GetJobAnswer

JSON: Final = "application/json"
MSGPACK: Final = "application/msgpack"
READ_S: Final = 30.0
"""A client that sends its body by drops does not hold a connection for ever."""

M = TypeVar("M", bound=msgspec.Struct)

_ENCODERS: Final[dict[str, msgspec.json.Encoder | msgspec.msgpack.Encoder]] = {
    JSON: msgspec.json.Encoder(),
    MSGPACK: msgspec.msgpack.Encoder(),
}
_DECODERS: Final[dict[tuple[str, type[Any]], Any]] = {}


def dialect_of(request: web.Request) -> str:
    """The dialect of the request's body. Raises ClientFault(unsupported_media_type), 415."""
    if request.content_type in _ENCODERS:
        return request.content_type
    raise ClientFault("unsupported_media_type", f"the body must be {JSON} or {MSGPACK}", http_status=415)


def answer_dialect(request: web.Request) -> str:
    """The dialect of the answer: that of the body, for a request without one what it accepts, else JSON."""
    if request.content_type in _ENCODERS:
        return request.content_type
    return MSGPACK if MSGPACK in request.headers.get("Accept", "") else JSON


async def decode(request: web.Request, kind: type[M]) -> M:
    """The request's message. Raises ClientFault: unsupported_media_type, body_too_large, bad_request."""
    dialect = dialect_of(request)
    try:
        async with asyncio.timeout(READ_S):
            body = await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise ClientFault("body_too_large", f"the body exceeds {MAX_BODY_BYTES} bytes", http_status=413) from None
    except TimeoutError:
        raise ClientFault("body_too_slow", f"the body did not come in {READ_S:.0f} s", http_status=408) from None
    except (PayloadEncodingError, web.RequestPayloadError):
        raise ClientFault("bad_request", "the body is not encoded as its headers say") from None
    decoder = _DECODERS.get((dialect, kind))
    if decoder is None:
        decoder = msgspec.json.Decoder(kind) if dialect == JSON else msgspec.msgpack.Decoder(kind)
        _DECODERS[dialect, kind] = decoder
    try:
        return decoder.decode(body)  # type: ignore[no-any-return]  # the table is keyed by the type
    except msgspec.DecodeError as error:
        raise ClientFault("bad_request", f"the body is not good: {error}") from None
    except (UnicodeDecodeError, RecursionError):
        raise ClientFault("bad_request", "the body is not good: it cannot be decoded") from None


def query(request: web.Request, kind: type[M]) -> M:
    """A message from the query string. Raises ClientFault(bad_request)."""
    try:
        return msgspec.convert(dict(request.query), kind, strict=False)
    except msgspec.ValidationError as error:
        raise ClientFault("bad_request", f"the query is not good: {error}") from None


def encoded(dialect: str, answer: msgspec.Struct) -> bytes:
    """The body of a good answer."""
    return _ENCODERS[dialect].encode(answer)


def encode(dialect: str, answer: msgspec.Struct) -> web.Response:
    """A good answer."""
    return web.Response(body=encoded(dialect, answer), content_type=dialect)


def grants_in(dialect: str, answer: GetJobAnswer) -> GetJobAnswer:
    """The answer with its specs, which are stored as MessagePack, in the dialect of the client."""
    if dialect == MSGPACK:
        return answer
    grants = [
        msgspec.structs.replace(grant, spec=msgspec.Raw(msgspec.json.encode(msgspec.msgpack.decode(grant.spec))))
        for grant in answer.jobs
    ]
    return msgspec.structs.replace(answer, jobs=grants)


def encode_error(dialect: str, error: CulmError) -> web.Response:
    """An error of the service in this dialect."""
    return service.refusal(error, _ENCODERS[dialect].encode, dialect)
