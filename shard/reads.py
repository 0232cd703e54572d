"""Reads: one job whole, pages of jobs, counts from the tallies."""

from typing import Final

import msgspec

from culm import access
from culm.errors import ClientFault
from culm.ids import slot_of
from culm.states import Event, State
from culm.topology import Topology, authority_of_slot, slot_block
from culm.wire import (
    AttemptReport,
    JobError,
    JobEvent,
    JobRow,
    JobsAnswer,
    JobSpec,
    JobView,
    ReportRequest,
    ShardCountsAnswer,
    ShardDepths,
    ShardDepthsAnswer,
    ShardJob,
    ShardJobs,
    SlotCount,
)
from shard.database import Database, Row

_SPEC: Final = msgspec.msgpack.Decoder(JobSpec)
_REPORT: Final = msgspec.msgpack.Decoder(ReportRequest)
_MICROSECONDS: Final = 1_000_000
MAX_EVENTS: Final = 1000
MAX_REPORTS: Final = 50
"""The newest of each: a job may have been given back many times, and the answer must fit into a frame."""


async def read_job(database: Database, topology: Topology, call: ShardJob) -> JobView:
    """One job with its history. Raises ClientFault(unknown_job), also for what the caller may not see; Unavailable."""
    rows = await database.run("read", lambda tx: tx.fetch("read_job", call.id))
    if not rows or not access.may_read(
        call.principal, vo=rows[0][6], owner=rows[0][5], authority=authority_of_slot(rows[0][1])
    ):
        raise ClientFault("unknown_job", f"job {call.id} is not known", http_status=404)
    spec = await database.run("read", lambda tx: tx.fetch("read_spec", call.id))
    events = await database.run("read", lambda tx: tx.fetch("read_events", call.id, MAX_EVENTS))
    reports = await database.run("read", lambda tx: tx.fetch("read_reports", call.id, MAX_REPORTS))
    n_reports = await database.run("read", lambda tx: tx.fetch("count_reports", call.id))
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
    """A page of jobs by id; only what the caller may see. Raises ClientFault(forbidden), Unavailable."""
    access.require_role(call.principal, "user", "admin")
    query = call.query
    # The rule of access.may_read: no list shows what a read of the one would refuse.
    who = call.principal
    is_user = int(who.role == "user")
    of_user = (is_user, who.vo)
    of_admin = (1 - is_user, *slot_block(who.authority), f"{who.authority}:%")
    state = query.state or ""
    slots = tuple(call.slots) or (0,)
    filters = (int(bool(call.slots)), slots, state, state, query.owner, query.owner)
    of_jobset = (int(query.jobset is not None), query.jobset or 0, *of_user, *of_admin)
    rows = await database.run(
        "read", lambda tx: tx.fetch("list_jobs", query.after, *filters, *of_jobset, query.limit + 1)
    )
    page = rows[: query.limit]
    return JobsAnswer(
        jobs=[_job_row(row, topology) for row in page], next=page[-1][0] if len(rows) > query.limit else None
    )


async def read_counts(database: Database, shard: str) -> ShardCountsAnswer:
    """Jobs by slot and state, as the tallies have it. Raises Unavailable."""
    rows = await database.run("read", lambda tx: tx.fetch("counts"))
    now = await database.run("read", lambda tx: tx.fetch("database_time"))
    counts = [SlotCount(slot=row[0], state=State(row[1]), n_jobs=int(row[2])) for row in rows if row[2]]
    return ShardCountsAnswer(shard=shard, at=now[0][0] / _MICROSECONDS, counts=counts)


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
