"""What a router counts and measures, beside `culm/telemetry.py` and `culm/get_job_times.py`. Of all its workers."""

from typing import Final

from culm.metrics import Metrics

METRICS: Final = Metrics("router")

UPSTREAM: Final = METRICS.histogram(
    "culm_router_upstream_seconds", "Time of a call to a shard, failed ones too; long polls are left out", "shard"
)
MISROUTES: Final = METRICS.counter("culm_router_misroutes_total", "Requests that a shard refused with moved")
EPOCH: Final = METRICS.gauge(
    "culm_router_epoch",
    "Epoch of an authority's topology section, of the worker that is furthest behind",
    "authority",
    workers="livemin",
)
PEER_HEARD: Final = METRICS.gauge(
    "culm_peer_heard_seconds",
    "When a peer last told its section, unix time; 0: not since the start",
    "authority",
    workers="livemax",
)
