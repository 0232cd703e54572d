"""How long a get_job takes, told alike by the router (as the pilot sees it) and by the shard.

The one measurement of an answered get_job: it is not in `culm_request_seconds` as well. The children are looked up
once, for this is the hottest path of all.
"""

from typing import Final

from culm.errors import CulmError
from culm.metrics import Metrics

METRICS: Final = Metrics("router", "shard")
_TIMES: Final = METRICS.histogram(
    "culm_getjob_seconds",
    "Time of a get_job. `op`: at_once, or wait (a long poll, which may last as long as the pilot allows). "
    "`outcome`: hit (jobs), empty (none), busy (refused for now, 503), error. Not of a client that has gone",
    "op",
    "outcome",
)
# Indexed by whether it waits.
_HIT, _EMPTY, _BUSY, _ERROR = (
    tuple(_TIMES.labels(op, outcome) for op in ("at_once", "wait")) for outcome in ("hit", "empty", "busy", "error")
)


def answered(elapsed_s: float, *, waits: bool, has_jobs: bool) -> None:
    """Note an answer, with jobs or none."""
    (_HIT if has_jobs else _EMPTY)[waits].observe(elapsed_s)


def refused(elapsed_s: float, error: CulmError, *, waits: bool) -> None:
    """Note a refusal."""
    (_BUSY if error.retryable else _ERROR)[waits].observe(elapsed_s)
