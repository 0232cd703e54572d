"""What an admin does with the archives of his authority's shards."""

from culm import access
from culm.errors import ClientFault, CulmError
from culm.wire import ArchiveAnswer, ArchiveRequest, Principal, ShardArchive, ShardArchiveAnswer
from router.forward import Forward

DEADLINE_S = 60.0
"""To drop a partition takes as long as its files take to go."""


async def archive(forward: Forward, authority: str, principal: Principal, request: ArchiveRequest) -> ArchiveAnswer:
    """Move a batch, drop a partition, or only show what there is.

    Raises ClientFault (forbidden, unknown_shard; unknown_partition and partition_in_use where no shard did it).
    Safe to retry: yes.
    """
    access.require_role(principal, "admin")
    if principal.authority != authority:
        raise access.forbidden(f"this router speaks for the shards of {authority}, the token for {principal.authority}")
    section = forward.fresh_topology().sections[authority]
    if request.shard and request.shard not in section.shards:
        raise ClientFault("unknown_shard", f"{authority} has no shard {request.shard!r}", http_status=404)
    names = [request.shard] if request.shard else sorted(section.shards)
    call = ShardArchive(principal=principal, older_s=request.older_s, drop=request.drop)
    answers = await forward.links.ask_many([(name, call) for name in names], "archive", ShardArchiveAnswer, DEADLINE_S)
    errors = [answer for answer in answers if isinstance(answer, CulmError)]
    if len(errors) == len(answers):
        # Nobody did it: why is worth more than who, and a refusal more than "not here".
        raise min(errors, key=lambda error: (error.retryable, error.http_status == 404))
    return ArchiveAnswer(
        shards=[answer for answer in answers if not isinstance(answer, CulmError)],
        missing_shards=[name for name, answer in zip(names, answers, strict=True) if isinstance(answer, CulmError)],
    )
