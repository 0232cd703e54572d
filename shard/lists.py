"""Lists of jobs, hot and archived, page by page: in the order of the ids, or the newest first.

However many jobs the filters leave out, a page looks at a bounded number of rows: it may be short, or empty, and says
where to go on.
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Final

from culm import access
from culm.ids import MAX_JOB_ID, id_range
from culm.positions import START, Position, position_of, words_of
from culm.topology import Topology, slot_block
from culm.wire import JobsAnswer, ShardJobs
from shard.database import Database, Row
from shard.reads import rows_of

MAX_EXAMINED: Final = 5000
"""Rows that one list may look at in a shard."""
MAX_RANGES: Final = 8
"""Slots that are looked at one by one; more are one range."""
_NO_QUEUE: Final = "\0"
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)

_Statements = tuple[tuple[str, str], tuple[str, str]]
"""Of the hot table and of the archive: the one that finds the last row to look at, the one that lists."""


_BY_ID: Final[_Statements] = (
    ("stop_by_id", "list_by_id"),
    ("stop_archived_by_id", "list_archived_by_id"),
)
_BY_JOBSET: Final[_Statements] = (
    ("stop_by_jobset", "list_by_jobset"),
    ("stop_archived_by_jobset", "list_archived_by_jobset"),
)
_NEWEST: Final[_Statements] = (
    ("stop_newest", "list_newest"),
    ("stop_archived_newest", "list_archived_newest"),
)
_NEWEST_OF_OWNER: Final[_Statements] = (
    ("stop_newest_of_owner", "list_newest_of_owner"),
    ("stop_archived_newest_of_owner", "list_archived_newest_of_owner"),
)
_NEWEST_OF_SLOT: Final[_Statements] = (
    ("stop_newest_of_slot", "list_newest_of_slot"),
    ("stop_archived_newest_of_slot", "list_archived_newest_of_slot"),
)


async def list_jobs(database: Database, topology: Topology, call: ShardJobs) -> JobsAnswer:
    """A page of jobs; only what the caller may see. Raises ClientFault(forbidden), Unavailable. Safe to retry: yes."""
    access.require_role(call.principal, "user", "admin")
    if call.query.order == "newest":
        return await _newest(database, topology, call)
    return await _by_id(database, topology, call)


async def _by_id(database: Database, topology: Topology, call: ShardJobs) -> JobsAnswer:
    query = call.query
    found: list[int] = []
    following: int | None = None
    for statements, key, first, last in _ranges(call):
        stops = [await _fetch(database, stop, *key, first, last, MAX_EXAMINED - 1) for stop, _ in statements]
        until = min((stop[0][0] for stop in stops if stop), default=last)
        wanted = query.limit + 1 - len(found)
        ids: set[int] = set()
        for _, listed in statements:
            rows = await _fetch(database, listed, *key, first, until, *_span(call), *_filters(call), wanted)
            ids.update(row[0] for row in rows)
        found += sorted(ids)[:wanted]
        if len(found) > query.limit:
            found.pop()
            following = found[-1]
            break
        if any(stops):
            following = until
            break
    return JobsAnswer(jobs=await rows_of(database, topology, found), next=following)


async def _newest(database: Database, topology: Topology, call: ShardJobs) -> JobsAnswer:
    query = call.query
    since = _text(_microseconds(query.since or 0))
    upper = position_of(query.before) if query.before else START
    if query.until is not None:
        upper = min(upper, (_microseconds(query.until), 0))
    top = (_text(upper[0]), _text(upper[0]), upper[1])
    walks = _walks(call)
    n_examined = max(1, MAX_EXAMINED // len(walks))
    floor: Position = (_microseconds(query.since or 0), 0)
    cut = False
    for statements, key in walks:
        for archived, (stop, _) in enumerate(statements):
            ended = (since,) * archived
            rows = await _fetch(database, stop, *ended, *key, since, *top, n_examined - 1)
            if rows:
                cut, floor = True, max(floor, _position(rows[0]))
    bottom = (_text(floor[0]), _text(floor[0]), floor[1])
    found: set[Position] = set()
    for statements, key in walks:
        for archived, (_, listed) in enumerate(statements):
            ended = (since,) * archived
            arguments = (*ended, *key, *bottom, *top, *_filters(call), query.limit + 1)
            found.update(map(_position, await _fetch(database, listed, *arguments)))
    page = sorted(found, reverse=True)
    following: Position | None = floor if cut else None
    if len(page) > query.limit:
        page = page[: query.limit]
        following = page[-1]
    rows_found = await rows_of(database, topology, [identifier for _, identifier in page])
    return JobsAnswer(jobs=rows_found, before=words_of(following) if following is not None else None)


def _walks(call: ShardJobs) -> list[tuple[_Statements, tuple[object, ...]]]:
    """The statements of the index to go by and its key; of few slots, each."""
    if call.query.owner:
        return [(_NEWEST_OF_OWNER, (call.query.owner,))]
    if 1 <= len(_slots(call)) <= MAX_RANGES:
        return [(_NEWEST_OF_SLOT, (slot,)) for slot in _slots(call)]
    return [(_NEWEST, ())]


def _ranges(call: ShardJobs) -> list[tuple[_Statements, tuple[object, ...], int, int]]:
    """The statements of the index to go by, its key, and the ids to look at, in their order."""
    query = call.query
    first, last = query.after + 1, MAX_JOB_ID
    if query.jobset is not None:
        return [(_BY_JOBSET, (query.jobset,), first, last)]
    ranges = [id_range(slot) for slot in sorted(_slots(call))] or [(first, last)]
    if len(ranges) > MAX_RANGES:
        ranges = [(ranges[0][0], ranges[-1][1])]
    return [(_BY_ID, (), max(first, low), high) for low, high in ranges if high >= first]


def _slots(call: ShardJobs) -> list[int]:
    return [*call.slots, *call.also]


def _span(call: ShardJobs) -> tuple[str, str]:
    """Between which times they were submitted."""
    until = call.query.until
    return (
        _text(_microseconds(call.query.since or 0)),
        _text(START[0] if until is None else _microseconds(until)),
    )


def _filters(call: ShardJobs) -> tuple[object, ...]:
    """The arguments of every list: a switch before each value."""
    query, who = call.query, call.principal
    state, jobset = query.state or "", query.jobset
    of_slots = (int(bool(_slots(call))), tuple(call.slots) or (-1,), tuple(call.queues) or (_NO_QUEUE,))
    # The rule of access.may_read: no list shows what a read of the one would refuse.
    is_user = int(who.role == "user")
    of_admin = (1 - is_user, *slot_block(who.authority), f"{who.authority}:%")
    return (
        *of_slots,
        *(state, state, query.owner, query.owner, int(jobset is not None), jobset or 0),
        *(is_user, who.vo, *of_admin),
    )


def _position(row: Row) -> Position:
    return row[0], row[1]


def _microseconds(at: float) -> int:
    return round(at * 1_000_000)


def _text(microseconds: int) -> str:
    """As a database writes a time."""
    return (_EPOCH + timedelta(microseconds=microseconds)).strftime("%Y-%m-%d %H:%M:%S.%f")


async def _fetch(database: Database, name: str, *arguments: object) -> Sequence[Row]:
    return await database.run("user", lambda tx: tx.fetch(name, *arguments))
