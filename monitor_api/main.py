"""The monitor process: asks all shards at once with a deadline, and answers with what is known and what is missing."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

import msgspec
from aiohttp import web

from culm import service
from culm.errors import Conflict, CulmError
from culm.https import POLL_S, Https
from culm.link import MONITOR, LinkOptions
from culm.settings import MonitorSettings
from culm.shard_links import ShardLinks
from culm.tokens import Verifier
from culm.topology_store import TopologyCache
from culm.wire import JobsQuery, Principal
from monitor_api.live import Live
from monitor_api.pages import COOKIE, Pages
from monitor_api.queries import ERROR_HOURS, PILE_UP_HOURS, PilotsQuery, hours_of, query_of
from monitor_api.views import Views

KEYS_POLL_S: Final = 5.0
LISTEN_S: Final = 5.0
"""How often all shards are asked what they have, though nobody looks."""
TOKENS_LOOK_S: Final = 1.0
"""How soon an event stream ends whose token is not good any more, though nothing happens."""
MAX_FORM_BYTES: Final = 64 << 10
WRITE_S: Final = 10.0
"""So long a reader of events may take nothing."""

UseCase = Callable[[Principal, Mapping[str, str]], Awaitable[msgspec.Struct]]
"""(who asks, the query)."""

log = logging.getLogger("monitor.main")


def run(settings: MonitorSettings) -> None:
    """Run the monitor until SIGTERM or SIGINT."""
    service.run(settings.name, settings.log_level, lambda stop: Monitor(settings).serve(stop))


class Monitor:
    """The shards' views, merged."""

    def __init__(self, settings: MonitorSettings) -> None:
        self._settings = settings
        self._topology = TopologyCache(settings.topology_dir, settings.authority)
        options = LinkOptions(stall_s=settings.link_stall_s, tls=settings.link_tls, says=MONITOR)
        self._links = ShardLinks(lambda: self._topology.current, options)
        self._verifier = Verifier(settings.trusted_keys_dir)
        self._https = Https(settings.https, settings.host, behind_tls_front=settings.behind_tls_front)
        self._views = Views(self._topology, self._links, settings.shard_deadline_s)
        self._live = Live(self._topology, self._links, settings.shard_deadline_s)

    async def serve(self, stop: asyncio.Event) -> None:
        """Serve until `stop`."""
        settings, loops = self._settings, service.Loops()
        await self._follow()
        loops.every(settings.topology_poll_s, "topology", self._follow)
        loops.every(POLL_S, "certificate", self._https.poll)
        loops.every(LISTEN_S, "listen", self._views.listen)
        loops.every(KEYS_POLL_S, "keys", self._verifier.poll)
        loops.every(TOKENS_LOOK_S, "event_tokens", self._live.look_at_tokens)
        runner = web.AppRunner(self.app(), access_log=None, handler_cancellation=True, shutdown_timeout=2.0)
        await runner.setup()
        try:
            try:
                site = web.TCPSite(runner, settings.host, settings.port, ssl_context=self._https.context)
                await site.start()
            except OSError as error:
                where = f"{settings.host}:{settings.port}"
                raise Conflict("port_busy", f"cannot listen at {where}: {error.strerror}") from None
            log.info("the monitor serves %s:%d", settings.host, settings.port)
            await stop.wait()
        finally:
            await self._live.stop()
            await runner.cleanup()
            await loops.stop()
            await self._links.stop()

    def app(self) -> web.Application:
        """The application with all routes."""
        views = self._views
        secure = self._https.context is not None or self._settings.behind_tls_front
        pages = Pages(views, self._verifier, secure=secure)

        def refuse(request: web.Request, error: CulmError) -> web.Response:
            is_browser = "text/html" in request.headers.get("Accept", "")
            return pages.refusal(error) if is_browser else service.refusal(error)

        app = web.Application(
            client_max_size=MAX_FORM_BYTES,
            middlewares=[service.errors("monitor", refuse)],
        )
        app.add_routes(
            [
                *service.health_routes("monitor", self._ready, self._verifier),
                *self._get("counts", lambda who, _query: views.counts(who)),
                *self._get("shards", lambda who, _query: views.shards(who)),
                *self._get("errors", lambda who, query: views.errors(who, hours_of(query, ERROR_HOURS))),
                *self._get("jobs", lambda who, query: views.jobs(who, query_of(query, JobsQuery))),
                *self._get("pile-ups", lambda who, query: views.pile_ups(who, hours_of(query, PILE_UP_HOURS))),
                *self._get("pilots", lambda who, query: views.pilots(who, query_of(query, PilotsQuery))),
                web.get("/v1/events", self._events),
                *pages.routes(),
            ]
        )
        return app

    def _get(self, verb: str, use_case: UseCase) -> list[web.RouteDef]:
        """A read, under both of its names."""

        async def handle(request: web.Request) -> web.Response:
            request[service.VERB] = verb.replace("-", "_")
            who = self._verifier.verify(request.headers.get("Authorization"))
            answer = await use_case(who, request.query)
            return web.Response(body=msgspec.json.encode(answer), content_type="application/json")

        return [web.get(f"/v1/{verb}", handle), web.get(f"/api/v1/{verb}", handle)]

    async def _events(self, request: web.Request) -> web.StreamResponse:
        """Server-sent events; a browser's EventSource shows its token by the cookie of the pages."""
        request[service.VERB] = "events"
        cookie = request.cookies.get(COOKIE)
        header = request.headers.get("Authorization") or (f"Bearer {cookie}" if cookie else None)
        last_id = request.headers.get("Last-Event-ID") or request.query.get("last_event_id", "")
        chunks = self._live.stream(lambda: self._verifier.verify(header), last_id)
        # The first one before the answer begins: what is refused is refused with its status.
        first = await anext(chunks)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
        try:
            await response.prepare(request)
            await self._write(response, first)
            async for chunk in chunks:
                await self._write(response, chunk)
        finally:
            await chunks.aclose()
        return response

    async def _write(self, response: web.StreamResponse, chunk: bytes) -> None:
        """Raises ConnectionResetError for a reader who takes nothing for a while: nobody waits for him."""
        try:
            async with asyncio.timeout(WRITE_S):
                await response.write(chunk)
        except TimeoutError:
            raise ConnectionResetError("the reader does not read") from None

    async def _follow(self) -> None:
        self._topology.refresh_if_changed()
        await self._links.refresh()
        await self._live.follow()

    async def _ready(self) -> str:
        return "" if self._topology.current.sections else "topology"
