"""Policies: what a VO or a computing queue says of time-outs and submit defaults. Pure; `culm.topology` keeps them."""

from collections.abc import Mapping
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from culm.errors import ClientFault
from culm.priorities import MAX_PRIORITY

MAX_VOS: Final = 1000
"""That have a policy of their own, of one authority."""

Amount = Annotated[int, Meta(ge=0, le=2**31 - 1)]
LeaseSeconds = Annotated[float, Meta(ge=0, le=10_000_000)]
"""Bounded: MessagePack can carry infinity, which the JSON of a section would turn into null, readable to nobody."""


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """Time-outs of jobs, seconds, and what a submit gets that does not say. 0 leaves it to whoever is asked next.

    The computing queue is asked first, then the VO, then the settings of the shard. The time-outs are those of
    `culm.settings.Timeouts`. A computing queue's time-outs are for the jobs that its pilots hold; while a job waits,
    and for its defaults, the queue that counts is the one it is pinned to.
    """

    first_lease_s: LeaseSeconds = 0.0
    heartbeat_s: LeaseSeconds = 0.0
    holding_s: LeaseSeconds = 0.0
    transferring_s: LeaseSeconds = 0.0
    activated_s: LeaseSeconds = 0.0
    unready_s: LeaseSeconds = 0.0
    default_cores: Annotated[int, Meta(ge=0, le=4096)] = 0
    default_memory_mb: Amount = 0
    default_disk_mb: Amount = 0
    default_walltime_s: Amount = 0
    default_max_attempts: Annotated[int, Meta(ge=0, le=50)] = 0
    max_priority: Annotated[int, Meta(ge=0, le=MAX_PRIORITY)] = 0
    """No job gets a higher priority, whatever was asked for or the formula gives."""


NO_POLICY: Final = Policy()


def over(first: Policy, then: Policy) -> Policy:
    """What two policies say together: the first one's word, and the second's where the first says nothing."""
    return Policy(**{name: getattr(first, name) or getattr(then, name) for name in Policy.__struct_fields__})


def changed(vos: Mapping[str, Policy], vo: str, changes: Mapping[str, object]) -> dict[str, Policy]:
    """The policies by VO with fields of one changed; a policy that says nothing any more is dropped.

    Raises ClientFault(bad_vo) for a field or a value that a policy cannot have, or for too many policies.
    """
    known = vos.get(vo, NO_POLICY)
    try:
        policy = msgspec.convert(msgspec.to_builtins(known) | dict(changes), Policy)
    except msgspec.ValidationError as error:
        raise ClientFault("bad_vo", f"VO {vo}: {error}") from None
    kept = {name: one for name, one in vos.items() if name != vo}
    if policy == NO_POLICY:
        return kept
    if len(kept) >= MAX_VOS:
        raise ClientFault("bad_vo", f"{MAX_VOS} VOs have a policy already")
    return kept | {vo: policy}
