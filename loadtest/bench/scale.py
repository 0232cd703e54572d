"""The cells of `culm bench` that are about size: many queues, several shards, parked pilots, a long run."""

import asyncio
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from culm.wire import GetJobAnswer, Grant, ReportRequest
from loadtest.bench import cpu, parked, rig
from loadtest.bench.backlog import fill
from loadtest.bench.beds import Beds, Sizes
from loadtest.bench.figures import GIVES
from loadtest.bench.rig import Bed, Sample
from loadtest.bench.rounds import Cell, Progress

N_QUEUES: Final = 1000
N_SHARDS: Final = 4
WAKES: Final = 50
WAKE_RATE: Final = 1000.0
"""getJobs per second that are dispatched beside the wake-ups."""
PARKED_WAIT_S: Final = 60.0
PARKED_SITE: Final = "PARKED"
SEGMENTS: Final = 10
JOBS_PER_TURN: Final = 5000
_ANSWER: Final = msgspec.msgpack.Decoder(GetJobAnswer)
_ENCODE: Final = msgspec.msgpack.Encoder().encode


def over(bed: Bed, n_jobs: int, sites: Sequence[str], n_clients: int = 64) -> Callable[[], Awaitable[Sample]]:
    """Jobs at many sites, and clients whose pilots are of all of them; every id is checked."""

    async def run() -> Sample:
        await rig.submit(bed, [rig.spec(site=sites[number % len(sites)]) for number in range(n_jobs)])
        bodies = [rig.get_job(number, f"{sites[number % len(sites)]}-q") for number in range(n_jobs)]
        sample = await rig.measure(bed, bodies, n_clients)
        if len(set(rig.granted(sample.answers))) != n_jobs:
            raise rig.failed("not every request got a job of its own")
        return sample

    return run


async def backlog_queues(beds: Beds, sizes: Sizes) -> Cell:
    """A thousand computing queues on one shard: a job waits in each, or a thousand."""
    little, much = await beds.fresh("few"), await beds.fresh("many")
    sites = [f"S{number}" for number in range(N_QUEUES)]
    for bed, n_jobs in ((little, N_QUEUES), (much, sizes.backlog)):
        await rig.register(bed, sites)
        await fill(bed, [rig.spec(site=site, argv=["true"]) for site in sites], n_jobs)
    return Cell(
        "backlog over queues",
        GIVES["backlog_queues"],
        {"little": over(little, sizes.few * 2, sites), "much": over(much, sizes.few * 2, sites)},
        lambda samples: {"backlog_1e6_queues": samples["much"].cpu_us / samples["little"].cpu_us},
    )


async def backlog_huge(beds: Beds, sizes: Sizes) -> Cell:
    """Ten million jobs in one queue, with payloads of 200 bytes, against a hundredth of that."""
    little, much = await beds.fresh("little"), await beds.fresh("huge")
    small = rig.spec(argv=["/bin/sh", "-c", "x" * 120])
    await fill(little, [small], sizes.huge // 100)
    await fill(much, [small], sizes.huge)
    return Cell(
        "backlog, huge",
        GIVES["backlog_huge"],
        {"little": over(little, sizes.few * 2, [rig.SITE]), "much": over(much, sizes.few * 2, [rig.SITE])},
        lambda samples: {"backlog_1e7": samples["much"].cpu_us / samples["little"].cpu_us},
    )


async def shards(beds: Beds, sizes: Sizes) -> Cell:
    """The same four sites on one shard, and on a shard each; 256 clients, so that each of four has 64."""
    one, four = await beds.fresh("one"), await beds.fresh("four", n_shards=N_SHARDS)
    sites = [rig.SITE, *(f"S{number}" for number in range(1, N_SHARDS))]
    await rig.register(one, sites[1:])
    for number in range(1, N_SHARDS):
        await rig.register(four, sites[number : number + 1], region=f"MORE{number}")
    return Cell(
        "shards",
        GIVES["shards"],
        {"one": over(one, sizes.jobs, sites, 256), "four": over(four, sizes.jobs, sites, 256)},
        lambda samples: {"shards_4_vs_1": samples["four"].cpu_us / samples["one"].cpu_us},
    )


async def parked_pilots(beds: Beds, sizes: Sizes) -> Cell:
    """Parked long polls at one site of a router of one process, woken one by one while another site is dispatched."""
    figures: dict[str, float] = {}

    async def run() -> Sample:
        # Each time a new bed: memory that was used once is not given back.
        bed = await beds.fresh("parked")
        await rig.register(bed, [PARKED_SITE])
        await rig.submit(bed, [rig.spec()] * 1000)
        await rig.get_jobs(bed, 1000, 64)
        before = cpu.resident_bytes(bed.pids["router"])
        head = (
            f"POST /v1/get_job HTTP/1.1\r\nHost: 127.0.0.1:{bed.port}\r\nAuthorization: Bearer {bed.token('pilot')}\r\n"
            f"Content-Type: {rig.MSGPACK}\r\nAccept: {rig.MSGPACK}\r\n"
        )
        polls = [rig.get_job(number, f"{PARKED_SITE}-q", wait_s=PARKED_WAIT_S) for number in range(sizes.parked)]
        order = parked.Order(
            host="127.0.0.1",
            port=bed.port,
            polls=[f"{head}Content-Length: {len(poll)}\r\n\r\n".encode() + poll for poll in polls],
            user_token=bed.token("user"),
            jobs=[rig.spec(site=PARKED_SITE)] * WAKES,
        )
        n_jobs = int(WAKE_RATE * sizes.parked / 1000)
        await rig.submit(bed, [rig.spec()] * n_jobs)
        with tempfile.TemporaryDirectory() as folder:
            into = Path(folder) / "result"
            child = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "loadtest.bench.parked", str(into)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            assert child.stdin is not None
            assert child.stdout is not None
            data = msgspec.msgpack.encode(order)
            child.stdin.write(len(data).to_bytes(8, "big") + data)
            if await child.stdout.readline() != b"parked\n":
                raise rig.failed("the pilots could not be parked")
            await rig.at_rest_cpu(bed)
            figures["parked_kb"] = (cpu.resident_bytes(bed.pids["router"]) - before) / sizes.parked / 1024
            busy = asyncio.create_task(
                rig.measure(bed, [rig.get_job(number) for number in range(n_jobs)], 64, rate=WAKE_RATE)
            )
            child.stdin.write(b"go\n")
            code = await child.wait()
            sample = await busy
            if code:
                raise rig.failed(f"the parked pilots ended with {code}")
            result = msgspec.msgpack.decode(into.read_bytes(), type=parked.Result)
        if result.n_answered != WAKES:
            raise rig.failed(f"{WAKES} jobs woke {result.n_answered} pilots")
        figures["wake_ms"] = statistics.median(result.wakes_ms)
        return sample

    return Cell("parked", GIVES["parked"], {"parked": run}, lambda _samples: dict(figures), warm_up=False)


async def churn(beds: Beds, sizes: Sizes, progress: Progress) -> Cell:
    """Very many jobs through one shard, from submit to the final report, with the archive pass on and a read open."""
    bed = await beds.fresh(
        "churn",
        environment={
            "CULM_SHARD_ARCHIVE__AFTER_S": "5",
            "CULM_SHARD_ARCHIVE__BATCH": "500",
            "CULM_SHARD_ARCHIVE__INTERVAL_S": "0.1",
        },
    )
    rates: list[float] = []

    async def run() -> Sample:
        rates.clear()
        samples: list[Sample] = []
        async with rig.open_read(bed):
            for number in range(SEGMENTS):
                made: list[Sample] = []
                for _ in range(max(1, sizes.churn // SEGMENTS // JOBS_PER_TURN)):
                    made += await _through(bed, min(JOBS_PER_TURN, sizes.churn // SEGMENTS))
                rates.append(sum(one.n for one in made[::2]) / sum(one.n / one.rate for one in made))
                samples += made
                total = sum((await rig.table_sizes(bed)).values()) >> 20
                undo = await rig.history(bed)
                progress(f"churn: part {number + 1}, {rates[-1]:.0f} jobs/s, history {undo}, tables {total} MiB")
        return samples[-1]

    return Cell("churn", GIVES["churn"], {"churn": run}, lambda _s: {"churn_1m": rates[-1] / rates[0]}, warm_up=False)


async def _through(bed: Bed, n_jobs: int) -> list[Sample]:
    """The get_job and the final report of so many jobs, which are made before."""
    await rig.submit(bed, [rig.spec()] * n_jobs)
    got = await rig.get_jobs(bed, n_jobs, 64)
    grants: list[Grant] = [grant for answer in got.answers for grant in _ANSWER.decode(answer).jobs]
    bodies = [
        _ENCODE(
            msgspec.convert(
                {"id": one.id, "attempt": one.attempt, "lease_token": one.lease_token, "state": "finished"},
                ReportRequest,
            )
        )
        for one in grants
    ]
    return [got, await rig.measure(bed, bodies, 64, path="report")]
