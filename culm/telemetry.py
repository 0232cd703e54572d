"""Logs and metrics, the same for every process.

Logs are one JSON object a line on stderr; secrets (tokens, payloads) are never passed to a logger. Metrics are
Prometheus's (`culm/metrics.py`, docs/metrics.md).
"""

import logging
import os
import sys
from typing import Final

import msgspec
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest, multiprocess

from culm.metrics import Metrics
from culm.metrics_folder import VARIABLE

_ENCODER: Final = msgspec.json.Encoder()

METRICS: Final = Metrics("router", "shard", "monitor")
LOOP_ERRORS: Final = METRICS.counter("culm_loop_errors_total", "Turns of a background loop that failed", "loop")
LOOP_RUNS: Final = METRICS.counter("culm_loop_runs_total", "Turns of a background loop", "loop")
LOOP_LAG: Final = METRICS.histogram(
    "culm_loop_lag_seconds", "How late the event loop was, looked at twice a second: so long everything waited"
)
REQUESTS: Final = METRICS.histogram(
    "culm_request_seconds",
    "Time of a request. `outcome`: ok, client_gone, or the code of the error. A get_job that was answered is in "
    "`culm_getjob_seconds` only",
    "verb",
    "outcome",
)
SHED: Final = METRICS.counter(
    "culm_shed_total",
    "Refused because something was full. `reason`: connections (of a router's worker), link_window and link_waiting "
    "(calls to one shard under way, long polls to it), link_calls (of one link, at the shard), get_jobs and signs "
    "(that wait at the shard), event_readers (of a monitor)",
    "reason",
)
TOPOLOGY_REFUSED: Final = METRICS.counter(
    "culm_topology_refused_total",
    "Sections that were not believed, for they step back or say another thing at the same epoch",
    "authority",
)
BUILD: Final = METRICS.gauge(
    "culm_build_info", "1; version and name of the process", "version", "process", workers="livemax"
)

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
