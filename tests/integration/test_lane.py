"""The fast lane and the ordinary handler: the same answer for every input, however it is cut into pieces."""

import asyncio
import random
import re
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import msgspec
import pytest

from culm.wire import GetJobRequest, HeartbeatRequest, PilotInfo, ReportRequest
from router import lane
from tests.front import RunningFront, front
from tests.partition import PILOT, QUEUE, Partition, job
from tests.waiting import eventually

DEADLINE_S = 20.0
NOTHING_S = 3.0
LAST = b"GET /v1/nothing HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
_GOES = re.compile(rb"(?m)^(Date|Server): .*\r\n")

_TOKENS: dict[Path, str] = {}

Routers = tuple[RunningFront, RunningFront]


@pytest.fixture
async def routers(shard: Partition) -> AsyncIterator[Routers]:
    """With the lane, and without."""
    async with front(shard) as fast, front(shard, fast_lane=False) as plain:
        yield fast, plain


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The verbs that the lane took on."""
    verbs: list[str] = []
    serve = lane.Lane.serve

    def noted(self: lane.Lane, connection: lane.Connection, head: lane.Head, body: bytes) -> bool:
        took = serve(self, connection, head, body)
        if took:
            verbs.append(head.verb)
        return took

    monkeypatch.setattr(lane.Lane, "serve", noted)
    return verbs


def _token(router: RunningFront) -> str:
    """The same for both routers: it may be quoted in an answer."""
    return _TOKENS.setdefault(router.folder, router.ring.issue(PILOT, 600.0))


def _body(request_id: str = "", queue: str = QUEUE, **more: object) -> bytes:
    asked = GetJobRequest(request_id=request_id or "r" * 8, queue=queue, pilot=PilotInfo(id="p1"), **more)  # type: ignore[arg-type]
    return msgspec.json.encode(asked)


def _request(router: RunningFront, body: bytes, *lines: str, path: str = "/v1/get_job", kind: str = "json") -> bytes:
    head = [
        f"POST {path} HTTP/1.1",
        "Host: localhost",
        f"Authorization: Bearer {_token(router)}",
        f"Content-Type: application/{kind}",
        f"Content-Length: {len(body)}",
        *lines,
    ]
    return "\r\n".join(head).encode("latin-1") + b"\r\n\r\n" + body


async def _exchange(router: RunningFront, pieces: Sequence[bytes]) -> bytes:
    """Send the pieces, each when the one before has been read, and a last request that ends it; all that comes back."""
    host, port = router.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        async with asyncio.timeout(DEADLINE_S):
            heard = asyncio.ensure_future(reader.read())
            for piece in (*pieces, LAST):
                if heard.done() or writer.transport.is_closing():
                    break
                writer.write(piece)
                # The router runs in this event loop: when this is answered it has read what came before.
                assert (await router.send("GET", "/health")).status == 200
            # Where the last request became a part of a body that is longer still, nothing will ever come.
            await asyncio.wait([heard], timeout=NOTHING_S)
            if not heard.done() and writer.can_write_eof():
                writer.write_eof()
            return await heard
    finally:
        writer.close()


def _comparable(answer: bytes) -> bytes:
    """Without what differs from one moment to the next."""
    return _GOES.sub(b"", answer)


async def _same(routers: Routers, make: Callable[[RunningFront], Sequence[bytes]]) -> bytes:
    """What both answer, which must be the same."""
    fast, plain = [_comparable(await _exchange(router, make(router))) for router in routers]
    assert _parts(fast) == _parts(plain)
    return fast


def _parts(answer: bytes) -> list[tuple[bytes, list[bytes], bytes]]:
    """Of each answer the status line, the headers in one order, and the body."""
    found = []
    while answer:
        head, _, rest = answer.partition(b"\r\n\r\n")
        first, *headers = head.split(b"\r\n")
        length = next((int(h.split(b":")[1]) for h in headers if h.lower().startswith(b"content-length")), 0)
        found.append((first, sorted(headers), rest[:length]))
        answer = rest[length:]
    return found


def _bodies(answer: bytes) -> list[bytes]:
    return [body for _, _, body in _parts(answer)]


# --- what it takes on ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["json", "msgpack"])
async def test_a_job_is_given_as_the_ordinary_way_gives_it(
    shard: Partition, routers: Routers, served: list[str], kind: str
) -> None:
    ids = await shard.submit(job(), job())
    decode = msgspec.json.decode if kind == "json" else msgspec.msgpack.decode
    bodies = []
    for number, router in enumerate(routers):
        body = (
            _body(f"request-{number}")
            if kind == "json"
            else msgspec.msgpack.encode(msgspec.json.decode(_body(f"request-{number}")))
        )
        answer = await _exchange(router, [_request(router, body, kind=kind)])
        head, content = answer.partition(b"\r\n\r\n")[0], _bodies(answer)[0]
        assert head.startswith(b"HTTP/1.1 200 OK\r\n")
        assert f"Content-Type: application/{kind}".encode() in head
        [grant] = decode(content)["jobs"]
        assert grant["id"] == ids[number]
        bodies.append({name: value for name, value in grant.items() if name not in ("id", "lease_token")})
    assert bodies[0] == bodies[1]
    assert served == ["get_job"]


async def test_a_whole_life_goes_by_the_lane(shard: Partition, routers: Routers, served: list[str]) -> None:
    [identifier] = await shard.submit(job())
    fast, _ = routers
    async with fast.client(PILOT) as client:
        [grant] = (await client.get_job(msgspec.json.decode(_body(), type=GetJobRequest))).jobs
        common = {"id": grant.id, "attempt": grant.attempt, "lease_token": grant.lease_token}
        await client.heartbeat(msgspec.convert(common | {"state": "running"}, HeartbeatRequest))
        await client.report(msgspec.convert(common | {"state": "finished"}, ReportRequest))
    assert (await shard.job(identifier)).job.state == "finished"
    assert served == ["get_job", "heartbeat", "report"]


async def test_many_requests_on_one_connection_are_answered_in_their_order(
    shard: Partition, routers: Routers, served: list[str]
) -> None:
    ids = await shard.submit(*[job()] * 5)
    fast, _ = routers
    sent = b"".join(_request(fast, _body(f"request-{number}")) for number in range(5))
    # The second time they are repeats, and in pieces that the lane leaves to aiohttp.
    for pieces, n_served in (([sent], 5), ([sent[n : n + 100] for n in range(0, len(sent), 100)], 0)):
        served.clear()
        bodies = _bodies(await _exchange(fast, pieces))[:5]
        found = [grant["id"] for body in bodies for grant in msgspec.json.decode(body)["jobs"]]
        assert found == ids
        assert served == ["get_job"] * n_served


async def test_what_comes_in_pieces_is_put_together(shard: Partition, routers: Routers, served: list[str]) -> None:
    fast, _ = routers
    request = _request(fast, _body())
    cut = request.index(b"\r\n\r\n") + 4
    for at in (cut, cut + 1, len(request) - 1):
        answer = await _exchange(fast, [request[:at], request[at:]])
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert served == ["get_job"] * 3


async def test_a_rest_that_does_not_come_is_aiohttps_to_wait_for(
    routers: Routers, served: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    left = asyncio.Event()
    too_slow = lane.Connection._too_slow

    def noted(self: lane.Connection) -> None:
        too_slow(self)
        left.set()

    monkeypatch.setattr(lane.Connection, "_too_slow", noted)
    monkeypatch.setattr(lane, "HOLD_S", 0.05)
    fast, _ = routers
    host, port = fast.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    request = _request(fast, _body())
    async with asyncio.timeout(DEADLINE_S):
        writer.write(request[:-5])
        await left.wait()
        writer.write(request[-5:])
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 OK\r\n")
    writer.close()
    assert served == []


# --- what it refuses, and leaves alone -------------------------------------------------------------------------------


def _odd(router: RunningFront) -> dict[str, list[bytes]]:
    """Requests that are not plain, by what is odd about them."""
    body = _body()
    token = _token(router)
    return {
        "two lengths alike": [_request(router, body, f"Content-Length: {len(body)}")],
        "two lengths that differ": [_request(router, body, "Content-Length: 3")],
        "a length and chunks": [_request(router, body, "Transfer-Encoding: chunked")],
        "chunks": [
            _request(router, b"", "Transfer-Encoding: chunked").replace(b"Content-Length: 0\r\n", b"")
            + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
        ],
        "a length with a sign": [_request(router, body).replace(b"Content-Length: ", b"Content-Length: +")],
        "no length": [re.sub(rb"Content-Length: \d+\r\n", b"", _request(router, body))],
        "no body": [_request(router, b"")],
        "bad JSON": [_request(router, b"{" * 20)],
        "a wrong field": [_request(router, b'{"queue": 5}')],
        "not UTF-8": [_request(router, b'"\xff"')],
        "deep": [_request(router, b"[" * 5000)],
        "another type": [_request(router, body, kind="x-www-form-urlencoded")],
        "a type with a charset": [_request(router, body).replace(b"/json", b"/json; charset=utf-8")],
        "no type": [_request(router, body).replace(b"Content-Type: application/json\r\n", b"")],
        "two types": [_request(router, body, "Content-Type: application/msgpack")],
        "no token": [_request(router, body).replace(f"Authorization: Bearer {token}\r\n".encode(), b"")],
        "a bad token": [_request(router, body).replace(token.encode(), token.encode()[:-9])],
        "two tokens": [_request(router, body, "Authorization: Bearer x")],
        "an unknown queue": [_request(router, _body(queue="nowhere"))],
        "another path": [_request(router, body, path="/v1/get_jobs")],
        "a path with a query": [_request(router, body, path="/v1/get_job?x=1")],
        "a whole URL": [_request(router, body, path="http://localhost/v1/get_job")],
        "another method": [_request(router, body).replace(b"POST", b"PUT", 1)],
        "HTTP/1.0": [_request(router, body).replace(b"HTTP/1.1", b"HTTP/1.0")],
        "HTTP/9": [_request(router, body).replace(b"HTTP/1.1", b"HTTP/9.9")],
        "close": [_request(router, body, "Connection: close")],
        "expects": [_request(router, body, "Expect: 100-continue")],
        "upgrade": [_request(router, body, "Connection: Upgrade", "Upgrade: websocket")],
        "compressed": [_request(router, body, "Content-Encoding: gzip")],
        "a folded header": [_request(router, body, "X-A: 1", " 2")],
        "a header without a name": [_request(router, body, ": 1")],
        "a bare line feed": [_request(router, body).replace(b"\r\n", b"\n")],
        "a NUL": [_request(router, body, "X-A: \x00")],
        "a long header": [_request(router, body, f"X-A: {'a' * 9000}")],
        "many headers": [_request(router, body, *[f"X-{n}: 1" for n in range(200)])],
        "not HTTP": [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20 + b"\r\n\r\n"],
        "a release by heartbeat": [_request(router, b'{"id": 1}', path="/v1/heartbeat")],
        "a job that nobody knows": [
            _request(router, b'{"id": 1, "attempt": 1, "lease_token": "x", "state": "running"}', path="/v1/heartbeat")
        ],
        # In one piece aiohttp answers neither: its parser reads ahead, and forgets what came before the odd one.
        "an odd one after a plain one": [_request(router, body), _request(router, body, "Content-Length: 3")],
        "a plain one after an odd one": [_request(router, b"{}") + _request(router, body)],
    }


_ODD_ONES = [
    "two lengths alike", "two lengths that differ", "a length and chunks", "chunks", "a length with a sign",
    "no length",
    "no body", "bad JSON", "a wrong field", "not UTF-8", "deep", "another type", "a type with a charset", "no type",
    "two types", "no token", "a bad token", "two tokens", "an unknown queue", "another path", "a path with a query",
    "a whole URL", "another method", "HTTP/1.0", "HTTP/9", "close", "expects", "upgrade", "compressed",
    "a folded header", "a header without a name", "a bare line feed", "a NUL", "a long header", "many headers",
    "not HTTP", "a release by heartbeat", "a job that nobody knows", "an odd one after a plain one",
    "a plain one after an odd one",
]  # fmt: skip


@pytest.mark.parametrize("which", _ODD_ONES)
async def test_what_is_odd_is_answered_as_the_ordinary_way_does(routers: Routers, which: str) -> None:
    assert await _same(routers, lambda router: _odd(router)[which])


async def test_every_odd_request_is_tried(routers: Routers) -> None:
    assert list(_odd(routers[0])) == _ODD_ONES


async def test_random_changes_of_a_request_are_answered_alike(routers: Routers) -> None:
    chance = random.Random(20261125)
    for _ in range(60):
        n_changes, cuts = chance.randrange(1, 4), sorted(chance.sample(range(1, 200), 2))
        bits = [b"", b"\r\n", b" ", b"\x00", b"Content-Length: 7\r\n", b"{", b"a:"]
        changes = [(chance.random(), chance.choice(bits)) for _ in range(n_changes)]

        def make(
            router: RunningFront, changes: list[tuple[float, bytes]] = changes, cuts: list[int] = cuts
        ) -> list[bytes]:
            request = _request(router, _body())
            for where, what in changes:
                at = int(where * len(request))
                request = request[:at] + what + request[at + (not what) :]
            return [request[: cuts[0]], request[cuts[0] : cuts[1]], request[cuts[1] :]]

        await _same(routers, make)


# --- clients that go, and the end ------------------------------------------------------------------------------------


async def test_a_client_that_hangs_up_while_it_waits_leaves_the_job_to_others(
    shard: Partition, routers: Routers, served: list[str]
) -> None:
    fast, _ = routers
    host, port = fast.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(_request(fast, _body(wait_s=20.0)))
    await eventually(lambda: len(shard.shard.dispatcher._parking) == 1, DEADLINE_S, what="it waits")
    writer.close()
    await eventually(lambda: len(shard.shard.dispatcher._parking) == 0, DEADLINE_S, what="it is gone")
    [identifier] = await shard.submit(job())
    assert [grant.id for grant in await shard.get()] == [identifier]
    assert served == ["get_job"]


async def test_a_router_that_ends_answers_what_it_has_begun(shard: Partition) -> None:
    async with front(shard) as router:
        host, port = router.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(_request(router, _body(wait_s=0.3)))
        await eventually(lambda: len(shard.shard.dispatcher._parking) == 1, DEADLINE_S, what="it waits")
    # Its end has waited for the answer.
    async with asyncio.timeout(DEADLINE_S):
        assert (await reader.read()).startswith(b"HTTP/1.1 200 OK\r\n")
    writer.close()


async def test_a_shard_that_is_gone_is_said_with_a_time_to_come_again(shard: Partition, routers: Routers) -> None:
    await shard.shard.link.stop(0.1)
    fast, _ = routers
    links = list(fast.forward.links._links.values())
    await eventually(lambda: not any(link.connected for link in links), DEADLINE_S, what="the links are down")
    answer = await _exchange(fast, [_request(fast, _body())])
    head, body = answer.partition(b"\r\n\r\n")[0], _bodies(answer)[0]
    assert head.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
    assert b"\r\nRetry-After: " in head
    assert msgspec.json.decode(body)["error"]["code"] == "shard_down"
