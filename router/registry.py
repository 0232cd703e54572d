"""What operators change through the router: sites and computing queues of this authority's section."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

from culm import access, topology_store
from culm.registry_wire import ChangedAnswer, QueueRequest, SitesRequest, TopologyAnswer
from culm.topology import Section, Topology, register_sites, set_queue
from culm.topology_store import Who
from culm.wire import Principal


async def register(folder: Path, principal: Principal, request: SitesRequest) -> ChangedAnswer:
    """Raises ClientFault (forbidden, bad_topology), Conflict. Safe to retry: yes."""
    return await _change(folder, principal, lambda section: register_sites(section, request.sites), request.reason)


async def set_fields(folder: Path, principal: Principal, request: QueueRequest) -> ChangedAnswer:
    """Raises ClientFault (forbidden, unknown_queue, bad_queue). Safe to retry: yes."""
    changes = dict(request.changes)
    if "status" in changes:
        # A reason marks the status as set by an operator: a push of the catalogue keeps it.
        changes.setdefault("reason", request.reason or f"set by {principal.subject}")
    return await _change(
        folder, principal, lambda section: set_queue(section, request.queue, **changes), request.reason
    )


def show(principal: Principal, topology: Topology) -> TopologyAnswer:
    """Every section. Raises ClientFault(forbidden) for a pilot."""
    access.require_role(principal, "user", "admin")
    return TopologyAnswer(sections=list(topology.sections.values()))


async def _change(folder: Path, principal: Principal, edit: Callable[[Section], Section], reason: str) -> ChangedAnswer:
    """An admin changes the section of his own authority, whichever router he asks."""
    access.require_role(principal, "admin")
    who = Who(actor=f"{principal.authority}:{principal.subject}", reason=reason, at=time.time())
    # It waits for a lock and for the disk.
    section = await asyncio.to_thread(topology_store.change, folder, principal.authority, edit, who)
    return ChangedAnswer(authority=section.authority, epoch=section.epoch)
