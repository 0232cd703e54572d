"""What every service process does alike: the event loop, signals, guarded background loops, health."""

import asyncio
import contextlib
import gc
import logging
import random
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final

import msgspec
import uvloop
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from culm import __version__, access, address, telemetry
from culm.errors import Bug, ClientFault, Conflict, CulmError
from culm.frames import error_body
from culm.tokens import Verifier
from culm.wire import ErrorBody

GC_THRESHOLD: Final = 20_000
"""New containers before a look for cycles: the usual 700 is a look every few requests."""

log = logging.getLogger("culm.service")


def run(process: str, level: str, main: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    """Run `main` on uvloop until it returns; its event is set by SIGTERM or SIGINT."""
    telemetry.configure_logging(process, level)
    telemetry.BUILD.labels(__version__, process).set(1)

    # What is there by now stays: the collector need not look at it again and again (a tenth of a busy shard's time).
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD)

    async def body() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        watch_lag(loop)
        await main(stop)

    uvloop.run(body())


def watch_lag(loop: asyncio.AbstractEventLoop) -> None:
    """Measure from now on how late the event loop is, which is what whoever it serves waits beyond his own time."""
    due = time.monotonic() + LAG_LOOK_S

    def look() -> None:
        nonlocal due
        telemetry.LOOP_LAG.observe(max(0.0, time.monotonic() - due))
        due = time.monotonic() + LAG_LOOK_S
        loop.call_later(LAG_LOOK_S, look)

    loop.call_later(LAG_LOOK_S, look)


class Loops:
    """Background loops: each turn is guarded and counted, and ends with the process.

    A loop that fails is logged, counted in culm_loop_errors_total and tried again after its interval.
    """

    def __init__(self) -> None:
        self._tasks: list[asyncio.Task[None]] = []

    def every(self, interval_s: float, name: str, turn: Callable[[], Awaitable[object]]) -> None:
        """Run `turn` now and then `interval_s` after each end."""
        self._tasks.append(asyncio.get_running_loop().create_task(self._repeat(interval_s, name, turn), name=name))

    async def stop(self) -> None:
        """Cancel all and wait for their ends."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()

    async def _repeat(self, interval_s: float, name: str, turn: Callable[[], Awaitable[object]]) -> None:
        runs, errors = telemetry.LOOP_RUNS.labels(name), telemetry.LOOP_ERRORS.labels(name)
        me = asyncio.current_task()
        assert me is not None
        while True:
            try:
                await turn()
                runs.inc()
            except CulmError as error:
                errors.inc()
                log.warning("loop %s: %s", name, error)
            except Exception:  # the guard of a background loop: it must outlive every fault
                errors.inc()
                log.exception("loop %s failed", name)
            # redis-py can swallow a cancellation (seen with 8.1: 105 of 4,000): then the turn ends as if nothing was.
            if me.cancelling():
                return
            await asyncio.sleep(interval_s)


# --- HTTP ------------------------------------------------------------------------------------------------------------

Ready = Callable[[], Awaitable[str]]
""""" when the process can do its work, else what is missing."""
Refuse = Callable[[web.Request, CulmError], web.Response]
"""The answer to a request that ends with this error."""

VERB: Final = web.RequestKey("verb", str)
"""What the metrics call the request."""
OTHER: Final = "other"
TIMED: Final = ""
"""For VERB: the handler has timed its request itself."""
LAG_LOOK_S: Final = 0.5
RETRY_JITTER: Final = 0.5
"""Retry-After is lengthened by up to this part, so that the clients of a dead shard do not come back at once."""


def health_routes(process: str, ready: Ready, verifier: Verifier | None) -> list[web.RouteDef]:
    """`GET /health` (200 {"status": "ok"} or 503 with what is missing) and `GET /metrics`.

    Health needs no token. Metrics need an admin's, or a user's with the role `monitor`; with a verifier of None none,
    which is for addresses that nobody else can reach. A client that comes from loopback is not trusted for that: a TLS
    front on the same machine makes everybody come from there.
    """

    async def health(_request: web.Request) -> web.Response:
        missing = await ready()
        body = {"status": "unavailable" if missing else "ok", "process": process, "version": __version__}
        return web.json_response(body | ({"missing": missing} if missing else {}), status=503 if missing else 200)

    async def metrics(request: web.Request) -> web.Response:
        if verifier is not None:
            access.require_monitor(verifier.verify(request.headers.get("Authorization")))
        body = await asyncio.to_thread(telemetry.exposition)
        return web.Response(body=body, headers={"Content-Type": telemetry.CONTENT_TYPE})

    return [web.get("/health", health), web.get("/metrics", metrics)]


def errors(process: str, refuse: Refuse) -> Middleware:
    """Every error leaves as our own body, made by `refuse`; every request is timed by verb and outcome."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        started = time.perf_counter()
        outcome = "ok"
        try:
            return await handler(request)
        except CulmError as error:
            outcome = error.code
            if isinstance(error, Bug):
                log.exception("%s: a bug of ours", request.path)
            return refuse(request, error)
        except web.HTTPException as error:
            outcome = f"http_{error.status}"
            return refuse(request, _of_http(request, error))
        except (ConnectionResetError, BrokenPipeError, asyncio.CancelledError):
            outcome = "client_gone"
            raise
        except Exception:  # the last guard of a request: one bad request must not look like a dead process
            outcome = "internal"
            log.exception("%s failed", request.path)
            return refuse(request, Bug(f"the request failed, see the log of the {process}"))
        finally:
            verb = request.get(VERB, OTHER)
            if verb != TIMED:
                telemetry.REQUESTS.labels(verb, outcome).observe(time.perf_counter() - started)

    return middleware


def refusal(
    error: CulmError,
    encode: Callable[[msgspec.Struct], bytes] = msgspec.json.encode,
    content_type: str = "application/json",
) -> web.Response:
    """{"error": {code, message, retryable, retry_after_s, details}} with the error's status and headers."""
    body = error_body(error)
    headers = {}
    if body.retry_after_s is not None:
        # Rounded first: header and body must not fall on two sides of a half.
        jittered = round(body.retry_after_s * (1 + random.uniform(0, RETRY_JITTER)), 3)  # noqa: S311  # no secret
        body = msgspec.structs.replace(body, retry_after_s=jittered)
        headers["Retry-After"] = str(max(1, round(jittered)))
    if error.http_status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    encoded = encode(_Envelope(body))
    return web.Response(body=encoded, status=error.http_status, content_type=content_type, headers=headers)


class _Envelope(msgspec.Struct):
    error: ErrorBody


def _of_http(request: web.Request, error: web.HTTPException) -> CulmError:
    if error.status == 404:
        return ClientFault("unknown_path", f"there is no {request.path[:200]}", http_status=404)
    if error.status == 405:
        return ClientFault("method_not_allowed", f"{request.method} is not for {request.path[:200]}", http_status=405)
    return ClientFault("bad_request", error.reason, http_status=error.status)


@contextlib.asynccontextmanager
async def side_http(where: str, process: str, ready: Ready) -> AsyncIterator[None]:
    """Serve health and metrics of a process that is no HTTP server otherwise, at `unix:/path` or `tcp:host:port`.

    It is plain HTTP without tokens, so for this machine only: raises ClientFault (bad_address for `tls:`, and as
    address.parse and address.prepare_socket), Conflict(port_busy).
    """
    target = address.parse(where)
    if target.kind == "tls":
        raise ClientFault("bad_address", f"{where}: health and metrics are served at unix: or a loopback tcp: only")
    app = web.Application(middlewares=[errors(process, lambda _request, error: refusal(error))])
    app.add_routes(health_routes(process, ready, None))
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    if target.kind == "unix":
        address.prepare_socket(target.path)
        site: web.BaseSite = web.UnixSite(runner, target.path)
    else:
        site = web.TCPSite(runner, target.host, target.port)
    try:
        try:
            await site.start()
        except OSError as error:
            raise Conflict("port_busy", f"cannot listen at {where}: {error.strerror}") from None
        yield
    finally:
        await runner.cleanup()
