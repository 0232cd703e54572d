"""Reads: one job whole, pages of jobs, counts from the tallies."""

from typing import Final

import msgspec

from culm import access
from culm.errors import ClientFault
from culm.ids import MAX_JOB_ID, id_range, slot_of
from culm.states import Event, State
from culm.topology import Topology, authority_of_slot, slot_block
from culm.wire import (
    AttemptReport,
    ErrorCount,
    JobError,
    JobEvent,
    JobRow,
    JobsAnswer,
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
    ShardJobs,
    SlotCount,
)
from shard.database import Database, Row

_SPEC: Final = msgspec.msgpack.Decoder(JobSpec)
_REPORT: Final = msgspec.msgpack.Decoder(ReportRequest)
_MICROSECONDS: Final = 1_000_000
MAX_OWNERS: Final = 200
MAX_ERRORS: Final = 1000
_HOUR_S: Final = 3600
MAX_EXAMINED: Final = 5000
"""Rows that one list may look at in a shard."""
MAX_RANGES: Final = 8
"""Slots that are looked at one by one; more are one range."""
MAX_EVENTS: Final = 1000
MAX_REPORTS: Final = 50
"""The newest of each: a job may have been given back many times, and the answer must fit into a frame."""


async def read_job(database: Database, topology: Topology, call: ShardJob) -> JobView:
    """One job with its history. Raises ClientFault(unknown_job), also for what the caller may not see; Unavailable."""
    rows = await database.run("user", lambda tx: tx.fetch("read_job", (call.id,)))
    if not rows or not access.may_read(
        call.principal, vo=rows[0][6], owner=rows[0][5], authority=authority_of_slot(rows[0][1])
    ):
        raise ClientFault("unknown_job", f"job {call.id} is not known", http_status=404)
    spec = await database.run("user", lambda tx: tx.fetch("read_spec", call.id))
    events = await database.run("user", lambda tx: tx.fetch("read_events", call.id, MAX_EVENTS))
    reports = await database.run("user", lambda tx: tx.fetch("read_reports", call.id, MAX_REPORTS))
    n_reports = await database.run("user", lambda tx: tx.fetch("count_reports", call.id))
    return JobView(
        job=_job_row(rows[0], topology),
        spec=_SPEC.decode(spec[0][0]) if spec else JobSpec(),
        history=[_event(row) for row in reversed(events)],
        reports=[_report(row) for row in reversed(reports)],
        # Events are numbered from 1 without gaps.
        events_left_out=events[-1][0] - 1 if events else 0,
        reports_left_out=max(0, n_reports[0][0] - len(reports)),
    )


async def list_jobs(database: Database, topology: Topology, call: ShardJobs) -> JobsAnswer:
    """A page of jobs by id; only what the caller may see.

    However many jobs the filters leave out, `MAX_EXAMINED` rows are looked at: the page may be short, or empty, and
    `next` says where to go on. Raises ClientFault(forbidden), Unavailable.
    """
    access.require_role(call.principal, "user", "admin")
    query = call.query
    found: list[int] = []
    following: int | None = None
    for (find_stop, find_ids), key, first, last in _ranges(call):
        stop = await _fetch(database, find_stop, *key, first, last, MAX_EXAMINED - 1)
        until = stop[0][0] if stop else last
        wanted = query.limit + 1 - len(found)
        found += [row[0] for row in await _fetch(database, find_ids, *key, first, until, *_filters(call), wanted)]
        if len(found) > query.limit:
            found.pop()
            following = found[-1]
            break
        if stop:
            following = until
            break
    rows = await _fetch(database, "read_job", tuple(found)) if found else []
    return JobsAnswer(jobs=[_job_row(row, topology) for row in rows], next=following)


async def _fetch(database: Database, name: str, *arguments: object) -> list[Row]:
    return await database.run("user", lambda tx: tx.fetch(name, *arguments))


def _ranges(call: ShardJobs) -> list[tuple[tuple[str, str], tuple[object, ...], int, int]]:
    """The statements of the index to go by, its key, and the ids to look at, in their order."""
    query = call.query
    first, last = query.after + 1, MAX_JOB_ID
    if query.jobset is not None:
        return [(("stop_by_jobset", "list_by_jobset"), (query.jobset,), first, last)]
    if query.owner:
        return [(("stop_by_owner", "list_by_owner"), (query.owner,), first, last)]
    ranges = [id_range(slot) for slot in sorted(call.slots)] or [(first, last)]
    if len(ranges) > MAX_RANGES:
        ranges = [(ranges[0][0], ranges[-1][1])]
    return [(("stop_by_id", "list_by_id"), (), max(first, low), high) for low, high in ranges if high >= first]


def _filters(call: ShardJobs) -> tuple[object, ...]:
    """The arguments of every list: a switch before each value."""
    query, who = call.query, call.principal
    state, jobset = query.state or "", query.jobset
    of_slots = (int(bool(call.slots)), tuple(call.slots) or (0,))
    # The rule of access.may_read: no list shows what a read of the one would refuse.
    is_user = int(who.role == "user")
    of_admin = (1 - is_user, *slot_block(who.authority), f"{who.authority}:%")
    return (
        *of_slots,
        *(state, state, query.owner, query.owner, int(jobset is not None), jobset or 0),
        *(is_user, who.vo, *of_admin),
    )


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
    counts = [SlotCount(slot=row[0], state=State(row[1]), vo=row[2], n_jobs=int(row[3])) for row in rows if row[3]]
    return ShardCountsAnswer(
        shard=shard,
        at=now[0][0] / _MICROSECONDS,
        counts=counts,
        owners={owner: int(n_jobs) for owner, n_jobs in owners},
    )


async def read_depths(database: Database, call: ShardDepths) -> ShardDepthsAnswer:
    """How deep jobs lie in their chains of parents; unknown ones are missing. Raises Unavailable."""
    if not call.ids:
        return ShardDepthsAnswer(depths={})
    rows = await database.run("read", lambda tx: tx.fetch("read_depths", tuple(call.ids)))
    return ShardDepthsAnswer(depths={row[0]: row[1] for row in rows})


def _job_row(row: Row, topology: Topology) -> JobRow:
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


def _event(row: Row) -> JobEvent:
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


def _report(row: Row) -> AttemptReport:
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
