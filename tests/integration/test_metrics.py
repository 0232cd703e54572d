"""What a shard and a router measure of themselves, on real servers."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable
from functools import partial

import pytest
from prometheus_client import REGISTRY

from culm import service
from culm.errors import CulmError, Moved, Unavailable
from culm.settings import DispatchSettings
from culm.states import Event, State
from culm.wire import GetJobRequest, Happening, JobError, PilotInfo
from shard import signs
from shard.database import Transaction
from tests.front import RunningFront, front
from tests.partition import PILOT, Partition, Servers, get_job_call, job, partition
from tests.waiting import eventually

pytestmark = pytest.mark.integration
DEADLINE_S = 20.0


def value(name: str, **labels: str) -> float | None:
    """One sample; None if it is not there."""
    return REGISTRY.get_sample_value(name, labels)


def counter(name: str, **labels: str) -> Callable[[], float]:
    """By how much one sample has grown since now."""
    before = value(name, **labels) or 0.0
    return lambda: (value(name, **labels) or 0.0) - before


# --- get_job


@pytest.fixture(params=[True, False], ids=["fast lane", "plain"])
async def router(shard: Partition, request: pytest.FixtureRequest) -> AsyncIterator[RunningFront]:
    """A router, with either way of a get_job."""
    async with front(shard, fast_lane=request.param) as running:
        yield running


async def test_both_ways_of_a_get_job_are_timed_by_router_and_shard(shard: Partition, router: RunningFront) -> None:
    def getjobs(op: str, outcome: str) -> Callable[[], float]:
        return counter("culm_getjob_seconds_count", op=op, outcome=outcome)

    grown = {outcome: getjobs("at_once", outcome) for outcome in ("hit", "empty", "busy", "error")}
    waited = {outcome: getjobs("wait", outcome) for outcome in ("hit", "empty", "busy", "error")}
    also = counter("culm_request_seconds_count", verb="get_job", outcome="ok")
    stopping = counter("culm_request_seconds_count", verb="get_job", outcome="stopping")
    async with router.client(PILOT, patience_s=0) as agent:

        async def ask(queue: str = "BNL-q", wait_s: float = 0.0) -> str:
            request = GetJobRequest(
                request_id=secrets.token_hex(8), queue=queue, pilot=PilotInfo(id="p"), wait_s=wait_s
            )
            try:
                return "hit" if (await agent.get_job(request)).jobs else "empty"
            except CulmError as error:
                return error.code

        await shard.submit(job(), job())
        assert [await ask(), await ask(wait_s=5.0), await ask(), await ask(wait_s=0.01)] == [
            "hit",
            "hit",
            "empty",
            "empty",
        ]
        assert await ask("NOWHERE-q") == "unknown_queue"
        shard.shard.dispatcher._stopping = True
        assert await ask() == "stopping"
        shard.shard.dispatcher._stopping = False
    # The router and the shard are one process here, so each is counted twice; the unknown queue is the router's alone.
    assert {outcome: n() for outcome, n in grown.items()} == {"hit": 2, "empty": 2, "busy": 2, "error": 1}
    assert {outcome: n() for outcome, n in waited.items()} == {"hit": 2, "empty": 2, "busy": 0, "error": 0}
    assert (also(), stopping()) == (0, 2)


async def test_a_get_job_that_needs_a_task_is_timed_too(shard: Partition) -> None:
    moved = shard.slot()
    busy = counter("culm_getjob_seconds_count", op="at_once", outcome="busy")
    with pytest.raises(Moved):
        await shard.get(slots=[type(moved)(moved.slot, moved.epoch + 1)])
    assert busy() == 1


# --- what there is


async def test_the_gauges_say_what_the_database_holds(both: Servers) -> None:
    async with partition(both, "BNL", "UTA") as shard:
        levels = shard.shard.levels
        first, *_ = await shard.submit(job(), job(), job())
        await shard.submit(job(site="", region="US"), at=shard.topology.slot(0))
        [grant] = await shard.get()
        assert grant.id == first
        await shard.sql(
            "UPDATE ready SET queued_at = DATE_SUB(queued_at, INTERVAL 100 SECOND) ORDER BY id DESC LIMIT 1"
        )
        await levels.turn()
        assert value("culm_jobs", state="activated") == 3
        assert value("culm_jobs", state="sent") == 1
        assert value("culm_jobs", state="finished") == 0
        depths = {site: value("culm_queue_depth", site=site) for site in ("BNL", "UTA", "(any site of US)")}
        assert depths == {"BNL": 2, "UTA": 0, "(any site of US)": 1}
        # Of the two the one with the lowest number, which has not been ready for 100 seconds.
        assert -1 < (value("culm_queue_oldest_seconds", site="BNL") or 0.0) < 90
        await shard.sql("UPDATE ready SET queued_at = DATE_SUB(queued_at, INTERVAL 500 SECOND)")
        await levels.turn()
        assert 500 <= (value("culm_queue_oldest_seconds", site="BNL") or 0.0) < 590
        assert value("culm_queue_oldest_seconds", site="UTA") == 0
        assert value("culm_pilots_seen", site="BNL") == 1
        shard.shard.ownership.open.pop(shard.slot("UTA").slot)
        await levels.turn()
        assert value("culm_queue_depth", site="UTA") is None
        assert value("culm_queue_depth", site="BNL") == 2


async def test_a_failed_job_is_counted_when_it_is_committed(shard: Partition) -> None:
    await shard.submit(job(max_attempts=1))
    [grant] = await shard.get()
    failed = counter("culm_job_errors_total", component="exe", code="930001")
    reached = counter("culm_job_transitions_total", state="failed")
    await shard.report(grant, State.FAILED, error=JobError(plane="exe", code=930_001))
    await shard.report(grant, State.FAILED, error=JobError(plane="exe", code=930_001))
    assert (failed(), reached()) == (1, 1)


async def test_a_transaction_that_is_rolled_back_changes_no_count(shard: Partition) -> None:
    reached = counter("culm_job_transitions_total", state="merging")
    happened = Happening(
        id=1, slot=1, state=State.MERGING, event=Event.MERGE, attempt=1, owner="central:ann", vo="atlas"
    )

    async def work(tx: Transaction, *, then: CulmError | None) -> None:
        tx.happened.append(happened)
        await tx.fetch("database_time")
        if then is not None:
            raise then

    with pytest.raises(Unavailable):
        await shard.shard.database.run("write", partial(work, then=Unavailable("no", "no")))
    assert reached() == 0
    await shard.shard.database.run("write", partial(work, then=None))
    assert reached() == 1


# --- what is refused


async def test_what_was_refused_because_something_was_full_is_counted(both: Servers) -> None:
    async with partition(both, dispatch=DispatchSettings(max_pending=1)) as shard:
        full = counter("culm_shed_total", reason="get_jobs")
        dispatcher = shard.shard.dispatcher
        first = dispatcher.begin(get_job_call(shard.slot()))
        assert first is not None
        with pytest.raises(Unavailable, match="overloaded"):
            dispatcher.begin(get_job_call(shard.slot()))
        assert full() == 1
        assert (await first).jobs == []


async def test_signs_beyond_the_bound_are_counted(shard: Partition, monkeypatch: pytest.MonkeyPatch) -> None:
    await shard.submit(job())
    [grant] = await shard.get()
    full = counter("culm_shed_total", reason="signs")
    refused = counter("culm_request_seconds_count", verb="heartbeat", outcome="overloaded")
    monkeypatch.setattr(signs, "MAX_PENDING", 0)
    with pytest.raises(Unavailable, match="overloaded"):
        await shard.heartbeat(grant)
    assert (full(), refused()) == (1, 1)


# --- waiting


async def test_the_wait_for_a_connection_is_measured(shard: Partition) -> None:
    database, gate = shard.shard.database, asyncio.Event()
    n_connections = shard.settings.database.user_connections
    slow = counter("culm_db_pool_wait_seconds_sum", pool="user")
    waits = counter("culm_db_pool_wait_seconds_count", pool="user")
    holders = [asyncio.create_task(database.run("user", lambda _tx: gate.wait())) for _ in range(n_connections)]
    await eventually(lambda: value("culm_db_pool_in_use", pool="user") == n_connections, DEADLINE_S)
    waiting = asyncio.create_task(database.run("user", lambda tx: tx.fetch("database_time")))
    began = asyncio.get_running_loop().time()
    await eventually(lambda: asyncio.get_running_loop().time() > began + 0.05, DEADLINE_S)
    gate.set()
    await asyncio.gather(*holders, waiting)
    assert waits() == n_connections + 1
    assert 0.05 <= slow() < DEADLINE_S


async def test_the_lag_of_the_loop_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "LAG_LOOK_S", 0.001)
    n, lag = counter("culm_loop_lag_seconds_count"), counter("culm_loop_lag_seconds_sum")
    loop = asyncio.get_running_loop()
    service.watch_lag(loop)
    until = loop.time() + 0.05
    while loop.time() < until:
        pass
    await eventually(lambda: n() >= 1, DEADLINE_S)
    assert lag() >= 0.04
