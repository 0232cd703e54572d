"""What a monitor counts and measures, beside `culm/telemetry.py`."""

from typing import Final

from culm.metrics import Metrics

METRICS: Final = Metrics("monitor")

STALE: Final = METRICS.gauge(
    "culm_monitor_shard_stale_seconds",
    "How long ago a shard last said what it has; of one that never did: since the monitor knows of it",
    "shard",
)
EVENT_READERS: Final = METRICS.gauge("culm_monitor_event_readers", "Open event streams")
CUT_OFF: Final = METRICS.counter(
    "culm_monitor_event_readers_cut_off_total", "Event streams that were cut off: too slow"
)
