"""What every service process does alike: the event loop, signals, guarded background loops, health."""

import asyncio
import contextlib
import logging
import signal
from collections.abc import AsyncIterator, Awaitable, Callable

import uvloop
from aiohttp import web

from culm import __version__, address, telemetry
from culm.errors import CulmError

log = logging.getLogger("culm.service")


def run(process: str, level: str, main: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    """Run `main` on uvloop until it returns; its event is set by SIGTERM or SIGINT."""
    telemetry.configure_logging(process, level)
    telemetry.BUILD.labels(__version__, process).set(1)

    async def body() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        await main(stop)

    uvloop.run(body())


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


Ready = Callable[[], Awaitable[str]]
""""" when the process can do its work, else what is missing."""


def health_routes(process: str, ready: Ready) -> list[web.RouteDef]:
    """`GET /health` (200 {"status": "ok"} or 503 with what is missing) and `GET /metrics`; neither needs a token."""

    async def health(_request: web.Request) -> web.Response:
        missing = await ready()
        body = {"status": "unavailable" if missing else "ok", "process": process, "version": __version__}
        return web.json_response(body | ({"missing": missing} if missing else {}), status=503 if missing else 200)

    async def metrics(_request: web.Request) -> web.Response:
        body = await asyncio.to_thread(telemetry.exposition)
        return web.Response(body=body, headers={"Content-Type": telemetry.CONTENT_TYPE})

    return [web.get("/health", health), web.get("/metrics", metrics)]


@contextlib.asynccontextmanager
async def side_http(where: str, process: str, ready: Ready) -> AsyncIterator[None]:
    """Serve health and metrics of a process that is no HTTP server otherwise, at `unix:/path` or `tcp:host:port`."""
    app = web.Application()
    app.add_routes(health_routes(process, ready))
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    target = address.parse(where)
    if target.kind == "unix":
        address.prepare_socket(target.path)
        site: web.BaseSite = web.UnixSite(runner, target.path)
    else:
        site = web.TCPSite(runner, target.host, target.port)
    await site.start()
    try:
        yield
    finally:
        await runner.cleanup()
