"""Which jobs a pilot may take: requirement classes, and matching as a pure function with an explaining twin.

Jobs with the same requirements form one class per slot (as DIRAC's task queues do). A pilot is matched against the
few classes of its slot, never against the jobs, so the cost does not grow with the backlog. `matches` is
`not refusals`: what dispatches is what explains.
"""

import hashlib
from typing import Final

import msgspec

_ENCODER: Final = msgspec.msgpack.Encoder(order="deterministic")


class Requirements(msgspec.Struct, frozen=True, array_like=True):
    """What a job needs of the pilot that takes it. Empty text and 0 mean "does not matter"."""

    label: str
    vo: str
    cores: int = 1
    memory_mb: int = 0
    disk_mb: int = 0
    walltime_s: int = 0
    release: str = ""
    platform: str = ""
    pilot_type: str = ""
    queue: str = ""
    """The computing queue that the job is pinned to."""

    def class_id(self) -> int:
        """The same 63-bit number for the same requirements on every shard: a hash, so that it survives a move."""
        digest = hashlib.blake2b(_ENCODER.encode(self), digest_size=8).digest()
        return int.from_bytes(digest, "big") >> 1


class Offer(msgspec.Struct, frozen=True):
    """What a pilot and its computing queue offer together. 0 means "no limit known", None "any"."""

    queue: str
    labels: frozenset[str]
    vos: frozenset[str] | None = None
    cores: int = 1
    memory_mb: int = 0
    disk_mb: int = 0
    walltime_s: int = 0
    releases: frozenset[str] = frozenset()
    platforms: frozenset[str] = frozenset()
    pilot_type: str = ""


class Refusal(msgspec.Struct, frozen=True):
    """One reason why an offer does not fit: what was asked for, what was needed."""

    reason: str
    needed: str
    offered: str


def matches(needs: Requirements, offer: Offer) -> bool:
    """True if a job of this class may run there: the short form of `refusals`."""
    return (
        needs.label in offer.labels
        and (offer.vos is None or needs.vo in offer.vos)
        and (not needs.queue or needs.queue == offer.queue)
        and (not needs.pilot_type or needs.pilot_type == offer.pilot_type)
        and needs.cores <= offer.cores
        and _fits(needs.memory_mb, offer.memory_mb)
        and _fits(needs.disk_mb, offer.disk_mb)
        and _fits(needs.walltime_s, offer.walltime_s)
        and (not needs.release or needs.release in offer.releases)
        and (not needs.platform or needs.platform in offer.platforms)
    )


def refusals(needs: Requirements, offer: Offer) -> list[Refusal]:
    """Every reason why a job of this class may not run there; empty exactly where `matches` is true."""
    found = []
    if needs.label not in offer.labels:
        found.append(Refusal("wrong_label", needs.label, "|".join(sorted(offer.labels))))
    if offer.vos is not None and needs.vo not in offer.vos:
        found.append(Refusal("wrong_vo", needs.vo, "|".join(sorted(offer.vos))))
    if needs.queue and needs.queue != offer.queue:
        found.append(Refusal("wrong_queue", needs.queue, offer.queue))
    if needs.pilot_type and needs.pilot_type != offer.pilot_type:
        found.append(Refusal("wrong_pilot_type", needs.pilot_type, offer.pilot_type))
    if needs.cores > offer.cores:
        found.append(Refusal("too_few_cores", str(needs.cores), str(offer.cores)))
    for name in ("memory_mb", "disk_mb", "walltime_s"):
        needed, offered = getattr(needs, name), getattr(offer, name)
        if not _fits(needed, offered):
            found.append(Refusal(f"too_little_{name}", str(needed), str(offered)))
    if needs.release and needs.release not in offer.releases:
        found.append(Refusal("no_matching_release", needs.release, "|".join(sorted(offer.releases))))
    if needs.platform and needs.platform not in offer.platforms:
        found.append(Refusal("no_matching_platform", needs.platform, "|".join(sorted(offer.platforms))))
    return found


def _fits(needed: int, offered: int) -> bool:
    return offered == 0 or needed <= offered
