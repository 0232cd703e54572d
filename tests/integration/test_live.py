"""The event stream: what happens is told, once, without a gap, and a slow reader is cut off."""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest
from prometheus_client import REGISTRY

from culm.states import Event, State
from culm.wire import Happening, JobSpec, Principal, ShardHappenings, SubmitRequest
from monitor_api import live
from monitor_api.metrics import EVENT_READERS
from shard.happenings import MAX_PER_ANSWER, Happenings
from tests.front import RunningFront
from tests.integration.test_monitor import monitor
from tests.partition import ADMIN, PILOT, USER
from tests.two_partitions import TwoPartitions
from tests.waiting import eventually

DEADLINE_S = 10.0
STRANGER = Principal(role="user", subject="cy", authority="central", vo="cms")


@pytest.fixture
async def url(pair: TwoPartitions, router: RunningFront) -> AsyncIterator[str]:
    """A monitor's URL."""
    async with monitor(pair, router) as where:
        yield where


@dataclass
class Reader:
    """A client of the stream and what it has read."""

    url: str
    token: str
    last_id: str = ""
    seen: list[tuple[int, str]] = field(default_factory=list)
    """Job and state, in the order in which they came."""
    names: list[str] = field(default_factory=list)
    task: "asyncio.Task[None] | None" = None

    async def __aenter__(self) -> "Reader":
        n_before = self.names.count("position")
        self.task = asyncio.create_task(self._read())
        await eventually(
            lambda: self.names.count("position") > n_before or (self.task is not None and self.task.done()),
            DEADLINE_S,
            what="the stream has begun",
        )
        if self.task.done():
            self.task.result()
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self.task is not None
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)

    async def _read(self) -> None:
        headers = {"Authorization": f"Bearer {self.token}"} | ({"Last-Event-ID": self.last_id} if self.last_id else {})
        async with (
            aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=None)) as session,
            session.get(f"{self.url}/v1/events") as answer,
        ):
            assert answer.status == 200, await answer.text()
            name, given = "", ""
            async for line in answer.content:
                key, _, value = line.decode().rstrip("\n").partition(": ")
                if key == "id":
                    given = value
                elif key == "event":
                    name = value
                elif key == "data":
                    if name == "jobs":
                        self.seen += [(one["id"], one["state"]) for one in json.loads(value)]
                    self.names.append(name)
                elif not key:
                    self.last_id, given = given or self.last_id, ""


async def submit(router: RunningFront, n_jobs: int = 1, site: str = "BNL") -> list[int]:
    jobs = [JobSpec(site=site, argv=["true"]) for _ in range(n_jobs)]
    async with router.client(USER) as user:
        answer = await user.submit(SubmitRequest(idempotency_key=secrets.token_hex(8), jobs=jobs))
    return [identifier for identifier in answer.ids if identifier is not None]


async def test_what_happens_on_any_shard_is_told(url: str, router: RunningFront) -> None:
    async with Reader(url, router.token(USER)) as reader:
        for site in ("BNL", "FZK"):
            [identifier] = await submit(router, site=site)
            await eventually(lambda: (identifier, "activated") in reader.seen, DEADLINE_S, what="it is told")  # noqa: B023
        assert reader.names.count("reset") == 0


async def test_a_reader_that_comes_back_goes_on_without_a_gap_and_nothing_twice(url: str, router: RunningFront) -> None:
    reader = Reader(url, router.token(USER))
    told: list[int] = []
    for turn in range(4):
        async with reader:
            told += await submit(router, 3, site=("BNL", "FZK")[turn % 2])
            await eventually(lambda: len(reader.seen) >= len(told), DEADLINE_S, what="told")  # noqa: B023
        # While he is away.
        told += await submit(router, 50, site=("FZK", "BNL")[turn % 2])
    async with reader:
        await eventually(lambda: len(reader.seen) >= len(told), DEADLINE_S, what="what was missed is told")
    assert sorted(identifier for identifier, _ in reader.seen) == sorted(told)
    assert "reset" not in reader.names


async def test_a_reader_is_told_only_what_he_may_read(url: str, router: RunningFront) -> None:
    async with Reader(url, router.token(STRANGER)) as stranger, Reader(url, router.token(ADMIN)) as admin:
        [identifier] = await submit(router)
        await eventually(lambda: (identifier, "activated") in admin.seen, DEADLINE_S, what="the admin is told")
        assert stranger.seen == []


async def test_after_a_restart_of_a_shard_the_reader_is_told_to_look_for_himself(
    url: str, router: RunningFront, pair: TwoPartitions
) -> None:
    async with Reader(url, router.token(USER)) as reader:
        await submit(router, site="FZK")
        await pair.stop("eu1")
        await pair.start("eu1")
        assert await router.forward.links._links["eu1"].wait_connected(DEADLINE_S)
        await eventually(lambda: "reset" in reader.names, DEADLINE_S, what="he is told")
        [identifier] = await submit(router, site="FZK")
        await eventually(lambda: (identifier, "activated") in reader.seen, DEADLINE_S, what="it goes on")
    old = Reader(url, router.token(USER), last_id="us1=0000.5,eu1=ffff.1")
    async with old:
        assert old.names.count("reset") == 2


async def test_a_reader_that_does_not_read_is_cut_off_and_holds_up_nobody(
    url: str, router: RunningFront, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("monitor_api.main.WRITE_S", 0.3)
    cut_off = EVENT_READERS._value.get  # type: ignore[attr-defined]
    host, port = url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port), limit=1024)
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    head = f"GET /v1/events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {router.token(USER)}\r\n\r\n"
    writer.write(head.encode())
    await eventually(lambda: cut_off() == 1, DEADLINE_S, what="it is open")
    async with Reader(url, router.token(USER)) as reader:
        n_told = 0

        async def gone() -> bool:
            nonlocal n_told
            n_told += len(await submit(router, 2000))
            return bool(cut_off() == 1)

        await eventually(gone, 60.0, what="the slow one is cut off")
        await eventually(lambda: len(reader.seen) == n_told, DEADLINE_S, what="the other was told everything")
    writer.close()


async def test_a_stream_too_many_is_refused_and_counted(
    url: str, router: RunningFront, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "MAX_READERS", 0)
    before = REGISTRY.get_sample_value("culm_shed_total", {"reason": "event_readers"}) or 0.0
    headers = {"Authorization": f"Bearer {router.token(USER)}"}
    async with aiohttp.ClientSession(headers=headers) as session, session.get(f"{url}/v1/events") as answer:
        assert answer.status == 503
    assert REGISTRY.get_sample_value("culm_shed_total", {"reason": "event_readers"}) == before + 1


@pytest.mark.parametrize("last_id", ["x", "us1", "us1=5", "us1=a.b", "=a.1", "us1=a.1,,", "x" * 5000])
async def test_an_id_that_is_none_is_refused(url: str, router: RunningFront, last_id: str) -> None:
    headers = {"Authorization": f"Bearer {router.token(USER)}", "Last-Event-ID": last_id}
    async with aiohttp.ClientSession(headers=headers) as session, session.get(f"{url}/v1/events") as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (400, "bad_event_id")


async def test_events_are_for_users_with_a_token(url: str, router: RunningFront) -> None:
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{url}/v1/events") as answer:
            assert answer.status == 401
        headers = {"Authorization": f"Bearer {router.token(PILOT)}"}
        async with session.get(f"{url}/v1/events", headers=headers) as answer:
            assert answer.status == 403


# --- the ring ---------------------------------------------------------------------------------------------------------


def happening(number: int) -> Happening:
    return Happening(id=number, slot=1, state=State.SENT, event=Event.CLAIM, attempt=1, owner="central:ann", vo="atlas")


async def ask(ring: Happenings, **values: Any) -> tuple[list[int], int, bool, str]:
    answer = await ring.since(ShardHappenings(**values))
    return [one.id for one in answer.happened], answer.seq, answer.reset, answer.generation


async def test_the_ring_gives_what_came_after_a_position_and_no_more_than_an_answer_holds() -> None:
    ring = Happenings(kept=5000)
    _, seq, reset, generation = await ask(ring)
    assert (seq, reset) == (0, False)
    ring.add([happening(n) for n in range(MAX_PER_ANSWER + 5)])
    some, seq, reset, _ = await ask(ring, generation=generation, seq=0)
    assert (some[0], len(some), seq, reset) == (0, MAX_PER_ANSWER, MAX_PER_ANSWER, False)
    some, seq, reset, _ = await ask(ring, generation=generation, seq=seq)
    assert (some, seq, reset) == (list(range(MAX_PER_ANSWER, MAX_PER_ANSWER + 5)), MAX_PER_ANSWER + 5, False)
    assert await ask(ring, generation=generation, seq=seq) == ([], seq, False, generation)


async def test_the_ring_says_when_it_does_not_know() -> None:
    ring = Happenings(kept=3)
    generation = (await ask(ring))[3]
    ring.add([happening(n) for n in range(10)])
    assert await ask(ring, generation=generation, seq=7) == ([7, 8, 9], 10, False, generation)
    for lost in ({"generation": generation, "seq": 6}, {"generation": generation, "seq": 11}, {"generation": "other"}):
        assert await ask(ring, **lost) == ([], 10, True, generation)
    ring.doubt()
    found = await ask(ring, generation=generation, seq=10)
    assert (found[2], found[3] != generation) == (True, True)


async def test_who_waits_is_answered_as_soon_as_something_happens() -> None:
    ring = Happenings()
    generation = (await ask(ring))[3]
    waiting = [asyncio.create_task(ask(ring, generation=generation, seq=0, wait_s=20.0)) for _ in range(3)]
    await eventually(lambda: len(ring._more._waiters) == 3, DEADLINE_S, what="all wait")  # type: ignore[attr-defined]
    ring.add([happening(1)])
    async with asyncio.timeout(1.0):
        assert [found[0] for found in await asyncio.gather(*waiting)] == [[1]] * 3
