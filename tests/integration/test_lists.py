"""Lists with the newest first: whole and in order, over hot jobs and the archive, while jobs come, go and are moved."""

import pytest

from culm.ids import slot_of
from culm.positions import position
from culm.states import State
from culm.wire import CancelAnswer, JobRow, JobsAnswer, JobsQuery, Principal, ShardCancel, ShardJobs
from shard.statements import STATEMENTS
from tests.partition import ADMIN, OTHER_USER, PRODUCTION, USER, Partition, Servers, job, partition

HOUR_S = 3600.0


async def newest(shard: Partition, *slots: int, who: Principal = ADMIN, **query: object) -> JobsAnswer:
    """A page of one shard."""
    asked = JobsQuery(order="newest", **query)  # type: ignore[arg-type]
    return await shard.ask("jobs", ShardJobs(principal=who, query=asked, slots=list(slots)), JobsAnswer)


async def walk(shard: Partition, *slots: int, **query: object) -> list[JobRow]:
    """All of a list, page by page."""
    found: list[JobRow] = []
    before: str | None = ""
    while before is not None:
        page = await newest(shard, *slots, before=before, **query)
        assert page.next is None
        assert page.before != before
        found += page.jobs
        before = page.before
    return found


async def aged(shard: Partition, n_hours: int) -> None:
    """Make what there is older by so much."""
    for name in ("created_at", "modified_at"):
        await shard.sql(f"UPDATE job SET {name} = DATE_SUB({name}, INTERVAL {n_hours} HOUR)")


async def several(shard: Partition) -> list[int]:
    """30 jobs of two sites and two owners, submitted in five calls an hour apart, the oldest two archived; ids."""
    ids: list[int] = []
    for n in range(5):
        site = ("BNL", "AGLT2")[n % 2]
        await aged(shard, 1)
        ids += await shard.submit(*[job(site=site)] * 6, at=shard.slot(site), who=(USER, PRODUCTION)[n % 2], jobset=7)
    places = [shard.slot(site) for site in ("BNL", "AGLT2")]
    await shard.ask("cancel", ShardCancel(principal=ADMIN, slots=places, ids=ids[:12], jobset=None), CancelAnswer)
    await shard.sql("UPDATE job SET modified_at = created_at")
    while await shard.shard.archive.move(HOUR_S):
        pass
    assert await shard.rows("SELECT COUNT(*) FROM archive_job") == [(12,)]
    return ids


@pytest.mark.parametrize(("examined", "limit"), [(5000, 1000), (5000, 7), (4, 1000), (4, 3), (2, 1)])
async def test_every_job_once_the_newest_first(
    both: Servers, monkeypatch: pytest.MonkeyPatch, examined: int, limit: int
) -> None:
    async with partition(both, "BNL", "AGLT2") as shard:
        ids = await several(shard)
        monkeypatch.setattr("shard.lists.MAX_EXAMINED", examined)
        here, there = (shard.slot(site).slot for site in ("BNL", "AGLT2"))
        for slots in ((), (here, there), (here,), (there,)):
            found = await walk(shard, *slots, limit=limit)
            assert sorted(row.id for row in found) == sorted(one for one in ids if not slots or slot_of(one) in slots)
            assert [position(row) for row in found] == sorted(map(position, found), reverse=True)
        of_owner = await walk(shard, limit=limit, owner="central:ann")
        assert sorted(row.id for row in of_owner) == sorted(one for one in ids if slot_of(one) == here)
        cancelled = await walk(shard, limit=limit, state=State.CANCELLED, jobset=7)
        assert sorted(row.id for row in cancelled) == sorted(ids[:12])
        assert await walk(shard, limit=limit, jobset=8) == []
        assert await walk(shard, limit=limit, who=OTHER_USER) == await walk(shard, limit=limit)


@pytest.mark.parametrize("order", ["newest", "id"])
async def test_a_span_of_time_holds_its_first_moment_and_not_its_last(both: Servers, order: str) -> None:
    async with partition(both, "BNL", "AGLT2") as shard:
        await several(shard)
        rows = await walk(shard)
        times = sorted({row.created_at for row in rows})
        assert len(times) == 5
        for since, until in ((times[1], times[4]), (times[0], times[2]), (times[2], times[2]), (times[4], None)):
            call = JobsQuery(order=order, since=since, until=until, limit=1000)  # type: ignore[arg-type]
            page = await shard.ask("jobs", ShardJobs(principal=ADMIN, query=call), JobsAnswer)
            wanted = {row.id for row in rows if since <= row.created_at and (until is None or row.created_at < until)}
            assert {row.id for row in page.jobs} == wanted
            assert len(page.jobs) == len(wanted)


async def test_a_walk_is_not_disturbed_by_jobs_that_come_and_that_go_into_the_archive(shard: Partition) -> None:
    ids = await shard.submit(*[job()] * 20)
    await shard.cancel(*ids[:10])
    page = await newest(shard, limit=5)
    seen = [row.id for row in page.jobs]
    while page.before is not None:
        await shard.submit(job())
        await shard.sql("UPDATE job SET modified_at = DATE_SUB(modified_at, INTERVAL 2 HOUR) WHERE state = 'cancelled'")
        await shard.shard.archive.move(HOUR_S)
        page = await newest(shard, limit=5, before=page.before)
        seen += [row.id for row in page.jobs]
    assert seen == sorted(ids, reverse=True)


@pytest.mark.parametrize(
    ("name", "key", "index"),
    [
        ("newest", (), "by_time"),
        ("newest_of_owner", ("central:ann",), "of_owner"),
        ("newest_of_slot", (1,), "of_slot"),
    ],
)
@pytest.mark.parametrize("archived", [False, True])
async def test_no_list_sorts(shard: Partition, name: str, key: tuple[object, ...], index: str, archived: bool) -> None:
    """Each statement goes along its index: a sort would read all of a partition for one page."""
    await several_in_one(shard)
    day = "2000-01-01 00:00:00"
    ended = (day,) * archived
    top, tail = ("2100-01-01 00:00:00",) * 2 + (5,), (0, (0,), ("",), *[""] * 4, 0, 0, 0, "", 1, 0, 1, "central:%", 10)
    full = f"archived_{name}" if archived else name
    for statement, arguments in (
        (f"stop_{full}", (*ended, *key, day, *top, 10)),
        (f"list_{full}", (*ended, *key, day, day, 5, *top, *tail)),
    ):
        [plan] = await shard.rows(f"EXPLAIN {STATEMENTS[statement].head}", *arguments)
        said = " ".join(map(str, plan))
        assert index in said
        assert "filesort" not in said


async def several_in_one(shard: Partition) -> None:
    """Enough rows that a plan is worth something."""
    await shard.submit(*[job()] * 200)
