"""What users ask: cancel, one job, pages of jobs. What spans shards says which of them gave no answer."""

import contextlib
from collections.abc import Container

import msgspec

from culm import access
from culm.errors import ClientFault, CulmError, Moved
from culm.ids import slot_of
from culm.topology import SLOT_BLOCKS, Topology
from culm.wire import (
    CancelAnswer,
    CancelledJob,
    CancelRequest,
    JobsAnswer,
    JobsQuery,
    JobView,
    Principal,
    ShardCancel,
    ShardJob,
    ShardJobs,
    SlotRef,
)
from router.forward import Forward


async def cancel(forward: Forward, principal: Principal, request: CancelRequest) -> CancelAnswer:
    """End jobs by id or a whole jobset; each id has its outcome.

    Raises ClientFault (bad_cancel, bad_job_id, forbidden). Safe to retry: yes.
    """
    access.require_role(principal, "user", "admin")
    if bool(request.ids) == (request.jobset is not None):
        raise ClientFault("bad_cancel", "either ids or a jobset is needed")

    ended: dict[int, CancelledJob] = {}
    missing: dict[str, CulmError] = {}

    async def attempt(topology: Topology) -> None:
        calls = _cancel_calls(topology, principal, request, ended)
        missing.clear()
        for (shard, _), answer in zip(
            calls, await forward.links.ask_many(calls, "cancel", CancelAnswer, forward.deadline_s), strict=True
        ):
            if isinstance(answer, CulmError):
                missing[shard] = answer
            else:
                # What an earlier attempt ended stays ended: a repeat would call it "already_final".
                ended.update((job.id, job) for job in answer.jobs if job.id not in ended)
        for error in missing.values():
            if isinstance(error, Moved):
                raise error

    with contextlib.suppress(ClientFault):
        forward.resolve(lambda topology: [topology.place(slot_of(identifier)) for identifier in request.ids])
    with contextlib.suppress(Moved):
        await forward.corrected(attempt)
    for identifier in request.ids:
        placed = slot_of(identifier) in forward.topology.placement
        ended.setdefault(identifier, CancelledJob(id=identifier, outcome="unknown" if placed else "not_found"))
    return CancelAnswer(jobs=list(ended.values()), missing_shards=list(missing))


async def job(forward: Forward, principal: Principal, identifier: int) -> JobView:
    """One job with its history. Raises ClientFault (unknown_job, bad_job_id, unknown_slot), Unavailable."""
    access.require_role(principal, "user", "admin")
    return await forward.to_slot(
        slot_of(identifier), "job", lambda at: ShardJob(at=at, principal=principal, id=identifier), JobView
    )


async def jobs(forward: Forward, principal: Principal, query: JobsQuery) -> JobsAnswer:
    """A page over all shards that the filters leave, in the order of the id; stable while jobs come and go.

    It may be short while more is to come: a shard looks at a bounded number of rows. What a missing shard has is
    missing from the walk too.

    Raises ClientFault (unknown_site, unknown_region, forbidden).
    """
    access.require_role(principal, "user", "admin")
    if query.owner and access.authority_of(query.owner) not in SLOT_BLOCKS:
        query = msgspec.structs.replace(query, owner=f"{principal.authority}:{query.owner}")
    by_shard = forward.resolve(lambda topology: _slots_of_query(topology, query))
    calls = [(shard, ShardJobs(principal=principal, query=query, slots=slots)) for shard, slots in by_shard.items()]
    answers = await forward.links.ask_many(calls, "jobs", JobsAnswer, forward.deadline_s)
    missing = [shard for (shard, _), answer in zip(calls, answers, strict=True) if isinstance(answer, CulmError)]
    pages = [answer for answer in answers if not isinstance(answer, CulmError)]
    # Beyond the smallest `next` some shard has not looked yet.
    known_to = min((page.next for page in pages if page.next is not None), default=None)
    merged = sorted((row for page in pages for row in page.jobs), key=lambda row: row.id)
    whole = [row for row in merged if known_to is None or row.id <= known_to]
    if len(whole) > query.limit:
        whole = whole[: query.limit]
        known_to = whole[-1].id
    return JobsAnswer(jobs=whole, next=known_to, missing_shards=missing)


def _cancel_calls(
    topology: Topology, principal: Principal, request: CancelRequest, ended: Container[int]
) -> list[tuple[str, ShardCancel]]:
    """One call per shard, for the ids that have no outcome yet and that a shard can know."""
    if request.jobset is not None:
        # A jobset may span shards: all are asked.
        jobset = ShardCancel(principal=principal, slots=[], jobset=request.jobset)
        return [(shard, jobset) for shard in topology.shards]
    by_shard: dict[str, dict[SlotRef, list[int]]] = {}
    for identifier in dict.fromkeys(request.ids):
        slot = slot_of(identifier)
        if identifier not in ended and slot in topology.placement:
            by_shard.setdefault(topology.place(slot).shard, {}).setdefault(topology.slot(slot), []).append(identifier)
    return [
        (shard, ShardCancel(principal=principal, slots=list(slots), ids=[i for ids in slots.values() for i in ids]))
        for shard, slots in by_shard.items()
    ]


def _slots_of_query(topology: Topology, query: JobsQuery) -> dict[str, list[int]]:
    if query.site:
        slots = list(topology.site(query.site).slots)
    elif query.region:
        region = topology.region(query.region)
        slots = [
            region.slot,
            *(s for site in topology.sites.values() if site.region == query.region for s in site.slots),
        ]
    else:
        return {shard: [] for shard in topology.shards}
    by_shard: dict[str, list[int]] = {}
    for slot in slots:
        by_shard.setdefault(topology.place(slot).shard, []).append(slot)
    return by_shard
