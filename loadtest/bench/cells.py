"""The cells of `culm bench`: what is compared with what."""

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

import msgspec

from culm.client import Client
from culm.wire import GetJobAnswer, HeartbeatRequest, ReportRequest, SubmitRequest
from loadtest.bench import rig, scale
from loadtest.bench.backlog import fill
from loadtest.bench.beds import Beds, Sizes
from loadtest.bench.figures import GIVES
from loadtest.bench.rig import Bed, Sample
from loadtest.bench.rounds import Cell, Progress

_ENCODE: Final = msgspec.msgpack.Encoder().encode
_ANSWER: Final = msgspec.msgpack.Decoder(GetJobAnswer)
N_CLASSES: Final = 500
N_OWNERS: Final = 1000


async def of(name: str, beds: Beds, sizes: Sizes, progress: Progress) -> Cell:
    """The cell of this name, with what it needs started."""
    if name == "churn":
        return await scale.churn(beds, sizes, progress)
    return await _CELLS[name](beds, sizes)


def names_for(ids: Sequence[str]) -> list[str]:
    """The cells that give these figures, in the table's order."""
    return [name for name, given in GIVES.items() if set(given) & set(ids)]


def _fresh(bed: Bed, n_jobs: int, n_clients: int, **options: Any) -> Callable[[], Awaitable[Sample]]:
    async def run() -> Sample:
        await rig.submit(bed, [rig.spec()] * n_jobs)
        return await rig.get_jobs(bed, n_jobs, n_clients, **options)

    return run


def _echo(bed: Bed, n: int, n_clients: int) -> Callable[[], Awaitable[Sample]]:
    return lambda: rig.measure(bed, [rig.get_job(number) for number in range(n)], n_clients)


async def _echo_cell(beds: Beds, sizes: Sizes, n_clients: int) -> Cell:
    ours, echo = await beds.ours(), await beds.echo()

    def work_out(samples: Mapping[str, Sample]) -> dict[str, float]:
        figures = {f"cpu_vs_echo_c{n_clients}": samples["culm"].cpu_us / samples["echo"].cpu_us}
        return figures | ({"commits_per_job_c64": samples["culm"].commits} if n_clients == 64 else {})

    variants = {"culm": _fresh(ours, sizes.jobs, n_clients), "echo": _echo(echo, 2 * sizes.jobs, n_clients)}
    return Cell(f"echo c{n_clients}", GIVES[f"echo{n_clients}"], variants, work_out)


async def _echo_64(beds: Beds, sizes: Sizes) -> Cell:
    return await _echo_cell(beds, sizes, 64)


async def _echo_256(beds: Beds, sizes: Sizes) -> Cell:
    return await _echo_cell(beds, sizes, 256)


async def _naive_64(beds: Beds, sizes: Sizes) -> Cell:
    ours, naive = await beds.ours(), await beds.naive()
    return Cell(
        "naive c64",
        GIVES["naive64"],
        {"culm": _fresh(ours, sizes.jobs, 64), "naive": _fresh(naive, sizes.few, 64)},
        lambda samples: {
            "cpu_vs_naive_c64": samples["naive"].cpu_us / samples["culm"].cpu_us,
            "rate_vs_naive_c64": samples["culm"].rate / samples["naive"].rate,
        },
    )


async def _naive_8(beds: Beds, sizes: Sizes) -> Cell:
    ours, naive, shard = await beds.ours(), await beds.naive(), await beds.naive_shard()
    return Cell(
        "naive c8",
        GIVES["naive8"],
        {
            "culm": _fresh(ours, sizes.few * 2, 8),
            "naive": _fresh(naive, sizes.few, 8),
            "naive shard": _fresh(shard, sizes.few, 8),
        },
        lambda samples: {
            "cpu_vs_naive_c8": samples["naive"].cpu_us / samples["culm"].cpu_us,
            "p50_vs_shard_c8": samples["culm"].p50_ms / samples["naive shard"].p50_ms,
        },
    )


async def _backlog(beds: Beds, sizes: Sizes) -> Cell:
    """Two beds without a history: little waits in one queue of the one, much of the other."""
    little, much = await beds.fresh("little"), await beds.fresh("much")
    await rig.submit(little, [rig.spec()] * 1000)
    await fill(much, [rig.spec(argv=["true"])], sizes.backlog)
    return Cell(
        "backlog",
        GIVES["backlog"],
        {"little": _fresh(little, sizes.few * 2, 64), "much": _fresh(much, sizes.few * 2, 64)},
        lambda samples: {"backlog_1e6": samples["much"].cpu_us / samples["little"].cpu_us},
    )


async def _classes(beds: Beds, sizes: Sizes) -> Cell:
    """500 classes of 1,000 owners wait; the pilots fit one class, whose jobs are made anew in every round."""
    one, many = await beds.fresh("one"), await beds.fresh("many")
    per_owner = -(-N_CLASSES // N_OWNERS)
    for number in range(N_OWNERS):
        need = 20_000 + number % N_CLASSES
        async with Client(f"http://127.0.0.1:{many.port}", beds.user(many, number)) as client:
            jobs = [rig.spec(memory_mb=need)] * max(per_owner, 2)
            await client.submit(SubmitRequest(idempotency_key=secrets.token_hex(12), jobs=jobs))

    def variant(bed: Bed) -> Callable[[], Awaitable[Sample]]:
        async def run() -> Sample:
            await rig.submit(bed, [rig.spec()] * sizes.few * 2)
            bodies = [rig.get_job(number, memory_mb=2000) for number in range(sizes.few * 2)]
            sample = await rig.measure(bed, bodies, 64)
            if len(set(rig.granted(sample.answers))) != len(bodies):
                raise rig.failed("not every request got a job of its own")
            return sample

        return run

    return Cell(
        "classes",
        GIVES["classes"],
        {"one": variant(one), "many": variant(many)},
        lambda samples: {"classes_500": samples["many"].cpu_us / samples["one"].cpu_us},
    )


async def _empty(beds: Beds, sizes: Sizes) -> Cell:
    ours = await beds.ours()

    async def empty() -> Sample:
        # The runs before have taken all there was.
        bodies = [rig.get_job(number) for number in range(sizes.jobs)]
        sample = await rig.measure(ours, bodies, 64)
        if rig.granted(sample.answers):
            raise rig.failed("a job was given where there should be none")
        return sample

    return Cell(
        "empty",
        GIVES["empty"],
        {"hit": _fresh(ours, sizes.jobs, 64), "empty": empty},
        lambda samples: {"empty_vs_hit": samples["empty"].cpu_us / samples["hit"].cpu_us},
    )


async def _drain(beds: Beds, sizes: Sizes) -> Cell:
    """As many requests as jobs: each must get one, however often the hints are lost meanwhile."""
    ours = await beds.ours()
    empties = 0

    async def drain() -> Sample:
        nonlocal empties
        await rig.submit(ours, [rig.spec()] * sizes.jobs)
        flushing = asyncio.create_task(_flush_often(beds, ours))
        try:
            sample = await rig.measure(ours, [rig.get_job(number) for number in range(sizes.jobs)], 64)
        finally:
            flushing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await flushing
        ids = rig.granted(sample.answers)
        if len(set(ids)) != len(ids):
            raise rig.failed("a job was given twice")
        empties = sizes.jobs - len(ids)
        return sample

    return Cell("drain", GIVES["drain"], {"drain": drain}, lambda _samples: {"false_empties": float(empties)})


async def _flush_often(beds: Beds, bed: Bed) -> None:
    while True:
        await asyncio.sleep(0.2)
        await beds.flush(bed)


async def _cycle(beds: Beds, sizes: Sizes) -> Cell:
    ours = await beds.ours()
    n_jobs = sizes.few * 2

    async def cycle() -> Sample:
        await rig.submit(ours, [rig.spec()] * n_jobs)
        got = await rig.get_jobs(ours, n_jobs, 64)
        grants = [grant for answer in got.answers for grant in _ANSWER.decode(answer).jobs]
        samples = [got]
        for path, kind, state in (
            ("heartbeat", HeartbeatRequest, "starting"),
            ("heartbeat", HeartbeatRequest, "running"),
            ("heartbeat", HeartbeatRequest, "running"),
            ("report", ReportRequest, "finished"),
        ):
            bodies = [
                _ENCODE(
                    msgspec.convert(
                        {"id": g.id, "attempt": g.attempt, "lease_token": g.lease_token, "state": state}, kind
                    )
                )
                for g in grants
            ]
            samples.append(await rig.measure(ours, bodies, 64, path=path))
        if await rig.state_counts(ours, [grant.id for grant in grants]) != {"finished": n_jobs}:
            raise rig.failed("not every job is stored as finished")
        return together(samples)

    return Cell(
        "cycle",
        GIVES["cycle"],
        {"get": _fresh(ours, n_jobs, 64), "cycle": cycle},
        lambda samples: {"cycle_vs_get": samples["cycle"].cpu_us / samples["get"].cpu_us},
    )


def together(samples: Sequence[Sample]) -> Sample:
    """What several runs over the same jobs cost together, per job."""
    parts = {name: sum(sample.parts[name] for sample in samples) for name in samples[0].parts}
    return Sample(
        n=samples[0].n,
        cpu_us=sum(parts.values()),
        parts=parts,
        rate=1 / sum(1 / sample.rate for sample in samples),
        p50_ms=max(sample.p50_ms for sample in samples),
        p99_ms=max(sample.p99_ms for sample in samples),
        client_share=max(sample.client_share for sample in samples),
        commits=sum(sample.commits for sample in samples),
    )


async def _submit(beds: Beds, sizes: Sizes) -> Cell:
    ours, echo = await beds.ours(), await beds.echo()
    n_calls = sizes.jobs // 100

    async def submit() -> Sample:
        bodies = [
            _ENCODE(SubmitRequest(idempotency_key=secrets.token_hex(12), jobs=[rig.spec()] * 100))
            for _ in range(n_calls)
        ]
        return await rig.measure(ours, bodies, 8, n_jobs=n_calls * 100, path="submit", role="user")

    return Cell(
        "submit",
        GIVES["submit"],
        {"submit": submit, "echo": _echo(echo, 2 * sizes.jobs, 64)},
        lambda samples: {"submit_cpu_us": samples["submit"].cpu_us / samples["echo"].cpu_us},
    )


async def _bulk(beds: Beds, sizes: Sizes) -> Cell:
    ours = await beds.ours()
    return Cell(
        "bulk",
        GIVES["bulk"],
        {"single": _fresh(ours, sizes.jobs, 64), "hundred": _fresh(ours, sizes.jobs // 100 * 100, 4, per_call=100)},
        lambda samples: {"bulk_100": samples["hundred"].cpu_us / samples["single"].cpu_us},
    )


_CELLS: Final[Mapping[str, Callable[[Beds, Sizes], Awaitable[Cell]]]] = {
    "echo64": _echo_64,
    "echo256": _echo_256,
    "naive64": _naive_64,
    "naive8": _naive_8,
    "empty": _empty,
    "drain": _drain,
    "cycle": _cycle,
    "submit": _submit,
    "bulk": _bulk,
    "classes": _classes,
    "backlog": _backlog,
    "backlog_queues": scale.backlog_queues,
    "shards": scale.shards,
    "parked": scale.parked_pilots,
    "backlog_huge": scale.backlog_huge,
}
