"""kill -9 of each kind of process under traffic: retries succeed, nothing acknowledged is lost, nothing runs twice."""

import asyncio
import os
import secrets
import signal
import time

import pytest

from culm.errors import CulmError, Unavailable
from culm.wire import GetJobRequest, JobSpec, PilotInfo, SubmitRequest
from tests.cluster import Cluster
from tests.traffic import PILOT, USER, Crowd
from tests.waiting import eventually

pytestmark = pytest.mark.system
DEADLINE_S = 60.0
MORE = 60
"""So many jobs must finish before a fault and after it."""


@pytest.mark.parametrize("victim", ["us1", "us1-db", "us1-valkey", "eu1", "cern1-db", "router", "monitor"])
async def test_a_killed_process_costs_a_retry_and_nothing_else(running: Cluster, victim: str) -> None:
    crowd = Crowd(running)
    async with crowd.at_work():
        await crowd.until(lambda books: len(books.finished) >= MORE)
        killed = running.kill(victim)
        await asyncio.to_thread(running.wait_back, victim, killed)
        finished = len(crowd.books.finished)
        await crowd.until(lambda books: len(books.finished) >= finished + MORE)
    crowd.check()
    assert await asyncio.to_thread(running.audit) == []


async def test_a_killed_router_worker_is_replaced_and_the_others_serve_on(running: Cluster) -> None:
    crowd = Crowd(running)
    before = running.workers()
    assert len(before) >= 2
    async with crowd.at_work():
        await crowd.until(lambda books: len(books.finished) >= MORE)
        os.kill(before[0], signal.SIGKILL)
        finished = len(crowd.books.finished)
        await crowd.until(lambda books: len(books.finished) >= finished + MORE)
        await eventually(lambda: len(running.workers()) == len(before), DEADLINE_S)
    crowd.check()
    assert before[0] not in running.workers()
    assert await asyncio.to_thread(running.audit) == []


async def test_everything_of_a_partition_killed_at_once_comes_back_whole(running: Cluster) -> None:
    crowd = Crowd(running)
    names = ("us1", "us1-db", "us1-valkey")
    async with crowd.at_work():
        await crowd.until(lambda books: len(books.finished) >= MORE)
        killed = {name: running.kill(name) for name in names}
        for name, pid in killed.items():
            await asyncio.to_thread(running.wait_back, name, pid)
        finished = len(crowd.books.finished)
        await crowd.until(lambda books: len(books.finished) >= finished + MORE)
    crowd.check()
    assert await asyncio.to_thread(running.audit) == []


async def test_a_dead_shard_is_answered_for_at_once_and_the_others_go_on(running: Cluster) -> None:
    """A stopped process is the hard case: its sockets stay open and nothing answers."""
    async with running.client(USER, patience_s=0.0) as user, running.client(PILOT, patience_s=0.0) as pilot:
        os.kill(running.one("us1").pid, signal.SIGSTOP)
        try:
            await eventually(lambda: _refused(pilot, "BNL-q"), DEADLINE_S, what="the router has noticed")
            began = time.monotonic()
            with pytest.raises(Unavailable) as told:
                await user.submit(_submit("BNL"))
            assert time.monotonic() - began < 1.0
            assert told.value.retry_after_s is not None
            assert told.value.retry_after_s > 0
            answer = await user.submit(_submit("DESY"))
            assert all(answer.ids)
            [grant] = (await pilot.get_job(_get("DESY-q"))).jobs
            assert grant.id in answer.ids
        finally:
            os.kill(running.one("us1").pid, signal.SIGCONT)
        await eventually(lambda: _served(pilot, "BNL-q"), DEADLINE_S, what="it serves again")


async def test_a_silent_shard_is_answered_for_within_a_second(running: Cluster) -> None:
    """From the moment of the fault on: no request waits longer for a shard that has just gone silent."""
    async with running.client(PILOT, patience_s=0.0) as pilot:
        await pilot.get_job(_get("DESY-q"))
        os.kill(running.one("eu1").pid, signal.SIGSTOP)
        try:
            began = time.monotonic()
            with pytest.raises(Unavailable):
                await pilot.get_job(_get("DESY-q"))
            # 1.5 times link_stall_s of 0.6 s, and what a busy machine adds.
            assert time.monotonic() - began < 1.2
        finally:
            os.kill(running.one("eu1").pid, signal.SIGCONT)
        await eventually(lambda: _served(pilot, "DESY-q"), DEADLINE_S)


async def _refused(client: object, queue: str) -> bool:
    try:
        await client.get_job(_get(queue))  # type: ignore[attr-defined]
    except CulmError as error:
        return error.code in {"shard_down", "outcome_unknown"}
    return False


async def _served(client: object, queue: str) -> bool:
    return not await _refused(client, queue)


def _submit(site: str) -> SubmitRequest:
    return SubmitRequest(idempotency_key=secrets.token_hex(8), jobs=[JobSpec(site=site, argv=["true"])])


def _get(queue: str) -> GetJobRequest:
    return GetJobRequest(request_id=secrets.token_hex(8), queue=queue, pilot=PilotInfo(id="p1"))
