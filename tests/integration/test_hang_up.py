"""Clients that hang up while their get_job is in a claim, which is between arriving and being parked."""

import asyncio

import pytest

from tests.partition import Partition, job
from tests.waiting import eventually

pytestmark = pytest.mark.integration
DEADLINE_S = 20.0
N_CLIENTS = 40


async def _hang_up(shard: Partition, request_id: str, n_turns: int) -> None:
    """Ask, and go some turns of the event loop later: somewhere on the way to the database and back."""
    asking = asyncio.ensure_future(shard.get(wait_s=60.0, request_id=request_id))
    for _ in range(n_turns):
        await asyncio.sleep(0)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)


async def test_nobody_is_parked_for_a_client_that_hung_up_during_the_claim(shard: Partition) -> None:
    """It would wait for a minute for nobody, and take the wake-up of somebody."""
    for n_turns in range(N_CLIENTS):
        await _hang_up(shard, f"gone-{n_turns:04}", n_turns)
    await eventually(lambda: not shard.shard.dispatcher._requests, DEADLINE_S, what="no request is left")
    assert len(shard.shard.dispatcher._parking) == 0


async def test_a_repeat_after_a_hang_up_is_answered_in_its_own_time(shard: Partition) -> None:
    """It does not join what the first would have waited for."""
    for n_turns in range(N_CLIENTS):
        await _hang_up(shard, f"again-{n_turns:04}", n_turns)
        # The release goes over another link in life; here the cancel has only to arrive.
        await eventually(lambda: not shard.shard.dispatcher._requests, DEADLINE_S, what="it is forgotten")
        assert await asyncio.wait_for(shard.get(wait_s=0.0, request_id=f"again-{n_turns:04}"), DEADLINE_S) == []
    [identifier] = await shard.submit(job())
    assert [grant.id for grant in await shard.get()] == [identifier]
