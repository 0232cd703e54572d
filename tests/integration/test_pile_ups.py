"""Where jobs pile up: for each cause the situation is made, an hour after a sample of a quiet shard, and told."""

import secrets
import time
from typing import Any

import msgspec
import pytest

from culm.errors import ClientFault
from culm.settings import Timeouts
from culm.states import Event, State
from culm.topology import Topology
from culm.wire import (
    Grant,
    InputFile,
    JobError,
    PilotInfo,
    Principal,
    ShardArchive,
    ShardArchiveAnswer,
    ShardPileUps,
    ShardPileUpsAnswer,
    ShardSiteWhy,
    SiteWhyAnswer,
    SlotPileUp,
)
from shard import pile_ups
from shard.growth import Asking
from shard.samples import Samples
from shard.why import Why
from tests.integration.test_why import world_at
from tests.partition import ADMIN, OTHER_USER, PILOT, USER, Partition, Servers, job, partition
from tests.waiting import eventually

DEADLINE_S = 20.0
N_JOBS = 12
STRANGER = Principal(role="user", subject="cy", authority="central", vo="cms")
SAMPLES = "SELECT slot, state, vo, n FROM tally_sample ORDER BY slot, state, vo"


@pytest.fixture(autouse=True)
def _no_hour_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour that begins in the middle of a test would be another sample."""
    began = time.time()

    async def now(_samples: Samples) -> float:
        return began

    monkeypatch.setattr(Samples, "now", now)
    # Nor is anything remembered: a test changes what there is to see.
    monkeypatch.setattr(pile_ups, "KNOWN_S", -1.0)


async def sampled(shard: Partition, n_hours: int = 1) -> None:
    """Wait for the shard's own samples."""

    async def are_there() -> bool:
        return len(await shard.rows("SELECT hour FROM sampled")) == n_hours

    await eventually(are_there, DEADLINE_S, what="the hour is sampled")


async def quiet_hour(shard: Partition) -> None:
    """What was sampled was sampled an hour ago."""
    await sampled(shard)
    for table in ("tally_sample", "sampled"):
        await shard.sql(f"UPDATE {table} SET hour = hour - 1 ORDER BY hour")
    await shard.sql("UPDATE sampled SET at = DATE_SUB(at, INTERVAL 1 HOUR)")


async def judged(shard: Partition, who: Principal = ADMIN, hours: int = 6) -> ShardPileUpsAnswer:
    return await shard.ask("pile_ups", ShardPileUps(principal=who, hours=hours), ShardPileUpsAnswer)


async def the_pile_up(shard: Partition, who: Principal = ADMIN) -> SlotPileUp:
    """The only one."""
    [found] = (await judged(shard, who)).pile_ups
    assert found.slot == shard.slot().slot
    return found


async def taken(shard: Partition, n_jobs: int = N_JOBS, **spec: Any) -> list[Grant]:
    """Jobs that a pilot has just been given."""
    await shard.submit(*[job(**spec)] * n_jobs)
    grants = await shard.get(n_jobs=n_jobs)
    assert len(grants) == n_jobs
    return grants


# --- the samples -----------------------------------------------------------------------------------------------------


async def test_an_hour_is_sampled_once_also_by_a_shard_that_is_started_again(both: Servers) -> None:
    async with partition(both) as shard:
        await sampled(shard)
        assert await shard.rows(SAMPLES) == []
        await shard.sql("DELETE FROM sampled")
        await shard.submit(*[job()] * 3)
        schema = shard.settings.database.name
    async with partition(both, schema=schema) as shard:
        await sampled(shard)
        slot = shard.slot().slot
        assert await shard.rows(SAMPLES) == [(slot, "activated", "atlas", 3)]
        await shard.submit(job())
        again = Samples(shard.shard.database, 48)
        await again.turn()
        await again.turn()
        assert await shard.rows(SAMPLES) == [(slot, "activated", "atlas", 3)]


async def test_old_hours_are_forgotten(shard: Partition) -> None:
    await sampled(shard)
    hour = int(await Samples(shard.shard.database, 3).now()) // 3600
    await shard.sql("DELETE FROM sampled")
    for before in range(5):
        await shard.sql(f"INSERT INTO sampled VALUES ({hour - before}, UTC_TIMESTAMP(6))")
        await shard.sql(f"INSERT INTO tally_sample VALUES ({hour - before}, 3, 'sent', 'atlas', 1)")
    await Samples(shard.shard.database, 3).turn()
    for table in ("sampled", "tally_sample"):
        hours = [row[0] for row in await shard.rows(f"SELECT hour FROM {table} ORDER BY hour")]
        assert hours == [hour - 2, hour - 1, hour]


async def test_what_went_into_the_archive_is_sampled_as_if_it_had_not(shard: Partition) -> None:
    for grant in await taken(shard, 3):
        await shard.report(grant)
    await shard.ask("archive", ShardArchive(principal=ADMIN, older_s=0.0), ShardArchiveAnswer)
    assert await shard.rows("SELECT SUM(n) FROM tally") == [(0,)]
    await sampled(shard)
    await shard.sql("DELETE FROM sampled")
    await shard.sql("DELETE FROM tally_sample")
    await Samples(shard.shard.database, 48).turn()
    assert await shard.rows(SAMPLES) == [(shard.slot().slot, "finished", "atlas", 3)]


# --- what grows ------------------------------------------------------------------------------------------------------


async def test_without_a_sample_of_an_hour_before_nothing_is_said(shard: Partition) -> None:
    await sampled(shard)
    await shard.submit(*[job()] * N_JOBS)
    answer = await judged(shard)
    assert (answer.n_samples, answer.pile_ups) == (0, [])


async def test_what_is_as_it_was_is_no_pile_up(shard: Partition) -> None:
    await shard.submit(*[job()] * N_JOBS)
    await sampled(shard)
    await shard.sql("DELETE FROM sampled")
    await shard.sql("DELETE FROM tally_sample")
    await Samples(shard.shard.database, 48).turn()
    await quiet_hour(shard)
    answer = await judged(shard)
    assert (answer.n_samples, answer.pile_ups) == (1, [])
    await shard.submit(*[job()] * 10)
    found = await the_pile_up(shard)
    assert (found.n_jobs, found.n_usual, found.n_before) == (N_JOBS + 10, N_JOBS, N_JOBS)


async def test_older_hours_than_those_asked_for_are_not_compared_with(shard: Partition) -> None:
    await quiet_hour(shard)
    await shard.sql("UPDATE sampled SET hour = hour - 5")
    await shard.submit(*[job()] * N_JOBS)
    assert (await judged(shard, hours=5)).n_samples == 0
    assert (await judged(shard, hours=6)).n_samples == 1


async def test_a_user_is_told_of_his_vo_and_a_pilot_of_nothing(shard: Partition) -> None:
    await quiet_hour(shard)
    await shard.submit(*[job()] * N_JOBS)
    await shard.submit(*[job()] * 10, who=STRANGER)
    assert (await the_pile_up(shard)).n_jobs == N_JOBS + 10
    assert (await the_pile_up(shard, OTHER_USER)).n_jobs == N_JOBS
    assert (await the_pile_up(shard, STRANGER)).n_jobs == 10
    for nobody in (msgspec.structs.replace(ADMIN, authority="CERN"), msgspec.structs.replace(USER, vo="")):
        assert (await judged(shard, nobody)).pile_ups == []
    with pytest.raises(ClientFault) as caught:
        await judged(shard, PILOT)
    assert caught.value.code == "forbidden"


async def test_what_was_dropped_from_the_archive_takes_nothing_from_the_pace_of_before(shard: Partition) -> None:
    await sampled(shard)
    hour = int(await Samples(shard.shard.database, 3).now()) // 3600
    slot = shard.slot().slot
    await shard.sql("DELETE FROM tally_sample")
    # 10 an hour, before and after a drop of 90,000; another VO begins after the oldest sample.
    for before, n_jobs in ((4, 90_000), (3, 90_010), (2, 10), (1, 20)):
        await shard.sql(
            f"INSERT INTO sampled VALUES ({hour - before}, DATE_SUB(UTC_TIMESTAMP(6), INTERVAL {before} HOUR))"
        )
        await shard.sql(f"INSERT INTO tally_sample VALUES ({hour - before}, {slot}, 'failed', 'atlas', {n_jobs})")
    await shard.sql(f"INSERT INTO tally_sample VALUES ({hour - 1}, {slot}, 'failed', 'cms', 7)")
    samples = Samples(shard.shard.database, 48)
    window, levels = await samples.compare(ShardPileUps(principal=ADMIN, hours=6))
    level = levels[slot][State.FAILED]
    assert (window.n_samples, level.n_sum, level.n_last, level.n_grown) == (4, 180_047, 27, 27)
    _, levels = await samples.compare(ShardPileUps(principal=USER, hours=6))
    assert levels[slot][State.FAILED].n_grown == 20


async def test_a_cause_that_was_looked_up_is_known_for_a_while_to_those_of_the_same_vo(
    shard: Partition, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pile_ups, "KNOWN_S", 20.0)
    monkeypatch.setattr(pile_ups, "MAX_KNOWN", 2)
    looked: list[str] = []
    asking = Why.asking

    async def counted(why: Why, topology: Topology, slot: int, who: Principal) -> Asking:
        looked.append(who.vo)
        return await asking(why, topology, slot, who)

    monkeypatch.setattr(Why, "asking", counted)
    await quiet_hour(shard)
    await shard.submit(*[job()] * N_JOBS)
    first = await the_pile_up(shard)
    for hours in range(2, 30):
        assert (await judged(shard, hours=hours)).pile_ups == [first]
    assert looked == [""]
    await shard.submit(*[job()] * N_JOBS, who=STRANGER)
    for _ in range(2):
        for who in (USER, OTHER_USER, STRANGER):
            await the_pile_up(shard, who)
    assert looked == ["", "atlas", "cms"]
    # The oldest one has been forgotten.
    await the_pile_up(shard)
    assert looked == ["", "atlas", "cms", ""]


# --- causes ----------------------------------------------------------------------------------------------------------


async def test_ready_jobs_grow_and_no_pilot_asks_or_none_fits_or_more_comes_than_is_taken(shard: Partition) -> None:
    await quiet_hour(shard)
    ids = await shard.submit(*[job(memory_mb=4000)] * N_JOBS)
    found = await the_pile_up(shard)
    assert (found.state, found.cause) == (State.ACTIVATED, "no_pilot_asked"), found.text
    assert "none ever did" in found.text

    async with world_at(shard) as world:
        assert await world.ask(memory_mb=1000) == []
        found = await the_pile_up(shard)
        assert (found.cause, found.example) == ("pilots_do_not_fit", ids[0])
        assert "too_little_memory_mb: needed 4000, offered 1000" in found.text

        # Jobs of another VO fit: that is no news for this one.
        await shard.submit(*[job()] * 10, who=STRANGER)
        assert (await the_pile_up(shard, USER)).cause == "pilots_do_not_fit"
        assert (await the_pile_up(shard, STRANGER)).cause == "more_arrives_than_is_dispatched"

        assert len(await world.ask(pilot=PilotInfo(id="large"))) == 1
        found = await the_pile_up(shard)
        assert found.cause == "more_arrives_than_is_dispatched"
        assert f"{N_JOBS + 10} jobs came and 1 left" in found.text


async def test_ready_jobs_grow_that_no_computing_queue_offers_enough_for(shard: Partition) -> None:
    await quiet_hour(shard)
    ids = await shard.submit(*[job(cores=64)] * N_JOBS)
    found = await the_pile_up(shard)
    assert (found.cause, found.example) == ("pilots_do_not_fit", ids[0])
    assert "no computing queue offers what any of them needs" in found.text
    assert "too_few_cores: needed 64" in found.text
    [queue] = (await shard.ask("site_why", ShardSiteWhy(principal=ADMIN, site="BNL"), SiteWhyAnswer)).queues
    assert [(one.code, one.example) for one in queue.refused] == [("too_few_cores", ids[0])]
    # One more that fits: a pilot would get something.
    await shard.submit(job())
    assert (await the_pile_up(shard)).cause == "no_pilot_asked"


async def test_ready_jobs_grow_where_the_site_is_offline(shard: Partition) -> None:
    await quiet_hour(shard)
    await shard.submit(*[job()] * N_JOBS)
    async with world_at(shard) as world:
        await world.describe(status="offline")

        async def said() -> SlotPileUp | None:
            found = await the_pile_up(shard)
            return found if found.cause == "site_offline" else None

        found = await eventually(said, DEADLINE_S, what="the shard sees it")
        assert found is not None
        assert found.text.endswith("offline: a test")


async def test_jobs_stay_sent_then_run_and_then_their_heartbeats_stop(both: Servers) -> None:
    async with partition(both, timeouts=Timeouts(heartbeat_s=3600.0, grace_s=0.001)) as shard:
        await quiet_hour(shard)
        grants = await taken(shard)
        assert [(one.state, one.cause) for one in (await judged(shard)).pile_ups] == [("sent", "pilots_give_no_sign")]
        for grant in grants:
            await shard.heartbeat(grant)
        assert [(one.state, one.cause) for one in (await judged(shard)).pile_ups] == [
            ("running", "more_starts_than_ends")
        ]
        # The heartbeats of half of them are 2,800 of 3,600 s ago.
        ids = ", ".join(str(grant.id) for grant in grants[: N_JOBS // 2])
        await shard.sql(f"UPDATE lease SET expires_at = DATE_SUB(expires_at, INTERVAL 2800 SECOND) WHERE id IN ({ids})")
        found = await the_pile_up(shard)
        assert found.cause == "heartbeats_stop"
        assert f"{N_JOBS // 2} of {N_JOBS}" in found.text
        [of_vo] = (await judged(shard, USER)).pile_ups
        assert of_vo.text == found.text


async def test_the_data_side_stops_before_and_after_the_payload(shard: Partition) -> None:
    await quiet_hour(shard)
    waiting = await shard.submit(*[job(inputs=[InputFile(name="in", ready=False)])] * N_JOBS)
    for identifier in waiting:
        await shard.say(identifier, Event.ASSIGN)
    for grant in await taken(shard):
        await shard.report(grant, State.TRANSFERRING)
    found = (await judged(shard)).pile_ups
    assert [(one.state, one.n_jobs, one.cause) for one in found] == [
        ("assigned", N_JOBS, "inputs_do_not_come"),
        ("transferring", N_JOBS, "outputs_not_accounted"),
    ]
    for identifier in waiting:
        await shard.say(identifier, Event.FAIL)
    assert {one.state for one in (await judged(shard)).pile_ups} == {"transferring", "failed"}


async def test_jobs_fail_and_the_most_frequent_error_is_told(shard: Partition) -> None:
    await quiet_hour(shard)
    grants = await taken(shard)
    for number, grant in enumerate(grants):
        error = JobError(plane="pilot", code=1099 if number < 2 else 1213, text="no")
        await shard.report(grant, State.FAILED, error=error)
    found = await the_pile_up(shard)
    assert (found.state, found.n_jobs, found.n_usual, found.cause) == (State.FAILED, N_JOBS, 0, "jobs_fail")
    assert f"pilot 1213: {N_JOBS - 2} jobs" in found.text
    assert found.example in {grant.id for grant in grants[2:]}
    # What has failed stays failed in the archive too.
    await shard.ask("archive", ShardArchive(principal=ADMIN, older_s=0.0), ShardArchiveAnswer)
    assert (await the_pile_up(shard)).n_jobs == N_JOBS


async def test_jobs_of_a_region_are_held_against_the_computing_queues_of_its_sites(shard: Partition) -> None:
    await quiet_hour(shard)
    region = shard.topology.slot(shard.topology.region("US").slot)
    await shard.submit(*[job(site="", region="US", memory_mb=4000)] * N_JOBS, at=region)
    async with world_at(shard) as world:
        await world.ask(memory_mb=1000, request_id=secrets.token_hex(8))
        [found] = (await judged(shard)).pile_ups
        assert (found.slot, found.cause) == (region.slot, "pilots_do_not_fit")
