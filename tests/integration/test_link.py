"""The link over real sockets: many calls at once, hang-ups, rubbish, dead and silent peers, TLS."""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import msgspec
import pytest
from prometheus_client import REGISTRY

from culm.errors import ClientFault, Conflict, CulmError, Moved, Unavailable
from culm.frames import Frame, Kind, encode_frame
from culm.link import LinkClient, LinkOptions, LinkServer
from culm.settings import TlsSettings
from culm.wire import MAX_FRAME_BYTES
from tests.certificates import authority, certificate
from tests.servers import free_ports
from tests.waiting import eventually

DEADLINE_S = 5.0
HELLO = encode_frame(Frame(Kind.HELLO, 1, "us1"))


class Shard:
    """A real accepting side whose handler is steered by the test."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.cancelled: list[str] = []
        self.undelivered: list[tuple[str, bytes, bytes]] = []
        self.gate = asyncio.Event()
        self.server = LinkServer("us1", self.handle, lambda *call: self.undelivered.append(call))

    async def handle(self, verb: str, body: bytes, deadline_s: float) -> bytes:
        self.started.append(verb)
        match verb:
            case "echo":
                return body
            case "deadline":
                return str(deadline_s).encode()
            case "wait":
                try:
                    await self.gate.wait()
                except asyncio.CancelledError:
                    self.cancelled.append(verb)
                    raise
                return body
            case "stubborn":
                # Its work is done when the CANCEL comes: the answer crosses it.
                try:
                    await self.gate.wait()
                except asyncio.CancelledError:
                    self.cancelled.append(verb)
                return b"granted"
            case "moved":
                raise Moved(17, 42)
            case "conflict":
                raise Conflict("stale_attempt", "attempt 2 is the last", details={"attempt": 2})
            case "large":
                await self.gate.wait()
                return bytes(4 << 20)
            case "huge":
                return bytes(MAX_FRAME_BYTES)
            case _ if len(verb) > 1000:
                raise ClientFault("unknown_verb", f"{verb * 3} is no verb")
            case _:
                raise ZeroDivisionError("a fault of ours")


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="culm-") as name:
        yield Path(name)


@pytest.fixture
async def shard(folder: Path) -> AsyncIterator[Shard]:
    peer = Shard()
    await peer.server.start(f"unix:{folder}/s")
    yield peer
    peer.gate.set()
    await peer.server.stop(1.0)


@asynccontextmanager
async def linked(where: str, options: LinkOptions | None = None) -> AsyncIterator[LinkClient]:
    client = LinkClient("us1", where, options or LinkOptions())
    client.start()
    try:
        yield client
    finally:
        await client.stop()


@pytest.fixture
async def client(shard: Shard, folder: Path) -> AsyncIterator[LinkClient]:
    async with linked(f"unix:{folder}/s") as link:
        assert await link.wait_connected(DEADLINE_S)
        yield link


Peer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def peer(folder: Path, behave: Peer) -> AsyncIterator[None]:
    """A listener that is not ours: it does what the test says with each connection, then reads to the end."""
    ends: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        ends.add(task)
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            await behave(reader, writer)
            await reader.read()
        await closed(writer)

    server = await asyncio.start_unix_server(serve, f"{folder}/s")
    try:
        yield
    finally:
        server.close()
        await server.wait_closed()
        async with asyncio.timeout(DEADLINE_S):
            await asyncio.gather(*ends)


@asynccontextmanager
async def raw(folder: Path) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection to the shard without any of our client's manners."""
    reader, writer = await asyncio.open_unix_connection(f"{folder}/s")
    try:
        yield reader, writer
    finally:
        await closed(writer)


async def closed(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()


async def shown_out(reader: asyncio.StreamReader) -> None:
    """Read until the other side ends the connection."""
    async with asyncio.timeout(DEADLINE_S):
        with suppress(ConnectionError):
            while await reader.read(65536):
                pass


async def failing(call: Awaitable[bytes]) -> CulmError:
    with pytest.raises(CulmError) as caught:
        await call
    return caught.value


# --- calls -----------------------------------------------------------------------------------------------------------


async def test_a_call_is_answered(client: LinkClient) -> None:
    assert await client.call("echo", b"hello", DEADLINE_S) == b"hello"
    assert await client.call("echo", b"", DEADLINE_S) == b""


async def test_a_thousand_calls_at_once_each_get_their_own_answer(client: LinkClient) -> None:
    answers = await asyncio.gather(*(client.call("echo", str(i).encode(), DEADLINE_S) for i in range(1000)))
    assert answers == [str(i).encode() for i in range(1000)]


async def test_a_slow_call_does_not_hold_up_the_others(client: LinkClient, shard: Shard) -> None:
    slow = asyncio.create_task(client.call("wait", b"slow", DEADLINE_S))
    await eventually(lambda: shard.started, DEADLINE_S)
    assert await client.call("echo", b"fast", DEADLINE_S) == b"fast"
    assert not slow.done()
    shard.gate.set()
    assert await slow == b"slow"


async def test_the_deadline_travels(client: LinkClient) -> None:
    assert await client.call("deadline", b"", 2.5) == b"2.5"


async def test_large_bodies_in_both_directions(client: LinkClient) -> None:
    body = bytes(4 << 20)
    assert await client.call("echo", body, DEADLINE_S) == body


async def test_a_body_beyond_the_limit_never_leaves(client: LinkClient, shard: Shard) -> None:
    error = await failing(client.call("echo", bytes(MAX_FRAME_BYTES), DEADLINE_S))
    assert isinstance(error, ClientFault)
    assert (error.code, error.http_status) == ("too_large", 413)
    assert shard.started == []
    assert await client.call("echo", b"still here", DEADLINE_S) == b"still here"


async def test_an_answer_beyond_the_limit_is_an_error_and_its_effect_can_be_undone(
    client: LinkClient, shard: Shard
) -> None:
    error = await failing(client.call("huge", b"ask", DEADLINE_S))
    assert error.code == "too_large"
    assert [(verb, body) for verb, body, _ in shard.undelivered] == [("huge", b"ask")]
    assert await client.call("echo", b"still here", DEADLINE_S) == b"still here"


@pytest.mark.parametrize(("verb", "kind", "code"), [("moved", Moved, "moved"), ("conflict", Conflict, "stale_attempt")])
async def test_errors_arrive_as_what_they_were(client: LinkClient, verb: str, kind: type[CulmError], code: str) -> None:
    error = await failing(client.call(verb, b"", DEADLINE_S))
    assert type(error) is kind
    assert error.code == code
    assert error.details == ({"slot": 17, "epoch": 42} if kind is Moved else {"attempt": 2})


async def test_a_fault_of_the_handler_is_a_bug_and_ends_nothing_else(client: LinkClient) -> None:
    error = await failing(client.call("explode", b"", DEADLINE_S))
    assert (error.code, error.http_status) == ("internal", 500)
    assert "ZeroDivisionError" not in error.message
    assert await client.call("echo", b"x", DEADLINE_S) == b"x"


# --- callers that go away -------------------------------------------------------------------------------------------


async def test_a_cancelled_caller_cancels_the_shards_work(client: LinkClient, shard: Shard) -> None:
    call = asyncio.create_task(client.call("wait", b"", DEADLINE_S))
    await eventually(lambda: shard.started, DEADLINE_S)
    call.cancel()
    await eventually(lambda: shard.cancelled == ["wait"], DEADLINE_S)
    assert await client.call("echo", b"x", DEADLINE_S) == b"x"


async def test_calls_that_are_cancelled_before_they_begin_are_forgotten_on_both_sides(
    shard: Shard, folder: Path
) -> None:
    """CALL and CANCEL leave in one write: the shard's task is cancelled before its first step."""
    async with linked(f"unix:{folder}/s", LinkOptions(window=3)) as link:
        assert await link.wait_connected(DEADLINE_S)
        for _ in range(5):
            calls = [asyncio.create_task(link.call("wait", b"", DEADLINE_S)) for _ in range(3)]
            await asyncio.sleep(0)
            for call in calls:
                call.cancel()
            answers = await asyncio.gather(*calls, return_exceptions=True)
            assert {type(answer) for answer in answers} == {asyncio.CancelledError}
            # Each call gets its one answer, also after a CANCEL: else the window would fill up for ever.
            await eventually(lambda: not link._connection.calls, DEADLINE_S, what="the client forgets")  # type: ignore[union-attr]
        [connection] = shard.server.connections
        assert connection.tasks == {}
        assert await link.call("echo", b"still here", DEADLINE_S) == b"still here"


async def test_an_error_too_large_for_a_frame_is_told_shorter(client: LinkClient) -> None:
    error = await failing(client.call("x" * (MAX_FRAME_BYTES // 2), b"", DEADLINE_S))
    assert (type(error), error.code) == (ClientFault, "unknown_verb")
    assert 1000 < len(error.message) < 5000


async def test_past_the_deadline_the_caller_is_told_and_the_shard_too(client: LinkClient, shard: Shard) -> None:
    error = await failing(client.call("wait", b"", 0.05))
    assert (error.code, error.retryable, error.details) == ("deadline", True, {"shard": "us1"})
    await eventually(lambda: shard.cancelled == ["wait"], DEADLINE_S)


async def test_an_answer_that_crossed_the_cancel_comes_back_as_an_orphan(shard: Shard, folder: Path) -> None:
    orphans: list[tuple[str, bytes, bytes]] = []
    options = LinkOptions(orphan=lambda *call: orphans.append(call))
    async with linked(f"unix:{folder}/s", options) as client:
        await client.wait_connected(DEADLINE_S)
        call = asyncio.create_task(client.call("stubborn", b"ask", DEADLINE_S))
        await eventually(lambda: shard.started, DEADLINE_S)
        call.cancel()
        await eventually(lambda: orphans, DEADLINE_S)
    assert orphans == [("stubborn", b"ask", b"granted")]


async def test_an_answer_for_a_connection_that_is_gone_is_undelivered(shard: Shard, folder: Path) -> None:
    async with linked(f"unix:{folder}/s") as client:
        await client.wait_connected(DEADLINE_S)
        call = asyncio.create_task(client.call("stubborn", b"ask", DEADLINE_S))
        await eventually(lambda: shard.started, DEADLINE_S)
    assert (await failing(call)).code == "outcome_unknown"
    await eventually(lambda: shard.undelivered == [("stubborn", b"ask", b"granted")], DEADLINE_S)


def shed(reason: str) -> float:
    """How many calls were refused because something was full."""
    return REGISTRY.get_sample_value("culm_shed_total", {"reason": reason}) or 0.0


async def test_calls_are_timed_but_for_those_that_wait_or_are_given_up(shard: Shard, folder: Path) -> None:
    times: list[float] = []
    async with linked(f"unix:{folder}/s", LinkOptions(timed=times.append)) as client:
        await client.wait_connected(DEADLINE_S)
        await client.call("echo", b"x", DEADLINE_S)
        assert len(times) == 1
        assert 0 < times[0] < DEADLINE_S
        await client.call("echo", b"x", DEADLINE_S, waits=True)
        given_up = asyncio.create_task(client.call("wait", b"", DEADLINE_S))
        await eventually(lambda: shard.started, DEADLINE_S)
        given_up.cancel()
        await asyncio.gather(given_up, return_exceptions=True)
        assert len(times) == 1
        assert (await failing(client.call("wait", b"", 0.01))).code == "deadline"
        assert len(times) == 2


async def test_beyond_the_window_nothing_is_sent(shard: Shard, folder: Path) -> None:
    async with linked(f"unix:{folder}/s", LinkOptions(window=2)) as client:
        await client.wait_connected(DEADLINE_S)
        calls = [asyncio.create_task(client.call("wait", b"", DEADLINE_S)) for _ in range(2)]
        await eventually(lambda: len(shard.started) == 2, DEADLINE_S)
        before = shed("link_window")
        assert (await failing(client.call("echo", b"", DEADLINE_S))).code == "overloaded"
        assert shed("link_window") == before + 1
        shard.gate.set()
        await asyncio.gather(*calls)
        assert await client.call("echo", b"x", DEADLINE_S) == b"x"


async def test_many_large_answers_at_once_end_no_link_and_what_cannot_be_sent_is_undone(
    shard: Shard, client: LinkClient
) -> None:
    calls = [client.begin("large", b"", DEADLINE_S) for _ in range(24)]
    await eventually(lambda: len(shard.started) == 24, DEADLINE_S)
    shard.gate.set()
    said = await asyncio.gather(*calls, client.call("echo", b"small", DEADLINE_S), return_exceptions=True)
    assert said.pop() == b"small"
    refused = [one for one in said if isinstance(one, Unavailable)]
    assert {one.code for one in refused} == {"overloaded"}
    assert len(shard.undelivered) == len(refused)
    assert [one for one in said if not isinstance(one, Unavailable)] == [bytes(4 << 20)] * (24 - len(refused))
    assert len(refused) < 12


async def test_many_large_calls_at_once_end_no_link(client: LinkClient) -> None:
    body = bytes(2 << 20)
    calls, refused = [], set()
    for _ in range(40):
        try:
            calls.append(client.begin("echo", body, DEADLINE_S))
        except Unavailable as error:
            refused.add(error.code)
    assert refused == {"overloaded"}
    assert len(calls) > 30
    assert await asyncio.gather(*calls) == [body] * len(calls)
    assert await client.call("echo", b"small", DEADLINE_S) == b"small"


async def test_who_reads_nothing_is_shown_out(shard: Shard, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("culm.frames.STUCK_S", 0.05)
    shard.gate.set()
    async with raw(folder) as (_reader, writer):
        writer.write(HELLO + encode_frame(Frame(Kind.CALL, 1, "large")) + encode_frame(Frame(Kind.CALL, 2, "large")))
        await eventually(lambda: len(shard.started) == 2, DEADLINE_S)
        await eventually(lambda: not shard.server.connections, DEADLINE_S, what="the connection is ended")


async def test_what_is_never_taken_has_a_bound(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("culm.frames.MAX_UNSENT_BYTES", 3 << 20)

    hears = asyncio.Event()

    async def deaf(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HELLO)
        await hears.wait()

    async with peer(folder, deaf), linked(f"unix:{folder}/s") as client:
        await client.wait_connected(DEADLINE_S)
        calls = [client.begin("echo", bytes(1 << 20), DEADLINE_S) for _ in range(3)]
        connection = client._connection
        assert connection is not None
        connection.send(Frame(Kind.CALL, 99, "echo", body=bytes(1 << 20)))
        said = await asyncio.gather(*calls, return_exceptions=True)
        hears.set()
        assert {getattr(one, "code", "") for one in said} == {"outcome_unknown"}


async def test_calls_that_wait_have_a_bound_of_their_own(shard: Shard, folder: Path) -> None:
    async with linked(f"unix:{folder}/s", LinkOptions(window=1, waiting=3)) as client:
        await client.wait_connected(DEADLINE_S)
        calls = [asyncio.create_task(client.call("wait", b"", DEADLINE_S, waits=True)) for _ in range(3)]
        await eventually(lambda: len(shard.started) == 3, DEADLINE_S)
        assert await client.call("echo", b"x", DEADLINE_S) == b"x"
        before = shed("link_waiting")
        assert (await failing(client.call("echo", b"", DEADLINE_S, waits=True))).code == "overloaded"
        assert shed("link_waiting") == before + 1
        calls.pop().cancel()
        await eventually(lambda: client._connection is not None and client._connection.n_waiting == 2, DEADLINE_S)
        calls.append(asyncio.create_task(client.call("wait", b"", DEADLINE_S, waits=True)))
        await eventually(lambda: len(shard.started) == 4, DEADLINE_S)
        shard.gate.set()
        await asyncio.gather(*calls)
        assert client._connection is not None
        assert client._connection.n_waiting == 0


# --- shards that go away --------------------------------------------------------------------------------------------


async def test_many_that_hang_up_at_once_take_no_room_from_the_others(shard: Shard, folder: Path) -> None:
    async with linked(f"unix:{folder}/s", LinkOptions(window=2, waiting=50)) as client:
        await client.wait_connected(DEADLINE_S)
        parked = [client.begin("stubborn", b"", DEADLINE_S, waits=True) for _ in range(50)]
        await eventually(lambda: len(shard.started) == 50, DEADLINE_S)
        for one in parked:
            one.cancel()
        # Their callers are gone, their answers still to come.
        assert await client.call("echo", b"x", DEADLINE_S) == b"x"
        await eventually(lambda: client._connection is not None and not client._connection.calls, DEADLINE_S)
        assert client._connection is not None
        assert client._connection.n_waiting == 0
        shard.gate.set()
        assert await client.call("wait", b"y", DEADLINE_S, waits=True) == b"y"
        assert client._connection.n_waiting == 0


async def test_a_shard_that_is_not_there_is_said_at_once(folder: Path) -> None:
    async with linked(f"unix:{folder}/nobody") as client:
        error = await failing(client.call("echo", b"", DEADLINE_S))
        assert (error.code, error.http_status, error.details) == ("shard_down", 503, {"shard": "us1"})
        assert not client.connected


async def test_when_the_shard_dies_the_outcome_is_unknown_and_its_return_is_found(shard: Shard, folder: Path) -> None:
    async with linked(f"unix:{folder}/s") as client:
        await client.wait_connected(DEADLINE_S)
        call = asyncio.create_task(client.call("wait", b"", DEADLINE_S))
        await eventually(lambda: shard.started, DEADLINE_S)
        await shard.server.stop(0.0)
        assert (await failing(call)).code in {"outcome_unknown", "cancelled"}
        await eventually(lambda: not client.connected, DEADLINE_S)
        reborn = Shard()
        await reborn.server.start(f"unix:{folder}/s")
        assert await client.wait_connected(DEADLINE_S)
        assert await client.call("echo", b"again", DEADLINE_S) == b"again"
        await reborn.server.stop(1.0)


async def test_a_shard_that_falls_silent_is_taken_for_dead(folder: Path) -> None:
    """It accepts, greets, and then answers nothing, as a process stopped with SIGSTOP does."""

    async def silent(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HELLO)

    async with peer(folder, silent), linked(f"unix:{folder}/s", LinkOptions(stall_s=0.2)) as client:
        assert await client.wait_connected(DEADLINE_S)
        began = asyncio.get_running_loop().time()
        error = await failing(client.call("echo", b"", DEADLINE_S))
        assert error.code == "outcome_unknown"
        assert asyncio.get_running_loop().time() - began < 1.0


async def test_a_peer_that_never_greets_is_not_connected(folder: Path) -> None:
    accepted = asyncio.Event()

    async def mute(_reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        accepted.set()

    async with peer(folder, mute), linked(f"unix:{folder}/s", LinkOptions(stall_s=0.1)) as client:
        async with asyncio.timeout(DEADLINE_S):
            await accepted.wait()
        assert not await client.wait_connected(0.3)
        assert (await failing(client.call("echo", b"", DEADLINE_S))).code == "shard_down"


async def test_a_shard_of_another_name_is_shown_out_and_asked_nothing(
    shard: Shard, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    counted = REGISTRY.get_sample_value
    before = counted("culm_link_other_name_total", {"shard": "eu1"}) or 0.0
    client = LinkClient("eu1", f"unix:{folder}/s", LinkOptions())
    client.start()
    try:
        await eventually(
            lambda: (counted("culm_link_other_name_total", {"shard": "eu1"}) or 0.0) >= before + 2,
            DEADLINE_S,
            what="it has tried twice",
        )
        error = await failing(client.call("echo", b"x", DEADLINE_S))
        assert (error.code, error.details) == ("shard_down", {"shard": "eu1"})
        assert f"us1 answers at unix:{folder}/s" in error.message
        assert not client.connected
        # Said once, not at every try.
        told = [record.getMessage() for record in caplog.records if record.name == "culm.link"]
        assert [f"link to eu1: the shard at unix:{folder}/s is us1: nothing is asked there"] == told
        # The right one comes: nothing has to be restarted.
        await shard.server.stop(0.0)
        other = LinkServer("eu1", shard.handle, lambda *_call: None)
        await other.start(f"unix:{folder}/s")
        assert await client.wait_connected(DEADLINE_S)
        assert await client.call("echo", b"x", DEADLINE_S) == b"x"
        await other.stop(0.0)
    finally:
        await client.stop()
    assert shard.started == ["echo"]


async def test_stop_lets_calls_under_way_end(shard: Shard, client: LinkClient) -> None:
    call = asyncio.create_task(client.call("wait", b"last", DEADLINE_S))
    await eventually(lambda: shard.started, DEADLINE_S)
    stopping = asyncio.create_task(shard.server.stop(DEADLINE_S))
    shard.gate.set()
    assert await call == b"last"
    await stopping


# --- rubbish on the link --------------------------------------------------------------------------------------------


def _frame(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


def _array(*values: object) -> bytes:
    return _frame(msgspec.msgpack.encode(values))


RUBBISH: list[tuple[str, bytes]] = [
    ("http", b"GET /v1/health HTTP/1.1\r\nHost: x\r\n\r\n"),
    ("a frame of 4 GB", b"\xff\xff\xff\xff"),
    ("a frame one too long", (MAX_FRAME_BYTES + 1).to_bytes(4, "big")),
    ("no MessagePack", HELLO + _frame(b"\xc1\xc1\xc1")),
    ("bytes after it", HELLO + _frame(msgspec.msgpack.encode([4, 1]) + b"\x00")),
    ("an empty frame", HELLO + _frame(b"")),
    ("a map", HELLO + _frame(msgspec.msgpack.encode({"kind": 0}))),
    ("an unknown kind", HELLO + _array(99, 1)),
    ("a negative kind", HELLO + _array(-1, 1)),
    ("text as stream", HELLO + _array(0, "one", "echo", 1, b"")),
    ("text as body", HELLO + _array(0, 1, "echo", 1, "text")),
    ("bad UTF-8 as verb", HELLO + _frame(b"\x93\x00\x01\xa2\xff\xfe")),
    ("a call before HELLO", _array(0, 1, "echo", 1000, b"")),
    ("another version", _array(6, 2, "router")),
    ("an answer to the shard", HELLO + _array(1, 1, "", 0, b"")),
    ("a pong to the shard", HELLO + _array(5, 1)),
    ("a stream used twice", HELLO + _array(0, 1, "wait", 9000, b"") + _array(0, 1, "wait", 9000, b"")),
    ("a second HELLO", HELLO + HELLO),
]


@pytest.mark.parametrize("data", [data for _, data in RUBBISH], ids=[name for name, _ in RUBBISH])
async def test_rubbish_ends_its_own_connection_only(
    client: LinkClient, folder: Path, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with raw(folder) as (reader, writer):
        writer.write(data)
        await shown_out(reader)
    assert await client.call("echo", b"unharmed", DEADLINE_S) == b"unharmed"
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_frames_may_come_byte_by_byte(shard: Shard, folder: Path) -> None:
    async with raw(folder) as (reader, writer), asyncio.timeout(DEADLINE_S):
        for byte in HELLO + _array(0, 7, "echo", 9000, b"bit"):
            writer.write(bytes([byte]))
            await writer.drain()
        hello = await reader.readexactly(int.from_bytes(await reader.readexactly(4), "big"))
        answer = await reader.readexactly(int.from_bytes(await reader.readexactly(4), "big"))
    assert msgspec.msgpack.decode(hello)[:3] == [6, 1, "us1"]
    assert msgspec.msgpack.decode(answer) == [1, 7, "", 0, b"bit"]


async def test_who_never_says_hello_is_shown_out(shard: Shard, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("culm.link.HELLO_TIMEOUT_S", 0.05)
    async with raw(folder) as (reader, _writer):
        await shown_out(reader)
    await eventually(lambda: not shard.server.connections, DEADLINE_S)


@pytest.mark.parametrize("kind", [Kind.CALL, Kind.CANCEL, Kind.PING])
async def test_a_router_refuses_what_only_routers_send(folder: Path, kind: Kind) -> None:
    gone = asyncio.Event()

    async def odd(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HELLO + encode_frame(Frame(kind, 1, "echo")))
        await shown_out(reader)
        gone.set()

    async with peer(folder, odd), linked(f"unix:{folder}/s"), asyncio.timeout(DEADLINE_S):
        await gone.wait()


async def test_an_error_frame_with_rubbish_inside_ends_the_call(folder: Path) -> None:
    async def odd(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HELLO)
        await reader.readuntil(b"echo")
        writer.write(encode_frame(Frame(Kind.ERROR, 1, body=b"\xc1rubbish")))

    async with peer(folder, odd), linked(f"unix:{folder}/s") as client:
        await client.wait_connected(DEADLINE_S)
        error = await failing(client.call("echo", b"", DEADLINE_S))
        assert isinstance(error, Unavailable)
        assert error.code == "outcome_unknown"


# --- between machines -----------------------------------------------------------------------------------------------


def _tls(folder: Path, ca: str, name: str) -> TlsSettings:
    return TlsSettings(
        ca_file=str(folder / f"{ca}.pem"), cert_file=str(folder / f"{name}.pem"), key_file=str(folder / f"{name}.key")
    )


@pytest.fixture
def certificates(folder: Path) -> Path:
    ours, theirs = authority(folder, "ca"), authority(folder, "other")
    certificate(folder, "shard", ours)
    certificate(folder, "router", ours)
    certificate(folder, "stranger", theirs)
    return folder


@pytest.mark.parametrize(
    ("ca", "name", "admitted"), [("ca", "router", True), ("ca", "stranger", False), ("other", "router", False)]
)
async def test_tls_admits_the_shared_authority_only(certificates: Path, ca: str, name: str, *, admitted: bool) -> None:
    peer = Shard()
    where = f"tls:localhost:{free_ports(1)}"
    await peer.server.start(where, _tls(certificates, "ca", "shard"))
    async with linked(where, LinkOptions(tls=_tls(certificates, ca, name))) as client:
        assert await client.wait_connected(DEADLINE_S if admitted else 0.5) is admitted
        if admitted:
            assert await client.call("echo", b"sealed", DEADLINE_S) == b"sealed"
    await peer.server.stop(1.0)


async def test_plain_tcp_outside_loopback_never_listens() -> None:
    with pytest.raises(ClientFault) as caught:
        await Shard().server.start(f"tcp:0.0.0.0:{free_ports(1)}")
    assert caught.value.code == "plain_tcp_refused"


async def test_a_shard_under_anothers_name_is_not_asked(
    shard: Shard, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = LinkClient("eu1", f"unix:{folder}/s", LinkOptions())
    anyone = LinkClient("", f"unix:{folder}/s", LinkOptions())
    for link in (other, anyone):
        link.start()
    try:
        assert await anyone.wait_connected(DEADLINE_S)
        assert anyone.peer == "us1"
        await eventually(lambda: "is us1: nothing is asked there" in caplog.text, DEADLINE_S)
        assert not other.connected
        with pytest.raises(Unavailable, match="shard_down"):
            await other.call("echo", b"x", DEADLINE_S)
        assert shard.started == []
    finally:
        await other.stop()
        await anyone.stop()
