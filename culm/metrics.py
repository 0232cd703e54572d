"""Metrics: each is declared once, with its labels and help; `docs/metrics.md` is made of the declarations.

Where: what every process has in `culm/telemetry.py`, how a get_job is timed in `culm/get_job_times.py`, the rest in the
`metrics.py` of its service. Labels have few values that nobody outside can add to; `site` is a label of gauges only.
Only this module and `culm/telemetry.py` know the library.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from prometheus_client import Counter, Gauge, Histogram, disable_created_metrics

Kind = Literal["counter", "gauge", "histogram"]
OfWorkers = Literal["livesum", "livemin", "livemax"]
"""What a gauge of several workers comes to, of those that live."""

SECONDS: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
"""Bounds of a histogram of times."""
FEW_SECONDS: Final = (0.001, 0.005, 0.02, 0.1, 0.5, 2.0)
"""The same where a label has many values."""

# Else each counter and histogram has a second series, of when it was made: nobody asks for that.
disable_created_metrics()  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Declaration:
    """One metric, as the page shows it."""

    name: str
    kind: Kind
    labels: tuple[str, ...]
    processes: tuple[str, ...]
    text: str


class Metrics:
    """The metrics that some processes have alike. A name may be declared once in a process: else ValueError."""

    def __init__(self, *processes: str) -> None:
        self.declared: list[Declaration] = []
        self._processes = processes

    def counter(self, name: str, text: str, *labels: str) -> Counter:
        """What only grows; the name ends in `_total`."""
        self._declare("counter", name, text, labels)
        return Counter(name, text, labels)

    def gauge(self, name: str, text: str, *labels: str, workers: OfWorkers = "livesum") -> Gauge:
        """What there is now."""
        self._declare("gauge", name, text, labels)
        return Gauge(name, text, labels, multiprocess_mode=workers)

    def histogram(self, name: str, text: str, *labels: str, buckets: Sequence[float] = SECONDS) -> Histogram:
        """Times, seconds."""
        self._declare("histogram", name, text, labels)
        return Histogram(name, text, labels, buckets=buckets)

    def _declare(self, kind: Kind, name: str, text: str, labels: tuple[str, ...]) -> None:
        self.declared.append(Declaration(name, kind, labels, self._processes, text))
