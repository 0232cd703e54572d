"""The monitor process: asks all shards at once with a deadline, and answers with what is known and what is missing."""

import asyncio
import logging
from typing import Final

import msgspec
from aiohttp import web

from culm import access, clock, service
from culm.errors import Conflict, CulmError
from culm.https import POLL_S, Https
from culm.link import LinkOptions
from culm.settings import MonitorSettings
from culm.shard_links import ShardLinks
from culm.tokens import Verifier
from culm.topology_store import TopologyCache
from culm.wire import CountsAnswer, ShardCounts, ShardCountsAnswer
from monitor_api.merge import Heard, merge

KEYS_POLL_S: Final = 5.0

log = logging.getLogger("monitor.main")


def run(settings: MonitorSettings) -> None:
    """Run the monitor until SIGTERM or SIGINT."""
    service.run(settings.name, settings.log_level, lambda stop: Monitor(settings).serve(stop))


class Monitor:
    """The shards' views, merged."""

    def __init__(self, settings: MonitorSettings) -> None:
        self._settings = settings
        self._topology = TopologyCache(settings.topology_dir, settings.authority)
        options = LinkOptions(stall_s=settings.link_stall_s, tls=settings.link_tls)
        self._links = ShardLinks(lambda: self._topology.current, options)
        self._verifier = Verifier(settings.trusted_keys_dir)
        self._clock = clock.SystemClock()
        self._heard: dict[str, Heard] = {}

    async def serve(self, stop: asyncio.Event) -> None:
        """Serve until `stop`."""
        settings, loops = self._settings, service.Loops()
        https = Https(settings.https, settings.host, behind_tls_front=settings.behind_tls_front)
        await self._follow()
        loops.every(settings.topology_poll_s, "topology", self._follow)
        loops.every(POLL_S, "certificate", https.poll)
        loops.every(KEYS_POLL_S, "keys", self._verifier.poll)
        runner = web.AppRunner(self.app(), access_log=None, handler_cancellation=True, shutdown_timeout=2.0)
        await runner.setup()
        try:
            try:
                await web.TCPSite(runner, settings.host, settings.port, ssl_context=https.context).start()
            except OSError as error:
                where = f"{settings.host}:{settings.port}"
                raise Conflict("port_busy", f"cannot listen at {where}: {error.strerror}") from None
            log.info("the monitor serves %s:%d", settings.host, settings.port)
            await stop.wait()
        finally:
            await runner.cleanup()
            await loops.stop()
            await self._links.stop()

    def app(self) -> web.Application:
        """The application with all routes."""
        app = web.Application(middlewares=[service.errors("monitor", lambda _request, error: service.refusal(error))])
        app.add_routes(
            [*service.health_routes("monitor", self._ready, self._verifier), web.get("/v1/counts", self._counts)]
        )
        return app

    async def counts(self) -> CountsAnswer:
        """Ask every shard; those that give no answer in time are named and shown as last heard."""
        topology = self._topology.current
        names = list(topology.shards)
        answers = await self._links.ask_many(
            [(name, ShardCounts()) for name in names], "counts", ShardCountsAnswer, self._settings.shard_deadline_s
        )
        missing = []
        for name, answer in zip(names, answers, strict=True):
            if isinstance(answer, CulmError):
                missing.append(name)
            else:
                self._heard[name] = Heard(answer, self._clock.monotonic())
        for gone in self._heard.keys() - topology.shards.keys():
            del self._heard[gone]
        return merge(topology, self._heard, missing, self._clock.monotonic())

    async def _counts(self, request: web.Request) -> web.Response:
        request[service.VERB] = "counts"
        principal = self._verifier.verify(request.headers.get("Authorization"))
        access.require_role(principal, "user", "admin")
        return web.Response(body=msgspec.json.encode(await self.counts()), content_type="application/json")

    async def _follow(self) -> None:
        self._topology.refresh_if_changed()
        await self._links.refresh()

    async def _ready(self) -> str:
        return "" if self._topology.current.sections else "topology"
