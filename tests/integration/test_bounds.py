"""What one user, one job or one broken row can do to a shard is bounded."""

import asyncio
from typing import Any

import msgspec
import pytest

from culm.errors import Unavailable
from culm.settings import DispatchSettings, Timeouts
from culm.states import Event, State
from culm.wire import JobSpec, ShardRelease, ShardReleaseAnswer
from shard.claim import MAX_BATCH_BYTES, MAX_SPEC_BYTES
from shard.classes import ClassRegistry
from tests.partition import OFFER, OTHER_USER, PILOT, Partition, Servers, job, partition
from tests.waiting import eventually

DEADLINE_S = 20.0
BIG = "x" * 60_000
SMALL = msgspec.structs.replace(OFFER, memory_mb=250)


# --- requirement classes ----------------------------------------------------------------------------------------------


async def _refused(shard: Partition, *specs: Any, **options: Any) -> str:
    with pytest.raises(Unavailable) as caught:
        await shard.submit(*specs, **options)
    return caught.value.code


async def test_one_owner_cannot_use_up_the_requirements_of_a_place(both: Servers) -> None:
    dispatch = DispatchSettings(max_classes=20, max_classes_per_owner=5)
    async with partition(both, dispatch=dispatch) as shard:
        mine = await shard.submit(*(job(memory_mb=100 + n) for n in range(5)))
        assert await _refused(shard, job(memory_mb=200)) == "too_many_classes"
        assert await shard.rows("SELECT COUNT(*) FROM job") == [(5,)]
        # What is known is no new one, and others have bounds of their own.
        mine += await shard.submit(job(memory_mb=100), key="again")
        await shard.submit(job(memory_mb=300), who=OTHER_USER)
        # When they have run there is room again.
        for _ in mine:
            [grant] = await shard.get(offer=SMALL)
            await shard.report(grant)
        assert await shard.get(offer=SMALL) == []
        [last] = await shard.submit(job(memory_mb=200))
        [grant] = await shard.get(offer=SMALL)
        assert grant.id == last


async def test_a_place_has_a_bound_for_all_owners_together(both: Servers) -> None:
    async with partition(both, dispatch=DispatchSettings(max_classes=6, max_classes_per_owner=5)) as shard:
        await shard.submit(*(job(memory_mb=100 + n) for n in range(5)))
        await shard.submit(job(memory_mb=300), who=OTHER_USER)
        assert await _refused(shard, job(memory_mb=301), who=OTHER_USER) == "too_many_classes"
        # A repeat finds its jobs, however full it is.
        ids = await shard.submit(job(memory_mb=100), key="k")
        assert await shard.submit(job(memory_mb=100), key="k") == ids


async def test_a_class_that_was_forgotten_is_met_again_when_its_job_is_ready_again(
    shard: Partition, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shard.classes.MAX_IDLE", 1)
    [identifier] = await shard.submit(job(memory_mb=77))
    [grant] = await shard.get()
    assert await shard.get() == []
    for n in range(3):
        await shard.submit(job(memory_mb=100 + n))
        await shard.report((await shard.get())[0])
        assert await shard.get() == []
    registry: ClassRegistry = shard.shard.classes
    [[slot, class_id]] = await shard.rows(f"SELECT slot, class_id FROM job WHERE id = {identifier}")
    assert class_id not in registry._known[slot]
    await shard.report(grant, State.ACTIVATED)
    [again] = await shard.get()
    assert again.id == identifier


async def test_strict_order_over_hundreds_of_classes(both: Servers) -> None:
    async with partition(both, dispatch=DispatchSettings(max_classes_per_owner=400)) as shard:
        specs = [job(memory_mb=1 + n % 300, priority=n % 7) for n in range(600)]
        ids = await shard.submit(*specs)
        expected = [identifier for _, identifier in sorted(zip((-s.priority for s in specs), ids, strict=True))]
        got: list[int] = []
        while True:
            grants = await shard.get(n_jobs=50)
            if not grants:
                break
            got += [grant.id for grant in grants]
        assert got == expected


# --- answers ----------------------------------------------------------------------------------------------------------


async def test_an_answer_holds_no_more_than_a_frame_and_the_rest_stays_ready(shard: Partition) -> None:
    ids = await shard.submit(*(job(argv=["true", BIG]) for _ in range(100)))
    got: list[int] = []
    while len(got) < len(ids):
        grants = await shard.get(n_jobs=100)
        assert 1 <= len(grants) <= MAX_SPEC_BYTES // len(BIG)
        got += [grant.id for grant in grants]
    assert got == ids
    assert await shard.get() == []


async def test_what_the_database_won_and_the_answer_has_no_room_for_keeps_its_hint(
    shard: Partition, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = await shard.submit(*(job(argv=["true", BIG]) for _ in range(100)))
    monkeypatch.setattr(shard.shard.refill, "clean", lambda _keys: False)
    got = {grant.id for grant in await shard.get(n_jobs=100)}
    assert 0 < len(got) < len(ids)
    dispatcher = shard.shard.dispatcher
    await eventually(lambda: not dispatcher._side_tasks, 5.0)
    assert {hint.id for hint in await shard.shard.queue.everything()} == set(ids) - got


@pytest.mark.parametrize("shelf_mb", [0, 64])
async def test_many_large_answers_at_once_are_given_in_several_batches_the_best_first(
    both: Servers, shelf_mb: int
) -> None:
    async with partition(both, dispatch=DispatchSettings(shelf_mb=shelf_mb)) as shard:
        large = job(argv=["x" * 60_000] * 30)
        ids: list[int] = []
        for n in range(40):
            ids += await shard.submit(msgspec.structs.replace(large, priority=100 - n % 7))
        assert 4 * MAX_BATCH_BYTES < 40 * 30 * 60_000
        got = await asyncio.gather(*(shard.get(request_id=f"r{n}") for n in range(40)))
        assert sorted(grants[0].id for grants in got) == sorted(ids)
        for [grant] in got:
            assert msgspec.msgpack.decode(grant.spec, type=JobSpec).argv == large.argv
        # A repeat finds the same, however large all of it is.
        again = await asyncio.gather(*(shard.get(request_id=f"r{n}") for n in range(40)))
        assert again == got
        await asyncio.gather(*(shard.report(grant, State.ACTIVATED) for [grant] in got))
        order = [(await shard.get())[0].priority for _ in range(40)]
        assert order == sorted(order, reverse=True)


async def test_who_is_woken_for_more_than_fits_passes_the_rest_on(shard: Partition) -> None:
    waiting = [asyncio.create_task(shard.get(n_jobs=100, wait_s=20.0)) for _ in range(2)]
    await eventually(lambda: len(shard.shard.dispatcher._parking) == 2, DEADLINE_S, what="both wait")
    ids = await shard.submit(*(job(argv=["true", BIG]) for _ in range(100)))
    async with asyncio.timeout(5.0):
        first, second = await asyncio.gather(*waiting)
    assert len(first) < 100
    assert second
    assert {grant.id for grant in [*first, *second]} <= set(ids)


# --- hand-backs -------------------------------------------------------------------------------------------------------


async def test_clients_that_hang_up_cost_a_job_nothing(both: Servers) -> None:
    async with partition(both, timeouts=Timeouts(max_releases=2)) as shard:
        [identifier] = await shard.submit(job(max_attempts=1))
        for n in range(8):
            assert len(await shard.get(request_id=f"r{n}")) == 1
            call = ShardRelease(subject=PILOT.subject, request_id=f"r{n}")
            assert (await shard.ask("release", call, ShardReleaseAnswer)).n_jobs == 1
        assert await shard.state(identifier) is State.ACTIVATED
        # What pilots give back themselves is counted without those.
        for state in (State.ACTIVATED, State.ACTIVATED, State.FAILED):
            [grant] = await shard.get()
            assert (await shard.report(grant, State.ACTIVATED)).state is state


async def test_a_job_that_every_pilot_gives_back_comes_to_an_end(both: Servers) -> None:
    async with partition(both, timeouts=Timeouts(max_releases=60)) as shard:
        [identifier] = await shard.submit(job(max_attempts=2))
        n_given_back = 0
        while grants := await shard.get():
            await shard.report(grants[0], State.ACTIVATED, stdout_tail="t" * 8000, stderr_tail="t" * 8000)
            n_given_back += 1
        view = await shard.job(identifier)
        assert (view.job.state, n_given_back) == (State.FAILED, 62)
        assert view.job.error is not None
        assert (view.job.error.plane, view.job.error.text) == ("culm", "given back 61 times")
        assert [event.event for event in view.history if event.event in (Event.EXPIRE, Event.LOSE)] == [
            Event.EXPIRE,
            Event.LOSE,
        ]
        assert (len(view.reports), view.reports_left_out, view.reports[-1].attempt) == (50, 12, 62)
        assert {report.stdout_tail for report in view.reports} == {""}
        assert view.events_left_out == 0


async def test_a_long_history_is_shown_from_its_end(shard: Partition) -> None:
    [identifier] = await shard.submit(job())
    values = ", ".join(
        f"({identifier}, {n}, UTC_TIMESTAMP(6), 'run', 'running', 'running', 1, 'a', '')" for n in range(2, 1503)
    )
    await shard.sql(f"INSERT INTO job_event (id, n, at, event, source, target, attempt, actor, detail) VALUES {values}")
    view = await shard.job(identifier)
    assert (len(view.history), view.history[-1].n, view.events_left_out) == (1000, 1502, 502)


# --- rows that do not fit together ------------------------------------------------------------------------------------


async def test_a_job_without_its_spec_keeps_no_other_from_being_dispatched(shard: Partition) -> None:
    ids = await shard.submit(*[job()] * 5)
    await shard.sql(f"DELETE FROM spec WHERE id IN ({ids[0]}, {ids[2]})")
    shard.shard.refill.shelf.drop(ids)
    got = [grants[0].id for _ in range(3) if (grants := await shard.get())]
    assert got == [ids[1], ids[3], ids[4]]
    assert await shard.get() == []
    assert await shard.rows("SELECT COUNT(*) FROM ready") == [(2,)]


async def test_a_lease_that_cannot_be_ended_holds_up_no_other(both: Servers) -> None:
    async with partition(both, timeouts=Timeouts(first_lease_s=0.3, grace_s=0.0)) as shard:
        ids = await shard.submit(*[job()] * 3)
        for _ in ids:
            assert await shard.get()
        await shard.sql(f"UPDATE job SET state = 'finished' WHERE id = {ids[1]}")

        async def ended() -> bool:
            return [await shard.state(identifier) for identifier in (ids[0], ids[2])] == [State.ACTIVATED] * 2

        await eventually(ended, DEADLINE_S, what="the others are activated again")
        assert await shard.state(ids[1]) is State.FINISHED
