"""What users ask: cancel, one job, pages of jobs. What spans shards says which of them gave no answer."""

from culm import access
from culm.errors import ClientFault, CulmError
from culm.ids import slot_of
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

    async def attempt(topology: Topology) -> CancelAnswer:
        calls, unknown = _cancel_calls(topology, principal, request)
        answers = await forward.links.ask_many(calls, "cancel", CancelAnswer, forward.deadline_s)
        ended = [CancelledJob(id=identifier, outcome="not_found") for identifier in unknown]
        missing = []
        for (shard, call), answer in zip(calls, answers, strict=True):
            if isinstance(answer, CulmError):
                missing.append(shard)
                ended += [CancelledJob(id=identifier, outcome="unknown") for identifier in call.ids]
            else:
                ended += answer.jobs
        return CancelAnswer(jobs=ended, missing_shards=missing)

    return await forward.corrected(attempt)


async def job(forward: Forward, principal: Principal, identifier: int) -> JobView:
    """One job with its history. Raises ClientFault (unknown_job, bad_job_id, unknown_slot), Unavailable."""
    access.require_role(principal, "user", "admin")
    return await forward.to_slot(
        slot_of(identifier), "job", lambda at: ShardJob(at=at, principal=principal, id=identifier), JobView
    )


async def jobs(forward: Forward, principal: Principal, query: JobsQuery) -> JobsAnswer:
    """A page over all shards that the filters leave, in the order of the id; stable while jobs come and go.

    Raises ClientFault (unknown_site, unknown_region, forbidden).
    """
    access.require_role(principal, "user", "admin")
    by_shard = _slots_of_query(forward.topology, query)
    calls = [(shard, ShardJobs(principal=principal, query=query, slots=slots)) for shard, slots in by_shard.items()]
    answers = await forward.links.ask_many(calls, "jobs", JobsAnswer, forward.deadline_s)
    missing = [shard for (shard, _), answer in zip(calls, answers, strict=True) if isinstance(answer, CulmError)]
    pages = [answer for answer in answers if not isinstance(answer, CulmError)]
    merged = sorted((row for page in pages for row in page.jobs), key=lambda row: row.id)
    more = len(merged) > query.limit or any(page.next is not None for page in pages)
    page = merged[: query.limit]
    return JobsAnswer(jobs=page, next=page[-1].id if more and page else None, missing_shards=missing)


def _cancel_calls(
    topology: Topology, principal: Principal, request: CancelRequest
) -> tuple[list[tuple[str, ShardCancel]], list[int]]:
    """One call per shard, and the ids that no shard can know."""
    if request.jobset is not None:
        # A jobset may span shards: all are asked.
        jobset = ShardCancel(principal=principal, slots=[], jobset=request.jobset)
        return [(shard, jobset) for shard in topology.shards], []
    by_shard: dict[str, dict[SlotRef, list[int]]] = {}
    unknown = []
    for identifier in request.ids:
        slot = slot_of(identifier)
        if slot in topology.placement:
            by_shard.setdefault(topology.place(slot).shard, {}).setdefault(topology.slot(slot), []).append(identifier)
        else:
            unknown.append(identifier)
    calls = [
        (shard, ShardCancel(principal=principal, slots=list(slots), ids=[i for ids in slots.values() for i in ids]))
        for shard, slots in by_shard.items()
    ]
    return calls, unknown


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
