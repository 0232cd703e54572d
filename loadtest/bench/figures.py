"""What `culm bench` tells: each figure by its id, what it means and what it is to be."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Figure:
    """One line of the table; `at_most` says on which side of the target is good, `unit` what the value is in."""

    id: str
    text: str
    target: float
    at_most: bool = True
    unit: str = "x"

    def met(self, value: float) -> bool:
        """Whether this value is good enough."""
        return value <= self.target if self.at_most else value >= self.target


_ALL: Final = (
    Figure("cpu_vs_echo_c64", "CPU of a durable getJob against the echo, 64 clients", 1.6),
    Figure("cpu_vs_echo_c256", "the same, 256 clients", 1.1),
    Figure("cpu_vs_naive_c64", "CPU of the naive build against ours, 64 clients", 5.0, at_most=False),
    Figure("rate_vs_naive_c64", "our rate against the naive build's, 64 clients", 4.0, at_most=False),
    Figure("cpu_vs_naive_c8", "CPU of the naive build against ours, 8 clients", 3.0, at_most=False),
    Figure("p50_vs_shard_c8", "our p50 against the naive shard asked directly, 8 clients", 1.0),
    Figure("commits_per_job_c64", "commits per job, 64 clients", 1 / 25, unit=""),
    Figure("backlog_1e6", "CPU of a getJob at 10^6 waiting jobs in one queue against 10^3", 1.2),
    Figure("backlog_1e6_queues", "the same, 10^6 over 1,000 queues", 1.2),
    Figure("classes_500", "CPU with 500 requirement classes and 1,000 owners against one of each", 2.0),
    Figure("empty_vs_hit", "CPU of an empty getJob against one that gets a job", 0.7),
    Figure("false_empties", "empty answers of 64 clients that drain a queue, hints flushed meanwhile", 0, unit=""),
    Figure("cycle_vs_get", "CPU of a job's whole cycle against its getJob", 4.5),
    Figure("submit_cpu_us", "CPU of a submitted job, calls of 100, against an echoed request", 1.5),
    Figure("bulk_100", "CPU of a job of a getJob with n_jobs = 100 against a single one's", 0.35),
    Figure("churn_1m", "rate of the last tenth of a million jobs against the first", 0.9, at_most=False),
    Figure("shards_4_vs_1", "CPU of a getJob with 4 shards against 1", 1.15),
    Figure("parked_kb", "memory of the router for a parked long poll", 20.0, unit="KB"),
    Figure("wake_ms", "median time to wake one of 10,000 parked pilots while jobs are dispatched", 200.0, unit="ms"),
    Figure("backlog_1e7", "CPU of a getJob at 10^7 waiting jobs against 10^5", 1.3),
)
FIGURES: Final = {figure.id: figure for figure in _ALL}
GIVES: Final[Mapping[str, tuple[str, ...]]] = {
    "echo64": ("cpu_vs_echo_c64", "commits_per_job_c64"),
    "echo256": ("cpu_vs_echo_c256",),
    "naive64": ("cpu_vs_naive_c64", "rate_vs_naive_c64"),
    "naive8": ("cpu_vs_naive_c8", "p50_vs_shard_c8"),
    "empty": ("empty_vs_hit",),
    "drain": ("false_empties",),
    "cycle": ("cycle_vs_get",),
    "submit": ("submit_cpu_us",),
    "bulk": ("bulk_100",),
    "classes": ("classes_500",),
    "backlog": ("backlog_1e6",),
    "backlog_queues": ("backlog_1e6_queues",),
    "shards": ("shards_4_vs_1",),
    "parked": ("parked_kb", "wake_ms"),
    "churn": ("churn_1m",),
    "backlog_huge": ("backlog_1e7",),
}
"""The figures of each cell, in the order in which they are run: those that leave much behind come last."""
LONG: Final = frozenset({"churn_1m", "backlog_1e7"})
"""These take from a quarter of an hour to an hour, and gigabytes: only where they are asked for."""
