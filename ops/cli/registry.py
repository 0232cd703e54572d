"""The topology as an authority's router tells it, and the wait until a change of it is seen by the others."""

import asyncio
import re
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from culm.errors import ClientFault, Unavailable
from culm.policies import Policy
from culm.registry_wire import ChangedAnswer, SitesRequest, TopologyAnswer
from culm.topology import CENTRAL, Queue, SiteRegistration, Topology
from ops.cli.options import router
from ops.cluster import control
from ops.cluster.layout import Layout

MIN_TIMEOUT_S: Final = 1.0
"""Of what an operator types: no pilot gives signs of life more often."""
SETTLE_S: Final = 10.0
"""How long the other authorities' routers may take to see a change."""


def topology_of(folder: Path, authority: str) -> Topology:
    """Every section that the router of an authority knows. Raises Unavailable(not_running) and as Client.get."""

    async def ask() -> TopologyAnswer:
        async with router(folder, "admin", authority=authority) as client:
            return await client.get("topology", {}, TopologyAnswer)

    return Topology(asyncio.run(ask()).sections, authority)


def fields(changes: Iterable[str], kind: type[Policy], code: str) -> dict[str, Any]:
    """FIELD=VALUE as an operator types them, for a policy or a computing queue. Raises ClientFault with that code."""
    given: dict[str, str] = {}
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals:
            raise ClientFault(code, f"{change!r} is not FIELD=VALUE")
        if name in given:
            raise ClientFault(code, f"{name} is given twice: {given[name]!r} and {value!r}")
        given[name] = value
    try:
        described = msgspec.convert(given, kind, strict=False)
    except msgspec.ValidationError as error:
        raise ClientFault(code, by_name(str(error), "")) from None
    values = {name: getattr(described, name) for name in given}
    for name, value in values.items():
        if isinstance(value, float) and 0 < value < MIN_TIMEOUT_S:
            told = f"{name}: {value:g} s is less than {MIN_TIMEOUT_S:g}: every such job would be taken for lost"
            raise ClientFault(code, f"{told} (0 says nothing of it)")
    return values


def by_name(message: str, before: str) -> str:
    """What msgspec says of a field, by the name that the user knows it by: `before` it, and the field's own."""
    found = re.fullmatch(r"(.*) - at `\$\.([a-z_]+).*`", message)
    return f"{before}{found[2]}: {found[1]}" if found is not None else message


async def register_sites(
    folder: Path, known: Topology, regions: Mapping[str, str], queue_of: Callable[[str], str], reason: str
) -> dict[str, str]:
    """Register sites, by name with their region, each with one computing queue; which authority decides about each.

    All that is returned is seen by every authority that runs here. Raises as Client.post. Safe to retry: yes.
    """
    authority_of = {
        site: known.authority_of_region(region) if region in known.regions else CENTRAL
        for site, region in regions.items()
    }
    for authority in set(authority_of.values()):
        wanted = [
            SiteRegistration(name=site, region=regions[site], queues={queue_of(site): Queue()})
            for site in regions
            if authority_of[site] == authority
        ]
        async with router(folder, "admin", authority=authority) as client:
            answer = await client.post("sites", SitesRequest(sites=wanted, reason=reason), ChangedAnswer)
        await settle(folder, answer)
    return authority_of


async def settle(folder: Path, changed: ChangedAnswer) -> None:
    """Wait until the routers of the other authorities that run here know of a change; they ask every few seconds.

    Raises Unavailable(not_seen) for one that does not come to know it.
    """
    for home in Layout(folder).homes:
        told = control.status(home.folder)
        if home.authority == changed.authority or told is None or not told.alive:
            continue
        deadline = time.monotonic() + SETTLE_S
        async with router(folder, "admin", authority=home.authority) as client:
            while True:
                sections = (await client.get("topology", {}, TopologyAnswer)).sections
                if any(one.authority == changed.authority and one.epoch >= changed.epoch for one in sections):
                    break
                if time.monotonic() > deadline:
                    raise Unavailable(
                        "not_seen", f"{home.authority} has not seen epoch {changed.epoch} of {changed.authority} yet"
                    )
                await asyncio.sleep(0.1)
