"""Submit: cut a call by shard, forward the parts at once, say per shard what became of it."""

import hashlib
from collections.abc import Iterable
from typing import Final

import msgspec

from culm import access
from culm.errors import CulmError, Moved, Unavailable
from culm.frames import error_body
from culm.ids import slot_of
from culm.topology import Topology, authority_of_slot
from culm.wire import (
    MAX_WARNINGS,
    JobSpec,
    Principal,
    ShardDepths,
    ShardDepthsAnswer,
    ShardKnown,
    ShardKnownAnswer,
    ShardOutcome,
    ShardSubmit,
    ShardSubmitAnswer,
    SubmitAnswer,
    SubmitRequest,
    SubmitWarning,
)
from router.forward import Forward
from router.policy import check_jobs
from router.resolve import ShardPart, jobset_of, slots_of_key, split_by_shard

_CANONICAL: Final = msgspec.msgpack.Encoder(order="deterministic")


async def submit(forward: Forward, principal: Principal, request: SubmitRequest) -> SubmitAnswer:
    """Accept a call: atomic per shard, and its repeat completes what a missing shard left open.

    Raises:
        ClientFault: bad_job, forbidden, banned, bad_target, unknown_queue, _site, _region, _parent.
        Conflict: key_reused.
        Unavailable: partial_submit, with the SubmitAnswer so far in details["answer"]; or as the shards say.

    Where one of several shards refused its part for good, its error is raised, with the same details.

    Safe to retry: yes, by the idempotency key.
    """
    check_jobs(principal, request.jobs)
    forward.resolve(
        lambda topology: split_by_shard(topology, request.jobs, request.idempotency_key, principal.authority)
    )
    depths = await _parent_depths(forward, request.jobs)
    jobset = request.jobset or jobset_of(principal.account, request.idempotency_key)
    digest = hashlib.blake2b(_CANONICAL.encode((jobset, request.jobs)), digest_size=16).digest()

    async def attempt(topology: Topology) -> SubmitAnswer:
        known = await _stored_before(forward, topology, principal, request)
        parts = split_by_shard(topology, request.jobs, request.idempotency_key, principal.authority, known)
        _require_not_banned(topology, principal, parts)
        calls = [
            (
                part.shard,
                ShardSubmit(
                    principal=principal,
                    key=request.idempotency_key,
                    jobset=jobset,
                    parts=part.slots,
                    parent_depths=depths,
                    call_digest=digest,
                ),
            )
            for part in parts
        ]
        answers = await forward.links.ask_many(calls, "submit", ShardSubmitAnswer, forward.deadline_s)
        return _merge(len(request.jobs), jobset, list(zip(parts, answers, strict=True)))

    return await forward.corrected(attempt)


async def _stored_before(
    forward: Forward, topology: Topology, principal: Principal, request: SubmitRequest
) -> dict[int, int]:
    """By the slot that the key has now: where its jobs are already, if a hot site had fewer slots then (I2).

    Asked of sites with several slots only. Raises Unavailable where a shard gives no answer: to go on would be to risk
    that the jobs are stored twice.
    """
    names = {topology.queue(spec.queue)[0] if spec.queue else spec.site for spec in request.jobs} - {""}
    hot = [site for site in map(topology.site, sorted(names)) if len(site.slots) > 1]
    before = {slots[-1]: slots[:-1] for site in hot if len(slots := slots_of_key(site, request.idempotency_key)) > 1}
    by_shard: dict[str, list[int]] = {}
    for slot in {slot for slots in before.values() for slot in slots}:
        by_shard.setdefault(topology.place(slot).shard, []).append(slot)
    asked = [
        (shard, ShardKnown(account=principal.account, key=request.idempotency_key, slots=slots))
        for shard, slots in by_shard.items()
    ]
    stored: set[int] = set()
    for answer in await forward.links.ask_many(asked, "known", ShardKnownAnswer, forward.deadline_s):
        if isinstance(answer, CulmError):
            raise answer
        stored.update(answer.slots)
    return {now: next(slot for slot in slots if slot in stored) for now, slots in before.items() if stored & {*slots}}


def _require_not_banned(topology: Topology, principal: Principal, parts: list[ShardPart]) -> None:
    """Raises ClientFault(banned)."""
    for authority in sorted({authority_of_slot(one.at.slot) for part in parts for one in part.slots}):
        reason = topology.ban_of(principal.account, authority)
        if reason is not None:
            raise access.banned(principal.account, reason)


def _merge(n_jobs: int, jobset: int, done: list[tuple[ShardPart, ShardSubmitAnswer | CulmError]]) -> SubmitAnswer:
    ids: list[int | None] = [None] * n_jobs
    shards: dict[str, ShardOutcome] = {}
    errors: list[CulmError] = []
    warnings: list[SubmitWarning] = []
    for part, answer in done:
        if isinstance(answer, CulmError):
            errors.append(answer)
            shards[part.shard] = ShardOutcome(ok=False, n_jobs=part.n_jobs, error=error_body(answer))
            continue
        shards[part.shard] = ShardOutcome(ok=True, n_jobs=part.n_jobs)
        for places, first_id in zip(part.places, answer.first_ids, strict=True):
            for offset, place in enumerate(places):
                ids[place] = first_id + offset
        in_call = [place for places in part.places for place in places]
        warnings += [msgspec.structs.replace(one, index=in_call[one.index]) for one in answer.warnings]
    warnings.sort(key=lambda one: one.index)
    merged = SubmitAnswer(jobset=jobset, ids=ids, shards=shards, warnings=warnings[:MAX_WARNINGS])
    if not errors:
        return merged
    moved = next((error for error in errors if isinstance(error, Moved)), None)
    if moved is not None:
        # The parts that were accepted are found again by their key.
        raise moved
    if len(done) == 1:
        raise errors[0]
    final = next((error for error in errors if not error.retryable), None)
    if final is not None:
        # A repeat could never complete the call: its caller is told so, and what the other shards did.
        final.details |= {"answer": merged}
        raise final
    raise Unavailable(
        "partial_submit",
        f"{len(errors)} of {len(done)} shards did not accept their part; repeat the call with the same key",
        retry_after_s=max(error.retry_after_s or 1.0 for error in errors),
        details={"answer": merged},
    )


async def _parent_depths(forward: Forward, specs: list[JobSpec]) -> dict[int, int]:
    """How deep the parents lie: each is asked of its own shard, for a child may live on another."""
    parents = {spec.parent_id for spec in specs if spec.parent_id is not None}
    by_shard = forward.resolve(lambda topology: _ids_by_shard(topology, parents))
    calls = [(shard, ShardDepths(ids=ids)) for shard, ids in by_shard.items()]
    depths: dict[int, int] = {}
    for answer in await forward.links.ask_many(calls, "depths", ShardDepthsAnswer, forward.deadline_s):
        if isinstance(answer, CulmError):
            raise answer
        depths |= answer.depths
    return depths


def _ids_by_shard(topology: Topology, ids: Iterable[int]) -> dict[str, list[int]]:
    by_shard: dict[str, list[int]] = {}
    for identifier in ids:
        by_shard.setdefault(topology.place(slot_of(identifier)).shard, []).append(identifier)
    return by_shard
