"""A shard's start and stop: with its servers away, with calls under way, told to stop before it began."""

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from culm import topology_store
from culm.errors import Unavailable
from culm.link import LinkClient, LinkOptions
from culm.settings import DatabaseSettings, DispatchSettings, ShardSettings, Timeouts
from ops.audit import audit
from ops.engines import innodb
from shard.main import Shard
from tests import servers
from tests.partition import Servers, get_job_call, job, partition, patiently, section_of
from tests.waiting import eventually

DEADLINE_S = 30.0


@pytest.fixture
def own() -> Iterator[servers.Server]:
    """A database server that may be away."""
    with servers.database(innodb.find(servers.cache())) as server:
        yield server


@pytest.fixture
def folder() -> Iterator[Path]:
    with servers.folder() as name:
        yield Path(name)


def _settings(folder: Path, both: Servers) -> ShardSettings:
    link = f"unix:{folder / 'link.sock'}"
    topology_store.create(folder / "topology", section_of("BNL", link=link))
    return ShardSettings(
        name="us1",
        link=link,
        http=f"unix:{folder / 'http.sock'}",
        topology_dir=str(folder / "topology"),
        redis=f"unix://{both.valkey.socket}?db=14",
        database=DatabaseSettings(socket=str(both.database.socket), name=f"l_{secrets.token_hex(4)}"),
        timeouts=Timeouts(grace_s=0.001),
        dispatch=DispatchSettings(breaker_s=0.05),
        stop_s=1.0,
    )


@asynccontextmanager
async def _serving(settings: ShardSettings) -> AsyncIterator[asyncio.Event]:
    """A shard that was told to serve, whether it can or not; ended in good order."""
    stop = asyncio.Event()
    task = asyncio.create_task(Shard(settings).serve(stop))
    try:
        yield stop
    finally:
        stop.set()
        async with asyncio.timeout(DEADLINE_S):
            await task


async def _health(settings: ShardSettings) -> str:
    """ "" if it is well, else what is missing, or "nothing answers"."""
    connector = aiohttp.UnixConnector(settings.http.removeprefix("unix:"))
    with contextlib.suppress(aiohttp.ClientError):
        async with aiohttp.ClientSession(connector=connector) as session, session.get("http://shard/health") as answer:
            return str((await answer.json()).get("missing", ""))
    return "nothing answers"


async def test_a_shard_whose_database_is_away_says_so_and_begins_when_it_is_there(
    own: servers.Server, valkey: servers.Server, folder: Path
) -> None:
    await asyncio.to_thread(own.kill)
    settings = _settings(folder, Servers(own, valkey))
    async with _serving(settings):

        async def starting() -> bool:
            return await _health(settings) == "starting"

        await eventually(starting, DEADLINE_S)
        assert not await asyncio.to_thread(Path(settings.link.removeprefix("unix:")).exists)
        await asyncio.to_thread(own.start)

        async def well() -> bool:
            return await _health(settings) == ""

        await eventually(well, DEADLINE_S)
        client = LinkClient("us1", settings.link, LinkOptions())
        client.start()
        assert await client.wait_connected(DEADLINE_S)
        await client.stop()


async def test_a_shard_that_is_told_to_stop_before_it_could_begin_ends(
    own: servers.Server, valkey: servers.Server, folder: Path
) -> None:
    await asyncio.to_thread(own.kill)
    settings = _settings(folder, Servers(own, valkey))
    async with _serving(settings):

        async def starting() -> bool:
            return await _health(settings) == "starting"

        await eventually(starting, DEADLINE_S)


async def test_a_shard_without_valkey_serves_all_the_same(mariadb: servers.Server) -> None:
    with servers.cache_server() as gone:
        gone.kill()
        async with partition(Servers(mariadb, gone), dispatch=DispatchSettings(breaker_s=0.05)) as shard:
            ids = await shard.submit(*[job(priority=n) for n in range(20)])
            got = [grant.id for _ in range(20) for grant in await shard.get()]
            assert got == ids[::-1]
            assert await shard.get() == []
            waiting = asyncio.create_task(shard.get(wait_s=15.0))
            await eventually(lambda: len(shard.shard.dispatcher._parking) == 1, DEADLINE_S)
            [identifier] = await shard.submit(job())
            async with asyncio.timeout(5.0):
                assert [grant.id for grant in await waiting] == [identifier]


async def test_health_names_a_database_that_went_away(own: servers.Server, valkey: servers.Server) -> None:
    async with partition(Servers(own, valkey), dispatch=DispatchSettings(reap_interval_s=0.05)) as shard:
        assert await _health(shard.settings) == ""
        await asyncio.to_thread(own.kill)

        async def missing() -> bool:
            return await _health(shard.settings) == "database"

        await eventually(missing, DEADLINE_S)
        await asyncio.to_thread(own.start)

        async def well() -> bool:
            return await _health(shard.settings) == ""

        await eventually(well, DEADLINE_S)


async def test_stopped_in_the_middle_of_everything_it_loses_nothing(both: Servers) -> None:
    """Calls of every kind under way: each is answered or refused, and its repeat at the next life completes it."""
    async with partition(both) as first:
        schema = first.settings.database.name
        await first.submit(*[job()] * 60)
        grants = await first.get(n_jobs=20)
        calls = [
            *(first.submit(job(), key=f"key-{n}") for n in range(20)),
            *(first.report(grant) for grant in grants),
            *(first.get(request_id=f"request-{n}") for n in range(20)),
            *(first.get(request_id=f"waiting-{n}", wait_s=20.0, n_jobs=2) for n in range(5)),
        ]
        asked = [asyncio.ensure_future(call) for call in calls]
        await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
        first.stop_event.set()
        async with asyncio.timeout(DEADLINE_S):
            answers = await asyncio.gather(*asked, return_exceptions=True)
        assert all(isinstance(answer, Unavailable) for answer in answers if isinstance(answer, Exception))
    async with partition(both, schema=schema) as second:
        accepted = [await patiently(lambda n=n: second.submit(job(), key=f"key-{n}"), DEADLINE_S) for n in range(20)]
        for told, again in zip(answers[:20], accepted, strict=True):
            assert isinstance(told, Unavailable) or told == again
        for grant in grants:
            await second.report(grant)
        for number, told in enumerate(answers[40:60]):
            again = await second.get(request_id=f"request-{number}")
            assert not isinstance(told, list) or not told or told == again
        rows = await second.rows("SELECT COUNT(*), COUNT(DISTINCT id) FROM job")
        assert rows == [(80, 80)]
        assert (await audit([second.settings], second.topology)).findings == []


async def test_a_killed_claim_is_found_by_its_repeat_or_was_never_made(both: Servers) -> None:
    """The claim's worker is cut off at any point; the pilot asks again with the same id at the next life."""
    async with partition(both) as first:
        schema = first.settings.database.name
        ids = await first.submit(*[job()] * 40)
        dispatcher = first.shard.dispatcher
        for number in range(20):
            name = f"request-{number}"
            asked = asyncio.ensure_future(dispatcher.get_job(get_job_call(first.slot(), request_id=name)))
            await asyncio.wait([asked], timeout=number * 0.0003)
            await _cancelled(dispatcher._workers)
            dispatcher.start()
            with contextlib.suppress(Unavailable):
                await asked
    async with partition(both, schema=schema) as second:
        answers = [await second.get(request_id=f"request-{number}") for number in range(20)]
        assert all(len(grants) == 1 for grants in answers)
        assert len({grants[0].id for grants in answers}) == 20
        rest = await second.get(n_jobs=40)
        assert sorted([grants[0].id for grants in answers] + [grant.id for grant in rest]) == ids
        assert (await audit([second.settings], second.topology)).findings == []


async def _cancelled(tasks: "list[asyncio.Task[None]]") -> None:
    """Cancel until they have ended: redis-py can swallow a cancellation."""
    while not all(task.done() for task in tasks):
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=0.05)
