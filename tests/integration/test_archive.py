"""The archive: jobs move whole or not at all, are found and answered as before, and are counted."""

import asyncio
import secrets
from collections.abc import Sequence
from types import SimpleNamespace
from typing import cast

import msgspec
import pytest

from culm.errors import ClientFault, Conflict, Unavailable
from culm.settings import ArchiveSettings
from culm.states import Event, State
from culm.wire import (
    ExportAnswer,
    Grant,
    JobsAnswer,
    JobView,
    ShardArchive,
    ShardArchiveAnswer,
    ShardCounts,
    ShardCountsAnswer,
    ShardExport,
    WhyAnswer,
)
from culm.wire import ShardJob as ReadJob
from ops.audit import audit
from shard import archive as archiving
from shard.database import Row, Transaction
from shard.driver import connect
from shard.metrics import NOT_ARCHIVED
from shard.ownership import Ownership
from tests.partition import ADMIN, OTHER_USER, PILOT, PRODUCTION, USER, Partition, Servers, job, partition
from tests.waiting import eventually

NOW = 0.0


async def finished(shard: Partition, n_jobs: int, **spec: object) -> list[Grant]:
    """Jobs that ended just now, with their grants."""
    await shard.submit(*[job(**spec)] * n_jobs)
    grants: list[Grant] = []
    while len(grants) < n_jobs:
        grants += await shard.get(n_jobs=min(100, n_jobs - len(grants)))
    for grant in grants:
        await shard.report(grant, stdout_tail=f"out {grant.id}")
    return grants


async def move(shard: Partition, older_s: float = NOW) -> int:
    """Move everything that is old enough."""
    n_moved = 0
    while True:
        call = ShardArchive(principal=ADMIN, older_s=older_s)
        answer = await shard.ask("archive", call, ShardArchiveAnswer)
        n_moved += answer.n_moved
        if not answer.n_moved:
            return n_moved


async def clean(shard: Partition) -> list[str]:
    report = await audit([shard.settings], shard.topology)
    return [f"{one.rule} {one.text}" for one in report.findings]


async def counted(shard: Partition) -> tuple[dict[str, int], dict[str, int]]:
    """Hot and archived jobs by state."""
    answer = await shard.ask("counts", ShardCounts(), ShardCountsAnswer)
    return {one.state: one.n_jobs for one in answer.counts}, {one.state: one.n_jobs for one in answer.archived}


async def test_what_ended_moves_and_is_read_as_before(shard: Partition) -> None:
    grants = await finished(shard, 5)
    [waiting] = await shard.submit(job())
    before = [await shard.job(grant.id) for grant in grants]
    listed = await shard.jobs()
    assert await move(shard) == 5
    assert await shard.rows("SELECT COUNT(*) FROM job") == [(1,)]
    for table in ("spec", "job_event"):
        assert await shard.rows(f"SELECT COUNT(*) FROM {table} WHERE id <> {waiting}") == [(0,)]
    assert await shard.rows("SELECT COUNT(*) FROM report") == [(0,)]
    assert [await shard.job(grant.id) for grant in grants] == before
    assert (await shard.jobs()).jobs == listed.jobs
    assert await counted(shard) == ({"activated": 1}, {"finished": 5})
    assert await move(shard) == 0
    assert await clean(shard) == []


async def test_what_is_young_or_not_final_stays(shard: Partition) -> None:
    await finished(shard, 3)
    await shard.submit(*[job()] * 2)
    await shard.get()
    assert await move(shard, older_s=3600.0) == 0
    await shard.sql("UPDATE job SET modified_at = DATE_SUB(modified_at, INTERVAL 2 HOUR)")
    assert await move(shard, older_s=3600.0) == 3
    assert await counted(shard) == ({"activated": 1, "sent": 1}, {"finished": 3})


@pytest.mark.parametrize("query", [{}, {"owner": "central:ann"}, {"jobset": 7}], ids=str)
async def test_lists_go_over_both_in_the_order_of_the_id(
    shard: Partition, monkeypatch: pytest.MonkeyPatch, query: dict[str, object]
) -> None:
    ids: list[int] = []
    for _ in range(4):
        ids += [grant.id for grant in await finished(shard, 6)]
        await shard.sql("UPDATE job SET modified_at = DATE_SUB(modified_at, INTERVAL 2 HOUR) WHERE id % 2 = 0")
        await move(shard, older_s=3600.0)
    ids += await shard.submit(*[job()] * 3)
    assert await shard.rows("SELECT COUNT(*) FROM job") == [(15,)]
    for examined, limit in ((5000, 1000), (5000, 4), (5, 1000), (3, 2)):
        monkeypatch.setattr("shard.lists.MAX_EXAMINED", examined)
        found: list[int] = []
        after = 0
        while True:
            page: JobsAnswer = await shard.jobs(after=after, limit=limit, **query)
            found += [row.id for row in page.jobs]
            if page.next is None:
                break
            assert page.next > after
            after = page.next
        assert found == sorted(ids)
    monkeypatch.setattr("shard.lists.MAX_EXAMINED", 5000)
    assert [row.id for row in (await shard.jobs(state=State.ACTIVATED)).jobs] == ids[-3:]


async def test_late_words_of_pilots_are_answered_as_when_it_was_hot(shard: Partition) -> None:
    [grant] = await finished(shard, 1)
    first = await shard.report(grant)
    for moved in (False, True):
        if moved:
            assert await move(shard) == 1
        assert await shard.report(grant) == first
        assert await shard.report(grant, State.FAILED) == first
        for late in (
            shard.report(msgspec.structs.replace(grant, lease_token="other")),
            shard.report(msgspec.structs.replace(grant, attempt=2)),
            shard.heartbeat(grant),
        ):
            with pytest.raises(Conflict) as caught:
                await late
            assert caught.value.code == "lease_lost"
        outcome = {one.id: (one.outcome, one.state) for one in (await shard.cancel(grant.id)).jobs}
        assert outcome == {grant.id: ("already_final", State.FINISHED)}
        stranger = msgspec.structs.replace(OTHER_USER, vo="cms")
        assert [one.outcome for one in (await shard.cancel(grant.id, who=stranger)).jobs] == ["forbidden"]
    assert await clean(shard) == []


async def test_late_words_of_the_data_side_are_answered_as_when_it_was_hot(shard: Partition) -> None:
    await shard.submit(job())
    [grant] = await shard.get()
    await shard.report(grant, State.HOLDING)
    first = await shard.say(grant.id, Event.FINISH)
    for moved in (False, True):
        if moved:
            assert await move(shard) == 1
        assert await shard.say(grant.id, Event.FINISH) == first
        with pytest.raises(Conflict) as caught:
            await shard.say(grant.id, Event.FAIL)
        assert caught.value.code == "bad_transition"
        with pytest.raises(ClientFault) as refused:
            await shard.say(grant.id, Event.FINISH, USER)
        assert refused.value.code == "forbidden"


async def test_who_may_not_read_a_job_cannot_read_it_archived(shard: Partition) -> None:
    [grant] = await finished(shard, 1)
    await move(shard)
    assert (await shard.ask("job", ReadJob(at=shard.slot(), principal=OTHER_USER, id=grant.id), JobView)).job.id
    for who in (msgspec.structs.replace(USER, vo="cms"), msgspec.structs.replace(ADMIN, authority="CERN")):
        with pytest.raises(ClientFault, match="unknown_job"):
            await shard.ask("job", ReadJob(at=shard.slot(), principal=who, id=grant.id), JobView)
    for who in (USER, PILOT, PRODUCTION):
        with pytest.raises(ClientFault, match="forbidden"):
            await shard.ask("archive", ShardArchive(principal=who, older_s=0.0), ShardArchiveAnswer)


async def test_why_speaks_of_an_archived_job_too(shard: Partition) -> None:
    [grant] = await finished(shard, 1)
    before = await shard.ask("why", ReadJob(at=shard.slot(), principal=USER, id=grant.id), WhyAnswer)
    await move(shard)
    assert await shard.ask("why", ReadJob(at=shard.slot(), principal=USER, id=grant.id), WhyAnswer) == before
    assert [reason.code for reason in before.reasons] == ["finished"]
    with pytest.raises(ClientFault, match="unknown_job"):
        cms = msgspec.structs.replace(USER, vo="cms")
        await shard.ask("why", ReadJob(at=shard.slot(), principal=cms, id=grant.id), WhyAnswer)


async def test_a_child_of_an_archived_parent_can_be_submitted(shard: Partition) -> None:
    from culm.wire import ShardDepths, ShardDepthsAnswer

    [grant] = await finished(shard, 1)
    await move(shard)
    assert (await shard.ask("depths", ShardDepths(ids=[grant.id]), ShardDepthsAnswer)).depths == {grant.id: 0}


@pytest.mark.parametrize("statement", ["insert_archived", "delete_specs", "add_to_archive_tally"])
async def test_a_pass_that_is_cut_off_has_moved_all_of_a_batch_or_nothing(
    shard: Partition, monkeypatch: pytest.MonkeyPatch, statement: str
) -> None:
    """The connection breaks at one of its statements, as it does when the process is killed there."""
    grants = await finished(shard, 7)
    ids = [grant.id for grant in grants]
    cut = False

    async def cutting(tx: Transaction, name: str, *arguments: object) -> int:
        nonlocal cut
        if name == statement and not cut:
            cut = True
            tx._connection.close()
        return await real_execute(tx, name, *arguments)

    async def cutting_rows(tx: Transaction, name: str, rows: Sequence[Sequence[object]]) -> int:
        nonlocal cut
        if name == statement and not cut:
            cut = True
            tx._connection.close()
        return await real_rows(tx, name, rows)

    real_execute, real_rows = Transaction.execute, Transaction.execute_rows
    monkeypatch.setattr(Transaction, "execute", cutting)
    monkeypatch.setattr(Transaction, "execute_rows", cutting_rows)
    with pytest.raises(Exception) as caught:  # whatever a closed connection gives; what matters is after it
        await move(shard)
    assert cut, caught.value
    assert await shard.rows("SELECT COUNT(*) FROM job") == [(7,)]
    assert await shard.rows("SELECT COUNT(*) FROM archive_job") == [(0,)]
    assert await clean(shard) == []
    assert await move(shard) == 7
    assert await clean(shard) == []
    assert [await shard.state(identifier) for identifier in ids] == [State.FINISHED] * 7


async def test_months_are_made_ahead_listed_and_dropped_as_a_whole(shard: Partition) -> None:
    old = await finished(shard, 4)
    await move(shard)
    # As if those had ended three years ago, in a part that is not the present month's.
    await shard.sql("UPDATE archive_job SET ended_at = '2019-06-01'")
    await shard.sql("UPDATE archive_tally SET month = 0")
    [fresh] = await finished(shard, 1)
    await move(shard)
    answer = await shard.ask("archive", ShardArchive(principal=ADMIN), ShardArchiveAnswer)
    assert answer.partitions[0].name == "before2020"
    assert [part.n_jobs for part in answer.partitions] == [4, 1, 0, 0]
    present = answer.partitions[1].name
    for name, code in (
        (present, "partition_in_use"),
        ("p190001", "unknown_partition"),
        ("x; DROP", "unknown_partition"),
    ):
        with pytest.raises(ClientFault, match=code):
            await shard.ask("archive", ShardArchive(principal=ADMIN, drop=name), ShardArchiveAnswer)
    dropped = await shard.ask("archive", ShardArchive(principal=ADMIN, drop="before2020"), ShardArchiveAnswer)
    assert (dropped.n_dropped, len(dropped.partitions)) == (4, 3)
    assert await shard.rows("SELECT name, n, actor FROM archive_dropped") == [("before2020", 4, "central:root")]
    with pytest.raises(ClientFault, match="unknown_job"):
        await shard.job(old[0].id)
    assert await shard.state(fresh.id) is State.FINISHED


async def test_the_shard_moves_them_by_itself_while_it_works(shard: Partition, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archiving, "MAX_EXAMINED", 50)
    archive = archiving.Archive(
        shard.shard.database, shard.shard.ownership, ArchiveSettings(after_s=0.001, batch=20, interval_s=0.01)
    )
    stop = asyncio.Event()

    async def passes() -> None:
        while not stop.is_set():
            try:
                await archive.turn()
            except Unavailable:
                continue

    working = asyncio.create_task(passes())
    grants: list[Grant] = []
    for _ in range(6):
        grants += await finished(shard, 30, name=secrets.token_hex(4))

    async def all_moved() -> bool:
        return await shard.rows("SELECT COUNT(*) FROM job") == [(0,)]

    await eventually(all_moved, 20.0, what="all are in the archive")
    stop.set()
    await working
    assert (await counted(shard))[1] == {"finished": 180}
    assert await clean(shard) == []
    for grant in grants[::20]:
        assert (await shard.report(grant)).state is State.FINISHED
        assert (await shard.job(grant.id)).reports[0].stdout_tail == f"out {grant.id}"


@pytest.mark.parametrize(
    ("limit", "value"), [("EXPORTED_PER_PAGE", 3), ("READ_BYTES", 1)], ids=["by number", "by bytes"]
)
async def test_a_month_is_read_in_pages_each_job_once(
    shard: Partition, monkeypatch: pytest.MonkeyPatch, limit: str, value: int
) -> None:
    monkeypatch.setattr(archiving, "MEASURED", 2)
    monkeypatch.setattr(archiving, limit, value)
    ids = await shard.submit(*[job()] * 7)
    for grant in await shard.get(n_jobs=7):
        await shard.report(grant)
    call = ShardArchive(principal=ADMIN, older_s=0.0)
    [part] = [p for p in (await shard.ask("archive", call, ShardArchiveAnswer)).partitions if p.n_jobs]
    found: list[int] = []
    after: int | None = 0
    n_pages = 0
    while after is not None:
        answer = await shard.ask("export", ShardExport(principal=ADMIN, name=part.name, after=after), ExportAnswer)
        found += [view.job.id for view in answer.jobs]
        after = answer.next
        n_pages += 1
    assert (found, n_pages) == (ids, 3 if value == 3 else 7)
    assert [event.event for event in answer.jobs[0].history] == ["submit_ready", "claim", "finish"]
    for who, name, code in ((ADMIN, "p190001", "unknown_partition"), (USER, part.name, "forbidden")):
        with pytest.raises(ClientFault) as refused:
            await shard.ask("export", ShardExport(principal=who, name=name), ExportAnswer)
        assert refused.value.code == code


async def big(shard: Partition, n_jobs: int) -> list[int]:
    """Finished jobs of 0.9 MB each."""
    ids: list[int] = []
    for _ in range(n_jobs // 2):
        ids += [grant.id for grant in await finished(shard, 2, argv=["x" * 65_000] * 14)]
    return ids


async def test_jobs_that_together_are_more_than_a_packet_move(shard: Partition) -> None:
    """40 of 0.9 MB: the server takes 64 MiB at most here, and what it refuses it answers by cutting the connection."""
    await shard.sql("SET GLOBAL max_allowed_packet = 16777216")
    try:
        await shard.shard.database.close()
        ids = await big(shard, 40)
        small = [grant.id for grant in await finished(shard, 3)]
        since, generation = shard.shard.database.connected_since, shard.shard.database.generation
        assert await move(shard) == 43
        assert (shard.shard.database.connected_since, shard.shard.database.generation) == (since, generation)
    finally:
        await shard.sql("SET GLOBAL max_allowed_packet = 67108864")
    assert await counted(shard) == ({}, {"finished": 43})
    assert len((await shard.job(ids[0])).spec.argv) == 14
    assert await shard.state(small[-1]) is State.FINISHED
    assert await clean(shard) == []


async def test_what_cannot_move_stays_alone_and_holds_up_nobody(
    both: Servers, caplog: pytest.LogCaptureFixture
) -> None:
    """A job that is in the archive already (as it never should be), and a slot that is not open any more."""
    async with partition(both, "BNL", "CNAF") as shard:
        await finished(shard, 1)
        await move(shard)
        ids = [grant.id for grant in await finished(shard, 6)]
        await shard.sql(
            "INSERT INTO archive_job (id, ended_at, created_at, slot, state, owner, vo, jobset, depth, body)"
            " SELECT id, modified_at, created_at, slot, state, owner, vo, jobset, depth, '' FROM job"
            f" WHERE id = {ids[1]}"
        )
        [other] = await shard.submit(job(site="CNAF"), at=shard.slot("CNAF"))
        await shard.cancel(other)
        moved_away = SimpleNamespace(
            open={shard.slot("BNL").slot: 99, shard.slot("CNAF").slot: shard.slot("CNAF").epoch}
        )
        before = NOT_ARCHIVED.labels("slot")._value.get(), NOT_ARCHIVED.labels("job")._value.get()
        archive = archiving.Archive(shard.shard.database, cast(Ownership, moved_away), ArchiveSettings(batch=2))
        assert await archive.move(NOW) == 1
        archive = archiving.Archive(shard.shard.database, shard.shard.ownership, ArchiveSettings(batch=2))
        assert [await archive.move(NOW) for _ in range(4)] == [1, 2, 2, 0]
        assert await shard.rows("SELECT id FROM job") == [(ids[1],)]
        after = NOT_ARCHIVED.labels("slot")._value.get(), NOT_ARCHIVED.labels("job")._value.get()
        assert (after[0] - before[0], after[1] - before[1]) == (1, 1)
        assert str(ids[1]) in caplog.text


async def test_two_passes_at_once_make_the_months_once_and_count_each_job_once(shard: Partition) -> None:
    """The shard's own and one that an operator asked for."""
    await finished(shard, 5)
    assert sum(await asyncio.gather(*(shard.shard.archive.move(NOW) for _ in range(2)))) == 5
    assert await clean(shard) == []


async def _bytes_sent(shard: Partition) -> int:
    return int((await shard.rows("SHOW GLOBAL STATUS LIKE 'Bytes_sent'"))[0][1])


async def test_lists_cancels_and_why_read_no_bodies(shard: Partition) -> None:
    ids = await big(shard, 12)
    before = await shard.jobs()
    await move(shard)
    sent = await _bytes_sent(shard)
    assert await shard.jobs() == before
    assert {one.outcome for one in (await shard.cancel(*ids)).jobs} == {"already_final"}
    await shard.ask("why", ReadJob(at=shard.slot(), principal=USER, id=ids[0]), WhyAnswer)
    assert await _bytes_sent(shard) - sent < 1_000_000


async def test_what_was_archived_before_it_had_a_narrow_row_is_read_in_parts_of_some_bytes(
    shard: Partition, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archiving, "MEASURED", 5)
    ids = await big(shard, 12)
    before = await shard.jobs()
    await move(shard)
    await shard.sql(f"UPDATE archive_job SET job_row = NULL WHERE id <> {ids[3]}")
    largest = 0

    async def measured(tx: Transaction, name: str, *arguments: object) -> list[Row]:
        nonlocal largest
        rows = await fetch(tx, name, *arguments)
        largest = max(largest, sum(len(value) for row in rows for value in row if isinstance(value, bytes)))
        return rows

    fetch = Transaction.fetch
    monkeypatch.setattr(Transaction, "fetch", measured)
    assert await shard.jobs() == before
    assert {one.outcome for one in (await shard.cancel(*ids)).jobs} == {"already_final"}
    assert (await shard.ask("why", ReadJob(at=shard.slot(), principal=USER, id=ids[0]), WhyAnswer)).reasons
    assert 900_000 < largest <= archiving.READ_BYTES


async def in_old_month(shard: Partition, n_jobs: int) -> tuple[str, str]:
    """Archived jobs that ended in a month that is long over; its partition, and a time in it."""
    [[name, bound, at]] = await shard.rows(
        "SELECT DATE_FORMAT(UTC_DATE() - INTERVAL 2 MONTH, 'p%Y%m'), DATE_FORMAT(UTC_DATE() - INTERVAL 1 MONTH,"
        " '%Y-%m-01'), DATE_FORMAT(UTC_DATE() - INTERVAL 2 MONTH, '%Y-%m-02')"
    )
    await shard.sql(f"ALTER TABLE archive_job ADD PARTITION (PARTITION {name} VALUES LESS THAN ('{bound}'))")
    await finished(shard, n_jobs)
    await put_back(shard, at)
    assert await move(shard) == n_jobs
    return name, at


async def put_back(shard: Partition, at: str) -> None:
    """As if all that is hot had been submitted and ended then."""
    await shard.sql(f"UPDATE job SET created_at = '{at}', modified_at = '{at}'")
    await shard.sql(f"UPDATE submission SET at = '{at}'")


async def drop(shard: Partition, name: str, exported: int | None = None) -> int:
    call = ShardArchive(principal=ADMIN, drop=name, exported=exported)
    return (await shard.ask("archive", call, ShardArchiveAnswer)).n_dropped


@pytest.mark.parametrize("examined", [5000, 1])
async def test_a_month_stays_while_a_job_may_move_into_it_or_an_export_has_another_count(
    shard: Partition, monkeypatch: pytest.MonkeyPatch, examined: int
) -> None:
    name, at = await in_old_month(shard, 3)
    await shard.submit(job())
    await finished(shard, 2)
    await put_back(shard, at)
    monkeypatch.setattr(archiving, "MAX_EXAMINED", examined)
    with pytest.raises(ClientFault, match="partition_in_use"):
        await drop(shard, name)
    monkeypatch.setattr(archiving, "MAX_EXAMINED", 5000)
    await move(shard)
    monkeypatch.setattr(archiving, "MAX_EXAMINED", examined)
    with pytest.raises(Conflict, match="archive_changed"):
        await drop(shard, name, exported=3)
    assert await shard.rows("SELECT COUNT(*) FROM archive_job") == [(5,)]
    assert await shard.rows("SELECT COUNT(*) FROM archive_dropped") == [(0,)]
    assert await drop(shard, name, exported=5) == 5
    assert await clean(shard) == []


async def test_a_month_that_has_just_ended_stays(shard: Partition, monkeypatch: pytest.MonkeyPatch) -> None:
    name, _ = await in_old_month(shard, 1)
    monkeypatch.setattr(archiving, "OVER_S", 70 * 86_400.0)
    with pytest.raises(ClientFault, match="partition_in_use"):
        await drop(shard, name)
    monkeypatch.undo()
    assert await drop(shard, name) == 1


@pytest.mark.parametrize("done", [False, True])
async def test_a_drop_that_is_cut_off_is_ended_by_a_repeat_and_excuses_nothing_before(
    shard: Partition, monkeypatch: pytest.MonkeyPatch, done: bool
) -> None:
    """At the ALTER, which the server may have begun or ended by then."""
    name, at = await in_old_month(shard, 4)
    [waiting] = await shard.submit(job())
    await put_back(shard, at)

    async def cut(tx: Transaction, statement: str, *arguments: float, **words: str) -> None:
        if done:
            await alter(tx, statement, *arguments, **words)
        raise Unavailable("database_down", "cut off")

    alter = Transaction.alter
    monkeypatch.setattr(Transaction, "alter", cut)
    with pytest.raises(Unavailable):
        await drop(shard, name)
    monkeypatch.undo()
    assert bool(await clean(shard)) is done
    assert await shard.rows("SELECT done, n FROM archive_dropped") == [(0, 4)]
    for _ in range(2):
        assert await drop(shard, name) == 4
        assert await shard.rows("SELECT done, n FROM archive_dropped") == [(1, 4)]
        assert (await counted(shard))[1] == {}
        assert await clean(shard) == []
    # Dropped were four: one more that is missing is lost, whenever it was submitted.
    for table in ("job", "spec", "job_event", "ready"):
        await shard.sql(f"DELETE FROM {table} WHERE id = {waiting}")
    found = (await audit([shard.settings], shard.topology)).findings
    assert waiting in {one.subject for one in found if one.rule == "submission_incomplete"}


@pytest.mark.filterwarnings("ignore:'INFORMATION_SCHEMA.PROCESSLIST' is deprecated")
async def test_who_reads_the_archive_for_long_is_waited_for_by_nobody(shard: Partition) -> None:
    name, _ = await in_old_month(shard, 2)
    reading = await connect(shard.settings.database, autocommit=False)
    try:
        async with reading.cursor() as cursor:
            await cursor.execute("SELECT COUNT(*) FROM archive_job")
            await cursor.fetchall()
        dropping = asyncio.create_task(drop(shard, name))
        started = asyncio.get_running_loop().time()

        async def pending() -> bool:
            rows = await shard.rows("SHOW PROCESSLIST")
            return any("DROP PARTITION" in str(row[7]) for row in rows) or dropping.done()

        await eventually(pending, 5.0, what="the ALTER waits")
        assert len((await shard.jobs()).jobs) == 2
        with pytest.raises(Unavailable, match="table_busy"):
            await dropping
        assert asyncio.get_running_loop().time() - started < 4.0
    finally:
        reading.close()
    assert await drop(shard, name) == 2
    assert await shard.rows("SELECT done, n FROM archive_dropped") == [(1, 2)]
    assert await clean(shard) == []


async def test_a_month_ahead_that_cannot_be_made_now_does_not_stop_the_pass(shard: Partition) -> None:
    await finished(shard, 1)
    await move(shard)
    names = [row[0] for row in await shard.rows(PARTITIONS)]
    await shard.sql(f"ALTER TABLE archive_job DROP PARTITION {names[-1]}")
    await finished(shard, 2)
    reading = await connect(shard.settings.database, autocommit=False)
    archive = archiving.Archive(shard.shard.database, shard.shard.ownership, ArchiveSettings(batch=1))
    try:
        async with reading.cursor() as cursor:
            await cursor.execute("SELECT COUNT(*) FROM archive_job")
            await cursor.fetchall()
        started = asyncio.get_running_loop().time()
        assert [await archive.move(NOW), await archive.move(NOW)] == [1, 1]
        assert asyncio.get_running_loop().time() - started < 3.0
        assert [row[0] for row in await shard.rows(PARTITIONS)] == names[:-1]
    finally:
        reading.close()
    archive = archiving.Archive(shard.shard.database, shard.shard.ownership, ArchiveSettings())
    await finished(shard, 1)
    assert await archive.move(NOW) == 1
    assert [row[0] for row in await shard.rows(PARTITIONS)] == names


PARTITIONS = (
    "SELECT partition_name FROM information_schema.partitions WHERE table_schema = DATABASE()"
    " AND table_name = 'archive_job' ORDER BY partition_ordinal_position"
)
