"""Job numbers: never twice, whatever is cut off, also for two processes on one partition; a lost block is a gap."""

import asyncio
import itertools

import msgspec
import pytest

from culm.errors import CulmError
from culm.ids import job_id, slot_of
from shard import id_blocks
from shard.database import Database
from shard.id_blocks import BLOCK, IdBlocks
from tests.partition import Partition, Servers, job, partition


async def _high_water(shard: Partition) -> int:
    return int((await shard.rows(f"SELECT next_seq FROM slot_sequence WHERE slot = {shard.slot().slot}"))[0][0])


async def test_numbers_follow_each_other_and_innodb_is_asked_once_for_a_block(shard: Partition) -> None:
    blocks, slot = IdBlocks(shard.shard.database), shard.slot().slot
    taken = [await blocks.take(slot, 3) for _ in range(10)]
    assert taken == [job_id(slot, 1 + 3 * n) for n in range(10)]
    assert await _high_water(shard) == 1 + BLOCK


async def test_a_call_larger_than_a_block_gets_one_range(shard: Partition) -> None:
    blocks, slot = IdBlocks(shard.shard.database), shard.slot().slot
    await blocks.take(slot, 1)
    first = await blocks.take(slot, 2 * BLOCK)
    after = await blocks.take(slot, 1)
    assert after >= first + 2 * BLOCK
    assert await _high_water(shard) > (after & (2**39 - 1))


async def test_what_is_left_of_a_block_is_a_gap_when_it_does_not_suffice(shard: Partition) -> None:
    blocks, slot = IdBlocks(shard.shard.database), shard.slot().slot
    await blocks.take(slot, BLOCK - 1)
    assert await blocks.take(slot, 2) == job_id(slot, BLOCK + 1)


async def test_many_at_once_get_ranges_that_do_not_meet(shard: Partition) -> None:
    blocks, slot = IdBlocks(shard.shard.database), shard.slot().slot
    sizes = [1, 7, 999, 1000, 1001, 3] * 5
    firsts = await asyncio.gather(*(blocks.take(slot, size) for size in sizes))
    ranges = sorted(zip(firsts, sizes, strict=True))
    assert all(first + size <= later for (first, size), (later, _) in itertools.pairwise(ranges))
    assert {slot_of(first + size - 1) for first, size in ranges} == {slot}


async def test_two_processes_of_one_partition_never_give_one_number(shard: Partition) -> None:
    slot = shard.slot().slot
    other = Database(shard.settings.database)
    both = [IdBlocks(shard.shard.database), IdBlocks(other)]
    firsts = await asyncio.gather(*(both[n % 2].take(slot, 300) for n in range(20)))
    numbers = {first + n for first in firsts for n in range(300)}
    assert len(numbers) == 20 * 300
    await other.close()


async def test_slots_have_numbers_of_their_own(both: Servers) -> None:
    async with partition(both, "BNL", "AGLT2") as shard:
        blocks = IdBlocks(shard.shard.database)
        slots = [shard.slot(site).slot for site in ("BNL", "AGLT2")]
        assert [await blocks.take(slot, 1) for slot in slots] == [job_id(slot, 1) for slot in slots]


async def test_a_crash_leaves_a_gap(both: Servers) -> None:
    async with partition(both) as first:
        schema = first.settings.database.name
        [before] = await first.submit(job())
    async with partition(both, schema=schema) as second:
        [after] = await second.submit(job())
        assert after == before + BLOCK


async def test_one_that_is_cancelled_while_it_asks_leaves_no_number_twice(shard: Partition) -> None:
    blocks, slot = IdBlocks(shard.shard.database), shard.slot().slot
    tasks = [asyncio.create_task(blocks.take(slot, BLOCK)) for _ in range(12)]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks[::2]:
        task.cancel()
    taken = [first for first in await asyncio.gather(*tasks, return_exceptions=True) if isinstance(first, int)]
    taken.append(await blocks.take(slot, BLOCK))
    assert len(set(taken)) == len(taken)
    assert all(abs(one - other) >= BLOCK for one in taken for other in taken if one != other)


async def test_a_database_that_is_away_gives_no_number_and_the_next_call_does(shard: Partition) -> None:
    slot = shard.slot().slot
    gone = Database(msgspec.structs.replace(shard.settings.database, socket="/nowhere/db.sock"))
    blocks = IdBlocks(gone)
    with pytest.raises(CulmError) as told:
        await blocks.take(slot, 1)
    assert told.value.retryable
    blocks._database = shard.shard.database
    assert await blocks.take(slot, 1) == job_id(slot, 1)


def test_a_block_holds_a_usual_call() -> None:
    assert id_blocks.BLOCK >= 100
