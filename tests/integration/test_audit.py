"""The audit: finds nothing on a partition at work, and each kind of violation when it is planted."""

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass

import msgspec
import pytest

from culm.errors import Unavailable
from culm.settings import ShardSettings, Timeouts
from culm.states import Event, State
from culm.topology import Placement, Shard, Topology
from culm.wire import InputFile
from ops.audit import RULES, Finding, audit
from shard.dispatch_queue import QueueLostError
from shard.hints import Hint
from shard.migrate import migrate
from tests.partition import PRODUCTION, Partition, Servers, job, partition
from tests.waiting import eventually

DEADLINE_S = 20.0
SEQ = 549_755_813_888
"""Numbers of one slot: 2**39."""


@dataclass
class World:
    """A partition with a job in each kind of state, whose shard has stopped: nothing repairs what is planted."""

    shard: Partition
    ids: dict[str, int]
    slot: int

    async def plant(self, *statements: str) -> None:
        """Change the database; `{finished}` and the like are ids, `{slot}` the slot."""
        for text in statements:
            await self.shard.sql(text.format(slot=self.slot, **self.ids))

    async def findings(self, *others: ShardSettings, topology: Topology | None = None) -> list[Finding]:
        """Audit it, and other partitions beside it."""
        report = await audit([self.shard.settings, *others], topology or self.shard.topology)
        assert report.missing_shards == {}
        return report.findings


async def _populate(shard: Partition) -> dict[str, int]:
    ids = {}
    for name in ("finished", "failed", "holding", "running", "sent"):
        [ids[name]] = await shard.submit(job(name=name))
        [grant] = await shard.get()
        assert grant.id == ids[name]
        match name:
            case "finished":
                await shard.report(grant)
            case "failed":
                await shard.report(grant, State.FAILED, exit_code=1)
            case "holding":
                await shard.report(grant, State.HOLDING)
            case "running":
                await shard.heartbeat(grant)
    [ids["cancelled"]] = await shard.submit(job())
    await shard.cancel(ids["cancelled"])
    [ids["defined"]] = await shard.submit(job(inputs=[InputFile(name="f", ready=False)]))
    ids["activated"], ids["second"] = await shard.submit(job(), job(cores=4))
    return ids


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing repairs anything, there is nothing to wait for between the looks at a hint."""
    monkeypatch.setattr("ops.audit.HINT_PAUSE_S", 0.1)


@pytest.fixture
async def world(both: Servers) -> AsyncIterator[World]:
    """Made by real verbs, then stopped."""
    async with partition(both, timeouts=Timeouts(grace_s=3600.0)) as shard:
        ids = await _populate(shard)
        shard.stop_event.set()
        await eventually(lambda: not shard.link.connected, DEADLINE_S, what="the shard has stopped")
        yield World(shard, ids, shard.slot().slot)


PLANTED: dict[str, tuple[str, tuple[str, ...]]] = {
    "submission_incomplete": ("finished", ("DELETE FROM job WHERE id = {finished}",)),
    "job_never_submitted": (
        "slot",
        (
            "INSERT INTO job SELECT {second} + 7, slot, class_id, state, version, attempt, lost, max_attempts,"
            " priority, jobset, parent_id, depth, owner, vo, working_group, label, name, queue, pilot, host,"
            " cancel_requested, created_at, modified_at, error_plane, error_code, error_text FROM job"
            " WHERE id = {finished}",
        ),
    ),
    "number_may_come_twice": ("second", ("UPDATE slot_sequence SET next_seq = 2 WHERE slot = {slot}",)),
    "submissions_overlap": ("failed", ("UPDATE submission SET n = 3 WHERE first_id = {finished}",)),
    "activated_without_ready": ("activated", ("DELETE FROM ready WHERE id = {activated}",)),
    "ready_without_activated": (
        "finished",
        ("INSERT INTO ready SELECT id, slot, class_id, 0, modified_at FROM job WHERE id = {finished}",),
    ),
    "ready_differs": ("activated", ("UPDATE ready SET ranking = ranking - 1 WHERE id = {activated}",)),
    "leased_without_lease": ("running", ("DELETE FROM lease WHERE id = {running}",)),
    "lease_without_leased": ("finished", ("UPDATE lease SET id = {finished} WHERE id = {running}",)),
    "spec_missing": ("holding", ("DELETE FROM spec WHERE id = {holding}",)),
    "spec_without_job": ("second", ("UPDATE spec SET id = {second} + 9 WHERE id = {second}",)),
    "class_missing": ("finished", ("DELETE FROM requirement_class WHERE slot = {slot}",)),
    "slot_wrong": ("sent", ("UPDATE job SET slot = slot + 1 WHERE id = {sent}",)),
    "attempt_granted_twice": (
        "sent",
        (
            "INSERT INTO job_event SELECT id, 99, at, event, source, target, attempt, actor, detail FROM job_event"
            " WHERE id = {sent} AND event = 'claim'",
        ),
    ),
    "lease_of_other_attempt": ("running", ("UPDATE lease SET attempt = 2 WHERE id = {running}",)),
    "finished_twice": (
        "finished",
        (
            "UPDATE job SET attempt = 2 WHERE id = {finished}",
            "INSERT INTO report SELECT id, 2, token, state, at, body FROM report WHERE id = {finished}",
        ),
    ),
    "report_of_no_attempt": ("failed", ("UPDATE report SET attempt = 7 WHERE id = {failed}",)),
    "events_missing": ("running", ("DELETE FROM job_event WHERE id = {running} AND n = 2",)),
    "events_of_no_job": ("second", ("UPDATE job_event SET id = {second} + 9 WHERE id = {second}",)),
    "chain_broken": ("running", ("UPDATE job_event SET source = 'waiting' WHERE id = {running} AND n = 3",)),
    "state_not_of_last_event": (
        "cancelled",
        ("UPDATE job SET state = 'closed' WHERE id = {cancelled}",),
    ),
    "tally_differs": ("slot", ("UPDATE tally SET n = n + 1 WHERE slot = {slot} AND state = 'finished'",)),
    "archive_tally_differs": (
        "slot",
        ("INSERT INTO archive_tally (month, slot, state, vo, n) VALUES (0, {slot}, 'finished', 'atlas', 1)",),
    ),
    "archived_and_hot": (
        "finished",
        (
            "INSERT INTO archive_job (id, ended_at, slot, state, owner, vo, jobset, depth, body)"
            " SELECT id, '2019-01-01', slot, state, owner, vo, jobset, depth, 'x' FROM job"
            " WHERE id = {finished}",
        ),
    ),
    "archived_not_final": (
        "running",
        (
            "INSERT INTO archive_job (id, ended_at, slot, state, owner, vo, jobset, depth, body)"
            " SELECT id, '2019-01-01', slot, state, owner, vo, jobset, depth, 'x' FROM job"
            " WHERE id = {running}",
        ),
    ),
    "owner_tally_differs": ("", ("UPDATE owner_tally SET n = n - 1 WHERE owner = 'central:ann'",)),
    "undeclared_transition": (
        "finished",
        ("UPDATE job_event SET event = 'release' WHERE id = {finished} AND event = 'finish'",),
    ),
}
"""Rule -> whose id it must name ("" for none, "slot" for the slot), and what to do to the database."""
BESIDE = {"events_of_no_job", "spec_without_job"}
"""These name an id that no job has: 9 beyond."""


async def test_a_partition_with_jobs_in_every_kind_of_state_is_clean(world: World) -> None:
    report = await audit([world.shard.settings], world.shard.topology)
    assert report.findings == []
    assert report.n_jobs == len(world.ids)
    assert report.shards == ["us1"]
    assert report.states == {
        "activated": 2, "cancelled": 1, "defined": 1, "failed": 1, "finished": 1, "holding": 1, "running": 1, "sent": 1,
    }  # fmt: skip


def test_every_rule_has_its_planted_case() -> None:
    assert set(RULES) <= set(PLANTED)


@pytest.mark.parametrize("rule", PLANTED)
async def test_what_is_planted_is_found_by_its_rule(world: World, rule: str) -> None:
    whose, statements = PLANTED[rule]
    await world.plant(*statements)
    subject = {"": 0, "slot": world.slot}.get(whose) if whose in {"", "slot"} else world.ids[whose]
    assert subject is not None
    found = [finding for finding in await world.findings() if finding.rule == rule]
    assert [finding.subject for finding in found][:1] == [subject + 9 * (rule in BESIDE)]
    assert {finding.shard for finding in found} == {"us1"}
    if rule in RULES:
        assert {finding.invariant for finding in found} == {RULES[rule][0]}


@pytest.mark.parametrize("state", ["finished", "cancelled", "failed", "closed"])
async def test_a_final_state_that_was_left_is_found(world: World, state: str) -> None:
    """I7: final states absorb."""
    await world.plant(f"UPDATE job_event SET source = '{state}' WHERE id = {{sent}} AND event = 'claim'")
    assert "undeclared_transition" in {finding.rule for finding in await world.findings()}


async def test_a_hint_of_a_job_that_is_not_ready_is_found(both: Servers) -> None:
    async with partition(both, timeouts=Timeouts(grace_s=3600.0)) as shard:
        [identifier] = await shard.submit(job())

        async def stored() -> list[Hint]:
            # A refill that runs as the shard starts may hold it back for a moment.
            with contextlib.suppress(QueueLostError):
                return [hint for hint in await shard.shard.queue.everything() if hint.id == identifier]
            return []

        found = await eventually(stored, DEADLINE_S, what="the hint is there")
        assert found is not None
        [hint] = found
        await shard.get()
        shard.stop_event.set()
        await eventually(lambda: not shard.link.connected, DEADLINE_S)
        import redis.asyncio as redis

        client = redis.Redis.from_url(shard.settings.redis)
        await client.zadd(f"culm:us1:ready:{hint.key.slot}:{hint.key.class_id}", {f"{identifier:016d}": 0})
        await client.aclose()
        findings = (await audit([shard.settings], shard.topology)).findings
        assert [(finding.rule, finding.subject) for finding in findings] == [("stale_hint", identifier)]


async def test_a_slot_open_at_another_epoch_than_the_topology_says_is_found(world: World) -> None:
    await world.plant("UPDATE slot SET epoch = epoch + 1 WHERE slot = {slot}")
    found = await world.findings()
    assert [(finding.invariant, finding.rule, finding.subject) for finding in found] == [
        ("I8", "slot_open_elsewhere", world.slot)
    ]


# --- between partitions


async def _beside(world: World, name: str) -> ShardSettings:
    """An empty partition of another shard on the same server."""
    database = msgspec.structs.replace(world.shard.settings.database, name=f"t_{name}_{secrets.token_hex(3)}")
    settings = msgspec.structs.replace(world.shard.settings, name=name, database=database)
    await migrate(database)
    return settings


async def _copy(world: World, to: ShardSettings, table: str, where: str) -> None:
    await world.shard.sql(f"INSERT INTO `{to.database.name}`.{table} SELECT * FROM {table} WHERE {where}")


async def test_an_empty_partition_beside_it_changes_nothing(world: World) -> None:
    assert await world.findings(await _beside(world, "eu1")) == []


async def test_a_job_in_two_databases_is_found(world: World) -> None:
    other = await _beside(world, "eu1")
    await _copy(world, other, "job", f"id = {world.ids['finished']}")
    found = await world.findings(other)
    assert ("I8", "job_in_two_databases", world.ids["finished"]) in {(f.invariant, f.rule, f.subject) for f in found}


async def test_a_slot_that_two_shards_have_open_is_found(world: World) -> None:
    other = await _beside(world, "eu1")
    await _copy(world, other, "slot", f"slot = {world.slot}")
    found = await world.findings(other)
    assert ("I8", "slot_open_twice", world.slot) in {(f.invariant, f.rule, f.subject) for f in found}


async def test_a_strict_regions_job_elsewhere_is_found(world: World) -> None:
    """I10: here the region is declared strict, and its home another shard, after its jobs were made."""
    [section] = world.shard.topology.sections.values()
    region = section.regions["US"]
    moved = msgspec.structs.replace(
        section,
        shards=section.shards | {"eu1": Shard(link="unix:/nowhere/eu1")},
        regions={"US": msgspec.structs.replace(region, strict=True, shards=["eu1"])},
        placement={slot: Placement("eu1", place.epoch) for slot, place in section.placement.items()},
    )
    found = await world.findings(topology=Topology([moved]))
    assert ("I10", "job_outside_strict_region", world.slot) in {(f.invariant, f.rule, f.subject) for f in found}


# --- beside live traffic


async def test_it_finds_nothing_while_jobs_come_and_go(both: Servers) -> None:
    async with partition(both) as shard:
        stop = asyncio.Event()

        async def work() -> None:
            while not stop.is_set():
                await shard.submit(*[job()] * 3)
                for grant in await shard.get(n_jobs=2):
                    await shard.heartbeat(grant)
                    await shard.report(grant)

        workers = [asyncio.create_task(work()) for _ in range(4)]
        try:
            for _ in range(5):
                assert (await audit([shard.settings], shard.topology)).findings == []
        finally:
            stop.set()
            await asyncio.gather(*workers)
        [waiting] = await shard.submit(job(inputs=[InputFile(name="f", ready=False)]))
        await shard.say(waiting, Event.INPUTS_READY, PRODUCTION)
        assert (await audit([shard.settings], shard.topology)).findings == []


async def test_a_database_that_cannot_be_read_is_named_and_the_others_are_audited(world: World) -> None:
    await world.plant("DELETE FROM lease WHERE id = {running}")
    database = msgspec.structs.replace(world.shard.settings.database, socket="/nowhere/db.socket")
    gone = msgspec.structs.replace(world.shard.settings, name="cern1", database=database)
    report = await audit([gone, world.shard.settings], world.shard.topology)
    assert report.shards == ["us1"]
    assert "leased_without_lease" in {finding.rule for finding in report.findings}
    assert list(report.missing_shards) == ["cern1"]
    assert "not reachable" in report.missing_shards["cern1"]
    with pytest.raises(Unavailable) as caught:
        await audit([gone], world.shard.topology)
    assert "no database of cern1 can be read" in caught.value.message
