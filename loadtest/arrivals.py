"""Arrivals that do not wait for answers: when each request is due is fixed before anybody knows how long one takes.

A client that sends its next request when it has got the last answer sends fewer while the service is slow, and so
leaves the worst latencies out ("coordinated omission"). Here a request's time counts from when it was due, also where
the client could send it only later.
"""

from dataclasses import dataclass


@dataclass
class Schedule:
    """Due times at a rate that may change; all times in seconds of one clock."""

    next_at: float
    """When the next one is due."""
    rate: float
    """Arrivals a second from now on; 0: none."""

    def due(self, now: float) -> list[float]:
        """The times of all that are due by now and were not given before, oldest first."""
        times = []
        if self.rate <= 0:
            self.next_at = max(self.next_at, now)
        while self.rate > 0 and self.next_at <= now:
            times.append(self.next_at)
            self.next_at += 1 / self.rate
        return times

    def change(self, rate: float, now: float) -> None:
        """Another rate from now on. What was due before stays due; the next one may come nearer."""
        if rate == self.rate:
            return
        self.rate = rate
        if rate > 0 and self.next_at > now:
            self.next_at = min(self.next_at, now + 1 / rate)
