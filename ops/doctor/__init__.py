"""What a machine and a cluster lack: versions, disk, ports, topology, keys and the databases' settings."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

from culm import settings, topology_store
from culm.errors import CulmError
from culm.settings import ShardSettings
from ops.cluster import control
from ops.cluster.layout import Layout
from ops.doctor import databases, keys, machine
from ops.doctor.check import Check


def examine(layout: Layout, configs: Sequence[Path] = ()) -> list[Check]:
    """Look at everything that can be looked at now; changes nothing. Never raises CulmError.

    Args:
        layout: of a cluster that may be up, down, or not there yet.
        configs: settings files of shards; without them those of the topology's shards.

    Safe to retry: yes.
    """
    told = control.status(layout.folder)
    alive = told if told is not None and told.alive else None
    if alive is not None:
        layout = Layout(layout.folder, alive.port)
    found = [*machine.versions(layout.cache), *machine.storage(layout), *machine.ports(layout, alive)]
    found += _processes(layout, alive)
    try:
        topology = topology_store.load(layout.topology)
    except CulmError as error:
        there = layout.topology.is_dir()
        advice = (
            f"restore the section from {layout.topology / topology_store.HISTORY}" if there else "culm up makes one"
        )
        found.append(Check(name="topology", level="bad" if there else "warn", text=error.message, advice=advice))
        authorities, shards = [], []
    else:
        epochs = ", ".join(f"{authority} at epoch {epoch}" for authority, epoch in topology.epochs.items())
        found.append(Check(name="topology", text=f"{epochs}; {len(topology.sites)} sites"))
        authorities, shards = list(topology.sections), list(topology.shards)
    found += keys.keys(layout, authorities)
    chosen = list(configs) or [layout.configs / f"{shard}.toml" for shard in shards]
    found += asyncio.run(_databases(chosen, expected=bool(configs) or alive is not None))
    return found


def _processes(layout: Layout, alive: control.Status | None) -> list[Check]:
    if alive is None:
        return [Check(name="cluster", text=f"none runs in {layout.folder}")]
    down = [f"{one.name} is {one.state}, {one.restarts} restarts" for one in alive.processes if one.state != "up"]
    if down and alive.phase == "up":
        return [Check(name="cluster", level="bad", text=", ".join(down), advice="culm logs NAME says why")]
    return [Check(name="cluster", text=f"{alive.phase}, {len(alive.processes)} processes")]


async def _databases(paths: Sequence[Path], *, expected: bool) -> list[Check]:
    """All shards' databases at once; one that is not there is bad only where it is `expected` to be."""
    found: list[Check] = []
    known: list[ShardSettings] = []
    for path in paths:
        try:
            known.append(settings.load(path, ShardSettings, prefix="CULM_SHARD_"))
        except CulmError as error:
            advice = "correct it; docs/settings.md has the keys"
            found.append(Check(name="settings", level="bad", text=error.message, advice=advice))
    for checks in await asyncio.gather(*(databases.examine(one, expected=expected) for one in known)):
        found += checks
    return found
