"""Very many jobs that wait, behind all others."""

import asyncio
import secrets
from collections.abc import Iterator, Sequence
from typing import Final

import msgspec

from culm.client import Client
from culm.wire import JobSpec, SubmitRequest
from loadtest.bench import rig
from loadtest.bench.rig import Bed

AT_ONCE: Final = 4
"""Calls under way."""


async def fill(bed: Bed, specs: Sequence[JobSpec], n_jobs: int) -> None:
    """Make so many jobs of these in turn, with the lowest priority. Raises CulmError(bench_failed)."""
    low = [msgspec.structs.replace(spec, priority=1) for spec in specs]
    n_before = await rig.waiting(bed)
    calls = iter(range(0, n_jobs, rig.JOBS_PER_CALL))
    await asyncio.gather(*(_fill(bed, low, n_jobs, calls) for _ in range(AT_ONCE)))
    n_waiting = await rig.waiting(bed) - n_before
    if n_waiting != n_jobs:
        raise rig.failed(f"{n_jobs} jobs should wait, {n_waiting} do")


async def _fill(bed: Bed, low: Sequence[JobSpec], n_jobs: int, calls: Iterator[int]) -> None:
    async with Client(f"http://127.0.0.1:{bed.port}", bed.token("user"), patience_s=600.0) as client:
        for start in calls:
            some = [low[n % len(low)] for n in range(start, min(start + rig.JOBS_PER_CALL, n_jobs))]
            await client.submit(SubmitRequest(idempotency_key=secrets.token_hex(12), jobs=some))
