"""What the command line tells the clients' process of a load run: who they are, whom they ask, how much."""

import random
import secrets
from collections.abc import Sequence
from typing import Final

import msgspec

from culm.wire import JobSpec

ENVIRONMENT: Final = "CULM_LOAD_ORDER"
"""The variable that names the order's file."""
PAYLOAD_BYTES: Final = 1300


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """A site that jobs are sent to and pilots ask for, with a token of its pilots."""

    site: str
    queue: str
    shard: str
    weight: float
    pilot_token: str


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """One run. It holds tokens: its file is private, and is removed when the run is over."""

    router: str
    monitor: str
    targets: list[Target]
    user_token: str
    jobset: int
    users: dict[str, int]
    shape: str
    rate: float
    seconds: float
    window_s: float
    seed: int
    backlog: int
    n_beats: int
    job_s: float
    ramp_p99_ms: float
    fed: dict[int, tuple[float, str]]
    """Jobs that wait already: id, and when it was accepted, seconds since the epoch, for which site."""
    began: str
    """A file to make when the run begins."""
    into: str
    """Where to write the Result."""
    more: str
    """A file that may come during the run: the sites from then on, as JSON."""


def specs(targets: Sequence[Target], n_jobs: int, rng: random.Random) -> list[JobSpec]:
    """Jobs over the sites by their weights, with a payload of 1.3 KB."""
    sites = rng.choices([one.site for one in targets], [one.weight for one in targets], k=n_jobs)
    argv = ["true", "x" * (PAYLOAD_BYTES - 130)]
    return [JobSpec(site=site, name="load", argv=argv, walltime_s=3600) for site in sites]


def weights(n_sites: int, hot_share: float) -> list[float]:
    """What share of the load each site gets: the first `hot_share`, the others the rest in equal parts.

    >>> weights(3, 0.5)
    [0.5, 0.25, 0.25]
    """
    if not hot_share or n_sites == 1:
        return [1 / n_sites] * n_sites
    return [hot_share, *[(1 - hot_share) / (n_sites - 1)] * (n_sites - 1)]


def new_key() -> str:
    """An idempotency key or a request id: never the same twice, whatever the seed of a run."""
    return secrets.token_hex(12)
