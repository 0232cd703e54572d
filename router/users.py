"""What users ask: cancel, one job, pages of jobs. What spans shards says which of them gave no answer."""

import contextlib
from collections.abc import Container

from culm import access
from culm.errors import ClientFault, CulmError, Moved
from culm.ids import slot_of
from culm.merged_jobs import merged_jobs
from culm.topology import Topology
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
    SlotRef,
)
from router.forward import Forward


async def cancel(forward: Forward, principal: Principal, request: CancelRequest) -> CancelAnswer:
    """End jobs by id or a whole jobset; each id has its outcome.

    Raises ClientFault (bad_cancel, bad_job_id, forbidden). Safe to retry: yes.
    """
    access.require_role(principal, "user", "admin")
    if bool(request.ids) == (request.jobset is not None):
        raise ClientFault("bad_cancel", "exactly one is needed: ids or a jobset")
    if request.after and request.jobset is None:
        raise ClientFault("bad_cancel", "`after` goes with a jobset")

    ended: dict[int, CancelledJob] = {}
    missing: dict[str, CulmError] = {}
    following: set[int] = set()

    async def attempt(topology: Topology) -> None:
        calls = _cancel_calls(topology, principal, request, ended)
        missing.clear()
        following.clear()
        for (shard, _), answer in zip(
            calls, await forward.links.ask_many(calls, "cancel", CancelAnswer, forward.deadline_s), strict=True
        ):
            if isinstance(answer, CulmError):
                missing[shard] = answer
            else:
                # What an earlier attempt ended stays ended: a repeat would call it "already_final".
                ended.update((job.id, job) for job in answer.jobs if job.id not in ended)
                following.update(() if answer.next is None else (answer.next,))
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
    # Whoever got further than the first to stop ends nothing twice: what is final stays as it is.
    following_after = min(following, default=None)
    return CancelAnswer(jobs=list(ended.values()), missing_shards=list(missing), next=following_after)


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
    return await merged_jobs(forward.resolve, forward.links, principal, query, forward.deadline_s)


def _cancel_calls(
    topology: Topology, principal: Principal, request: CancelRequest, ended: Container[int]
) -> list[tuple[str, ShardCancel]]:
    """One call per shard, for the ids that have no outcome yet and that a shard can know."""
    if request.jobset is not None:
        # A jobset may span shards: all are asked.
        jobset = ShardCancel(principal=principal, slots=[], jobset=request.jobset, after=request.after)
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
