"""What the archive's pass costs a dispatching shard: `python -m tests.measure.archive_load [JOBS]`.

200,000 finished jobs are made by SQL from one that really ran (the audit checks them), then 200 get_job a second run
while the pass is on and off in turns; then the rest is moved, and the audit looks at everything. MariaDB only, for its
sequence engine.
"""

import asyncio
import statistics
import sys
import time
from typing import Final

from culm.settings import ArchiveSettings, Timeouts
from culm.wire import ShardCounts, ShardCountsAnswer
from ops.audit import audit
from ops.engines import innodb
from shard.archive import Archive
from tests import servers
from tests.partition import Partition, Servers, job, partition

N_JOBS: Final = 200_000
RATE: Final = 200.0
ROUND_S: Final = 10.0
ROUNDS: Final = 3
CHUNK: Final = 20_000
OLD: Final = "DATE_SUB(UTC_TIMESTAMP(6), INTERVAL 5 DAY)"


async def _make(shard: Partition, n_jobs: int) -> None:
    """Copies of one finished job, five days old, with all that belongs to each."""
    [model] = await shard.submit(job())
    [grant] = await shard.get()
    await shard.heartbeat(grant)
    await shard.report(grant, stdout_tail="x" * 500)
    base = model + 1_000_000
    columns = (
        "slot, class_id, state, version, attempt, lost, max_attempts, priority, jobset, parent_id, depth, owner, vo,"
        " working_group, label, name, queue, pilot, host, cancel_requested"
    )
    for start in range(0, n_jobs, CHUNK):
        numbers = f"seq_{start}_to_{min(start + CHUNK, n_jobs) - 1}"
        await shard.sql(
            f"INSERT INTO job (id, {columns}, created_at, modified_at, error_plane, error_code, error_text)"
            f" SELECT {base} + seq, {columns}, {OLD}, {OLD}, error_plane, error_code, error_text"
            f" FROM job, {numbers} WHERE id = {model}"
        )
        await shard.sql(f"INSERT INTO spec SELECT {base} + seq, body FROM spec, {numbers} WHERE id = {model}")
        await shard.sql(
            f"INSERT INTO job_event SELECT {base} + seq, n, at, event, source, target, attempt, actor, detail"
            f" FROM job_event, {numbers} WHERE id = {model}"
        )
        await shard.sql(
            f"INSERT INTO report SELECT {base} + seq, attempt, token, state, at, body FROM report, {numbers}"
            f" WHERE id = {model}"
        )
    slot = shard.slot().slot
    await shard.sql(
        f"INSERT INTO submission SELECT slot, owner, 'copies', digest, {base}, {n_jobs}, at, NULL"
        " FROM submission LIMIT 1"
    )
    await shard.sql(f"UPDATE slot_sequence SET next_seq = next_seq + 2000000 WHERE slot = {slot}")
    await shard.sql(
        f"INSERT INTO tally (slot, state, vo, writer, n) VALUES ({slot}, 'finished', 'atlas', 60000, {n_jobs})"
    )


async def _load(shard: Partition, seconds: float) -> list[float]:
    """RATE get_job a second, each of which gets a job, that is reported; the times of the get_job, milliseconds."""
    times: list[float] = []
    n = int(RATE * seconds)
    await shard.submit(*[job()] * min(n, 2000))
    began = time.perf_counter()

    async def one(number: int) -> None:
        await asyncio.sleep(max(0.0, began + number / RATE - time.perf_counter()))
        asked = time.perf_counter()
        grants = await shard.get()
        times.append((time.perf_counter() - asked) * 1000)
        for grant in grants:
            await shard.report(grant)

    await asyncio.gather(*(one(number) for number in range(n)))
    return times


async def main(n_jobs: int) -> None:
    """All of it."""
    with servers.database(innodb.find(servers.cache())) as database, servers.cache_server() as valkey:
        async with partition(Servers(database, valkey), timeouts=Timeouts(grace_s=0.001)) as shard:
            # Its own loop moves nothing: the pass is ours.
            shard.shard.archive._settings = ArchiveSettings(after_s=0.0)
            await _make(shard, n_jobs)
            report = await audit([shard.settings], shard.topology)
            say(f"{n_jobs} finished jobs; audit: {report.n_jobs} jobs, {len(report.findings)} findings")
            await _load(shard, 2.0)
            settings = ArchiveSettings(after_s=86_400.0)
            archive = Archive(shard.shard.database, shard.shard.ownership, settings)
            on: list[list[float]] = []
            off: list[list[float]] = []
            n_moved = 0
            for _ in range(ROUNDS):
                off.append(await _load(shard, ROUND_S))
                stop = asyncio.Event()

                async def passes(stop: asyncio.Event = stop) -> int:
                    n = 0
                    while not stop.is_set():
                        n += await archive.turn()
                        # As the shard's own loop does.
                        await asyncio.sleep(settings.interval_s)
                    return n

                moving = asyncio.create_task(passes())
                on.append(await _load(shard, ROUND_S))
                stop.set()
                n_moved += await moving
            for name, rounds in (("pass off", off), ("pass on", on)):
                p99 = [statistics.quantiles(times, n=100)[98] for times in rounds]
                p50 = [statistics.median(times) for times in rounds]
                say(f"{name:9} get_job p50 {_spread(p50)} ms, p99 {_spread(p99)} ms, {RATE:.0f}/s")
            say(f"moved {n_moved} meanwhile")
            began = time.perf_counter()
            while n_moved < n_jobs:
                n_moved += await archive.turn()
            say(f"the rest in {time.perf_counter() - began:.0f} s without a pause; {n_moved} in all")
            counts = await shard.ask("counts", ShardCounts(), ShardCountsAnswer)
            say(
                f"hot {sum(one.n_jobs for one in counts.counts)}, archived {sum(one.n_jobs for one in counts.archived)}"
            )
            report = await audit([shard.settings], shard.topology)
            say(f"audit: {report.n_jobs} jobs, {len(report.findings)} findings {report.findings[:3]}")


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} - {max(values):.2f})"


def say(text: str) -> None:
    """A line of the measurement."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else N_JOBS))
