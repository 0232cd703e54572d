"""What a get_job costs with few and many requirement classes: `python -m tests.measure.class_cost`.

Interleaved rounds; CPU of shard, database and Valkey together, from /proc.
"""

import asyncio
import os
import time
from pathlib import Path
from typing import Final

import msgspec

from culm.matching import Offer
from culm.settings import DispatchSettings
from ops.engines import innodb
from tests import servers
from tests.partition import OFFER, Partition, Servers, job, partition
from tests.waiting import eventually

ROUNDS: Final = 3
N_GETS: Final = 200
N_AT_ONCE: Final = 32
SETTLE_S: Final = 20.0
CLASSES: Final = (1, 500, 1000)
NARROW: Final = msgspec.structs.replace(OFFER, memory_mb=500)
"""Fits one class, OFFER fits all."""
MS_PER_TICK: Final = 1000 / os.sysconf("SC_CLK_TCK")


def _cpu_ms(pids: list[int]) -> float:
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks * MS_PER_TICK


async def _measure(shard: Partition, pids: list[int], offer: Offer, n_at_once: int) -> tuple[float, float]:
    """Wall clock and CPU milliseconds per get_job; each gets a job."""
    cpu_ms, began = _cpu_ms(pids), time.perf_counter()
    for _ in range(N_GETS // n_at_once):
        answers = await asyncio.gather(*(shard.get(offer=offer) for _ in range(n_at_once)))
        assert all(answers)
    n = N_GETS // n_at_once * n_at_once
    return (time.perf_counter() - began) * 1000 / n, (_cpu_ms(pids) - cpu_ms) / n


async def _round(both: Servers, n_classes: int) -> None:
    async with partition(both, dispatch=DispatchSettings(max_classes_per_owner=1000)) as shard:
        others = [job(memory_mb=1000 + n) for n in range(n_classes - 1)]
        for start in range(0, len(others), 500):
            await shard.submit(*others[start : start + 500])
        for _ in range(3):
            await shard.submit(*[job(memory_mb=10)] * 300)
        refill, classes = shard.shard.refill, shard.shard.classes
        await eventually(lambda: refill.clean(classes.active()), SETTLE_S, what="Valkey has the hints")
        pids = [os.getpid(), both.database.pid, both.valkey.pid]
        for name, offer, n_at_once in (
            ("fits one class", NARROW, 1),
            ("fits all classes", OFFER, 1),
            (f"fits all, {N_AT_ONCE} at once", OFFER, N_AT_ONCE),
        ):
            wall_ms, cpu_ms = await _measure(shard, pids, offer, n_at_once)
            print(f"{n_classes:5} classes, {name:20} {wall_ms:6.2f} ms, {cpu_ms:6.2f} CPU-ms a get_job")


async def main() -> None:
    """All rounds."""
    with servers.database(innodb.find(servers.cache())) as database, servers.cache_server() as valkey:
        for _ in range(ROUNDS):
            for n_classes in CLASSES:
                await _round(Servers(database, valkey), n_classes)


if __name__ == "__main__":
    asyncio.run(main())
