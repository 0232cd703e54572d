"""Who may do what: pure rules over a verified Principal, for the router and, where the job decides, the shard."""

from typing import Final

from culm.errors import ClientFault
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


def forbidden(message: str) -> ClientFault:
    """The error for what this principal may not do."""
    return ClientFault("forbidden", message, http_status=403)


def allows_queue(principal: Principal, queue: str) -> bool:
    """Whether a pilot's token is scoped for a computing queue (invariant I13); an admin's always is."""
    if principal.role == "admin":
        return True
    return principal.role == "pilot" and any(
        queue.startswith(scope[:-1]) if scope.endswith("*") else queue == scope for scope in principal.queues
    )


def may_read(principal: Principal, vo: str) -> bool:
    """Users see the jobs of their own VO, an admin sees all, a pilot none."""
    return principal.role == "admin" or (principal.role == "user" and principal.vo == vo)


def may_end(principal: Principal, *, owner: str, vo: str, working_group: str) -> bool:
    """An owner may end his jobs, a group's manager the group's, production its VO's, an admin all."""
    if principal.role != "user":
        return principal.role == "admin"
    if principal.vo != vo:
        return False
    is_manager = bool(working_group) and f"manager:{working_group}" in principal.roles
    return principal.subject == owner or is_manager or PRODUCTION in principal.roles


def may_speak_for_data(principal: Principal, vo: str) -> bool:
    """Whether this is the data side of a VO: it says when inputs are there and outputs are stored."""
    return principal.role == "admin" or (
        principal.role == "user" and principal.vo == vo and PRODUCTION in principal.roles
    )
