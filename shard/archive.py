"""The archive: jobs that ended some time ago leave the hot tables, one row each, in a partition per month.

A batch moves in one transaction: all of a job is in the hot tables or in the archive, never in both, whenever the pass
is killed. What is asked of an archived job is answered as when it was hot: reads, lists, late reports, cancels.
"""

import asyncio
import datetime
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Final

import msgspec

from culm.errors import ClientFault, Conflict, CulmError, Moved, Unavailable
from culm.ids import id_range
from culm.settings import ArchiveSettings
from culm.states import FINAL, State
from culm.wire import ArchivePartition, SlotRef
from shard.database import Database, Row, Transaction
from shard.metrics import ARCHIVED, NOT_ARCHIVED
from shard.ownership import Ownership
from shard.transitions import Counted, add_to_tallies, lock_jobs, lock_slots

MAX_EXAMINED: Final = 5000
"""Rows that one turn goes through in search of old jobs."""
MOVED_BYTES: Final = 4 << 20
"""As stored, of one transaction; one job always fits. A statement has them once, and escaped at most doubled."""
RETRY_S: Final = 600.0
"""A job that could not move alone is left alone for so long."""
MAX_LEFT: Final = 10_000
"""Of those jobs that are kept in mind."""
MEASURED: Final = 50
"""Jobs whose bytes are asked for at once: the server reads a body whole to say how long it is."""
EXPORTED_PER_PAGE: Final = 500
READ_BYTES: Final = 2 << 20
"""As stored, of the whole jobs that one statement reads; one job always fits."""
MONTHS_AHEAD: Final = 2
ALTER_TIMEOUT_S: Final = 50.0
"""Of a statement that makes or drops a partition; a drop takes as long as its files take to go."""
BUSY_S: Final = 60.0
"""Between two tries to make a partition while the table is in use."""
OVER_S: Final = 3600.0
"""A month can be dropped so long after its end: no transaction of before is still under way, no clock so far off."""
FIRST_YEAR: Final = 2020
"""What ended before lies in one partition."""
_FINAL: Final = tuple(sorted(FINAL))
_ENCODER: Final = msgspec.msgpack.Encoder()

log = logging.getLogger("shard.archive")

Month = tuple[int, int]
"""Year and month."""


class ArchivedJob(msgspec.Struct, frozen=True, array_like=True):
    """All that belongs to a job: rows as the statements `read_job`, `events_of` and `reports_of` give them."""

    row: list[Any]
    spec: bytes
    events: list[list[Any]]
    """Without the id."""
    reports: list[list[Any]]
    """Without the id; the lease token is the last."""


_DECODER: Final = msgspec.msgpack.Decoder(ArchivedJob)


async def find_archived(tx: Transaction, ids: Sequence[int]) -> dict[int, ArchivedJob]:
    """Those of these jobs that are in the archive."""
    rows = await tx.fetch("find_archived", tuple(ids))
    return {row[0]: _DECODER.decode(row[1]) for row in rows}


class _RowOf(msgspec.Struct, frozen=True, array_like=True):
    """The beginning of an ArchivedJob."""

    row: list[Any]


_ROW: Final = msgspec.msgpack.Decoder(list[Any])
_ROW_OF: Final = msgspec.msgpack.Decoder(_RowOf)


async def find_archived_rows(tx: Transaction, ids: Sequence[int]) -> dict[int, list[Any]]:
    """The `read_job` rows of those of these jobs that are in the archive."""
    if not ids:
        return {}
    found = await tx.fetch("find_archived_rows", tuple(ids))
    rows: dict[int, list[Any]] = {identifier: _ROW.decode(row) for identifier, row in found if row is not None}
    # What was archived before there was a narrow row has it in its body only.
    for wide in _by_number([identifier for identifier, row in found if row is None]):
        for some in _fitting(await tx.fetch("sizes_of_archived", wide), READ_BYTES):
            bodies = await tx.fetch("find_archived", tuple(some))
            rows |= {identifier: _ROW_OF.decode(body).row for identifier, body in bodies}
    return rows


class Archive:
    """The pass of one shard, and what operators ask of its partitions."""

    def __init__(self, database: Database, ownership: Ownership, settings: ArchiveSettings) -> None:
        self._database = database
        self._ownership = ownership
        self._settings = settings
        self._looked_at: dict[int, int] = {}
        """By slot, the last id up to which was looked."""
        self._left: dict[int, float] = {}
        """Jobs that could not move alone, and the monotonic time when they are tried again."""
        self._months: set[str] = set()
        self._making = asyncio.Lock()
        self._make_again_at = 0.0
        """The monotonic time before which no month is made: the last try found the table in use."""

    async def turn(self) -> int:
        """One turn of a background loop: a batch per slot; how many went. Raises Unavailable."""
        return await self.move(self._settings.after_s) if self._settings.after_s else 0

    async def move(self, older_s: float) -> int:
        """Move a batch per open slot of what ended longer ago than this; how many went.

        A slot that fails holds up no other; its error is raised where nothing moved at all.
        Raises Unavailable, Moved. Safe to retry: yes.
        """
        n_moved, failed = 0, list[CulmError]()
        for slot, epoch in dict(self._ownership.open).items():
            try:
                n_moved += await self._move_of(SlotRef(slot, epoch), older_s)
            except CulmError as error:
                NOT_ARCHIVED.labels("slot").inc()
                log.warning("slot %d: %s", slot, error)
                failed.append(error)
        if failed and not n_moved:
            raise failed[0]
        return n_moved

    async def partitions(self) -> list[ArchivePartition]:
        """The months, oldest first. Raises Unavailable."""
        found = []
        for name, bound, n_rows, n_bytes in await self._database.run("user", lambda tx: tx.fetch("read_partitions")):
            [[n_jobs]] = await self._database.run("user", partial(_tally_of, month=_number(name)))
            found.append(
                ArchivePartition(
                    name=name,
                    before=str(bound).strip("'"),
                    n_jobs=int(n_jobs),
                    n_rows_estimated=int(n_rows or 0),
                    n_bytes=int(n_bytes or 0),
                )
            )
        return found

    async def drop(self, name: str, actor: str, exported: int | None = None) -> int:
        """Drop a month as a whole; how many jobs it had. It stays as long as a job may still move into it.

        Args:
            name: the partition.
            actor: the account that is named in `archive_dropped`.
            exported: so many jobs it must have; None for any number.

        Raises ClientFault (unknown_partition, partition_in_use), Conflict(archive_changed), Unavailable (table_busy
        too). Safe to retry: yes; a repeat ends what was cut off, and says the same where that had ended.
        """
        known = {one.name: one for one in await self.partitions()}
        told = await self._database.run("read", lambda tx: tx.fetch("read_dropped", name))
        if name in known:
            n_jobs = await self._drop(known[name], actor, exported)
        elif told:
            n_jobs = int(told[0][0])
        else:
            raise _unknown(name)
        # Only now it is done: what counts the jobs of the month goes with the word that they are gone.
        await self._database.run("write", partial(_end_drop, name=name))
        self._months.discard(name)
        return n_jobs

    async def _drop(self, part: ArchivePartition, actor: str, exported: int | None) -> int:
        await self._require_over(part)
        # After that look nothing comes any more: this is what there is.
        [[n_jobs]] = await self._database.run("read", partial(_tally_of, month=_number(part.name)))
        if exported is not None and exported != n_jobs:
            changed = f"{part.name} has {n_jobs} jobs here, the export has {exported}: export it again"
            raise Conflict("archive_changed", changed)
        await self._have_months()
        await self._database.run("write", partial(_begin_drop, part=part, n_jobs=int(n_jobs), actor=actor))
        await self._database.run("write", lambda tx: tx.alter("drop_partition", ALTER_TIMEOUT_S, name=part.name))
        return int(n_jobs)

    async def _require_over(self, part: ArchivePartition) -> None:
        """Raises ClientFault(partition_in_use) for a month into which a job may still move."""
        in_use = partial(ClientFault, "partition_in_use")
        bound = datetime.datetime.fromisoformat(part.before).replace(tzinfo=datetime.UTC)
        if await self._now() < bound + datetime.timedelta(seconds=OVER_S):
            raise in_use(f"{part.name} is not long over, or to come: jobs go there")
        at, after = "1970-01-01", 0
        while True:
            look = (_FINAL, part.before, part.before, at, at, after, MAX_EXAMINED)
            rows = await self._database.run("read", partial(_ended_before, look=look))
            waiting = next((row[1] for row in rows if row[2]), None)
            if waiting is not None:
                raise in_use(f"job {waiting} ended before {part.before} and is not archived: culm db archive, or wait")
            if len(rows) < MAX_EXAMINED:
                return
            at, after = rows[-1][0], rows[-1][1]

    async def page(self, name: str, after: int) -> tuple[list[ArchivedJob], int | None]:
        """The jobs of a month after an id, as many as fit into an answer, and the id to go on after; None at the end.

        Raises ClientFault(unknown_partition), Unavailable. Safe to retry: yes.
        """
        parts = await self._database.run("user", lambda tx: tx.fetch("read_partitions"))
        bounds = [str(part[1]).strip("'") for part in parts]
        names = [part[0] for part in parts]
        if name not in names:
            raise _unknown(name)
        number = names.index(name)
        since = bounds[number - 1] if number else "1000-01-01"
        rows = await self._database.run(
            "user", lambda tx: tx.fetch("next_archived", since, bounds[number], after, EXPORTED_PER_PAGE + 1)
        )
        ids = await self._that_fit([row[0] for row in rows[:EXPORTED_PER_PAGE]])
        found = await self._database.run("user", lambda tx: find_archived(tx, ids)) if ids else {}
        return [found[one] for one in ids if one in found], ids[-1] if len(ids) < len(rows) else None

    async def _that_fit(self, ids: Sequence[int]) -> list[int]:
        """The first of these archived jobs, as many as one answer holds."""
        chosen, n_bytes = list[int](), 0
        for some in _by_number(ids):
            for identifier, size in await self._database.run("user", partial(_sizes_of_archived, ids=some)):
                n_bytes += size
                if chosen and n_bytes > READ_BYTES:
                    return chosen
                chosen.append(identifier)
        return chosen

    async def _move_of(self, at: SlotRef, older_s: float) -> int:
        first, last = id_range(at.slot)
        first = max(first, self._looked_at.get(at.slot, 0) + 1)
        stop = await self._database.run("read", lambda tx: tx.fetch("stop_by_id", first, last, MAX_EXAMINED - 1))
        until = stop[0][0] if stop else last
        n_batch = self._settings.batch
        rows = await self._database.run(
            "read", lambda tx: tx.fetch("old_final", first, until, _FINAL, older_s, n_batch)
        )
        ids = [row[0] for row in rows]
        n_moved = 0
        if ids:
            await self._have_months()
        for measured in _by_number([one for one in ids if not self._is_left(one)]):
            sizes = await self._database.run("read", partial(_sizes_of, ids=measured))
            for some in _fitting([(one, int(size)) for one, size in sizes], MOVED_BYTES):
                n_moved += await self._move_some(at, some)
        if len(ids) == n_batch:
            self._looked_at[at.slot] = ids[-1]
        else:
            # At the end it begins anew.
            self._looked_at[at.slot] = until if stop else 0
        return n_moved

    async def _move_some(self, at: SlotRef, ids: Sequence[int]) -> int:
        """Move these together; where that cannot be, each alone, and leave the one that cannot move."""
        months = sorted(filter(None, map(_number, self._months)))
        try:
            n_moved = await self._database.run("write", partial(_move, at=at, ids=ids, months=months))
        except (Unavailable, Moved):
            raise
        except Exception:  # whatever is wrong with one job must not keep all others out of the archive
            if len(ids) > 1:
                return sum([await self._move_some(at, [one]) for one in ids])
            NOT_ARCHIVED.labels("job").inc()
            log.exception("job %d cannot be archived", ids[0])
            if len(self._left) >= MAX_LEFT:
                self._left.clear()
            self._left[ids[0]] = self._database.clock.monotonic() + RETRY_S
            return 0
        ARCHIVED.inc(n_moved)
        return n_moved

    def _is_left(self, identifier: int) -> bool:
        if self._left.get(identifier, 0.0) > self._database.clock.monotonic():
            return True
        self._left.pop(identifier, None)
        return False

    async def _have_months(self) -> None:
        """See to the partitions up to some months ahead; a job that ended can be older than any, never younger."""
        # The shard's own pass and one that an operator asked for may be here at once.
        async with self._making:
            await self._make_months()

    async def _make_months(self) -> None:
        now = await self._now()
        wanted = [_plus((now.year, now.month), n) for n in range(MONTHS_AHEAD + 1)]
        if self._months.issuperset(map(_name, wanted)) or self._database.clock.monotonic() < self._make_again_at:
            return
        rows = await self._database.run("read", lambda tx: tx.fetch("read_partitions"))
        self._months = {row[0] for row in rows}
        newest = max(map(_number, self._months), default=0)
        for one in wanted:
            if one[0] * 100 + one[1] > newest:
                try:
                    await self._database.run("write", partial(_add, month=one))
                except Unavailable as error:
                    # Those that try wait, and all who come after them: not at every turn.
                    self._make_again_at = self._database.clock.monotonic() + BUSY_S
                    if error.code != "table_busy" or newest < now.year * 100 + now.month:
                        raise
                    log.warning("the partition %s is not made yet: %s", _name(one), error)
                    return
                self._months.add(_name(one))
                newest = one[0] * 100 + one[1]
                log.info("made the partition %s", _name(one))

    async def _now(self) -> datetime.datetime:
        [[microseconds]] = await self._database.run("read", lambda tx: tx.fetch("database_time"))
        return datetime.datetime.fromtimestamp(microseconds / 1_000_000, datetime.UTC)


async def _move(tx: Transaction, at: SlotRef, ids: Sequence[int], months: Sequence[int]) -> int:
    """All of a batch or nothing; how many went. Final jobs change no more: what is read is what is deleted."""
    await lock_slots(tx, [at])
    locked = await lock_jobs(tx, ids)
    gone = tuple(sorted(job.id for job in locked.jobs.values() if job.state in FINAL))
    if not gone:
        return 0
    rows = {row[0]: row for row in await tx.fetch("read_job", gone)}
    specs: dict[int, bytes] = dict(await tx.fetch("specs_of", gone))
    events = _by_job(await tx.fetch("events_of", gone))
    reports = _by_job(await tx.fetch("reports_of", gone))
    archived, tally = [], Counter[Counted]()
    of_months: Counter[tuple[int, int, str, str]] = Counter()
    for identifier, slot, state, owner, vo, queue, jobset, depth, created_at, ended_at in await tx.fetch(
        "archived_from", gone
    ):
        body = ArchivedJob(
            row=list(rows[identifier]),
            spec=specs.get(identifier, b""),
            events=events.get(identifier, []),
            reports=reports.get(identifier, []),
        )
        archived.append(
            (
                *(identifier, ended_at, created_at, slot, state, owner, vo, queue, jobset, depth),
                *(_ENCODER.encode(body), _ENCODER.encode(body.row)),
            )
        )
        tally[slot, State(state), vo] -= 1
        of_months[_month_of(ended_at, months), slot, state, vo] += 1
    await tx.execute_rows("insert_archived", archived)
    for statement in ("delete_jobs", "delete_specs", "delete_events", "delete_reports"):
        await tx.execute(statement, gone)
    await add_to_tallies(tx, tally, Counter())
    await tx.execute_rows("add_to_archive_tally", [(*key, n) for key, n in sorted(of_months.items())])
    return len(gone)


async def _sizes_of(tx: Transaction, ids: tuple[int, ...]) -> list[Row]:
    return await tx.fetch("sizes_of", *[ids] * 4)


async def _sizes_of_archived(tx: Transaction, ids: tuple[int, ...]) -> list[Row]:
    return await tx.fetch("sizes_of_archived", ids)


def _by_number(ids: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """As many as are measured at once, in their order."""
    for start in range(0, len(ids), MEASURED):
        yield tuple(ids[start : start + MEASURED])


def _fitting(sizes: Iterable[Sequence[int]], n_bytes: int) -> Iterator[list[int]]:
    """Ids in their order, in parts of so many bytes by the size of each; one always fits."""
    part, total = list[int](), 0
    for identifier, size in sizes:
        total += size
        if part and total > n_bytes:
            yield part
            part, total = [], size
        part.append(identifier)
    if part:
        yield part


def _by_job(rows: Sequence[Sequence[Any]]) -> dict[int, list[list[Any]]]:
    found: dict[int, list[list[Any]]] = {}
    for row in rows:
        found.setdefault(row[0], []).append(list(row[1:]))
    return found


def _month_of(ended_at: datetime.datetime, months: Sequence[int]) -> int:
    """The partition that holds a time: the first that is not older; 0 for the one before all months."""
    if ended_at.year < FIRST_YEAR:
        return 0
    wanted = ended_at.year * 100 + ended_at.month
    return next((month for month in months if month >= wanted), wanted)


async def _add(tx: Transaction, month: Month) -> None:
    following = _plus(month, 1)
    await tx.alter("add_partition", ALTER_TIMEOUT_S, name=_name(month), bound=f"{following[0]}-{following[1]:02d}-01")


async def _begin_drop(tx: Transaction, part: ArchivePartition, n_jobs: int, actor: str) -> None:
    await tx.execute("forget_dropped", part.name)
    await tx.execute("insert_dropped", part.name, part.before, n_jobs, actor)


async def _end_drop(tx: Transaction, name: str) -> None:
    await tx.execute("end_dropped", name)
    await tx.execute("drop_archive_tally", _number(name))


async def _ended_before(tx: Transaction, look: Sequence[object]) -> list[Row]:
    return await tx.fetch("ended_before", *look)


async def _tally_of(tx: Transaction, month: int) -> list[Any]:
    return await tx.fetch("archived_tally_of", month)


def _plus(month: Month, n: int) -> Month:
    count = month[0] * 12 + month[1] - 1 + n
    return count // 12, count % 12 + 1


def _name(month: Month) -> str:
    return f"p{month[0]}{month[1]:02d}"


def _unknown(name: str) -> ClientFault:
    return ClientFault("unknown_partition", f"there is no partition {name[:40]!r}", http_status=404)


def _number(name: str) -> int:
    """YYYYMM of a partition's name; 0 of the one before all months."""
    return int(name[1:]) if name[1:].isdecimal() else 0
