"""What a shard counts and measures, beside `culm/telemetry.py` and `culm/get_job_times.py`."""

from typing import Final

from culm.metrics import FEW_SECONDS, Metrics

METRICS: Final = Metrics("shard")
_counter, _gauge, _histogram = METRICS.counter, METRICS.gauge, METRICS.histogram

# --- what there is, looked up every few seconds (shard/levels.py)

JOBS: Final = _gauge("culm_jobs", "Jobs in the slots that are open here, without the archive", "state")
QUEUE_DEPTH: Final = _gauge("culm_queue_depth", "Activated jobs", "site")
QUEUE_OLDEST: Final = _gauge(
    "culm_queue_oldest_seconds", "How long the activated job with the lowest number has been ready; 0 of none", "site"
)
PILOTS_SEEN: Final = _gauge(
    "culm_pilots_seen",
    "Pilots that asked in the last five minutes; of each computing queue at most 1,000 are told apart",
    "site",
)

# --- dispatch

DISPATCHED: Final = _counter("culm_jobs_dispatched_total", "Jobs given to pilots")
CLAIM_BATCHES: Final = _counter("culm_claim_batches_total", "Claim transactions")
BROKEN: Final = _counter(
    "culm_broken_jobs_total", "Jobs that a claim passed over, for their rows do not fit together (`culm audit`)"
)
PARKED: Final = _gauge("culm_parked_requests", "Long polls that wait for a job")
PENDING: Final = _gauge("culm_pending_requests", "get_job requests that wait for a claim")
SHELF_TAKEN: Final = _counter("culm_shelf_taken_total", "Ready jobs that a claim looked for on the shelf", "found")
SHELF_BYTES: Final = _gauge("culm_shelf_bytes", "What the shelf holds, about")
REDIS_FAILURES: Final = _counter("culm_redis_failures_total", "Calls of the dispatch queue that failed")
REDIS_OPEN: Final = _gauge("culm_redis_breaker_open", "1 while dispatch goes by the database alone")

# --- jobs

TRANSITIONS: Final = _counter(
    "culm_job_transitions_total", "Committed changes of state, by the state that was reached; a submit is one", "state"
)
ERRORS: Final = _counter(
    "culm_job_errors_total",
    "Jobs that failed, by PanDA's plane and code. A plane that is not PanDA's is `other`, and so are the codes that "
    "come after the first 300 different ones; without a word: component `none`, code 0",
    "component",
    "code",
)
LEASES_EXPIRED: Final = _counter(
    "culm_lease_expired_total", "Leases that ended by the database's clock, by the event that followed", "outcome"
)
LEASES_STUCK: Final = _counter("culm_stuck_leases_total", "Looks at a lease that could not be ended")
HUNG_UP_JOBS: Final = _counter(
    "culm_hung_up_jobs_total", "Jobs that were given and taken back, for the client was gone before its answer"
)
SIGN_BATCHES: Final = _counter("culm_sign_batches_total", "Transactions of heartbeats and reports")
SIGNS_PENDING: Final = _gauge("culm_pending_signs", "Heartbeats and reports that wait for a transaction")
SAMPLES_TAKEN: Final = _counter("culm_tally_samples_total", "Hours whose tallies were sampled")
ARCHIVED: Final = _counter("culm_archived_jobs_total", "Jobs that went into the archive")
NOT_ARCHIVED: Final = _counter(
    "culm_archive_failures_total", "What the archive's pass had to leave: a slot this time, or a job", "what"
)

# --- the database

POOL_IN_USE: Final = _gauge("culm_db_pool_in_use", "Connections in use", "pool")
POOL_WAIT: Final = _histogram(
    "culm_db_pool_wait_seconds", "How long a transaction waited for its connection, in vain too", "pool"
)
QUERY: Final = _histogram(
    "culm_db_query_seconds",
    "Time of a statement, failed ones too; of several that are sent together, under the name of the first",
    "query",
    buckets=FEW_SECONDS,
)
RETRIES: Final = _counter(
    "culm_db_retries_total",
    "Transactions run again, by the server's error number; `changed`: a row was not as it had been read, "
    "`stale`: the connection had been dead for some time",
    "errno",
)
