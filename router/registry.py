"""What operators change through the router: sites, computing queues and shards of this authority's section."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from culm import access, topology_store
from culm.topology import Section, Shard, SiteRegistration, Topology, add_shard, register_sites, set_queue
from culm.topology_store import Who
from culm.wire import Answer, Name, OptionalName, Principal, Request

MAX_SITES_PER_CALL = 1000


@dataclass(frozen=True)
class Home:
    """The authority of this router, and the folder with the original of its section."""

    folder: Path
    authority: str


class SitesRequest(Request, frozen=True, kw_only=True):
    """Register sites, or bring their computing queues up to date."""

    sites: Annotated[list[SiteRegistration], Meta(min_length=1, max_length=MAX_SITES_PER_CALL)]
    reason: Annotated[str, Meta(max_length=500)] = ""


class QueueRequest(Request, frozen=True, kw_only=True):
    """Change fields of one computing queue."""

    queue: Name
    changes: Annotated[dict[str, Any], Meta(min_length=1)]
    reason: Annotated[str, Meta(max_length=500)] = ""


class ChangedAnswer(Answer, frozen=True, kw_only=True):
    """The section's epoch after the change; the same as before if there was nothing to change."""

    authority: str
    epoch: int


class ShardRequest(Request, frozen=True, kw_only=True):
    """Add a shard that is running: it serves the sites that are registered in its region from now on."""

    name: Name
    link: Annotated[str, Meta(min_length=1, max_length=300)]
    """Where the routers reach it: `unix:/path` or `tls:host:port`."""
    region: OptionalName = ""
    """Made if it is new, with its own slot on this shard; "" to serve regions that come later."""
    strict: bool = False
    """Of a new region: its jobs may lie on its own shards only."""
    weight: Annotated[int, Meta(ge=0, le=100)] = 1
    """Its share of new sites, next to the region's other shards."""
    expected_epoch: int | None = None
    """The section's epoch that the plan was made for; None to build on whatever is there."""
    reason: Annotated[str, Meta(max_length=500)] = ""


class AuthorityAnswer(Answer, frozen=True, kw_only=True):
    """What one authority decides: its section, and its public keys, PEM by kid."""

    authority: str
    section: Section
    keys: dict[str, str]


class TopologyAnswer(Answer, frozen=True, kw_only=True):
    """Every section that this router knows."""

    sections: list[Section]


async def register(home: Home, principal: Principal, request: SitesRequest) -> ChangedAnswer:
    """Raises ClientFault (forbidden, bad_topology), Conflict. Safe to retry: yes."""
    return await _change(home, principal, lambda section: register_sites(section, request.sites), request.reason)


async def join(home: Home, principal: Principal, request: ShardRequest) -> ChangedAnswer:
    """Raises ClientFault (forbidden, bad_topology), Conflict (shard_exists, epoch_changed). Safe to retry: yes."""
    shard = Shard(link=request.link, weight=request.weight)
    return await _change(
        home,
        principal,
        lambda section: add_shard(section, request.name, shard, request.region, strict=request.strict),
        request.reason,
        expected=request.expected_epoch,
    )


async def set_fields(home: Home, principal: Principal, request: QueueRequest) -> ChangedAnswer:
    """Raises ClientFault (forbidden, unknown_queue, bad_queue). Safe to retry: yes."""
    changes = dict(request.changes)
    if "status" in changes:
        # A reason marks the status as set by an operator: a push of the catalogue keeps it.
        changes.setdefault("reason", request.reason or f"set by {principal.subject}")
    return await _change(home, principal, lambda section: set_queue(section, request.queue, **changes), request.reason)


def show(principal: Principal, topology: Topology) -> TopologyAnswer:
    """Every section. Raises ClientFault(forbidden) for a pilot."""
    access.require_role(principal, "user", "admin")
    return TopologyAnswer(sections=list(topology.sections.values()))


async def _change(
    home: Home,
    principal: Principal,
    edit: Callable[[Section], Section],
    reason: str,
    *,
    expected: int | None = None,
) -> ChangedAnswer:
    """An admin changes the section of his own authority, at a router of that authority: elsewhere are only copies."""
    access.require_role(principal, "admin")
    if principal.authority != home.authority:
        raise access.forbidden(
            f"this router changes the section of {home.authority} only: ask a router of {principal.authority}"
        )
    who = Who(actor=f"{principal.authority}:{principal.subject}", reason=reason, at=time.time())
    # It waits for a lock and for the disk.
    section = await asyncio.to_thread(topology_store.change, home.folder, home.authority, edit, who, expected=expected)
    return ChangedAnswer(authority=section.authority, epoch=section.epoch)
