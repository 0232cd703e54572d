"""What an admin does with the archives of his authority's shards."""

from culm import access
from culm.errors import ClientFault, CulmError
from culm.wire import (
    ArchiveAnswer,
    ArchiveRequest,
    ExportAnswer,
    ExportRequest,
    Principal,
    ShardArchive,
    ShardArchiveAnswer,
    ShardExport,
)
from router.forward import Forward

DEADLINE_S = 60.0
"""To drop a partition takes as long as its files take to go."""


async def export(forward: Forward, authority: str, principal: Principal, request: ExportRequest) -> ExportAnswer:
    """A page of a month of one shard's archive.

    Raises ClientFault (forbidden, unknown_shard, unknown_partition), Unavailable. Safe to retry: yes.
    """
    _require_admin(principal, authority)
    if request.shard not in forward.fresh_topology().sections[authority].shards:
        raise _unknown_shard(authority, request.shard)
    call = ShardExport(principal=principal, name=request.name, after=request.after)
    return await forward.links.ask(request.shard, "export", call, ExportAnswer, DEADLINE_S)


async def archive(forward: Forward, authority: str, principal: Principal, request: ArchiveRequest) -> ArchiveAnswer:
    """Move a batch, drop a partition, or only show what there is.

    Raises ClientFault (forbidden, unknown_shard; unknown_partition and partition_in_use where no shard did it),
    Conflict(archive_changed) too.
    Safe to retry: yes.
    """
    _require_admin(principal, authority)
    section = forward.fresh_topology().sections[authority]
    if request.shard and request.shard not in section.shards:
        raise _unknown_shard(authority, request.shard)
    names = [request.shard] if request.shard else sorted(section.shards)
    calls = [
        ShardArchive(
            principal=principal,
            older_s=request.older_s,
            drop=request.drop,
            exported=None if request.exported is None else request.exported.get(name, 0),
        )
        for name in names
    ]
    asked = list(zip(names, calls, strict=True))
    answers = await forward.links.ask_many(asked, "archive", ShardArchiveAnswer, DEADLINE_S)
    errors = [answer for answer in answers if isinstance(answer, CulmError)]
    if len(errors) == len(answers):
        # Nobody did it: why is worth more than who, and a refusal more than "not here".
        raise min(errors, key=lambda error: (error.retryable, error.http_status == 404))
    why = {name: str(answer) for name, answer in zip(names, answers, strict=True) if isinstance(answer, CulmError)}
    return ArchiveAnswer(
        shards=[answer for answer in answers if not isinstance(answer, CulmError)],
        missing_shards=list(why),
        why_missing=why,
    )


def _require_admin(principal: Principal, authority: str) -> None:
    access.require_role(principal, "admin")
    if principal.authority != authority:
        raise access.forbidden(f"this router speaks for the shards of {authority}, the token for {principal.authority}")


def _unknown_shard(authority: str, shard: str) -> ClientFault:
    return ClientFault("unknown_shard", f"{authority} has no shard {shard!r}", http_status=404)
