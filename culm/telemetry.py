"""Logs and metrics, the same for every process.

Logs are one JSON object a line on stderr; secrets (tokens, payloads) are never passed to a logger. Metrics are
Prometheus's, with the names of `docs/` and labels of few values: a histogram is by verb and outcome only.
"""

import logging
import os
import sys
from typing import Final

import msgspec
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess

from culm.metrics_folder import VARIABLE

_ENCODER: Final = msgspec.json.Encoder()
_BUCKETS: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)

LOOP_ERRORS: Final = Counter("culm_loop_errors_total", "Turns of a background loop that failed", ["loop"])
LOOP_RUNS: Final = Counter("culm_loop_runs_total", "Turns of a background loop", ["loop"])
REQUESTS: Final = Histogram(
    "culm_request_seconds", "Time of a request by verb and outcome", ["verb", "outcome"], buckets=_BUCKETS
)
BUILD: Final = Gauge("culm_build_info", "Version and process", ["version", "process"], multiprocess_mode="livemax")

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


class JsonFormatter(logging.Formatter):
    """One JSON object per record: time, level, process, logger, message, and the traceback if there is one."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self.process = process

    def format(self, record: logging.LogRecord) -> str:
        """The line for one record."""
        fields: dict[str, object] = {
            "at": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}",
            "level": record.levelname,
            "process": self.process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return _ENCODER.encode(fields).decode()


def configure_logging(process: str, level: str) -> None:
    """Send every record of this process to stderr as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(process))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def exposition(registry: CollectorRegistry = REGISTRY) -> bytes:
    """All metrics in Prometheus's text format. Slow with many series: call it in a thread.

    Of a worker: the sum over all workers, those that have ended too.
    """
    if VARIABLE in os.environ:
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return generate_latest(registry)


def worker_ended(pid: int) -> None:
    """Its gauges count no more; its counters stay."""
    if VARIABLE in os.environ:
        multiprocess.mark_process_dead(pid)  # type: ignore[no-untyped-call]
