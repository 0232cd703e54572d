"""The archive: jobs move whole or not at all, are found and answered as before, and are counted."""

import asyncio
import secrets
from collections.abc import Sequence

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
from shard.database import Transaction
from tests.partition import ADMIN, OTHER_USER, PILOT, PRODUCTION, USER, Partition, job
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


async def test_a_month_is_read_in_pages_each_job_once(shard: Partition, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shard.archive.EXPORTED_PER_PAGE", 3)
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
    assert (found, n_pages) == (ids, 3)
    assert [event.event for event in answer.jobs[0].history] == ["submit_ready", "claim", "finish"]
    for who, name, code in ((ADMIN, "p190001", "unknown_partition"), (USER, part.name, "forbidden")):
        with pytest.raises(ClientFault) as refused:
            await shard.ask("export", ShardExport(principal=who, name=name), ExportAnswer)
        assert refused.value.code == code
