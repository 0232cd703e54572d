"""Reads: one job whole, rows of jobs, counts from the tallies."""

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from culm import access
from culm.errors import ClientFault
from culm.ids import slot_of
from culm.states import Event, State
from culm.topology import Topology, authority_of_slot
from culm.wire import (
    AttemptReport,
    ErrorCount,
    JobError,
    JobEvent,
    JobRow,
    JobSpec,
    JobView,
    ReportRequest,
    ShardCounts,
    ShardCountsAnswer,
    ShardDepths,
    ShardDepthsAnswer,
    ShardErrors,
    ShardErrorsAnswer,
    ShardJob,
    SlotCount,
)
from shard.archive import ArchivedJob, find_archived, find_archived_rows
from shard.database import Database, Row

_SPEC: Final = msgspec.msgpack.Decoder(JobSpec)
_REPORT: Final = msgspec.msgpack.Decoder(ReportRequest)
_MICROSECONDS: Final = 1_000_000
MAX_OWNERS: Final = 200
MAX_ERRORS: Final = 1000
_HOUR_S: Final = 3600
MAX_EVENTS: Final = 1000
MAX_REPORTS: Final = 50
"""The newest of each: a job may have been given back many times, and the answer must fit into a frame."""


async def read_job(database: Database, topology: Topology, call: ShardJob) -> JobView:
    """One job with its history, hot or archived.

    Raises ClientFault(unknown_job), also for what the caller may not see; Unavailable.
    """
    rows = await _fetch(database, "read_job", (call.id,))
    if not rows:
        return await _read_archived(database, topology, call)
    _require_readable(call, rows[0])
    spec = await _fetch(database, "read_spec", call.id)
    events = await _fetch(database, "read_events", call.id, MAX_EVENTS)
    reports = await _fetch(database, "read_reports", call.id, MAX_REPORTS)
    n_reports = await _fetch(database, "count_reports", call.id)
    if not spec:
        moved = await database.run("user", lambda tx: find_archived(tx, [call.id]))
        if moved:
            # It went into the archive between these looks.
            return await _read_archived(database, topology, call)
    return _view(topology, rows[0], spec[0][0] if spec else b"", (events[::-1], reports[::-1]), n_reports[0][0])


async def _read_archived(database: Database, topology: Topology, call: ShardJob) -> JobView:
    found = await database.run("user", lambda tx: find_archived(tx, [call.id]))
    if call.id not in found:
        # It may have gone into the archive between the two looks, but not out of it.
        raise unknown(call.id)
    one = found[call.id]
    _require_readable(call, one.row)
    return _view(topology, one.row, one.spec, (one.events[-MAX_EVENTS:], one.reports[-MAX_REPORTS:]), len(one.reports))


def exported(topology: Topology, jobs: Sequence[ArchivedJob]) -> list[JobView]:
    """Archived jobs with all that belongs to each."""
    return [_view(topology, one.row, one.spec, (one.events, one.reports), len(one.reports)) for one in jobs]


def _require_readable(call: ShardJob, row: Sequence[Any]) -> None:
    if not access.may_read(call.principal, vo=row[6], owner=row[5], authority=authority_of_slot(row[1])):
        raise unknown(call.id)


def unknown(identifier: int) -> ClientFault:
    """The error for a job that is not there, or not for the caller to see."""
    return ClientFault("unknown_job", f"job {identifier} is not known", http_status=404)


def _view(
    topology: Topology,
    row: Sequence[Any],
    spec: bytes,
    told: tuple[Sequence[Sequence[Any]], Sequence[Sequence[Any]]],
    n_reports: int,
) -> JobView:
    """From rows, events and reports oldest first."""
    events, reports = told
    return JobView(
        job=_job_row(row, topology),
        spec=_SPEC.decode(spec) if spec else JobSpec(),
        history=[_event(one) for one in events],
        reports=[_report(one) for one in reports],
        # Events are numbered from 1 without gaps.
        events_left_out=events[0][0] - 1 if events else 0,
        reports_left_out=max(0, n_reports - len(reports)),
    )


async def rows_of(database: Database, topology: Topology, ids: Sequence[int]) -> list[JobRow]:
    """In the order of the ids, from wherever each is now. Raises Unavailable."""
    if not ids:
        return []
    rows: dict[int, Sequence[Any]] = {row[0]: row for row in await _fetch(database, "read_job", tuple(ids))}
    rest = [identifier for identifier in ids if identifier not in rows]
    if rest:
        rows |= await database.run("user", lambda tx: find_archived_rows(tx, rest))
    return [_job_row(rows[identifier], topology) for identifier in ids if identifier in rows]


async def _fetch(database: Database, name: str, *arguments: object) -> list[Row]:
    return await database.run("user", lambda tx: tx.fetch(name, *arguments))


async def read_errors(database: Database, shard: str, call: ShardErrors) -> ShardErrorsAnswer:
    """Errors by slot, plane and code in the last hours; a user's of his VO.

    Raises ClientFault(forbidden), Unavailable. Safe to retry: yes.
    """
    access.require_role(call.principal, "user", "admin")
    now = await _fetch(database, "database_time")
    since = now[0][0] // _MICROSECONDS // _HOUR_S - call.hours + 1
    is_user = int(call.principal.role == "user")
    rows = await _fetch(database, "error_counts", since, is_user, call.principal.vo, MAX_ERRORS)
    return ShardErrorsAnswer(
        shard=shard,
        errors=[
            ErrorCount(
                slot=row[0], plane=row[1], code=row[2], n_jobs=int(row[3]), example=row[4], last_at=row[5] * _HOUR_S
            )
            for row in rows
        ],
    )


async def read_counts(database: Database, shard: str, call: ShardCounts) -> ShardCountsAnswer:
    """Jobs by slot and state, as the tallies have it. Raises Unavailable."""
    rows = await database.run("user", lambda tx: tx.fetch("counts"))
    now = await database.run("user", lambda tx: tx.fetch("database_time"))
    owners = await _fetch(database, "owner_counts", MAX_OWNERS)
    if call.account:
        [[n_own]] = await _fetch(database, "owner_count", call.account)
        owners = [*owners, *([(call.account, n_own)] if n_own else [])]
    archived = await _fetch(database, "archived_counts")
    return ShardCountsAnswer(
        shard=shard,
        at=now[0][0] / _MICROSECONDS,
        counts=_slot_counts(rows),
        owners={owner: int(n_jobs) for owner, n_jobs in owners},
        archived=_slot_counts(archived),
    )


def _slot_counts(rows: Sequence[Row]) -> list[SlotCount]:
    return [SlotCount(slot=row[0], state=State(row[1]), vo=row[2], n_jobs=int(row[3])) for row in rows if row[3]]


async def read_depths(database: Database, call: ShardDepths) -> ShardDepthsAnswer:
    """How deep jobs lie in their chains of parents; unknown ones are missing. Raises Unavailable."""
    if not call.ids:
        return ShardDepthsAnswer(depths={})
    rows = await database.run("read", lambda tx: tx.fetch("read_depths", tuple(call.ids), tuple(call.ids)))
    return ShardDepthsAnswer(depths={row[0]: row[1] for row in rows})


def _job_row(row: Sequence[Any], topology: Topology) -> JobRow:
    slot = slot_of(row[0])
    return JobRow(
        id=row[0],
        state=State(row[2]),
        site=topology.site_of_queue.get(row[3]) or topology.site_of_slot.get(slot, ""),
        region=topology.region_of_slot.get(slot, ""),
        queue=row[3],
        name=row[4],
        owner=row[5],
        vo=row[6],
        working_group=row[7],
        label=row[8],
        priority=row[9],
        attempt=row[10],
        max_attempts=row[11],
        jobset=row[12],
        parent_id=row[13],
        created_at=row[14] / _MICROSECONDS,
        modified_at=row[15] / _MICROSECONDS,
        pilot=row[16],
        host=row[17],
        cancel_requested=bool(row[18]),
        error=JobError(plane=row[19], code=row[20], text=row[21] or "") if row[19] is not None else None,
        lost=row[22],
    )


def _event(row: Sequence[Any]) -> JobEvent:
    return JobEvent(
        n=row[0],
        at=row[1] / _MICROSECONDS,
        event=Event(row[2]),
        source=State(row[3]) if row[3] else None,
        target=State(row[4]),
        attempt=row[5],
        actor=row[6],
        detail=row[7],
    )


def _report(row: Sequence[Any]) -> AttemptReport:
    body = _REPORT.decode(row[3])
    return AttemptReport(
        attempt=row[0],
        at=row[1] / _MICROSECONDS,
        state=State(row[2]),
        exit_code=body.exit_code,
        error=body.error,
        stdout_tail=body.stdout_tail,
        stderr_tail=body.stderr_tail,
        usage=body.usage,
    )
