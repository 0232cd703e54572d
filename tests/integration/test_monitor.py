"""The monitor over HTTP: merged counts equal the shards' own, a dead shard is named, and answers come in time."""

import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import msgspec
import pytest
from aiohttp import web

from culm.client import Client
from culm.errors import ClientFault
from culm.link import LinkClient, LinkOptions
from culm.settings import MonitorSettings
from culm.tokens import KeyRing
from culm.wire import JobSpec, Principal, ShardSubmit, SlotJobs
from monitor_api.main import Monitor
from tests.partition import ADMIN, PILOT, USER, Servers
from tests.servers import free_ports
from tests.two_partitions import NAMES, TwoPartitions, two_partitions
from tests.waiting import eventually

DEADLINE_S = 20.0
IN_TIME_S = 1.5
"""The deadline of a shard is 0.8 s; the rest is a busy machine."""


class RunningMonitor:
    """A monitor over two partitions."""

    def __init__(self, url: str, ring: KeyRing) -> None:
        self.url = url
        self._ring = ring

    def client(self, who: Principal = USER) -> Client:
        """A client that asks once."""
        return Client(self.url, self._ring.issue(who, 600.0), patience_s=0.0)


@asynccontextmanager
async def monitor(pair: TwoPartitions) -> AsyncIterator[RunningMonitor]:
    ring = KeyRing(pair.folder / "keys", pair.folder / "trusted", "central")
    ring.ensure()
    port = free_ports(1)
    settings = MonitorSettings(
        topology_dir=str(pair.topology_dir), trusted_keys_dir=str(pair.folder / "trusted"), port=port
    )
    made = Monitor(settings)
    await made._follow()
    runner = web.AppRunner(made.app(), access_log=None, handler_cancellation=True, shutdown_timeout=1.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, settings.host, port).start()
        yield RunningMonitor(f"http://127.0.0.1:{port}", ring)
    finally:
        await runner.cleanup()
        await made._links.stop()


@pytest.fixture
async def pair(both: Servers) -> AsyncIterator[TwoPartitions]:
    async with two_partitions(both) as running:
        yield running


async def submit(pair: TwoPartitions, site: str, n_jobs: int) -> None:
    topology = pair.topology
    slot = topology.site(site).slots[0]
    part = SlotJobs(at=topology.slot(slot), specs=[JobSpec(site=site, argv=["true"])] * n_jobs)
    shard = topology.place(slot).shard
    link = LinkClient("test", topology.shards[shard].link, LinkOptions())
    link.start()
    try:
        assert await link.wait_connected(DEADLINE_S)
        call = ShardSubmit(principal=USER, key=site, jobset=1, parts=[part])
        await link.call("submit", msgspec.msgpack.encode(call), DEADLINE_S)
    finally:
        await link.stop()


async def all_heard(client: Client) -> bool:
    return not (await client.counts()).missing_shards


async def test_the_merged_counts_are_what_the_databases_hold(pair: TwoPartitions) -> None:
    await submit(pair, "BNL", 30)
    await submit(pair, "FZK", 12)
    await submit(pair, "UTA", 5)
    async with monitor(pair) as running, running.client() as client:
        await eventually(lambda: all_heard(client), DEADLINE_S, what="both shards answer")
        counts = await client.counts()
        stored: Counter[str] = Counter()
        for name in NAMES:
            stored.update(dict(await pair.rows(name, "SELECT state, COUNT(*) FROM job GROUP BY state")))
        assert counts.total == dict(stored) == {"activated": 47}
        assert counts.by_site == {"BNL": {"activated": 30}, "FZK": {"activated": 12}, "UTA": {"activated": 5}}
        assert counts.by_region == {"US": {"activated": 30}, "EU": {"activated": 12}, "BOTH": {"activated": 5}}
        assert counts.shards.keys() == set(NAMES)


async def test_a_dead_shard_is_named_and_shown_as_last_heard(pair: TwoPartitions) -> None:
    await submit(pair, "BNL", 3)
    await submit(pair, "FZK", 4)
    async with monitor(pair) as running, running.client() as client:
        await eventually(lambda: all_heard(client), DEADLINE_S, what="both shards answer")
        await pair.stop("eu1")
        began = time.monotonic()
        counts = await client.counts()
        assert time.monotonic() - began < IN_TIME_S
        assert counts.missing_shards == ["eu1"]
        # Not a zero, and not news.
        assert counts.by_site["FZK"] == {"activated": 4}
        assert counts.total == {"activated": 7}
        assert counts.shards["eu1"] > counts.shards["us1"]
        await pair.start("eu1")
        await eventually(lambda: all_heard(client), DEADLINE_S, what="it is back")


async def test_a_shard_that_was_never_heard_is_missing_and_adds_nothing(pair: TwoPartitions) -> None:
    await submit(pair, "BNL", 3)
    await pair.stop("eu1")

    async with monitor(pair) as running, running.client() as client:

        async def only_one_is_missing() -> bool:
            return (await client.counts()).missing_shards == ["eu1"]

        await eventually(only_one_is_missing, DEADLINE_S, what="us1 answers")
        counts = await client.counts()
        assert (counts.total, list(counts.shards)) == ({"activated": 3}, ["us1"])


async def test_the_counts_need_a_token_of_a_user_or_an_admin(pair: TwoPartitions) -> None:
    async with monitor(pair) as running:
        async with running.client(ADMIN) as client:
            await client.counts()
        async with running.client(PILOT) as client:
            with pytest.raises(ClientFault) as caught:
                await client.counts()
            assert (caught.value.code, caught.value.http_status) == ("forbidden", 403)
        async with Client(running.url, "nonsense", patience_s=0.0) as client:
            with pytest.raises(ClientFault) as caught:
                await client.counts()
            assert (caught.value.code, caught.value.http_status) == ("bad_token", 401)


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/counts", 401, "no_token"),
        ("POST", "/v1/counts", 405, "method_not_allowed"),
        ("GET", "/v1/nothing", 404, "unknown_path"),
    ],
)
async def test_an_error_has_our_body(pair: TwoPartitions, method: str, path: str, status: int, code: str) -> None:
    async with (
        monitor(pair) as running,
        aiohttp.ClientSession() as session,
        session.request(method, running.url + path) as answer,
    ):
        assert answer.status == status
        error = (await answer.json())["error"]
        assert (error["code"], error["retryable"]) == (code, False)


async def test_health_needs_no_token(pair: TwoPartitions) -> None:
    async with (
        monitor(pair) as running,
        aiohttp.ClientSession() as session,
        session.get(f"{running.url}/health") as answer,
    ):
        assert (answer.status, (await answer.json())["status"]) == (200, "ok")
