"""What becomes of getJob at three times what a shard can do: `python -m tests.measure.overload [PORT]`.

First 64 clients ask as fast as they are answered, which is what it can do; then requests come at three times that rate
from ten thousand connections, whether those before are answered or not. What is too much must be refused soon, and what
is accepted answered soon.
"""

import asyncio
import contextlib
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Final

from loadtest.bench import rig
from ops.bench_bed import Beds

OVER: Final = 3.0
SECONDS: Final = 10.0
CLIENTS: Final = 10_000
ROUNDS: Final = 3


async def main(port: int) -> None:
    """All of it."""
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="culm-overload-")))
        bed = await Beds(folder, port, stack).ours()
        await rig.submit(bed, [rig.spec()] * 4000)
        await rig.get_jobs(bed, 4000, 64)
        for number in range(ROUNDS):
            await rig.submit(bed, [rig.spec()] * 8000)
            calm = await rig.get_jobs(bed, 8000, 64)
            rate = OVER * calm.rate
            bodies = [rig.get_job(n) for n in range(int(rate * SECONDS))]
            await rig.submit(bed, [rig.spec()] * len(bodies))
            result = await rig.traffic(bed, bodies, CLIENTS, rate=rate)
            accepted = result.statuses.get(200, 0)
            say(f"round {number + 1}: {calm.rate:.0f}/s by 64 clients, p99 {calm.p99_ms:.0f} ms")
            say(
                f"  {len(bodies) / result.wall_s:.0f}/s asked, {accepted / result.wall_s:.0f}/s accepted: p50"
                f" {statistics.median(result.latencies_ms):.0f} ms, p99 {_p99(result.latencies_ms):.0f} ms;"
                f" statuses {result.statuses}, refused after p99 {_p99(result.refused_ms):.0f} ms;"
                f" the clients took {result.cpu_s / result.wall_s:.0%} of a core"
            )


def _p99(values: list[float]) -> float:
    return sorted(values)[int(len(values) * 0.99)] if values else 0.0


def say(text: str) -> None:
    """A line of the measurement."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    # Its children are started from no folder in particular.
    os.environ.setdefault("PYTHONPATH", str(Path(__file__).parents[2]))
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 27_080))
