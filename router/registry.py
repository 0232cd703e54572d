"""What operators change through the router: sites, computing queues and shards of this authority's section."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from culm import access, address, topology_store
from culm.errors import Conflict, Unavailable
from culm.registry_wire import (
    BanRequest,
    ChangedAnswer,
    QueueRequest,
    ShardRequest,
    SitesRequest,
    SlotsRequest,
    TopologyAnswer,
    VoRequest,
)
from culm.section_changes import add_shard, register_sites, set_ban, set_queue, set_slots, set_vo
from culm.shard_links import ShardLinks
from culm.topology import Section, Shard, Topology
from culm.topology_store import Who
from culm.wire import Principal

ANSWERS_S: Final = 2.0
"""How long a shard that joins may take to greet."""


@dataclass(frozen=True)
class Home:
    """The authority of this router, and the folder with the original of its section."""

    folder: Path
    authority: str


async def register(home: Home, principal: Principal, request: SitesRequest) -> ChangedAnswer:
    """Raises ClientFault (forbidden, bad_topology), Conflict (epoch_changed and others). Safe to retry: yes."""
    return await _change(
        home,
        principal,
        lambda section: register_sites(section, request.sites),
        request.reason,
        expected=request.expected_epoch,
    )


async def join(home: Home, links: ShardLinks, principal: Principal, request: ShardRequest) -> ChangedAnswer:
    """A shard joins that runs already: the first request for it must not find it down.

    Raises:
        ClientFault: forbidden, bad_address, bad_topology.
        Unavailable: shard_down, if none answers at that link.
        Conflict: other_shard (another one answers there), shard_exists, epoch_changed, name_taken.

    Safe to retry: yes.
    """
    _require_own(home, principal)
    address.parse(request.link)
    found = await links.who_answers(request.link, ANSWERS_S)
    if not found:
        raise Unavailable("shard_down", f"no shard answers at {request.link}: start it first (culm shard run)")
    if found != request.name:
        raise Conflict("other_shard", f"the shard at {request.link} is {found}, not {request.name}")
    shard = Shard(link=request.link, weight=request.weight)
    return await _change(
        home,
        principal,
        lambda section: add_shard(section, request.name, shard, request.region, strict=request.strict),
        request.reason,
        expected=request.expected_epoch,
    )


async def ban(home: Home, principal: Principal, request: BanRequest) -> ChangedAnswer:
    """Raises ClientFault (forbidden, bad_account, too_many_bans). Safe to retry: yes."""
    reason = request.reason if request.banned else None
    return await _change(home, principal, lambda section: set_ban(section, request.account, reason), request.reason)


async def set_fields(home: Home, principal: Principal, request: QueueRequest) -> ChangedAnswer:
    """Raises ClientFault (forbidden, unknown_queue, bad_queue). Safe to retry: yes."""
    changes = dict(request.changes)
    if "status" in changes:
        # A reason marks the status as set by an operator: a push of the catalogue keeps it.
        changes.setdefault("reason", request.reason or f"set by {principal.subject}")
    return await _change(home, principal, lambda section: set_queue(section, request.queue, **changes), request.reason)


async def spread(home: Home, principal: Principal, request: SlotsRequest) -> ChangedAnswer:
    """Raises ClientFault (forbidden, unknown_site, too_many_slots), Conflict (slots_cannot_shrink, ..).

    Safe to retry: yes.
    """
    return await _change(
        home, principal, lambda section: set_slots(section, request.site, request.n_slots), request.reason
    )


async def set_vo_fields(home: Home, principal: Principal, request: VoRequest) -> ChangedAnswer:
    """Raises ClientFault (forbidden, bad_vo), Conflict(epoch_changed). Safe to retry: yes."""
    return await _change(
        home,
        principal,
        lambda section: set_vo(section, request.vo, **request.changes),
        request.reason,
        expected=request.expected_epoch,
    )


def show(principal: Principal, topology: Topology) -> TopologyAnswer:
    """Every section. Raises ClientFault(forbidden) for a pilot."""
    access.require_role(principal, "user", "admin")
    sections = list(topology.sections.values())
    if principal.role == "user":
        # Who is banned, and why, is between him and the admins.
        sections = [msgspec.structs.replace(section, banned={}) for section in sections]
    return TopologyAnswer(sections=sections)


async def _change(
    home: Home,
    principal: Principal,
    edit: Callable[[Section], Section],
    reason: str,
    *,
    expected: int | None = None,
) -> ChangedAnswer:
    _require_own(home, principal)
    who = Who(actor=principal.account, reason=reason, at=time.time())
    # It waits for a lock and for the disk.
    section = await asyncio.to_thread(topology_store.change, home.folder, home.authority, edit, who, expected=expected)
    return ChangedAnswer(authority=section.authority, epoch=section.epoch)


def _require_own(home: Home, principal: Principal) -> None:
    """An admin changes the section of his own authority, at a router of that authority: elsewhere are only copies."""
    access.require_role(principal, "admin")
    if principal.authority != home.authority:
        raise access.forbidden(
            f"this router changes the section of {home.authority} only: ask a router of {principal.authority}"
        )
