"""Why a job is not running: the shard's word, and what only the router can say where the shard gives none."""

from culm import access
from culm.errors import CulmError, Unavailable
from culm.ids import slot_of
from culm.topology import Topology, authority_of_slot
from culm.wire import (
    Principal,
    QueueWhy,
    Reason,
    Refused,
    ShardJob,
    ShardSiteWhy,
    SiteWhyAnswer,
    WhyAnswer,
)
from router.forward import Forward


async def why(forward: Forward, authority: str, principal: Principal, identifier: int) -> WhyAnswer:
    """Why a job is not running; a shard that cannot be asked is a reason, not an error.

    Args:
        forward: the way to the shards.
        authority: this router's.
        principal: who asks.
        identifier: of the job.

    Raises ClientFault (unknown_job, bad_job_id, unknown_slot, forbidden). Safe to retry: yes.
    """
    access.require_role(principal, "user", "admin")
    try:
        return await forward.to_slot(
            slot_of(identifier), "why", lambda at: ShardJob(at=at, principal=principal, id=identifier), WhyAnswer
        )
    except Unavailable as error:
        return WhyAnswer(
            id=identifier, state=None, reasons=[_unreachable(forward, authority, slot_of(identifier), error)]
        )


async def site_why(forward: Forward, principal: Principal, name: str) -> SiteWhyAnswer:
    """What the pilots of a site ask for, get and are refused for, over the shards that they ask.

    Raises ClientFault (unknown_site, forbidden). Safe to retry: yes.
    """
    access.require_role(principal, "user", "admin")
    shards = forward.resolve(lambda topology: _shards_of(topology, name))
    call = ShardSiteWhy(principal=principal, site=name)
    answers = await forward.links.ask_many(
        [(shard, call) for shard in shards], "site_why", SiteWhyAnswer, forward.deadline_s
    )
    heard = [answer for answer in answers if not isinstance(answer, CulmError)]
    missing = [shard for shard, answer in zip(shards, answers, strict=True) if isinstance(answer, CulmError)]
    if not heard:
        raise Unavailable("shard_down", f"none of the shards of {name} answers: {', '.join(missing)}")
    merged = [_merge(list(parts)) for parts in zip(*(answer.queues for answer in heard), strict=True)]
    return SiteWhyAnswer(site=name, window_s=heard[0].window_s, queues=merged, missing_shards=missing)


def _unreachable(forward: Forward, authority: str, slot: int, error: Unavailable) -> Reason:
    topology = forward.topology
    shard = topology.place(slot).shard
    owner = authority_of_slot(slot)
    if owner != authority and not forward.links.any_connected(topology.sections[owner].shards):
        told = f"no shard of {owner} can be reached from here: ask its own router; the job is where it was"
        return Reason(code="region_cut_off", text=told)
    told = (
        f"shard {shard} does not answer ({error.message}): what it has accepted is stored, and goes on when it is back"
    )
    return Reason(code="shard_down", text=told)


def _shards_of(topology: Topology, name: str) -> list[str]:
    site = topology.site(name)
    slots = [*site.slots, topology.region(site.region).slot]
    return list(dict.fromkeys(topology.place(slot).shard for slot in slots))


def _merge(parts: list[QueueWhy]) -> QueueWhy:
    """One computing queue as several shards see it: its pilots ask all of them, and get jobs from each."""
    first = parts[0]
    refused: dict[tuple[str, str, str], Refused] = {}
    for one in (one for part in parts for one in part.refused):
        key = (one.code, one.needed, one.offered)
        n_before = refused[key].n_classes if key in refused else 0
        refused[key] = Refused(
            code=one.code,
            needed=one.needed,
            offered=one.offered,
            n_classes=n_before + one.n_classes,
            example=refused[key].example if key in refused else one.example,
        )
    last = [part.last_asked_at for part in parts if part.last_asked_at is not None]
    return QueueWhy(
        queue=first.queue,
        status=first.status,
        reason=first.reason,
        last_asked_at=max(last, default=None),
        n_pilots=max(part.n_pilots for part in parts),
        n_asked=max(part.n_asked for part in parts),
        n_given=sum(part.n_given for part in parts),
        refused=list(refused.values()),
    )
