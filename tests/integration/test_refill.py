"""Keeping the dispatch queue whole: what marks a class, what mends it, and what a look into InnoDB finds again."""

import asyncio
import random

import msgspec
import pytest

from culm.errors import Unavailable
from culm.settings import DispatchSettings
from culm.states import State
from culm.wire import InputFile
from shard.classes import ClassRegistry
from shard.database import Database, Transaction
from shard.dispatch_queue import DispatchQueue, QueueLostError, Wanted
from shard.hints import ClassKey, Hint
from shard.refill import Refill
from shard.shelf import Shelf
from tests.partition import PRODUCTION, Partition, Servers, job, partition
from tests.waiting import eventually

DEADLINE_S = 20.0
QUIET = DispatchSettings(cap=5, sweep_interval_s=600.0, reap_interval_s=600.0, breaker_s=0.05)


async def _stored(shard: Partition) -> list[int]:
    return sorted(hint.id for hint in await shard.shard.queue.everything())


def _key(shard: Partition) -> ClassKey:
    [key] = shard.shard.classes.active()
    return key


async def _settled(shard: Partition) -> None:
    refill = shard.shard.refill

    def clean() -> bool:
        return refill.clean(shard.shard.classes.active())

    await eventually(clean, DEADLINE_S, what="every class is clean")


async def _forget_hints(shard: Partition) -> None:
    key = _key(shard)
    await shard.shard.queue._redis.delete(f"culm:us1:ready:{key.slot}:{key.class_id}")


async def test_a_flush_is_noticed_and_mended_with_the_best_of_each_class(both: Servers) -> None:
    async with partition(both, dispatch=QUIET) as shard:
        ids = await shard.submit(*[job(priority=n) for n in range(8)])
        await shard.shard.queue._redis.flushdb()
        [grant] = await shard.get()
        assert grant.id == ids[7]
        await _settled(shard)
        # One less where the refill read them before the claim took its own.
        assert await _stored(shard) in (ids[2:7], ids[3:7])


async def test_what_lies_in_valkey_from_an_earlier_life_is_not_believed(both: Servers) -> None:
    """A restarted shard finds its generation again, and hints of jobs that are gone."""
    async with partition(both, dispatch=QUIET) as first:
        schema, url = first.settings.database.name, first.settings.redis
        ids = await first.submit(*[job()] * 3)
        key = _key(first)
    queue = DispatchQueue("us1", url, QUIET)
    await queue.begin()
    await queue.push([Hint(-9, 12345, key)])
    async with partition(both, dispatch=QUIET, schema=schema) as second:
        grants = [await second.get() for _ in range(4)]
        assert [[grant.id for grant in got] for got in grants] == [[i] for i in ids] + [[]]
    await queue.close()


async def test_a_lost_hint_is_found_by_the_sweep(both: Servers) -> None:
    async with partition(both, dispatch=QUIET) as shard:
        ids = await shard.submit(*[job()] * 3)
        await _settled(shard)
        await _forget_hints(shard)
        assert await _stored(shard) == []
        await shard.shard.refill.sweep()
        await eventually(lambda: _stored(shard), DEADLINE_S, what="the hints are back")
        assert await _stored(shard) == ids


async def test_leftover_hints_of_a_class_that_has_ceased_are_swept_away(both: Servers) -> None:
    async with partition(both, dispatch=QUIET) as shard:
        [identifier] = await shard.submit(job())
        await _settled(shard)
        key = _key(shard)
        await shard.get()
        assert await shard.get() == []
        assert shard.shard.classes.active() == []
        await shard.shard.queue.push([Hint(0, identifier, key)])

        async def swept() -> bool:
            await shard.shard.refill.sweep()
            return await _stored(shard) == []

        await eventually(swept, DEADLINE_S)


async def test_a_job_whose_announcement_was_lost_wakes_a_pilot_that_waits(both: Servers) -> None:
    """The commit was done and nobody heard of it: the process was cut off, or the answer of the database."""
    async with partition(both, dispatch=DispatchSettings(sweep_interval_s=0.1, breaker_s=0.05)) as shard:
        [identifier] = await shard.submit(job(inputs=[InputFile(name="in.root", ready=False)]))
        waiting = asyncio.create_task(shard.get(wait_s=DEADLINE_S))
        await eventually(lambda: len(shard.shard.dispatcher._parking) == 1, DEADLINE_S)
        await _activate_unheard(shard, identifier)
        async with asyncio.timeout(DEADLINE_S / 2):
            assert [grant.id for grant in await waiting] == [identifier]


async def _activate_unheard(shard: Partition, identifier: int) -> None:
    await shard.sql(f"UPDATE job SET state = 'activated' WHERE id = {identifier}")
    await shard.sql(
        "INSERT INTO ready (id, slot, class_id, ranking, queued_at)"
        f" SELECT id, slot, class_id, -priority, UTC_TIMESTAMP(6) FROM job WHERE id = {identifier}"
    )


async def test_jobs_of_a_class_that_this_process_never_heard_of_are_dispatched(both: Servers) -> None:
    """Committed by a call whose outcome was not told, or brought by an import."""
    async with partition(both, dispatch=DispatchSettings(sweep_interval_s=0.1)) as shard:
        [identifier] = await shard.submit(job(cores=3))
        shard.shard.classes.__init__()  # type: ignore[misc]  # as after the loss of all that it knew
        [grant] = await shard.get(wait_s=DEADLINE_S)
        assert grant.id == identifier


async def test_a_pilot_is_told_no_job_only_after_a_last_look(both: Servers) -> None:
    """Its wait is over, and a job is there that nobody announced."""
    async with partition(both, dispatch=QUIET) as shard:
        [identifier] = await shard.submit(job(inputs=[InputFile(name="in.root", ready=False)]))
        waiting = asyncio.create_task(shard.get(wait_s=1.0))
        await eventually(lambda: len(shard.shard.dispatcher._parking) == 1, DEADLINE_S)
        await _activate_unheard(shard, identifier)
        await shard.shard.refill.load()
        assert [grant.id for grant in await waiting] == [identifier]


async def test_a_refill_that_cannot_read_leaves_its_class_dirty_and_is_tried_again(both: Servers) -> None:
    async with partition(both, dispatch=QUIET) as shard:
        ids = await shard.submit(*[job()] * 3)
        await _settled(shard)
        await shard.sql("RENAME TABLE ready TO ready_away")
        shard.shard.refill.mark([_key(shard)])
        await eventually(lambda: shard.shard.refill.n_begun > 1, DEADLINE_S)
        assert not shard.shard.refill.clean([_key(shard)])
        await shard.sql("RENAME TABLE ready_away TO ready")
        await _settled(shard)
        assert await _stored(shard) == ids


async def test_a_class_that_is_being_refilled_is_not_clean(both: Servers) -> None:
    """A push between the emptying and the end is kept; nothing is taken meanwhile."""
    async with partition(both, dispatch=QUIET) as shard:
        await shard.submit(job(priority=1))
        await _settled(shard)
        key = _key(shard)
        queue, database = shard.shard.queue, shard.shard.database
        refill = Refill(database, queue, shard.shard.classes, QUIET, Shelf(1 << 20))
        pool = shard.settings.database.read_connections
        held = [_Held(database) for _ in range(pool)]
        await asyncio.gather(*(one.begun.wait() for one in held))
        task = asyncio.create_task(refill._refill(key))
        await eventually(lambda: refill.n_begun == 1, DEADLINE_S)
        assert not refill.clean([key])
        await queue.push([Hint(-900, 77, key)])
        for one in held:
            one.go.set()
        await task
        assert refill.clean([key])
        taken = await queue.take([Wanted(9, (key,))])
        assert taken.hints[0][0].id == 77
        await asyncio.gather(*(one.done for one in held))


class _Held:
    """A read connection that is in use until `go`."""

    def __init__(self, database: Database) -> None:
        self.begun, self.go = asyncio.Event(), asyncio.Event()
        self.done = asyncio.create_task(database.run("read", self._work))

    async def _work(self, _tx: Transaction) -> None:
        self.begun.set()
        await self.go.wait()


async def test_a_low_class_is_topped_up_while_it_is_drained_in_order(both: Servers) -> None:
    async with partition(both, dispatch=QUIET) as shard:
        ids = await shard.submit(*[job(priority=n % 7) for n in range(60)])
        wanted = [i for _, i in sorted((-(n % 7), identifier) for n, identifier in enumerate(ids))]
        got = [grant.id for _ in range(20) for grant in await shard.get(n_jobs=3)]
        assert got == wanted
        assert shard.shard.refill.n_topped_up > 1


async def test_what_a_load_finds_is_active_and_dirty_once(both: Servers) -> None:
    async with partition(both, dispatch=QUIET) as shard:
        await shard.submit(job(), job(cores=2))
        classes = ClassRegistry()
        queue = DispatchQueue("other", shard.settings.redis, QUIET)
        refill = Refill(shard.shard.database, queue, classes, QUIET, Shelf(1 << 20))
        found = await refill.load()
        assert sorted(found) == sorted(shard.shard.classes.active())
        assert sorted(classes.active()) == sorted(found)
        assert not refill.clean(found)
        await refill.turn()
        assert refill.clean(found)
        assert sorted(await refill.load()) == sorted(found)
        assert refill.clean(found)
        await queue.close()


async def test_without_valkey_a_refill_waits_for_the_breaker_and_stays_wanted(both: Servers) -> None:
    async with partition(both, dispatch=QUIET) as shard:
        await shard.submit(job())
        await _settled(shard)
        key = _key(shard)
        lost = DispatchQueue("other", "unix:///nowhere/valkey.sock", QUIET)
        refill = Refill(shard.shard.database, lost, shard.shard.classes, QUIET, Shelf(1 << 20))
        refill.mark([key])
        loop = asyncio.get_running_loop()
        started = loop.time()
        for _ in range(3):
            await refill.turn()
        # Not three turns in no time: that filled the log of a shard whose Valkey was down.
        assert loop.time() - started >= 3 * QUIET.breaker_s * 0.9
        assert not refill.clean([key])
        with pytest.raises(QueueLostError):
            await lost.push([Hint(0, 1, key)])
        await lost.close()


async def test_without_the_database_a_sweep_says_so(both: Servers) -> None:
    async with partition(both, dispatch=QUIET) as shard:
        gone = Database(msgspec.structs.replace(shard.settings.database, socket="/nowhere/db.sock"))
        refill = Refill(gone, shard.shard.queue, shard.shard.classes, QUIET, Shelf(1 << 20))
        with pytest.raises(Unavailable):
            await refill.sweep()


async def test_a_push_that_was_lost_is_found_again_by_a_refill(both: Servers) -> None:
    async with partition(both, dispatch=QUIET) as shard:
        await shard.submit(job())
        await _settled(shard)
        await shard.shard.queue._redis.flushdb()
        # This submit is what notices the flush.
        [identifier] = await shard.submit(job(priority=5000), who=PRODUCTION)
        await _settled(shard)
        assert identifier in await _stored(shard)
        [grant] = await shard.get()
        assert grant.id == identifier
        assert await shard.state(identifier) is State.SENT


async def test_what_comes_while_a_class_is_drained_and_topped_up_is_dispatched_in_order(both: Servers) -> None:
    chance = random.Random(7)
    async with partition(both, dispatch=QUIET) as shard:
        ready: dict[int, int] = {}
        for _ in range(120):
            for _ in range(chance.randrange(4)):
                priority = chance.randrange(5)
                [identifier] = await shard.submit(job(priority=priority))
                ready[identifier] = priority
            best = sorted(ready, key=lambda identifier: (-ready[identifier], identifier))[: chance.randrange(1, 3)]
            if best:
                assert [grant.id for grant in await shard.get(n_jobs=len(best))] == best
                for identifier in best:
                    del ready[identifier]
        assert shard.shard.refill.n_topped_up > 1
