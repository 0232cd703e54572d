"""The bound on connections: who is too many is told so, the others are served."""

import asyncio
from collections.abc import AsyncIterator

import msgspec
import pytest
from prometheus_client import REGISTRY

from router import door
from tests.front import RunningFront, front
from tests.partition import Partition
from tests.waiting import eventually

DEADLINE_S = 10.0
MOST = 3
REQUEST = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@pytest.fixture
async def router(shard: Partition) -> AsyncIterator[RunningFront]:
    """A router with room for three."""
    async with front(shard, max_connections=MOST) as running:
        yield running


async def connect(router: RunningFront) -> Streams:
    """A connection."""
    host, port = router.url.removeprefix("http://").split(":")
    return await asyncio.open_connection(host, int(port))


async def health(streams: Streams) -> tuple[int, dict[str, str], bytes]:
    """Ask for health over this connection: status, headers, body."""
    reader, writer = streams
    writer.write(REQUEST)
    async with asyncio.timeout(DEADLINE_S):
        head = (await reader.readuntil(b"\r\n\r\n")).decode().splitlines()
        headers = dict(line.split(": ", 1) for line in head[1:] if line)
        return int(head[0].split()[1]), headers, await reader.readexactly(int(headers["Content-Length"]))


async def test_beyond_the_bound_a_client_is_told_to_come_again(router: RunningFront) -> None:
    inside = [await connect(router) for _ in range(MOST)]
    assert [(await health(one))[0] for one in inside] == [200] * MOST
    before = REGISTRY.get_sample_value("culm_shed_total", {"reason": "connections"}) or 0.0
    outside = await connect(router)
    status, headers, body = await health(outside)
    assert REGISTRY.get_sample_value("culm_shed_total", {"reason": "connections"}) == before + 1
    error = msgspec.json.decode(body)["error"]
    assert (status, headers["Retry-After"], headers["Connection"]) == (503, "1", "close")
    assert (error["code"], error["retryable"]) == ("too_many_connections", True)
    async with asyncio.timeout(DEADLINE_S):
        assert await outside[0].read() == b""
    # Who is inside is served on, and who leaves makes room.
    assert [(await health(one))[0] for one in inside] == [200] * MOST
    inside[0][1].close()

    async def admitted() -> bool:
        fresh = await connect(router)
        status = (await health(fresh))[0]
        fresh[1].close()
        return status == 200

    await eventually(admitted, DEADLINE_S, what="there is room again")
    for _, writer in (*inside[1:], outside):
        writer.close()


async def test_who_is_refused_and_says_nothing_is_shown_out(
    router: RunningFront, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "LINGER_S", 0.05)
    inside = [await connect(router) for _ in range(MOST)]
    assert [(await health(one))[0] for one in inside] == [200] * MOST
    mute = await connect(router)
    async with asyncio.timeout(DEADLINE_S):
        assert await mute[0].read() == b""
    for _, writer in (*inside, mute):
        writer.close()
