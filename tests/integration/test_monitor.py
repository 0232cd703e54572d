"""The monitor over HTTP: merged counts of two shards, a missing one named, tokens asked for."""

import asyncio
import secrets
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import pytest

from culm import topology_store
from culm.client import Client
from culm.errors import ClientFault, Unavailable
from culm.ids import slot_of
from culm.settings import MonitorSettings
from culm.topology import Section, Shard
from culm.wire import (
    CancelRequest,
    CountsAnswer,
    GetJobRequest,
    JobSpec,
    JobsQuery,
    PilotInfo,
    Principal,
    ShardCounts,
    SubmitRequest,
)
from monitor_api.main import Monitor
from monitor_api.views import Views
from shard import reads
from tests.front import Reply, RunningFront
from tests.partition import ADMIN, PILOT, USER
from tests.servers import free_ports
from tests.two_partitions import NAMES, TwoPartitions
from tests.waiting import eventually

DEADLINE_S = 20.0


@asynccontextmanager
async def monitor(pair: TwoPartitions, router: RunningFront) -> AsyncIterator[str]:
    """A monitor over both shards; its URL."""
    port = free_ports(1)
    settings = MonitorSettings(
        topology_dir=str(pair.topology_dir), trusted_keys_dir=str(router.folder / "trusted"), port=port
    )
    running, stop = Monitor(settings), asyncio.Event()
    task = asyncio.create_task(running.serve(stop))

    async def connected() -> bool:
        links = running._links._links
        return len(links) == len(NAMES) and all(link.connected for link in links.values())

    try:
        await eventually(connected, DEADLINE_S, what="the monitor is linked")
        yield f"http://127.0.0.1:{port}"
    finally:
        stop.set()
        await task


@pytest.fixture
async def url(pair: TwoPartitions, router: RunningFront) -> AsyncIterator[str]:
    """A monitor's URL."""
    async with monitor(pair, router) as where:
        yield where


async def counts(router: RunningFront, url: str, who: Principal = USER) -> CountsAnswer:
    """Ask once."""
    async with Client(url, router.token(who), patience_s=0) as client:
        return await client.counts()


async def work(router: RunningFront) -> list[int]:
    """Jobs of both shards in several states; their ids."""
    specs = [JobSpec(site=site, argv=["x"]) for site in ("BNL", "FZK", "BNL", "FZK", "BNL", "UTA")]
    specs.append(JobSpec(region="EU", argv=["x"]))
    async with router.client(USER) as user, router.client(PILOT) as pilot:
        ids = (await user.submit(SubmitRequest(idempotency_key=secrets.token_hex(8), jobs=specs))).ids
        for site in ("BNL", "FZK"):
            request = GetJobRequest(request_id=secrets.token_hex(8), queue=f"{site}-q", pilot=PilotInfo(id="p"))
            assert len((await pilot.get_job(request)).jobs) == 1
        await user.cancel(CancelRequest(ids=[ids[-3] or 0]))
    return [identifier or 0 for identifier in ids]


async def stored(pair: TwoPartitions) -> list[tuple[str, int, str]]:
    """(shard, slot, state) of every job in the databases."""
    return [
        (name, slot_of(identifier), state)
        for name in NAMES
        for identifier, state in await pair.rows(name, "SELECT id, state FROM job")
    ]


async def test_merged_counts_are_what_the_databases_hold(pair: TwoPartitions, router: RunningFront, url: str) -> None:
    await work(router)
    answer = await counts(router, url)
    rows, topology = await stored(pair), pair.topology
    assert len(rows) == 7
    assert answer.total == Counter(state for _, _, state in rows)
    for region in ("US", "EU", "BOTH"):
        assert answer.by_region[region] == Counter(
            state for _, slot, state in rows if topology.region_of_slot[slot] == region
        )
    for site in ("BNL", "FZK", "UTA"):
        assert answer.by_site[site] == Counter(
            state for _, slot, state in rows if topology.site_of_slot.get(slot) == site
        )
    assert answer.by_site["(any site of EU)"] == Counter(
        state for _, slot, state in rows if slot == topology.region("EU").slot
    )
    assert answer.missing_shards == []
    assert answer.shards.keys() == set(NAMES)


async def test_a_dead_shard_is_named_soon_and_shown_as_last_heard_with_its_age(
    pair: TwoPartitions, router: RunningFront, url: str
) -> None:
    await work(router)
    before = await counts(router, url)
    await pair.stop("eu1")

    async def missed() -> CountsAnswer | None:
        began = asyncio.get_running_loop().time()
        answer = await counts(router, url)
        assert asyncio.get_running_loop().time() - began < 1.5
        return answer if answer.missing_shards else None

    first = await eventually(missed, DEADLINE_S, what="the monitor misses a shard")
    assert first is not None
    assert first.missing_shards == ["eu1"]
    assert (first.total, first.by_site) == (before.total, before.by_site)
    later = await counts(router, url)
    assert later.shards["eu1"] > first.shards["eu1"] > 0
    assert later.shards["us1"] < 1.5
    await pair.start("eu1")

    async def whole() -> bool:
        return not (await counts(router, url)).missing_shards

    await eventually(whole, DEADLINE_S, what="the shard is found again")
    assert (await counts(router, url)).total == before.total


async def test_a_shard_that_another_authority_names_as_its_own_is_counted_and_listed_once(
    pair: TwoPartitions, router: RunningFront, url: str
) -> None:
    ids = await work(router)
    before = await counts(router, url)
    us1 = pair.topology.shards["us1"].link
    detour = us1.replace("/us1.d/", "/eu1.d/../us1.d/")
    # The same link is passed over; the same shard by another way is found out by the name with which it greets.
    for number, (link, known) in enumerate(((us1, []), (detour, ["cernx"]))):
        section = Section(authority="CERN", epoch=number + 1, shards={"cernx": Shard(link=link)})
        assert await asyncio.to_thread(topology_store.adopt, pair.topology_dir, section)

        async def followed(epoch: int = number + 1) -> bool:
            async with Client(url, router.token(ADMIN), patience_s=0) as client:
                return (await client.shards()).epochs.get("CERN") == epoch

        await eventually(followed, DEADLINE_S, what="the section is followed")
        after = await counts(router, url)
        assert after.missing_shards == known
        assert (after.total, after.by_site, after.active_by_owner) == (
            before.total,
            before.by_site,
            before.active_by_owner,
        )
        async with Client(url, router.token(USER), patience_s=0) as client:
            assert sorted(row.id for row in (await client.jobs(JobsQuery())).jobs) == sorted(ids)


async def test_a_shard_that_never_answered_is_named_and_not_zero(pair: TwoPartitions, router: RunningFront) -> None:
    await work(router)
    async with monitor(pair, router) as url:
        # Not asked yet: what is missing from the first answer on has never been heard.
        await pair.stop("eu1")

        async def missed() -> bool:
            return (await counts(router, url)).missing_shards == ["eu1"]

        await eventually(missed, DEADLINE_S, what="the shard is missed")
        answer = await counts(router, url)
        assert "eu1" not in answer.shards or answer.shards["eu1"] > 0
        assert answer.by_region["US"]


async def test_a_shard_that_hangs_does_not_hold_up_the_others(
    pair: TwoPartitions, router: RunningFront, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await work(router)
    gate = asyncio.Event()

    async def hangs(_database: object, shard: str, call: ShardCounts) -> object:
        if shard == "eu1":
            await gate.wait()
        return await real(_database, shard, call)  # type: ignore[arg-type]

    real = reads.read_counts
    monkeypatch.setattr(reads, "read_counts", hangs)
    began = asyncio.get_running_loop().time()
    answer = await counts(router, url)
    assert asyncio.get_running_loop().time() - began < 1.5
    assert answer.missing_shards == ["eu1"]
    assert answer.by_region["US"]
    gate.set()


async def _send(router: RunningFront, url: str, path: str, token: str, method: str = "GET") -> Reply:
    here = router.url
    router.url = url
    try:
        return await router.send(method, path, token=token)
    finally:
        router.url = here


async def test_nothing_but_health_works_without_a_token(router: RunningFront, url: str) -> None:
    for token, code in (("", "no_token"), ("x.y.z", "bad_token"), (router.token(USER, valid_s=-3600), "token_expired")):
        reply = await _send(router, url, "/v1/counts", token)
        assert (reply.status, reply.code) == (401, code)
    assert (await _send(router, url, "/health", "")).status == 200
    assert (await counts(router, url, ADMIN)).missing_shards == []
    with pytest.raises(ClientFault) as caught:
        await counts(router, url, PILOT)
    assert caught.value.code == "forbidden"


async def test_errors_of_the_monitor_have_our_body_too(router: RunningFront, url: str) -> None:
    for method, path, status, code in (
        ("GET", "/v1/nowhere", 404, "unknown_path"),
        ("POST", "/v1/counts", 405, "method_not_allowed"),
    ):
        reply = await _send(router, url, path, router.token(USER), method)
        assert (reply.status, reply.code) == (status, code)


async def test_the_monitor_names_the_scheme_to_a_stranger_and_spreads_those_that_come_again(
    router: RunningFront, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (await _send(router, url, "/v1/counts", "")).headers["WWW-Authenticate"] == "Bearer"

    async def down(_views: Views, _who: Principal) -> CountsAnswer:
        raise Unavailable("shard_down", "no", retry_after_s=10.0)

    monkeypatch.setattr(Views, "counts", down)
    waits = {(await _send(router, url, "/v1/counts", router.token(USER))).body["error"]["retry_after_s"] for _ in "abc"}
    assert len(waits) > 1
    assert all(10.0 <= wait_s <= 15.0 for wait_s in waits)


async def test_metrics_of_the_monitor_need_a_token_of_a_reader_of_metrics(router: RunningFront, url: str) -> None:
    assert (await _send(router, url, "/metrics", "")).code == "no_token"
    assert (await _send(router, url, "/metrics", router.token(USER))).code == "forbidden"
    headers = {"Authorization": f"Bearer {router.token(ADMIN)}"}
    async with aiohttp.ClientSession(headers=headers) as http, http.get(f"{url}/metrics") as answer:
        assert answer.status == 200
        assert 'culm_request_seconds_count{outcome="forbidden",verb="other"}' in await answer.text()
