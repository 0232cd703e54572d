"""The client: repeats what may be repeated, raises what the router raised, never waits beyond its patience."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import msgspec
import pytest
from aiohttp import web

from culm.client import TIMEOUT_S, Client, error_of
from culm.errors import Bug, ClientFault, Conflict, CulmError, Moved, Unavailable
from culm.frames import error_body
from culm.wire import GetJobAnswer, GetJobRequest, JobsAnswer, JobSpec, JobsQuery, PilotInfo, SubmitRequest
from tests.servers import free_ports

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
SUBMIT = SubmitRequest(idempotency_key="k", jobs=[JobSpec(argv=["true"])])


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[str]:
    """An HTTP server that is no router; its URL."""
    app = web.Application(client_max_size=8 << 20)
    app.router.add_route("*", "/{tail:.*}", handler)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    port = free_ports(1)
    await web.TCPSite(runner, "127.0.0.1", port).start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        await runner.cleanup()


def encoded(error: CulmError) -> bytes:
    """An error as a router sends it."""
    return msgspec.json.encode({"error": error_body(error)})


@pytest.mark.parametrize(
    "error",
    [
        ClientFault("bad_job", "x", details={"index": 3}),
        ClientFault("forbidden", "x", http_status=403),
        Conflict("lease_lost", "x", details={"state": "running"}),
        Unavailable("shard_down", "x", retry_after_s=2.5, details={"shard": "us1"}),
        Moved(3, 4),
        Bug("x"),
    ],
    ids=lambda error: error.code,
)
def test_an_error_arrives_as_what_it_was(error: CulmError) -> None:
    arrived = error_of(error.http_status, encoded(error))
    assert type(arrived) is type(error)
    assert (arrived.code, arrived.http_status, arrived.retryable) == (error.code, error.http_status, error.retryable)
    assert (arrived.details, arrived.retry_after_s) == (error.details, error.retry_after_s)


@pytest.mark.parametrize("body", [b"", b"<html>Bad Gateway</html>", b"{}", b'{"error": {"code": "\xff"}}', b"\xff\xfe"])
def test_an_answer_that_is_not_ours_is_retryable_where_a_proxy_may_have_made_it(body: bytes) -> None:
    assert isinstance(error_of(502, body), Unavailable)
    refused = error_of(404, body)
    assert isinstance(refused, ClientFault)
    assert refused.http_status == 404


async def test_what_may_be_repeated_is_repeated_with_the_same_body() -> None:
    bodies: list[bytes] = []
    request = SubmitRequest(idempotency_key="k", jobs=[JobSpec(argv=["x" * 60_000])] * 30)

    async def handler(http: web.Request) -> web.Response:
        bodies.append(await http.read())
        if len(bodies) < 3:
            return web.Response(status=503, body=encoded(Unavailable("shard_down", "x", retry_after_s=0.01)))
        return web.json_response({"jobset": 1, "ids": [5], "shards": {}})

    async with serving(handler) as url, Client(url, "t") as client:
        assert (await client.submit(request)).ids == [5]
    assert bodies == [msgspec.json.encode(request)] * 3
    assert len(bodies[0]) > 1 << 20


@pytest.mark.parametrize("error", [ClientFault("bad_job", "x"), Conflict("key_reused", "x"), Bug("x")])
async def test_what_may_not_be_repeated_is_asked_once(error: CulmError) -> None:
    n_calls = 0

    async def handler(_request: web.Request) -> web.Response:
        nonlocal n_calls
        n_calls += 1
        return web.Response(status=error.http_status, body=encoded(error))

    async with serving(handler) as url, Client(url, "t") as client:
        with pytest.raises(type(error)):
            await client.submit(SUBMIT)
    assert n_calls == 1


async def test_patience_ends() -> None:
    async def handler(_request: web.Request) -> web.Response:
        return web.Response(status=503, body=encoded(Unavailable("shard_down", "x", retry_after_s=0.01)))

    async with serving(handler) as url:
        began = asyncio.get_running_loop().time()
        async with Client(url, "t", patience_s=0.6) as client:
            with pytest.raises(Unavailable):
                await client.submit(SUBMIT)
        assert 0.2 < asyncio.get_running_loop().time() - began < 3.0


async def test_nobody_there_is_unreachable() -> None:
    async with Client(f"http://127.0.0.1:{free_ports(1)}", "t", patience_s=0) as client:
        with pytest.raises(Unavailable) as caught:
            await client.jobs(JobsQuery())
    assert caught.value.code == "unreachable"


@pytest.mark.parametrize("body", [b"", b"OK", b'{"jobs": 5}', b"\xff\xfe", b'{"jobs": [], "reason": "\xff"}'])
async def test_a_good_status_with_a_strange_body_is_a_bad_answer(body: bytes) -> None:
    async def handler(_request: web.Request) -> web.Response:
        return web.Response(body=body)

    async with serving(handler) as url, Client(url, "t", patience_s=0) as client:
        with pytest.raises(Unavailable) as caught:
            await client.get_job(GetJobRequest(request_id="r" * 8, queue="q", pilot=PilotInfo(id="p")))
    assert caught.value.code == "bad_answer"


async def test_the_token_and_the_query_are_sent_and_defaults_are_not() -> None:
    seen: list[tuple[str, str]] = []

    async def handler(request: web.Request) -> web.Response:
        seen.append((request.headers["Authorization"], request.query_string))
        return web.Response(body=msgspec.json.encode(JobsAnswer(jobs=[])))

    async with serving(handler) as url, Client(f"{url}/", "secret") as client:
        await client.jobs(JobsQuery())
        await client.jobs(JobsQuery(owner="a b&c", limit=5))
    assert seen == [("Bearer secret", ""), ("Bearer secret", "owner=a b%26c&limit=5")]


async def test_a_long_poll_may_take_its_time() -> None:
    """The time-out of the request grows with the time that the pilot asked to wait."""
    seen: list[float] = []

    async def asked(*_args: object, timeout_s: float, **_options: object) -> GetJobAnswer:
        seen.append(timeout_s)
        return GetJobAnswer()

    async with Client("http://x", "t") as client:
        client.post = asked  # type: ignore[assignment, method-assign]
        await client.get_job(GetJobRequest(request_id="r" * 8, queue="q", pilot=PilotInfo(id="p"), wait_s=50.0))
    assert seen == [TIMEOUT_S + 50.0]
