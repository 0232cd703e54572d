"""Rubbish on the link of a real shard: its own connection or call is refused, and the shard goes on."""

import asyncio
import random
from pathlib import Path

import msgspec
import pytest

from culm.errors import ClientFault, CulmError
from culm.wire import ShardGetJob, ShardSubmit, SlotJobs
from tests.partition import USER, Partition, get_job_call, job

DEADLINE_S = 20.0
HELLO = b"\x00\x00\x00\x0a" + msgspec.msgpack.encode([6, 1, "router"])
VERBS = ("submit", "get_job", "heartbeat", "report", "cancel", "release", "job", "jobs", "counts", "depths")


async def throw(shard: Partition, data: bytes) -> None:
    """Send bytes on a connection of their own, and read until the shard closes it or says no more."""
    reader, writer = await asyncio.open_unix_connection(Path(shard.settings.link.removeprefix("unix:")))
    try:
        writer.write(data)
        writer.write_eof()
        async with asyncio.timeout(DEADLINE_S):
            await asyncio.gather(reader.read(), return_exceptions=True)
    finally:
        writer.close()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)


async def works(shard: Partition) -> None:
    """Submit, get_job: the shard goes on."""
    [identifier] = await shard.submit(job())
    assert [grant.id for grant in await shard.get()] == [identifier]


async def test_random_bytes_end_their_own_connections_only(shard: Partition) -> None:
    assert int.from_bytes(HELLO[:4], "big") == len(HELLO) - 4
    rng = random.Random(20261125)
    for n in range(60):
        rubbish = rng.randbytes(rng.randrange(1, 400))
        size = len(rubbish).to_bytes(4, "big")
        await throw(shard, (rubbish, HELLO + rubbish, HELLO + size + rubbish)[n % 3])
    await works(shard)


@pytest.mark.parametrize("verb", VERBS)
async def test_a_body_that_is_no_message_is_an_error_of_its_call(shard: Partition, verb: str) -> None:
    bodies = (
        b"", b"\xc1", b"\xff" * 50, b"\x91" * 5000, msgspec.msgpack.encode([1, 2]), msgspec.msgpack.encode("text"),
        b"\x81\xa2at\xa2\xff\xfe",
    )  # fmt: skip
    # A question without fields has none that could be wrong.
    for body in bodies[:-1] if verb == "counts" else bodies:
        with pytest.raises(CulmError) as caught:
            await shard.link.call(verb, body, DEADLINE_S)
        assert caught.value.code == "bad_message", (body, caught.value)
    assert shard.link.connected
    await works(shard)


async def test_an_unknown_verb_is_said(shard: Partition) -> None:
    for verb in ("", "steal", "__class__", "x" * 1000):
        with pytest.raises(ClientFault) as caught:
            await shard.link.call(verb, b"", DEADLINE_S)
        assert caught.value.code == "unknown_verb"
    await works(shard)


async def test_good_messages_with_flipped_bytes_break_nothing(shard: Partition) -> None:
    """Whatever a damaged message still means: one answer or one error each, never a broken link."""
    rng = random.Random(7)
    good = [("get_job", msgspec.msgpack.encode(get_job_call(shard.slot())))]
    assert msgspec.msgpack.decode(good[0][1], type=ShardGetJob).slots == [shard.slot()]
    for _ in range(150):
        verb, body = good[0]
        damaged = bytearray(body)
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            await shard.link.call(verb, bytes(damaged), DEADLINE_S)
        except CulmError as error:
            assert error.code in {"bad_message", "moved"}, error
    assert shard.link.connected
    await works(shard)


async def test_a_submit_that_ends_early_stores_nothing(shard: Partition) -> None:
    call = ShardSubmit(principal=USER, key="k", jobset=1, parts=[SlotJobs(at=shard.slot(), specs=[job()])])
    body = msgspec.msgpack.encode(call)
    for length in range(0, len(body), 7):
        with pytest.raises(ClientFault):
            await shard.link.call("submit", body[:length], DEADLINE_S)
    assert await shard.rows("SELECT id FROM job") == []
    await works(shard)
