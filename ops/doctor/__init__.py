"""What a machine and a cluster lack: versions, disk, ports, topology, keys and the databases' settings."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

from culm import settings, topology_store
from culm.errors import CulmError
from culm.settings import ShardSettings
from culm.topology import CENTRAL, validate
from ops.cluster import control
from ops.cluster.layout import Layout
from ops.doctor import databases, keys, machine
from ops.doctor.check import Check


def examine(homes: Sequence[Layout], configs: Sequence[Path] = ()) -> list[Check]:
    """Look at everything that can be looked at now; changes nothing. Never raises CulmError.

    Args:
        homes: of a cluster that may be up, down, or not there yet.
        configs: settings files of shards; without them those of the shards that live in the homes.

    Safe to retry: yes.
    """
    found = [*machine.versions(homes[0].cache), *machine.storage(homes[0])]
    chosen = [(path, True) for path in configs]
    for home in homes:
        told = control.status(home.folder)
        alive = told if told is not None and told.alive else None
        layout = home if alive is None else Layout(home.folder, alive.port, home.authority)
        found += [*machine.ports(layout, alive), *_processes(layout, alive), _topology(layout), *keys.keys(layout)]
        if not configs and layout.configs.is_dir():
            chosen += [(layout.configs / f"{shard}.toml", alive is not None) for shard in layout.shards]
    found += asyncio.run(_databases(chosen))
    return found


def _topology(layout: Layout) -> Check:
    name, authority = f"topology of {layout.authority}", layout.authority
    restore = "culm topology restore --plan" + ("" if authority == CENTRAL else f" --authority {authority}")
    advice = f"{restore} says what would be put back; never copy a file of the history over it"
    try:
        copies = [
            copy
            for other in layout.homes
            if other.authority != authority
            for copy in topology_store.copies(other.topology, authority)
        ]
        if not layout.topology.is_dir() and not copies:
            text = f"{layout.topology} is not there"
            return Check(name=name, level="warn", text=text, advice="culm up makes one")
        own = topology_store.load_section(layout.topology, authority)
        for row in topology_store.changes(layout.topology, authority, 1):
            if row.to_epoch > own.epoch:
                text = f"{authority} has stepped back: it is at epoch {own.epoch}, but was at {row.to_epoch}"
                return Check(name=name, level="bad", text=text, advice=advice)
        for copy in copies:
            topology_store.require_order(copy.section, own)
        validate(own)
    except CulmError as error:
        return Check(name=name, level="bad", text=error.message, advice=advice)
    try:
        topology = topology_store.load(layout.topology, authority)
    except CulmError as error:
        copied = "it is a copy: remove it, the router copies it again when that authority is reached"
        return Check(name=name, level="bad", text=error.message, advice=copied)
    told = ", ".join(f"{authority} at epoch {epoch}" for authority, epoch in topology.epochs.items())
    told += f"; {len(topology.sites)} sites"
    if topology.clashes:
        advice = "one of the two authorities renames it; until then its own is used"
        return Check(name=name, level="warn", text=f"{told}; passed over: {', '.join(topology.clashes)}", advice=advice)
    return Check(name=name, text=told)


def _processes(layout: Layout, alive: control.Status | None) -> list[Check]:
    name = f"processes of {layout.authority}"
    if alive is None:
        return [Check(name=name, text=f"none runs in {layout.folder}")]
    down = [f"{one.name} is {one.state}, {one.restarts} restarts" for one in alive.processes if one.state != "up"]
    if down and alive.phase == "up":
        return [Check(name=name, level="bad", text=", ".join(down), advice="culm logs NAME says why")]
    return [Check(name=name, text=f"{alive.phase}, {len(alive.processes)} processes")]


async def _databases(chosen: Sequence[tuple[Path, bool]]) -> list[Check]:
    """All shards' databases at once, by settings file; one that is not there is bad only where it is expected to be."""
    found: list[Check] = []
    known: list[tuple[ShardSettings, bool]] = []
    for path, expected in chosen:
        try:
            known.append((settings.load(path, ShardSettings, prefix="CULM_SHARD_"), expected))
        except CulmError as error:
            advice = "correct it; docs/settings.md has the keys"
            found.append(Check(name="settings", level="bad", text=error.message, advice=advice))
    for checks in await asyncio.gather(*(databases.examine(one, expected=expected) for one, expected in known)):
        found += checks
    return found
