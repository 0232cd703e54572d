"""The archive: jobs that ended some time ago leave the hot tables, one row each, in a partition per month.

A batch moves in one transaction: all of a job is in the hot tables or in the archive, never in both, whenever the pass
is killed. What is asked of an archived job is answered as when it was hot: reads, lists, late reports, cancels.
"""

import datetime
import logging
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any, Final

import msgspec

from culm.errors import ClientFault
from culm.ids import id_range
from culm.settings import ArchiveSettings
from culm.states import FINAL, State
from culm.wire import ArchivePartition, SlotRef
from shard.database import Database, Transaction
from shard.metrics import ARCHIVED
from shard.ownership import Ownership
from shard.transitions import Counted, add_to_tallies, lock_jobs, lock_slots

MAX_EXAMINED: Final = 5000
"""Rows that one turn goes through in search of old jobs."""
EXPORTED_PER_PAGE: Final = 500
EXPORTED_BYTES: Final = 2 << 20
"""As stored, of one page of an export; one job always fits."""
MONTHS_AHEAD: Final = 2
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


class Archive:
    """The pass of one shard, and what operators ask of its partitions."""

    def __init__(self, database: Database, ownership: Ownership, settings: ArchiveSettings) -> None:
        self._database = database
        self._ownership = ownership
        self._settings = settings
        self._looked_at: dict[int, int] = {}
        """By slot, the last id up to which was looked."""
        self._months: set[str] = set()

    async def turn(self) -> int:
        """One turn of a background loop: a batch per slot; how many went. Raises Unavailable."""
        return await self.move(self._settings.after_s) if self._settings.after_s else 0

    async def move(self, older_s: float) -> int:
        """Move a batch per open slot of what ended longer ago than this; how many went.

        Raises Unavailable, Moved. Safe to retry: yes.
        """
        n_moved = 0
        for slot, epoch in dict(self._ownership.open).items():
            n_moved += await self._move_of(SlotRef(slot, epoch), older_s)
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

    async def drop(self, name: str, actor: str) -> int:
        """Drop a month as a whole; how many jobs it had. The present month and later ones stay.

        Raises ClientFault (unknown_partition, partition_in_use), Unavailable. Safe to retry: yes.
        """
        known = {one.name: one for one in await self.partitions()}
        if name not in known:
            raise ClientFault("unknown_partition", f"there is no partition {name[:40]!r}", http_status=404)
        now = await self._now()
        if _number(name) >= now[0] * 100 + now[1]:
            raise ClientFault("partition_in_use", f"{name} is the present month or a later one: jobs go there")
        month, before, n_jobs = _number(name), known[name].before, known[name].n_jobs
        # First the word that it goes: cut off here, the audit knows why its jobs may be missing.
        await self._database.run("write", lambda tx: tx.execute("insert_dropped", name, before, n_jobs, actor))
        await self._database.run("write", lambda tx: tx.alter("drop_partition", name=name))
        await self._database.run("write", lambda tx: tx.execute("drop_archive_tally", month))
        self._months.discard(name)
        return n_jobs

    async def page(self, name: str, after: int) -> tuple[list[ArchivedJob], int | None]:
        """The jobs of a month after an id, as many as fit into an answer, and the id to go on after; None at the end.

        Raises ClientFault(unknown_partition), Unavailable. Safe to retry: yes.
        """
        parts = await self._database.run("user", lambda tx: tx.fetch("read_partitions"))
        bounds = [str(part[1]).strip("'") for part in parts]
        names = [part[0] for part in parts]
        if name not in names:
            raise ClientFault("unknown_partition", f"there is no partition {name[:40]!r}", http_status=404)
        number = names.index(name)
        since = bounds[number - 1] if number else "1000-01-01"
        rows = await self._database.run(
            "user", lambda tx: tx.fetch("next_archived", since, bounds[number], after, EXPORTED_PER_PAGE + 1)
        )
        ids: list[int] = []
        n_bytes = 0
        for identifier, size in rows[:EXPORTED_PER_PAGE]:
            n_bytes += size
            if ids and n_bytes > EXPORTED_BYTES:
                break
            ids.append(identifier)
        found = await self._database.run("user", lambda tx: find_archived(tx, ids)) if ids else {}
        return [found[one] for one in ids if one in found], ids[-1] if len(ids) < len(rows) else None

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
        if ids:
            await self._make_months()
            months = sorted(filter(None, map(_number, self._months)))
            await self._database.run("write", partial(_move, at=at, ids=ids, months=months))
            ARCHIVED.inc(len(ids))
        if len(ids) < n_batch:
            # At the end it begins anew.
            self._looked_at[at.slot] = until if stop else 0
        return len(ids)

    async def _make_months(self) -> None:
        """The partitions up to some months ahead; a job that ended can be older than any, never younger."""
        year, month = await self._now()
        wanted = [_plus((year, month), n) for n in range(MONTHS_AHEAD + 1)]
        if self._months.issuperset(map(_name, wanted)):
            return
        rows = await self._database.run("read", lambda tx: tx.fetch("read_partitions"))
        self._months = {row[0] for row in rows}
        newest = max(map(_number, self._months), default=0)
        for one in wanted:
            if one[0] * 100 + one[1] > newest:
                await self._database.run("write", partial(_add, month=one))
                self._months.add(_name(one))
                log.info("made the partition %s", _name(one))

    async def _now(self) -> Month:
        [[microseconds]] = await self._database.run("read", lambda tx: tx.fetch("database_time"))
        at = datetime.datetime.fromtimestamp(microseconds / 1_000_000, datetime.UTC)
        return at.year, at.month


async def _move(tx: Transaction, at: SlotRef, ids: Sequence[int], months: Sequence[int]) -> None:
    """All of a batch or nothing. Final jobs change no more, so what is read here is what is deleted here."""
    await lock_slots(tx, [at])
    locked = await lock_jobs(tx, ids)
    gone = tuple(sorted(job.id for job in locked.jobs.values() if job.state in FINAL))
    if not gone:
        return
    rows = {row[0]: row for row in await tx.fetch("read_job", gone)}
    specs: dict[int, bytes] = dict(await tx.fetch("specs_of", gone))
    events = _by_job(await tx.fetch("events_of", gone))
    reports = _by_job(await tx.fetch("reports_of", gone))
    archived, tally = [], Counter[Counted]()
    of_months: Counter[tuple[int, int, str, str]] = Counter()
    for identifier, slot, state, owner, vo, jobset, depth, created_at, ended_at in await tx.fetch(
        "archived_from", gone
    ):
        body = ArchivedJob(
            row=list(rows[identifier]),
            spec=specs.get(identifier, b""),
            events=events.get(identifier, []),
            reports=reports.get(identifier, []),
        )
        archived.append(
            (identifier, ended_at, created_at, slot, state, owner, vo, jobset, depth, _ENCODER.encode(body))
        )
        tally[slot, State(state), vo] -= 1
        of_months[_month_of(ended_at, months), slot, state, vo] += 1
    await tx.execute_rows("insert_archived", archived)
    for statement in ("delete_jobs", "delete_specs", "delete_events", "delete_reports"):
        await tx.execute(statement, gone)
    await add_to_tallies(tx, tally, Counter())
    await tx.execute_rows("add_to_archive_tally", [(*key, n) for key, n in sorted(of_months.items())])


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
    await tx.alter("add_partition", name=_name(month), bound=f"{following[0]}-{following[1]:02d}-01")


async def _tally_of(tx: Transaction, month: int) -> list[Any]:
    return await tx.fetch("archived_tally_of", month)


def _plus(month: Month, n: int) -> Month:
    count = month[0] * 12 + month[1] - 1 + n
    return count // 12, count % 12 + 1


def _name(month: Month) -> str:
    return f"p{month[0]}{month[1]:02d}"


def _number(name: str) -> int:
    """YYYYMM of a partition's name; 0 of the one before all months."""
    return int(name[1:]) if name[1:].isdecimal() else 0
