"""Who may do what: pure rules over a verified Principal, for the router and, where the job decides, the shard."""

from dataclasses import dataclass
from typing import Final

from culm.errors import ClientFault
from culm.ids import MAX_SLOT
from culm.topology import slot_block
from culm.wire import Principal

PRODUCTION: Final = "production"
MONITOR: Final = "monitor"


def require_role(principal: Principal, *roles: str) -> None:
    """Raises ClientFault(forbidden) unless the principal has one of these roles."""
    if principal.role not in roles:
        raise forbidden(f"this needs the role {' or '.join(roles)}, the token has {principal.role}")


def require_monitor(principal: Principal) -> None:
    """Raises ClientFault(forbidden) unless this is an admin, or a user with the role `monitor`: he may read metrics."""
    if principal.role != "admin" and not (principal.role == "user" and MONITOR in principal.roles):
        raise forbidden("metrics need an admin's token or a user's with the role monitor")


def is_production(principal: Principal) -> bool:
    """Whether it may ask for what changes the order among all: an admin, or the role production."""
    return principal.role == "admin" or PRODUCTION in principal.roles


def forbidden(message: str) -> ClientFault:
    """The error for what this principal may not do."""
    return ClientFault("forbidden", message, http_status=403)


def banned(account: str, reason: str) -> ClientFault:
    """The error for an account that an authority has banned."""
    return ClientFault("banned", f"{account} is banned: {reason}", http_status=403)


def allows_queue(principal: Principal, queue: str, authority: str) -> bool:
    """Whether a token may ask for jobs of a computing queue that an authority has registered (invariant I13).

    A pilot's is scoped for computing queues of its own authority, an admin's holds for all of those.
    """
    if principal.authority != authority:
        return False
    if principal.role == "admin":
        return True
    return principal.role == "pilot" and any(
        queue.startswith(scope[:-1]) if scope.endswith("*") else queue == scope for scope in principal.queues
    )


def authority_of(account: str) -> str:
    """The authority of an account, which is `authority:subject`."""
    return account.partition(":")[0]


def may_read(principal: Principal, *, vo: str, owner: str, authority: str) -> bool:
    """Users see the jobs of their own VO everywhere, an admin those of his authority, a pilot none.

    Who has no VO shares none with anybody: of the jobs without one he sees his own.

    Args:
        principal: who asks.
        vo: the job's.
        owner: the job's, an account.
        authority: in whose slots the job lies.
    """
    if principal.role == "admin":
        return _acts_for(principal, owner, authority)
    return principal.role == "user" and principal.vo == vo and (bool(vo) or principal.account == owner)


@dataclass(frozen=True)
class Reach:
    """What a principal may read of sums that know a slot and a VO, but no owner: the rule of `may_read` without owners.

    An admin's are the slots of his authority, a user's his VO everywhere; of one without a VO there are none.
    """

    vo: str | None
    """None: any."""
    first: int
    last: int
    """Slots, inclusive; none if `last` is the smaller one."""

    def holds(self, slot: int, vo: str) -> bool:
        """Whether he may read a sum."""
        return self.first <= slot <= self.last and self.vo in (None, vo)

    @property
    def arguments(self) -> tuple[int, str, int, int]:
        """For a statement: a switch, the VO, the first and the last slot."""
        return int(self.vo is not None), self.vo or "", self.first, self.last


def reach(principal: Principal) -> Reach:
    """How far the sums go that a principal may read. Raises ClientFault(unknown_authority) for an admin of none."""
    if principal.role == "admin":
        return Reach(None, *slot_block(principal.authority))
    if principal.role == "user" and principal.vo:
        return Reach(principal.vo, 0, MAX_SLOT)
    return Reach(None, 0, -1)


def may_end(principal: Principal, *, owner: str, vo: str, working_group: str, authority: str) -> bool:
    """An owner may end his jobs; of his authority's, a group's manager the group's, production its VO's, an admin all.

    A job is an authority's if it lies in its slots or belongs to an account of it.
    """
    if not _acts_for(principal, owner, authority):
        return False
    if principal.role != "user":
        return principal.role == "admin"
    if principal.vo != vo:
        return False
    is_manager = bool(working_group) and f"manager:{working_group}" in principal.roles
    return principal.account == owner or is_manager or PRODUCTION in principal.roles


def may_speak_for_data(principal: Principal, *, vo: str, owner: str, authority: str) -> bool:
    """Whether this is the data side of a job: it says when inputs are there and outputs are stored."""
    return _acts_for(principal, owner, authority) and (
        principal.role == "admin" or (principal.role == "user" and principal.vo == vo and PRODUCTION in principal.roles)
    )


def _acts_for(principal: Principal, owner: str, authority: str) -> bool:
    return principal.authority in (authority, authority_of(owner))
