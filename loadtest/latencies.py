"""Latencies in a histogram whose buckets grow by one per cent: any percentile to 1 %, few bytes, and they add up."""

import math
from collections.abc import Iterable, Mapping
from typing import Final

GROWTH: Final = 1.01
"""From one bucket to the next: what a percentile may be too high by."""
_LOG: Final = math.log(GROWTH)
_SMALLEST_MS: Final = 0.001
PERCENTILES: Final = (0.5, 0.95, 0.99, 0.999)


class Histogram:
    """How many latencies fell into which bucket; bucket b is up to `_SMALLEST_MS * GROWTH ** b` milliseconds."""

    def __init__(self, counts: Mapping[int, int] | None = None) -> None:
        self.counts: dict[int, int] = dict(counts or {})

    def add(self, ms: float) -> None:
        """Count one latency, in milliseconds; what is below a microsecond counts as one."""
        bucket = math.ceil(math.log(max(ms, _SMALLEST_MS) / _SMALLEST_MS) / _LOG)
        self.counts[bucket] = self.counts.get(bucket, 0) + 1

    @property
    def n(self) -> int:
        """How many there are."""
        return sum(self.counts.values())

    def percentile(self, share: float) -> float:
        """The latency in milliseconds that `share` (0 to 1) of all do not exceed; 0 where there is none."""
        wanted = max(1, math.ceil(share * self.n))
        seen = 0
        for bucket in sorted(self.counts):
            seen += self.counts[bucket]
            if seen >= wanted:
                return float(_SMALLEST_MS * GROWTH**bucket)
        return 0.0


def together(several: Iterable[Histogram]) -> Histogram:
    """All of them as one."""
    merged = Histogram()
    for one in several:
        for bucket, n in one.counts.items():
            merged.counts[bucket] = merged.counts.get(bucket, 0) + n
    return merged
