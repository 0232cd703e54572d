"""The HTTP face of the router: a table of verbs. Handlers decode, call one use case, encode."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import msgspec
from aiohttp import web

from culm import get_job_times, service
from culm.errors import ClientFault, CulmError
from culm.registry_wire import BanRequest, QueueRequest, ShardRequest, SitesRequest, SlotsRequest, VoRequest
from culm.settings import RouterSettings
from culm.tokens import Verifier
from culm.wire import (
    MAX_BODY_BYTES,
    ArchiveRequest,
    CancelRequest,
    ExportRequest,
    GetJobAnswer,
    GetJobRequest,
    HeartbeatRequest,
    JobsQuery,
    Principal,
    ReportRequest,
    SubmitRequest,
)
from router import dialects, door, peers, pilots, registry, users, why
from router.archive import archive, export
from router.forward import Forward
from router.lane import Connection, Lane
from router.submit import submit

M = TypeVar("M", bound=msgspec.Struct)
Answerer = Callable[[Principal, web.Request], Awaitable[msgspec.Struct]]


class Front:
    """The router's HTTP handlers over one Forward."""

    def __init__(self, settings: RouterSettings, forward: Forward, verifier: Verifier) -> None:
        self._forward = forward
        self._verifier = verifier
        self._settings = settings
        self._home = registry.Home(Path(settings.topology_dir), settings.authority)
        self.orphans = pilots.Orphans(forward.links)
        forward.links.on_orphan = self.orphans.crossed
        self._lane = Lane(forward, verifier, self.orphans) if settings.fast_lane else None

    def app(self, ready: service.Ready) -> web.Application:
        """The application with all routes."""
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[service.errors("router", _refuse)])
        app.add_routes(service.health_routes("router", ready, self._verifier))
        forward, home = self._forward, self._home
        app.add_routes(
            [
                self._post("submit", SubmitRequest, lambda who, body: submit(forward, who, body)),
                self._post("heartbeat", HeartbeatRequest, lambda who, body: pilots.heartbeat(forward, who, body)),
                self._post("report", ReportRequest, lambda who, body: pilots.report(forward, who, body)),
                self._post("cancel", CancelRequest, lambda who, body: users.cancel(forward, who, body)),
                self._post("archive", ArchiveRequest, lambda who, body: archive(forward, home.authority, who, body)),
                self._post("export", ExportRequest, lambda who, body: export(forward, home.authority, who, body)),
                self._post("sites", SitesRequest, lambda who, body: registry.register(home, who, body)),
                self._post("queue", QueueRequest, lambda who, body: registry.set_fields(home, who, body)),
                self._post("vo", VoRequest, lambda who, body: registry.set_vo_fields(home, who, body)),
                self._post("slots", SlotsRequest, lambda who, body: registry.spread(home, who, body)),
                self._post("ban", BanRequest, lambda who, body: registry.ban(home, who, body)),
                self._post("shard", ShardRequest, lambda who, body: registry.join(home, forward.links, who, body)),
                web.post("/v1/get_job", self._get_job),
                self._get("job", "/v1/job/{id}", self._job),
                self._get("jobs", "/v1/jobs", self._jobs),
                self._get("why", "/v1/why/{id}", self._why),
                self._get("site_why", "/v1/site_why/{site}", self._site_why),
                self._get("topology", "/v1/topology", self._topology),
                self._get("authority", "/v1/authority", self._authority),
            ]
        )
        return app

    def connections(self, server: web.Server) -> Callable[[], asyncio.BaseProtocol]:
        """What makes the protocol of each client's connection, of a server that serves `app`."""
        lane, loop = self._lane, asyncio.get_running_loop()
        if lane is None:
            return server
        return lambda: Connection(server, lane, loop=loop, access_log=None, keepalive_timeout=door.KEEPALIVE_S)

    async def _get_job(self, request: web.Request) -> web.StreamResponse:
        """Written here, not by the framework: a client that is gone by now gives its jobs back at once."""
        principal = self._principal(request)
        request[service.VERB] = "get_job"
        message = await dialects.decode(request, GetJobRequest)
        started, waits = time.perf_counter(), message.wait_s > 0
        try:
            answer = await pilots.get_job(self._forward, self.orphans, principal, message)
        except CulmError as error:
            get_job_times.refused(time.perf_counter() - started, error, waits=waits)
            raise
        dialect = dialects.answer_dialect(request)
        written = False
        try:
            # Before the write: a pilot that has read its answer closes at once, and is not gone for that.
            if door.has_hung_up(request.transport):
                return dialects.encode(dialect, GetJobAnswer())
            response = dialects.encode(dialect, dialects.grants_in(dialect, answer))
            await response.prepare(request)
            await response.write_eof()
            written = request.transport is not None and not request.transport.is_closing()
        finally:
            if answer.jobs and not written:
                self.orphans.unsent(pilots.shards_of(self._forward.topology, answer), principal, message)
        get_job_times.answered(time.perf_counter() - started, waits=waits, has_jobs=bool(answer.jobs))
        request[service.VERB] = service.TIMED
        return response

    async def _job(self, principal: Principal, request: web.Request) -> msgspec.Struct:
        return await users.job(self._forward, principal, _job_id(request))

    async def _why(self, principal: Principal, request: web.Request) -> msgspec.Struct:
        return await why.why(self._forward, self._home.authority, principal, _job_id(request))

    async def _site_why(self, principal: Principal, request: web.Request) -> msgspec.Struct:
        return await why.site_why(self._forward, principal, request.match_info["site"])

    async def _jobs(self, principal: Principal, request: web.Request) -> msgspec.Struct:
        return await users.jobs(self._forward, principal, dialects.query(request, JobsQuery))

    async def _topology(self, principal: Principal, _request: web.Request) -> msgspec.Struct:
        return registry.show(principal, self._forward.fresh_topology())

    async def _authority(self, principal: Principal, _request: web.Request) -> msgspec.Struct:
        return await peers.tell(self._settings, principal, self._forward.fresh_topology())

    def _post(
        self, verb: str, kind: type[M], use_case: Callable[[Principal, M], Awaitable[msgspec.Struct]]
    ) -> web.RouteDef:
        async def answer(principal: Principal, request: web.Request) -> msgspec.Struct:
            return await use_case(principal, await dialects.decode(request, kind))

        return web.post(f"/v1/{verb}", self._handler(verb, answer))

    def _get(self, verb: str, path: str, answer: Answerer) -> web.RouteDef:
        return web.get(path, self._handler(verb, answer))

    def _handler(self, verb: str, answer: Answerer) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handle(request: web.Request) -> web.StreamResponse:
            request[service.VERB] = verb
            # The token before the body: a stranger cannot make us read or decode anything.
            principal = self._principal(request)
            return dialects.encode(dialects.answer_dialect(request), await answer(principal, request))

        return handle

    def _principal(self, request: web.Request) -> Principal:
        return self._verifier.verify(request.headers.get("Authorization"))


def _job_id(request: web.Request) -> int:
    text = request.match_info["id"]
    if not text.isdecimal() or len(text) > 19:
        raise ClientFault("bad_job_id", f"{text[:40]!r} is not a job id")
    return int(text)


def _refuse(request: web.Request, error: CulmError) -> web.Response:
    return dialects.encode_error(dialects.answer_dialect(request), error)
