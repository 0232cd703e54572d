"""Slots that are not open here, or close in the middle: what they left holds up nobody, and nothing is written."""

import asyncio
from typing import Any

import pytest

from culm.errors import CulmError, Moved
from culm.settings import DispatchSettings, Timeouts
from culm.states import Event, State
from culm.wire import CancelAnswer, GetJobAnswer, InputFile, ShardCancel, SlotRef
from shard import reaper
from shard.database import ChangedUnderfootError, Transaction
from shard.ownership import Ownership
from tests.partition import ADMIN, USER, Partition, Servers, get_job_call, job, partition
from tests.waiting import eventually

DEADLINE_S = 20.0
QUIET = DispatchSettings(sweep_interval_s=600.0, reap_interval_s=600.0)
SHORT = Timeouts(activated_s=0.05, unready_s=0.05, grace_s=0.001)


async def _move_away(shard: Partition, site: str) -> None:
    """As a finished move leaves its source: a tombstone, and the rows until they are purged."""
    await shard.sql(f"UPDATE slot SET state = 'moved', epoch = epoch + 1 WHERE slot = {shard.slot(site).slot}")
    await shard.shard.ownership.adopt()


async def _granted(shard: Partition, site: str, n_jobs: int = 1) -> list[int]:
    at = shard.slot(site)
    await shard.submit(*[job(site="")] * n_jobs, at=at)
    answer = await shard.ask("get_job", get_job_call(at, n_jobs=n_jobs), GetJobAnswer)
    return [grant.id for grant in answer.jobs]


async def _expire_all(shard: Partition) -> None:
    await shard.sql("UPDATE lease SET expires_at = '2001-01-01'")


async def test_expired_leases_of_a_moved_slot_do_not_hold_up_the_reaper(
    both: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reaper, "BATCH", 3)
    async with partition(both, "BNL", "AGLT2", dispatch=QUIET) as shard:
        left = await _granted(shard, "AGLT2", 5)
        await _expire_all(shard)
        here = await _granted(shard, "BNL", 4)
        await _move_away(shard, "AGLT2")
        await shard.sql(f"UPDATE lease SET expires_at = '2002-01-01' WHERE id >= {min(here)} AND id <= {max(here)}")
        assert await shard.shard.reaper.end_leases() == len(here)
        assert {await shard.state(identifier) for identifier in here} == {State.ACTIVATED}
        # What was left is another shard's now: not a row of it is touched.
        rows = await shard.rows("SELECT id FROM lease")
        assert sorted(row[0] for row in rows) == sorted(left)


async def test_a_jobset_is_cancelled_where_it_is_ours(both: Servers) -> None:
    async with partition(both, "BNL", "AGLT2", dispatch=QUIET) as shard:
        here = await shard.submit(job(), jobset=99)
        left = await shard.submit(job(site=""), jobset=99, at=shard.slot("AGLT2"))
        await _move_away(shard, "AGLT2")
        # A router that asks for a jobset names no slots.
        answer = await shard.ask("cancel", ShardCancel(principal=USER, slots=[], jobset=99), CancelAnswer)
        assert [(one.id, one.outcome) for one in answer.jobs] == [(here[0], "cancelled")]
        assert await shard.rows(f"SELECT state FROM job WHERE id = {left[0]}") == [("activated",)]


async def test_a_jobset_over_named_slots_stays_in_them(both: Servers) -> None:
    async with partition(both, "BNL", "AGLT2", dispatch=QUIET) as shard:
        await shard.submit(job(), jobset=99)
        there = await shard.submit(job(site=""), jobset=99, at=shard.slot("AGLT2"))
        call = ShardCancel(principal=USER, slots=[shard.slot("AGLT2")], jobset=99)
        assert [one.id for one in (await shard.ask("cancel", call, CancelAnswer)).jobs] == there


async def test_old_jobs_of_a_moved_slot_do_not_hold_up_the_closing_of_ours(both: Servers) -> None:
    async with partition(both, "AGLT2", "BNL", timeouts=SHORT, dispatch=QUIET) as shard:
        unready = job(site="", inputs=[InputFile(name="in.root", ready=False)])
        [left] = await shard.submit(unready, at=shard.slot("AGLT2"))
        [here] = await shard.submit(unready)
        await _move_away(shard, "AGLT2")

        async def closed() -> bool:
            await shard.shard.reaper.close_old()
            return await shard.state(here) is State.CLOSED

        await eventually(closed, DEADLINE_S)
        assert await shard.rows(f"SELECT state FROM job WHERE id = {left}") == [("defined",)]


async def test_a_job_that_was_taken_and_given_back_since_the_look_is_not_old(both: Servers) -> None:
    async with partition(both, timeouts=Timeouts(activated_s=1000.0, grace_s=0.001), dispatch=QUIET) as shard:
        [identifier] = await shard.submit(job())
        await shard.sql("UPDATE ready SET queued_at = '2001-01-01'")
        database = shard.shard.database
        run = database.run

        async def between(pool: Any, work: Any) -> Any:
            if pool == "write":
                database.run = run  # type: ignore[method-assign]
                [grant] = await shard.get()
                await shard.report(grant, State.ACTIVATED)
            return await run(pool, work)

        database.run = between  # type: ignore[method-assign,assignment]
        assert await shard.shard.reaper.close_old() == 0
        assert await shard.state(identifier) is State.ACTIVATED


async def test_every_write_to_a_slot_that_closed_behind_our_back_is_refused(both: Servers) -> None:
    """Memory still has it open: the row decides, in the transaction of the write itself (invariant I8)."""
    async with partition(both, dispatch=QUIET) as shard:
        shard.shard.ownership.adopt = _nothing  # type: ignore[method-assign]
        await shard.submit(job(), job(), job(inputs=[InputFile(name="in.root", ready=False)]))
        [grant] = await shard.get(request_id="the-request")
        await shard.sql("UPDATE slot SET state = 'fenced', epoch = epoch + 1")
        before = await shard.rows("SELECT * FROM job_event ORDER BY id, n")
        calls = [
            shard.submit(job()),
            shard.get(),
            shard.heartbeat(grant),
            shard.report(grant),
            shard.report(grant, State.ACTIVATED),
            shard.say(grant.id + 2, Event.INPUTS_READY, ADMIN),
            shard.cancel(grant.id + 1),
            shard.shard.lifecycle.release_request("pilots", "the-request"),
        ]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(answer) for answer in answers] == [Moved] * len(calls)
        assert await shard.rows("SELECT * FROM job_event ORDER BY id, n") == before
        assert await shard.rows("SELECT COUNT(*) FROM submission") == [(1,)]
        # The same again, open at the new epoch: what believed in the old one is refused still.
        await shard.sql("UPDATE slot SET state = 'open'")

        async def refused() -> bool:
            with pytest.raises(Moved) as told:
                await shard.heartbeat(grant)
            # 0 until the shard has looked again.
            return bool(told.value.details["epoch"] == shard.slot().epoch + 1)

        await eventually(refused, 10.0, what="the refusal names the new epoch")


async def _nothing() -> None:
    """A turn that is not taken."""


async def test_a_slot_whose_opening_was_not_committed_is_opened_by_the_next_turn(both: Servers) -> None:
    async with partition(both, dispatch=QUIET) as shard:
        running = shard.shard
        await shard.sql("DELETE FROM slot")
        await shard.sql("DELETE FROM slot_sequence")
        ownership = Ownership("us1", running.database, lambda: shard.topology)
        opening = ownership._open

        async def cut_off(tx: Transaction, fresh: list[SlotRef]) -> object:
            ownership._open = opening  # type: ignore[method-assign]
            await opening(tx, fresh)
            raise CulmError("database_down", "the commit was cut off")

        ownership._open = cut_off  # type: ignore[method-assign,assignment]
        with pytest.raises(CulmError):
            await ownership.adopt()
        assert ownership.open == {}
        await ownership.adopt()
        at = shard.slot()
        assert ownership.open[at.slot] == at.epoch
        await ownership.require([at])
        assert (await shard.rows(f"SELECT state FROM slot WHERE slot = {at.slot}")) == [("open",)]
        assert (await shard.rows(f"SELECT next_seq FROM slot_sequence WHERE slot = {at.slot}")) == [(1,)]


async def test_opening_that_is_run_again_opens_once(both: Servers) -> None:
    async with partition(both, dispatch=QUIET) as shard:
        running = shard.shard
        ownership = Ownership("us1", running.database, lambda: shard.topology)
        opening = ownership._open
        n_tries = 0

        async def rolled_back(tx: Transaction, fresh: list[SlotRef]) -> object:
            nonlocal n_tries
            n_tries += 1
            answer = await opening(tx, fresh)
            if n_tries == 1:
                raise ChangedUnderfootError
            return answer

        ownership._open = rolled_back  # type: ignore[method-assign,assignment]
        await asyncio.gather(*(ownership.adopt() for _ in range(4)))
        assert ownership.open == running.ownership.open


async def test_a_moved_slot_is_not_opened_again_by_a_topology_that_still_places_it_here(both: Servers) -> None:
    async with partition(both, "BNL", "AGLT2", dispatch=QUIET) as shard:
        await _move_away(shard, "AGLT2")
        for _ in range(3):
            await shard.shard.ownership.adopt()
        assert shard.slot("AGLT2").slot not in shard.shard.ownership.open
    async with partition(both, "BNL", "AGLT2", dispatch=QUIET, schema=shard.settings.database.name) as again:
        assert again.slot("AGLT2").slot not in again.shard.ownership.open
        with pytest.raises(Moved):
            await again.submit(job(site=""), at=again.slot("AGLT2"))


# --- release and the races of a lease --------------------------------------------------------------------------------


async def test_a_release_does_not_end_the_lease_of_the_next_request(both: Servers) -> None:
    """Between its look and its locks the job ended, and was given to somebody else."""
    async with partition(both, dispatch=QUIET) as shard:
        await shard.submit(job())
        [mine] = await shard.get(request_id="the-first")
        released = shard.shard.lifecycle._release
        looked, go = asyncio.Event(), asyncio.Event()

        class _Slow(Transaction):
            async def fetch(self, name: str, *arguments: object) -> list[tuple[object, ...]]:
                rows = await super().fetch(name, *arguments)
                if name == "leases_of_request" and not looked.is_set():
                    looked.set()
                    await go.wait()
                return rows

        async def slow(tx: Transaction) -> object:
            return await released(
                _Slow(tx._connection, tx.writer, tx._timeout_s, tx._max_packet_bytes), "pilots", "the-first"
            )

        releasing = asyncio.create_task(shard.shard.database.run("write", slow))
        # Whichever comes first: one that failed would never look.
        looking = asyncio.create_task(looked.wait())
        await asyncio.wait([looking, releasing], return_when=asyncio.FIRST_COMPLETED)
        assert looking.done()
        await shard.report(mine, State.ACTIVATED)
        [other] = await shard.get(request_id="the-second")
        go.set()
        assert await releasing == []
        assert (await shard.heartbeat(other)).state is State.RUNNING


async def test_a_job_may_be_given_back_more_often_than_sixteen_bits_count(both: Servers) -> None:
    async with partition(both, timeouts=Timeouts(grace_s=0.001, max_releases=100_000)) as shard:
        [identifier] = await shard.submit(job())
        await shard.sql("UPDATE job SET attempt = 65534")
        shard.shard.refill.shelf.drop([identifier])
        for attempt in (65535, 65536, 65537):
            [grant] = await shard.get()
            assert grant.attempt == attempt
            await shard.report(grant, State.ACTIVATED)
        [grant] = await shard.get()
        await shard.heartbeat(grant)
        assert (await shard.report(grant)).state is State.FINISHED
        assert (await shard.job(identifier)).reports[-1].attempt == 65538


async def test_every_pair_of_rival_acts_on_one_lease_ends_in_one_of_the_two_orders(shard: Partition) -> None:
    """Report, release, cancel, heartbeat and expiry at once, many times over: one final state, a whole history."""
    for _ in range(25):
        [identifier] = await shard.submit(job(max_attempts=1))
        [grant] = await shard.get(request_id=f"request-{identifier}")
        await shard.sql(f"UPDATE lease SET expires_at = '2001-01-01' WHERE id = {identifier}")
        await asyncio.gather(
            shard.report(grant),
            shard.heartbeat(grant),
            shard.cancel(identifier),
            shard.shard.lifecycle.release_request("pilots", f"request-{identifier}"),
            shard.shard.reaper.end_leases(),
            shard.report(grant, State.FAILED),
            return_exceptions=True,
        )
        view = await shard.job(identifier)
        assert [event.n for event in view.history] == list(range(1, len(view.history) + 1))
        assert view.history[-1].target is view.job.state
        n_final = [event.target for event in view.history].count(view.job.state)
        assert n_final == 1 or view.job.state is State.ACTIVATED
        assert len(view.reports) <= 1
        await shard.cancel(identifier, who=ADMIN)
