"""One whole shard in the test's event loop, over real servers, spoken to over its real link."""

import asyncio
import contextlib
import itertools
import secrets
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import redis.asyncio as redis

from culm import topology_store
from culm.errors import Unavailable
from culm.link import LinkClient, LinkOptions
from culm.matching import Offer
from culm.section_changes import register_sites
from culm.settings import ArchiveSettings, DatabaseSettings, DispatchSettings, ShardSettings, SubmitDefaults, Timeouts
from culm.states import Event, State
from culm.topology import Placement, Queue, Region, Section, SiteRegistration, Topology
from culm.topology import Shard as ShardEntry
from culm.wire import (
    CancelAnswer,
    GetJobAnswer,
    Grant,
    HeartbeatAnswer,
    HeartbeatRequest,
    JobsAnswer,
    JobSpec,
    JobsQuery,
    JobView,
    LeaseTimes,
    PilotInfo,
    Principal,
    ReportAnswer,
    ReportRequest,
    ShardCancel,
    ShardGetJob,
    ShardHeartbeat,
    ShardJob,
    ShardJobs,
    ShardReport,
    ShardSubmit,
    ShardSubmitAnswer,
    SlotJobs,
    SlotRef,
)
from shard.driver import connect
from shard.main import Shard
from tests.servers import Server
from tests.waiting import eventually

A = TypeVar("A", bound=msgspec.Struct)
T = TypeVar("T")

QUEUE = "BNL-q"
DEADLINE_S = 20.0
USER = Principal(role="user", subject="ann", authority="central", vo="atlas", groups=["higgs"])
OTHER_USER = Principal(role="user", subject="bob", authority="central", vo="atlas")
PRODUCTION = Principal(role="user", subject="prod", authority="central", vo="atlas", roles=["production"])
PILOT = Principal(role="pilot", subject="pilots", authority="central", queues=["*"])
ADMIN = Principal(role="admin", subject="root", authority="central")
OFFER = Offer(queue=QUEUE, labels=frozenset({"user", "panda", "managed"}), vos=None, cores=8)
_numbers = itertools.count()
_cache_of: dict[str, int] = {}
"""One Valkey serves all tests: by schema, the number of its database there."""


@dataclass
class Servers:
    """What a shard needs."""

    database: Server
    valkey: Server


def section_of(*sites: str, link: str) -> Section:
    """One shard `us1`, region US, and sites with one computing queue `<site>-q` each."""
    section = Section(
        authority="central",
        epoch=1,
        shards={"us1": ShardEntry(link=link)},
        regions={"US": Region(slot=0, shards=["us1"])},
        placement={0: Placement("us1", 1)},
        default_region="US",
    )
    return register_sites(
        section, [SiteRegistration(name=site, region="US", queues={f"{site}-q": Queue()}) for site in sites]
    )


@dataclass
class Partition:
    """A running shard and the calls that a router would make."""

    shard: Shard
    settings: ShardSettings
    link: LinkClient
    topology: Topology
    servers: Servers
    stop_event: asyncio.Event = field(default_factory=asyncio.Event)

    def slot(self, site: str = "BNL") -> SlotRef:
        """A site's slot."""
        return self.topology.slot(self.topology.site(site).slots[0])

    async def ask(self, verb: str, message: msgspec.Struct, answer: type[A], deadline_s: float = DEADLINE_S) -> A:
        """One call over the link."""
        body = await self.link.call(verb, msgspec.msgpack.encode(message), deadline_s)
        return msgspec.msgpack.decode(body, type=answer)

    async def submit(
        self,
        *specs: JobSpec,
        key: str = "",
        who: Principal = USER,
        at: SlotRef | None = None,
        jobset: int = 7,
        depths: dict[int, int] | None = None,
    ) -> list[int]:
        """Submit; the ids."""
        part = SlotJobs(at=at or self.slot(), specs=list(specs))
        call = ShardSubmit(
            principal=who, key=key or secrets.token_hex(8), jobset=jobset, parts=[part], parent_depths=depths or {}
        )
        first = (await self.ask("submit", call, ShardSubmitAnswer)).first_ids[0]
        return list(range(first, first + len(specs)))

    async def get(self, **changes: Any) -> list[Grant]:
        """One get_job; what it was granted."""
        return (await self.get_answer(**changes)).jobs

    async def get_answer(self, **changes: Any) -> GetJobAnswer:
        """One get_job."""
        call = get_job_call(self.slot(), **changes)
        return await self.ask("get_job", call, GetJobAnswer, DEADLINE_S + call.wait_s)

    async def heartbeat(self, grant: Grant, state: State = State.RUNNING, **changes: Any) -> HeartbeatAnswer:
        """One heartbeat."""
        request = HeartbeatRequest(
            **({"id": grant.id, "attempt": grant.attempt, "lease_token": grant.lease_token, "state": state} | changes)
        )
        return await self.ask(
            "heartbeat", ShardHeartbeat(at=self.slot(), principal=PILOT, request=request), HeartbeatAnswer
        )

    async def report(self, grant: Grant, state: State = State.FINISHED, **changes: Any) -> ReportAnswer:
        """One report of a pilot."""
        request = ReportRequest(
            **({"id": grant.id, "attempt": grant.attempt, "lease_token": grant.lease_token, "state": state} | changes)
        )
        return await self.ask("report", ShardReport(at=self.slot(), principal=PILOT, request=request), ReportAnswer)

    async def say(self, job_id: int, event: Event, who: Principal = PRODUCTION) -> ReportAnswer:
        """One report of the data side."""
        request = ReportRequest(id=job_id, event=event)
        return await self.ask("report", ShardReport(at=self.slot(), principal=who, request=request), ReportAnswer)

    async def cancel(self, *ids: int, who: Principal = USER, jobset: int | None = None) -> CancelAnswer:
        """End jobs."""
        call = ShardCancel(principal=who, slots=[self.slot()], ids=list(ids), jobset=jobset)
        return await self.ask("cancel", call, CancelAnswer)

    async def job(self, job_id: int) -> JobView:
        """One job whole."""
        return await self.ask("job", ShardJob(at=self.slot(), principal=ADMIN, id=job_id), JobView)

    async def state(self, job_id: int) -> State:
        """Where a job stands."""
        return (await self.job(job_id)).job.state

    async def jobs(self, who: Principal = ADMIN, **query: Any) -> JobsAnswer:
        """A page of jobs."""
        return await self.ask("jobs", ShardJobs(principal=who, query=JobsQuery(**query)), JobsAnswer)

    async def sql(self, text: str) -> None:
        """Change the database behind the shard's back."""
        connection = await connect(self.settings.database, autocommit=True)
        try:
            async with connection.cursor() as cursor:
                await cursor.execute(text)
        finally:
            connection.close()

    async def rows(self, text: str, *arguments: object) -> list[tuple[Any, ...]]:
        """Look into the database behind the shard's back."""
        connection = await connect(self.settings.database, autocommit=True)
        try:
            async with connection.cursor() as cursor:
                await cursor.execute(text, arguments or None)
                return list(await cursor.fetchall())
        finally:
            connection.close()


async def patiently(call: Callable[[], Awaitable[T]], deadline_s: float, refused: set[str] | None = None) -> T:
    """Repeat a call as long as it is answered with a 503, as every client does; the codes go to `refused`."""

    async def once() -> list[T]:
        try:
            return [await call()]
        except Unavailable as error:
            (set() if refused is None else refused).add(error.code)
            return []

    return (await eventually(once, deadline_s, what="the call is accepted"))[0]


def job(**changes: Any) -> JobSpec:
    """A small job."""
    return JobSpec(**({"site": "BNL", "argv": ["true"]} | changes))


def get_job_call(*slots: SlotRef, **changes: Any) -> ShardGetJob:
    """A get_job as a router forwards it."""
    values: dict[str, Any] = {
        "slots": list(slots),
        "request_id": secrets.token_hex(8),
        "subject": "pilots",
        "offer": OFFER,
        "pilot": PilotInfo(id="p1", host="node1"),
        "lease": LeaseTimes(),
        "n_jobs": 1,
        "wait_s": 0.0,
    }
    return ShardGetJob(**(values | changes))


@asynccontextmanager
async def partition(
    servers: Servers,
    *sites: str,
    timeouts: Timeouts | None = None,
    dispatch: DispatchSettings | None = None,
    submit: SubmitDefaults | None = None,
    schema: str = "",
) -> AsyncIterator[Partition]:
    """A shard with a fresh schema (or an existing one) on these servers."""
    with tempfile.TemporaryDirectory(prefix="culm-t-", dir="/tmp") as name:
        folder = Path(name)
        link = f"unix:{folder / 'link.sock'}"
        section = section_of(*(sites or ("BNL",)), link=link)
        topology_store.create(folder / "topology", section)
        if not schema:
            number = next(_numbers)
            schema = f"t{number}_{secrets.token_hex(3)}"
            _cache_of[schema] = number % 16
            await _flush(servers.valkey, _cache_of[schema])
        settings = ShardSettings(
            name="us1",
            link=link,
            http=f"unix:{folder / 'http.sock'}",
            topology_dir=str(folder / "topology"),
            redis=f"unix://{servers.valkey.socket}?db={_cache_of[schema]}",
            database=DatabaseSettings(socket=str(servers.database.socket), name=schema),
            timeouts=timeouts or Timeouts(grace_s=0.001),
            dispatch=dispatch or DispatchSettings(reap_interval_s=0.05, sweep_interval_s=0.2),
            submit=submit or SubmitDefaults(),
            # The archive's pass is the test's to make.
            archive=ArchiveSettings(after_s=0.0),
            topology_poll_s=0.05,
            stop_s=2.0,
        )
        shard = Shard(settings)
        client = LinkClient("us1", link, LinkOptions())
        running = Partition(shard, settings, client, Topology([section]), servers)
        task = asyncio.create_task(shard.serve(running.stop_event))
        client.start()
        try:
            await eventually(lambda: client.connected or task.done(), DEADLINE_S, what="the shard serves")
            if task.done():
                task.result()
            yield running
        finally:
            running.stop_event.set()
            await client.stop()
            await task


async def _flush(valkey: Server, number: int) -> None:
    """Clear one database of a Valkey: an earlier test has left its hints there. A test may have killed it."""
    client = redis.Redis(unix_socket_path=str(valkey.socket), db=number)
    with contextlib.suppress(redis.RedisError, OSError):
        await client.flushdb()
    await client.aclose()
