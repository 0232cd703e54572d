"""The audit: checks what must always be true on the stored data of every partition, and between them.

Each partition is read in one consistent snapshot, so the audit may run beside live traffic. The rules of one partition
are the blocks of `sql/audit.sql`; those between partitions and the topology, and the one on hints, are here.
"""

import asyncio
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from typing import Final

import msgspec

from culm.errors import Unavailable
from culm.settings import ShardSettings
from culm.states import FINAL, LEASED, TRANSITIONS, Event, State
from culm.topology import Topology
from shard.database import Database, Row, Transaction
from shard.dispatch_queue import DispatchQueue, QueueLostError
from shard.statements import parse

STATEMENT_TIMEOUT_S: Final = 600.0
MAX_FINDINGS: Final = 20
"""Shown of one rule in one partition."""
IDS_PER_PAGE: Final = 5000
HINT_LOOKS: Final = 20
HINT_PAUSE_S: Final = 0.5
"""A hint is stale for a moment whenever its job is taken, and a sweep takes away what was left over."""

_STATEMENTS: Final = parse(resources.files("ops").joinpath("sql/audit.sql").read_text(encoding="utf-8"))
_LEASED: Final = tuple(sorted(LEASED))
_FINAL: Final = tuple(sorted(FINAL))
RULES: Final[dict[str, tuple[str, tuple[tuple[State, ...], ...]]]] = {
    "submission_incomplete": ("I1", ()),
    "job_never_submitted": ("I9", ()),
    "number_may_come_twice": ("I2", ()),
    "submissions_overlap": ("I2", ()),
    "activated_without_ready": ("I1", ()),
    "ready_without_activated": ("I1", ()),
    "ready_differs": ("I1", ()),
    "leased_without_lease": ("I1", (_LEASED,)),
    "lease_without_leased": ("I1", (_LEASED,)),
    "spec_missing": ("I1", ()),
    "spec_without_job": ("I9", ()),
    "class_missing": ("I1", ()),
    "slot_wrong": ("I8", ()),
    "attempt_granted_twice": ("I3", ()),
    "lease_of_other_attempt": ("I4", ()),
    "finished_twice": ("I5", ()),
    "report_of_no_attempt": ("I5", ()),
    "events_missing": ("I7", ()),
    "events_of_no_job": ("I9", ()),
    "chain_broken": ("I7", ()),
    "state_not_of_last_event": ("I7", ()),
    "tally_differs": ("I11", ()),
    "archive_tally_differs": ("I11", ()),
    "archived_and_hot": ("I1", ()),
    "archived_not_final": ("I7", (_FINAL,)),
    "owner_tally_differs": ("I11", (_FINAL,)),
}
"""Block of audit.sql -> the invariant that it checks, and its arguments before the limit."""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One broken rule: the invariant, its name, the shard, the job (or slot, or 0), and what is wrong."""

    invariant: str
    rule: str
    shard: str
    subject: int
    text: str


class AuditReport(msgspec.Struct, frozen=True, kw_only=True):
    """What was looked at and what was found."""

    n_jobs: int
    states: dict[str, int]
    shards: list[str]
    """Whose databases were read."""
    findings: list[Finding]
    missing_shards: dict[str, str] = {}
    """Whose were not, and why: nothing is proved of them, nor of what lies between them and the others."""


@dataclass
class _Facts:
    """What the rules between partitions need of one."""

    shard: str
    n_jobs: dict[int, int] = field(default_factory=dict)
    """By slot."""
    states: Counter[str] = field(default_factory=Counter)
    open: dict[int, int] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)


async def audit(shards: Sequence[ShardSettings], topology: Topology) -> AuditReport:
    """Check every partition and what holds between them. Reads only.

    Raises Unavailable if no partition's database can be read. Safe to retry: yes.
    """
    limited = [_patient(settings) for settings in shards]
    facts, missing = [], dict[str, str]()
    for settings, read in zip(
        limited, await asyncio.gather(*map(_audit_shard, limited), return_exceptions=True), strict=True
    ):
        if isinstance(read, Unavailable):
            missing[settings.name] = read.message
        elif isinstance(read, BaseException):
            raise read
        else:
            facts.append(read)
    if not facts:
        told = f"no database of {', '.join(missing)} can be read, are they up? {next(iter(missing.values()))}"
        raise Unavailable("database_down", told)
    findings = [finding for one in facts for finding in one.findings]
    findings += _between_sections(facts, topology)
    findings += await _ids_in_two(limited, facts)
    states: Counter[str] = Counter()
    for one in facts:
        states.update(one.states)
    return AuditReport(
        n_jobs=states.total(),
        states=dict(sorted(states.items())),
        shards=[one.shard for one in facts],
        findings=findings,
        missing_shards=missing,
    )


async def _audit_shard(settings: ShardSettings) -> _Facts:
    facts = _Facts(settings.name)
    database = Database(settings.database)
    try:
        await database.run("write", lambda tx: _read_facts(tx, facts))
        facts.findings += await _stale_hints(settings, database)
    finally:
        await database.close()
    return facts


async def _read_facts(tx: Transaction, facts: _Facts) -> None:
    facts.findings.clear()
    tx.use(_STATEMENTS)
    await tx.execute("snapshot_isolation")
    await tx.execute("begin_snapshot")
    facts.n_jobs = {slot: n for slot, n, _, _ in await tx.fetch("totals")}
    facts.states = Counter({state: int(n) for state, n in await tx.fetch("states")})
    facts.open = dict[int, int](await tx.fetch("open_slots"))
    for rule, (invariant, arguments) in RULES.items():
        for subject, text in await tx.fetch(rule, *arguments, MAX_FINDINGS):
            facts.findings.append(_finding(facts.shard, (invariant, rule), int(subject), str(text)))
    for source, event, target, n_times, example in await tx.fetch("transitions"):
        if not _declared(source, event, target):
            text = f"{source} -{event}-> {target} is not a declared transition ({n_times} times)"
            facts.findings.append(_finding(facts.shard, ("I7", "undeclared_transition"), example, text))


def _declared(source: str | None, event: str, target: str) -> bool:
    try:
        return TRANSITIONS.get((State(source) if source else None, Event(event))) == target
    except ValueError:
        return False


async def _stale_hints(settings: ShardSettings, database: Database) -> list[Finding]:
    """Hints of jobs that are not ready, seen so in every one of several looks."""
    queue = DispatchQueue(settings.name, settings.redis, settings.dispatch)
    try:
        suspects: set[int] | None = None
        for look in range(HINT_LOOKS):
            stale = await _not_ready(database, [hint.id for hint in await queue.everything()])
            suspects = stale if suspects is None else suspects & stale
            if not suspects:
                return []
            if look + 1 < HINT_LOOKS:
                await asyncio.sleep(HINT_PAUSE_S)
    except QueueLostError:
        # No dispatch queue, no hints: that is allowed at any time.
        return []
    finally:
        await queue.close()
    return [
        _finding(settings.name, ("I1", "stale_hint"), identifier, "the dispatch queue offers it, but it is not ready")
        for identifier in sorted(suspects or ())[:MAX_FINDINGS]
    ]


async def _not_ready(database: Database, ids: Sequence[int]) -> set[int]:
    stale = set(ids)
    for start in range(0, len(ids), IDS_PER_PAGE):
        page = tuple(ids[start : start + IDS_PER_PAGE])
        rows = await database.run("read", partial(_fetch, name="ready_of", arguments=(page,)))
        stale -= {row[0] for row in rows}
    return stale


def _between_sections(facts: Sequence[_Facts], topology: Topology) -> Iterable[Finding]:
    """Invariants I8 and I10: who has a slot open, and where a strict region's jobs are."""
    openers: dict[int, str] = {}
    for one in facts:
        for slot, epoch in one.open.items():
            other = openers.setdefault(slot, one.shard)
            if other != one.shard:
                yield _finding(one.shard, ("I8", "slot_open_twice"), slot, f"open here and on {other}")
            place = topology.placement.get(slot)
            if place is None or (place.shard, place.epoch) != (one.shard, epoch):
                where = "nowhere" if place is None else f"on {place.shard} at epoch {place.epoch}"
                text = f"open here at epoch {epoch}, the topology places it {where}"
                yield _finding(one.shard, ("I8", "slot_open_elsewhere"), slot, text)
        for slot, n_jobs in one.n_jobs.items():
            region = topology.regions.get(topology.region_of_slot.get(slot, ""))
            if region is not None and region.strict and one.shard not in region.shards:
                text = f"{n_jobs} jobs of the strict region {topology.region_of_slot[slot]} are here"
                yield _finding(one.shard, ("I10", "job_outside_strict_region"), slot, text)


async def _ids_in_two(shards: Sequence[ShardSettings], facts: Sequence[_Facts]) -> list[Finding]:
    """No id in two databases. Only slots of which two have jobs are read id by id."""
    settings_of = {settings.name: settings for settings in shards}
    holders: dict[int, list[str]] = {}
    for one in facts:
        for slot in one.n_jobs:
            holders.setdefault(slot, []).append(one.shard)
    findings: list[Finding] = []
    for slot, names in holders.items():
        seen: dict[int, str] = {}
        for name in names if len(names) > 1 else ():
            for identifier in await _ids_of(settings_of[name], slot):
                other = seen.setdefault(identifier, name)
                if other != name and len(findings) < MAX_FINDINGS:
                    findings.append(_finding(name, ("I8", "job_in_two_databases"), identifier, f"also on {other}"))
    return findings


async def _ids_of(settings: ShardSettings, slot: int) -> list[int]:
    database = Database(settings.database)
    found: list[int] = []
    try:
        while True:
            arguments = (slot, found[-1] if found else 0, IDS_PER_PAGE)
            rows = await database.run("read", partial(_fetch, name="ids_of_slot", arguments=arguments))
            if not rows:
                return found
            found += [row[0] for row in rows]
    finally:
        await database.close()


async def _fetch(tx: Transaction, name: str, arguments: tuple[object, ...]) -> list[Row]:
    tx.use(_STATEMENTS)
    return await tx.fetch(name, *arguments)


def _finding(shard: str, rule: tuple[str, str], subject: int, text: str) -> Finding:
    return Finding(invariant=rule[0], rule=rule[1], shard=shard, subject=subject, text=text)


def _patient(settings: ShardSettings) -> ShardSettings:
    database = msgspec.structs.replace(settings.database, statement_timeout_s=STATEMENT_TIMEOUT_S)
    return msgspec.structs.replace(settings, database=database)
