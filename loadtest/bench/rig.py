"""Measuring one thing once: jobs are made, clients are let loose, the processes' time is read, the answers are checked.

Processor time is that of everything that serves: router, shard, Valkey and database, from before the first request
until the database has purged what the requests left behind. A refill and a read-ahead of the shard fall into that time
too. What makes the jobs is not counted, but where it is what is measured.
"""

import asyncio
import secrets
import statistics
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec

from culm.client import Client
from culm.errors import CulmError
from culm.registry_wire import ChangedAnswer, SitesRequest
from culm.settings import DatabaseSettings
from culm.topology import Queue, SiteRegistration
from culm.wire import GetJobAnswer, GetJobRequest, JobSpec, PilotInfo, SubmitRequest
from loadtest.bench import cpu
from loadtest.bench.traffic import Order, Result
from shard.database import Database, Transaction
from shard.driver import connect
from shard.statements import parse

PAYLOAD_BYTES: Final = 1300
JOBS_PER_CALL: Final = 1000
PURGE_S: Final = 5.0
"""So long the database may take to clear up after a run."""
LOOK_S: Final = 0.05
HISTORY_AT_REST: Final = 50
SETTLE_S: Final = 30.0
QUIET_S: Final = 1.0
SATURATED: Final = 0.85
"""Of one core: a client above it measures itself."""
SITE: Final = "BNL"
QUEUE: Final = "BNL-q"
MSGPACK: Final = "application/msgpack"
_PROBE: Final = parse(resources.files("loadtest").joinpath("bench/probe.sql").read_text(encoding="utf-8"))
_ANSWER: Final = msgspec.msgpack.Decoder(GetJobAnswer)
_ENCODE: Final = msgspec.msgpack.Encoder().encode


class Bed(Protocol):
    """What is measured on: running processes."""

    @property
    def port(self) -> int:
        """Where clients ask."""
        ...

    @property
    def pids(self) -> Mapping[str, int]:
        """The processes whose time counts, by what they are."""
        ...

    @property
    def databases(self) -> Sequence[DatabaseSettings]:
        """The partitions behind it; none of an echo."""
        ...

    def token(self, role: str) -> str:
        """A token that it trusts."""
        ...


@dataclass(frozen=True)
class Sample:
    """One run: processor time in microseconds and commits are per job (or request); latencies in ms, rates in 1/s."""

    n: int
    cpu_us: float
    parts: Mapping[str, float]
    rate: float
    p50_ms: float
    p99_ms: float
    client_share: float
    commits: float = 0.0
    answers: Sequence[bytes] = field(default=(), repr=False)


def spec(**changes: Any) -> JobSpec:
    """A job with a payload of 1.3 KB."""
    values: dict[str, Any] = {
        "site": SITE,
        "name": "bench",
        "argv": ["/bin/sh", "-c", "x" * (PAYLOAD_BYTES - 170)],
        "memory_mb": 1000,
        "walltime_s": 3600,
    }
    return JobSpec(**(values | changes))


def get_job(number: int, queue: str = QUEUE, **changes: Any) -> bytes:
    """A pilot's request, of one of 64 pilots."""
    pilot = PilotInfo(id=f"pilot-{number % 64}", host=f"node-{number % 8}.example.org")
    return _ENCODE(GetJobRequest(request_id=secrets.token_hex(12), queue=queue, pilot=pilot, **changes))


async def submit(bed: Bed, specs: Sequence[JobSpec], role: str = "user") -> list[int]:
    """Make these jobs; their ids."""
    ids: list[int] = []
    async with Client(f"http://127.0.0.1:{bed.port}", bed.token(role)) as client:
        for start in range(0, len(specs), JOBS_PER_CALL):
            some = list(specs[start : start + JOBS_PER_CALL])
            answer = await client.submit(SubmitRequest(idempotency_key=secrets.token_hex(12), jobs=some))
            ids += [identifier for identifier in answer.ids if identifier is not None]
    return ids


async def register(bed: Bed, sites: Sequence[str], region: str = "US") -> None:
    """Register sites with a computing queue each, named after it, and wait until their jobs are taken."""
    queue = Queue(memory_mb=4000, walltime_s=86_400, cores=8)
    wanted = [SiteRegistration(name=site, region=region, queues={f"{site}-q": queue}) for site in sites]
    url = f"http://127.0.0.1:{bed.port}"
    async with Client(url, bed.token("admin")) as client:
        await client.post("sites", SitesRequest(sites=wanted, reason="a benchmark"), ChangedAnswer)
    async with Client(url, bed.token("pilot"), patience_s=SETTLE_S) as client:
        for site in (sites[0], sites[-1]):
            asked = msgspec.msgpack.decode(get_job(0, f"{site}-q"), type=GetJobRequest)
            await client.get_job(asked)


async def traffic(
    bed: Bed, bodies: Sequence[bytes], n_clients: int, *, path: str = "get_job", role: str = "pilot", rate: float = 0.0
) -> Result:
    """Let clients loose in a process of their own. Raises CulmError(bench_failed) if they could not do their work."""
    order = Order(
        host="127.0.0.1",
        port=bed.port,
        path=f"/v1/{path}",
        token=bed.token(role),
        content_type=MSGPACK,
        bodies=list(bodies),
        n_clients=n_clients,
        rate=rate,
    )
    with tempfile.TemporaryDirectory() as folder:
        into = Path(folder) / "result"
        argv = [sys.executable, "-P", "-m", "loadtest.bench.traffic", str(into)]
        ran = await asyncio.to_thread(
            subprocess.run, argv, input=msgspec.msgpack.encode(order), stderr=subprocess.PIPE, check=False
        )
        if ran.returncode:
            raise failed(f"the clients ended with {ran.returncode}: {ran.stderr.decode(errors='replace')[-500:]}")
        return msgspec.msgpack.decode(into.read_bytes(), type=Result)


async def measure(
    bed: Bed,
    bodies: Sequence[bytes],
    n_clients: int,
    *,
    n_jobs: int = 0,
    path: str = "get_job",
    role: str = "pilot",
    rate: float = 0.0,
) -> Sample:
    """Send all bodies; the figures per job, or per request where `n_jobs` is 0. Raises CulmError(bench_failed)."""
    commits, before = await _commits(bed), cpu.of_all(bed.pids)
    result = await traffic(bed, bodies, n_clients, path=path, role=role, rate=rate)
    await _at_rest(bed)
    after = cpu.of_all(bed.pids)
    n = n_jobs or result.n_requests
    if result.statuses != {200: len(bodies)}:
        raise failed(f"not every request was answered with 200: {result.statuses}")
    parts = {name: (after[name] - before[name]) / n * 1e6 for name in after}
    latencies = sorted(result.latencies_ms)
    return Sample(
        n=n,
        cpu_us=sum(parts.values()),
        parts=parts,
        rate=n / result.wall_s,
        p50_ms=statistics.median(latencies),
        p99_ms=latencies[int(len(latencies) * 0.99)],
        client_share=result.cpu_s / result.wall_s,
        commits=(await _commits(bed) - commits) / n,
        answers=result.answers,
    )


async def get_jobs(bed: Bed, n_jobs: int, n_clients: int, *, per_call: int = 1, queue: str = QUEUE) -> Sample:
    """Get jobs that are there, in calls of `per_call`; every id is checked. Raises CulmError(bench_failed)."""
    bodies = [get_job(number, queue, n_jobs=per_call) for number in range(n_jobs // per_call)]
    sample = await measure(bed, bodies, n_clients, n_jobs=n_jobs)
    ids = granted(sample.answers)
    if len(ids) != n_jobs or len(set(ids)) != n_jobs:
        raise failed(f"{n_jobs} jobs were asked for, {len(ids)} given, {len(set(ids))} of them different")
    n_stored = sum([await _count(database, "granted", ids) for database in bed.databases])
    if n_stored != n_jobs:
        raise failed(f"{n_jobs} jobs were given, {n_stored} of them are stored as sent")
    return sample


def granted(answers: Sequence[bytes]) -> list[int]:
    """The ids of all jobs in these answers."""
    return [grant.id for answer in answers for grant in _ANSWER.decode(answer).jobs]


def failed(what: str) -> CulmError:
    """The error of a run that measured nothing, for something was wrong."""
    return CulmError("bench_failed", what)


async def state_counts(bed: Bed, ids: Sequence[int]) -> dict[str, int]:
    """How many of these jobs are in which state."""
    counts: dict[str, int] = {}
    for database in bed.databases:
        for start in range(0, len(ids), JOBS_PER_CALL):
            some = tuple(ids[start : start + JOBS_PER_CALL])
            for state, n in await _probe(database, "states", some):
                counts[state] = counts.get(state, 0) + n
    return counts


async def waiting(bed: Bed) -> int:
    """How many jobs are ready, over all partitions."""
    return sum([int(row[0]) for database in bed.databases for row in await _probe(database, "waiting")])


async def table_sizes(bed: Bed) -> dict[str, int]:
    """The bytes of each table, over all partitions, as the database estimates them."""
    sizes: dict[str, int] = {}
    for database in bed.databases:
        for name, n_bytes in await _probe(database, "table_sizes"):
            sizes[name] = sizes.get(name, 0) + int(n_bytes or 0)
    return sizes


async def history(bed: Bed) -> int:
    """How many transactions' undo history waits for the purge, over all partitions."""
    return sum([int(row[1]) for database in bed.databases for row in await _probe(database, "history")])


async def at_rest_cpu(bed: Bed) -> None:
    """Wait until the router has nothing to do. Raises CulmError(bench_failed) where that never comes."""
    for _ in range(int(SETTLE_S / QUIET_S)):
        before = cpu.seconds(bed.pids["router"])
        await asyncio.sleep(QUIET_S)
        if cpu.seconds(bed.pids["router"]) - before < QUIET_S / 10:
            return
    raise failed("the router did not come to rest")


@asynccontextmanager
async def open_read(bed: Bed) -> AsyncIterator[None]:
    """Hold a snapshot of every partition open, as a long report or a dump does: nothing that it sees is purged."""
    async with AsyncExitStack() as stack:
        for settings in bed.databases:
            connection = await connect(settings, autocommit=False)
            stack.callback(connection.close)
            async with connection.cursor() as cursor:
                await cursor.execute(_PROBE["snapshot_level"].head)
                await cursor.execute(_PROBE["snapshot"].head)
                await cursor.execute(_PROBE["waiting"].head)
                await cursor.fetchall()
        yield


async def _at_rest(bed: Bed) -> None:
    for _ in range(int(PURGE_S / LOOK_S)):
        if await history(bed) <= HISTORY_AT_REST:
            return
        await asyncio.sleep(LOOK_S)


async def _commits(bed: Bed) -> int:
    return sum([int(row[1]) for database in bed.databases for row in await _probe(database, "commits")])


async def _count(settings: DatabaseSettings, name: str, ids: Sequence[int]) -> int:
    n = 0
    for start in range(0, len(ids), JOBS_PER_CALL):
        [[some]] = await _probe(settings, name, tuple(ids[start : start + JOBS_PER_CALL]))
        n += int(some)
    return n


async def _probe(settings: DatabaseSettings, name: str, *arguments: Any) -> list[tuple[Any, ...]]:
    database = Database(settings)

    async def look(tx: Transaction) -> list[tuple[Any, ...]]:
        tx.use(_PROBE)
        return await tx.fetch(name, *arguments)

    try:
        return await database.run("user", look)
    finally:
        await database.close()
