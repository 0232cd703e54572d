"""From what a request names to slots and offers: pure, over one Topology."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType

from culm import labels
from culm.errors import ClientFault
from culm.matching import Offer
from culm.topology import Queue, Site, Topology
from culm.wire import GetJobRequest, JobSpec, LeaseTimes, Principal, SlotJobs, SlotRef


@dataclass
class ShardPart:
    """One shard's part of a submit: per slot the places in the call, and what to send."""

    shard: str
    places: list[list[int]] = field(default_factory=list)
    slots: list[SlotJobs] = field(default_factory=list)

    @property
    def n_jobs(self) -> int:
        """How many jobs go there."""
        return sum(map(len, self.places))


def stable_hash(*words: str) -> int:
    """The same number for the same words in every process and version: placement hangs on it."""
    return int.from_bytes(hashlib.blake2b("\0".join(words).encode(), digest_size=6).digest(), "big")


def jobset_of(owner: str, key: str) -> int:
    """The jobset that a submit makes: the same for every repeat of its key, always below 2**48."""
    return stable_hash("jobset", owner, key) or 1


def slots_of_key(site: Site, key: str) -> list[int]:
    """Where a site with several slots keeps the jobs of an idempotency key: in the last of these, or in an earlier one.

    Each is the slot that the key had while the site had fewer slots (rendezvous hashing: a new slot takes keys from
    the others, and changes nothing between those). The first is where the key was when the site had one.
    """
    return _slots_of_key(tuple(site.slots), key)


@lru_cache(maxsize=1024)
def _slots_of_key(slots: tuple[int, ...], key: str) -> list[int]:
    found: list[int] = []
    best = -1
    for slot in slots:
        weight = stable_hash(key, str(slot))
        if weight > best:
            best = weight
            found.append(slot)
    return found


def split_by_shard(
    topology: Topology,
    specs: Sequence[JobSpec],
    key: str,
    authority: str,
    known: Mapping[int, int] = MappingProxyType({}),
) -> list[ShardPart]:
    """Cut a call into the parts of its shards, in the order of the slots' first jobs; `authority` is the submitter's.

    `known` says of a slot that the key has now in which one its jobs are already, if the site had fewer slots then.

    Raises ClientFault (unknown_queue, unknown_site, unknown_region, bad_target) that names the first offending job.
    """
    places: dict[int, list[int]] = {}
    for index, spec in enumerate(specs):
        try:
            slot = target_slot(topology, spec, key, authority)
            places.setdefault(known.get(slot, slot), []).append(index)
        except ClientFault as error:
            raise ClientFault(
                error.code, f"jobs[{index}]: {error.message}", http_status=error.http_status, details={"index": index}
            ) from None
    parts: dict[str, ShardPart] = {}
    for slot, indexes in places.items():
        shard = topology.place(slot).shard
        part = parts.setdefault(shard, ShardPart(shard))
        part.places.append(indexes)
        some = [specs[index] for index in indexes]
        offsets = [_priority_offset(topology, spec) for spec in some]
        part.slots.append(SlotJobs(at=topology.slot(slot), specs=some, offsets=offsets if any(offsets) else []))
    return list(parts.values())


def target_slot(topology: Topology, spec: JobSpec, key: str, authority: str) -> int:
    """The slot of a job: a computing queue's or site's pin beats a region's, that beats the authority's default region.

    A site with several slots takes the one that the idempotency key says, so that jobs spread and a repeat goes where
    the first went (`slots_of_key`).
    """
    if spec.queue:
        site_name, site, _ = topology.queue(spec.queue)
        if spec.site and spec.site != site_name:
            raise ClientFault("bad_target", f"computing queue {spec.queue} belongs to {site_name}, not to {spec.site}")
    elif spec.site:
        site_name, site = spec.site, topology.site(spec.site)
    else:
        name = spec.region or topology.default_region(authority)
        if not name:
            raise ClientFault("bad_target", f"no queue, site or region is named, and {authority} has no default region")
        return topology.region(name).slot
    if spec.region and spec.region != site.region:
        raise ClientFault("bad_target", f"site {site_name} belongs to region {site.region}, not to {spec.region}")
    return slots_of_key(site, key)[-1]


def pilot_slots(topology: Topology, site: Site, pilot_id: str) -> list[tuple[str, list[SlotRef]]]:
    """The slots whose jobs a pilot of this site may take, by shard, its home slot's shard first.

    Home slot, sibling slots, then the region's own slot: jobs pinned to no more than a region are bound here, as late
    as can be.
    """
    home = stable_hash(pilot_id) % len(site.slots)
    slots = [*site.slots[home:], *site.slots[:home], topology.region(site.region).slot]
    by_shard: dict[str, list[SlotRef]] = {}
    for slot in slots:
        by_shard.setdefault(topology.place(slot).shard, []).append(topology.slot(slot))
    return list(by_shard.items())


def offer_of(principal: Principal, request: GetJobRequest, queue: Queue) -> Offer:
    """What a pilot and its computing queue offer together: the smaller of two known limits.

    A queue that is offline offers nothing new, but a repeated request still finds its first answer.
    """
    allowed = labels.allowed_job_labels(request.label, queue_status=queue.status, queue_type=queue.type)
    return Offer(
        queue=request.queue,
        labels=frozenset() if queue.status == "offline" else allowed,
        vos=None if principal.vos is None else frozenset(principal.vos),
        cores=_smaller(request.cores, queue.cores),
        memory_mb=_smaller(request.memory_mb, queue.memory_mb),
        disk_mb=_smaller(request.disk_mb, queue.disk_mb),
        walltime_s=_smaller(request.walltime_s, queue.walltime_s),
        releases=frozenset(queue.releases),
        platforms=frozenset(queue.platforms),
        pilot_type=request.pilot.type,
    )


def lease_times(queue: Queue) -> LeaseTimes:
    """The computing queue's own time-outs, 0 where the shard's defaults hold."""
    return LeaseTimes(queue.first_lease_s, queue.heartbeat_s)


def _smaller(asked: int, described: int) -> int:
    """The smaller of two limits, where 0 means that none is known."""
    return min(asked, described) if asked and described else asked or described


def _priority_offset(topology: Topology, spec: JobSpec) -> int:
    """The largest offset that applies (PanDA's rule): of the pinned queue, else of any of the site's queues."""
    if spec.queue:
        queues = [topology.queue(spec.queue)[2]]
    elif spec.site:
        queues = list(topology.site(spec.site).queues.values())
    else:
        return 0
    offsets = [q.priority_offsets[g] for q in queues for g in {"", spec.working_group} if g in q.priority_offsets]
    return max(offsets, default=0)
