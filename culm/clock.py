"""Time, behind a seam: everything that asks for it takes a Clock, so that tests own it.

Leases never depend on it: they end by the database's clock alone (design section 4, point 5).
"""

import time
from typing import Protocol


class Clock(Protocol):
    """Two readings: `now` in seconds since the epoch (UTC), `monotonic` in seconds from any start."""

    def now(self) -> float:
        """Seconds since the epoch, UTC."""
        ...

    def monotonic(self) -> float:
        """Seconds that never run backwards."""
        ...


class SystemClock:
    """The machine's own clock."""

    def now(self) -> float:
        """Seconds since the epoch, UTC."""
        return time.time()

    def monotonic(self) -> float:
        """Seconds that never run backwards."""
        return time.monotonic()
