"""What a cluster consists of: its settings files, its first topology, its keys and tokens, its processes."""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from culm import topology_store
from culm.tokens import KeyRing
from culm.topology import SLOT_BLOCKS, Placement, Queue, Region, Section, Shard, SiteRegistration, register_sites
from culm.wire import Principal
from ops.cluster.layout import AUTHORITIES, REGIONS, Layout, make_private
from ops.engines import innodb, valkey

TOKEN_VALID_S: Final = 365 * 86_400.0
DEMO_SITES: Final = {"US": "BNL", "EU": "DESY", "CERN": "CERN-PROD"}
READY_S: Final = 60.0
RECOVERY_S: Final = 600.0
"""A database answers when it has gone through its log; to end it before that only makes it begin anew."""
_RUN: Final = [sys.executable, "-P", "-m", "ops"]


@dataclass(frozen=True)
class Process:
    """One supervised process; it is up when `ready` answers: a unix socket, or a URL with /health.

    One that still runs but does not answer after `ready_s` seconds is ended.
    """

    name: str
    argv: list[str]
    ready: str
    environment: Mapping[str, str] = field(default_factory=dict)
    ready_s: float = READY_S


def prepare(layout: Layout) -> list[Process]:
    """Write what is missing and give the processes in the order of their start. Safe to retry: yes."""
    for folder in (layout.folder, layout.sockets):
        make_private(folder)
    for folder in (layout.configs, layout.logs, layout.tokens, layout.keys):
        folder.mkdir(mode=0o700, exist_ok=True)
    _topology(layout)
    _tokens(layout)
    engine = innodb.find(layout.cache)
    processes = []
    for shard in REGIONS:
        processes += _shard(layout, shard, engine)
    common = {"topology_dir": str(layout.topology), "trusted_keys_dir": str(layout.trusted)}
    for number, name in enumerate(("router", "monitor")):
        config = _write(layout, name, common | {"port": layout.port + number})
        url = f"http://127.0.0.1:{layout.port + number}/health"
        processes.append(Process(name, [*_RUN, name, "run", "--config", str(config)], url))
    return processes


def _shard(layout: Layout, shard: str, engine: innodb.Engine) -> list[Process]:
    data = layout.data(shard)
    data.mkdir(mode=0o700, parents=True, exist_ok=True)
    innodb.prepare(engine, data / "db", layout.cache)
    sockets = {what: layout.socket(shard, what) for what in ("db", "valkey", "link", "http")}
    values = {
        "name": shard,
        "link": f"unix:{sockets['link']}",
        "http": f"unix:{sockets['http']}",
        "topology_dir": str(layout.topology),
        "redis": f"unix://{sockets['valkey']}",
        "database": {"socket": str(sockets["db"])},
    }
    config = _write(layout, shard, values)
    database = innodb.argv(engine, data / "db", sockets["db"])
    return [
        Process(f"{shard}-db", database, f"unix:{sockets['db']}", engine.environment, RECOVERY_S),
        Process(f"{shard}-valkey", valkey.argv(sockets["valkey"], data), f"unix:{sockets['valkey']}"),
        Process(shard, [*_RUN, "shard", "run", "--config", str(config)], f"unix:{sockets['link']}"),
    ]


def _write(layout: Layout, name: str, values: Mapping[str, Any]) -> Path:
    """The settings of a process, once: what an operator has changed in them stays."""
    path = layout.configs / f"{name}.toml"
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items() if not isinstance(value, dict)]
    for key, table in values.items():
        if isinstance(table, dict):
            lines += [f"\n[{key}]", *(f"{inner} = {json.dumps(value)}" for inner, value in table.items())]
    text = "\n".join(lines) + "\n"
    if not path.exists():
        path.write_text(text, encoding="utf-8")
    elif "port" in values:
        # The port is the command line's to say.
        kept = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("port =")]
        path.write_text(f"port = {values['port']}\n" + "\n".join(kept) + "\n", encoding="utf-8")
    return path


def _topology(layout: Layout) -> None:
    for authority in dict.fromkeys(AUTHORITIES.values()):
        if (layout.topology / f"{authority}.json").exists():
            continue
        first = SLOT_BLOCKS[authority][0]
        names = [shard for shard, owner in AUTHORITIES.items() if owner == authority]
        section = Section(
            authority=authority,
            epoch=1,
            shards={name: Shard(link=f"unix:{layout.socket(name, 'link')}") for name in names},
            regions={
                REGIONS[name]: Region(slot=first + n, shards=[name], strict=authority != "central")
                for n, name in enumerate(names)
            },
            placement={first + n: Placement(name, 1) for n, name in enumerate(names)},
            default_region=REGIONS[names[0]] if authority == "central" else "",
        )
        sites = [
            SiteRegistration(
                name=site, region=region, queues={f"{site}-q": Queue(memory_mb=4000, walltime_s=86_400, cores=8)}
            )
            for region, site in DEMO_SITES.items()
            if region in section.regions
        ]
        topology_store.create(layout.topology, register_sites(section, sites))


def _tokens(layout: Layout) -> None:
    for authority in dict.fromkeys(AUTHORITIES.values()):
        ring = KeyRing(layout.keys / authority, layout.trusted, authority)
        ring.ensure()
        for principal in (
            Principal(role="admin", subject="operator", authority=authority),
            Principal(role="user", subject="demo", authority=authority, vo="demo"),
            Principal(role="pilot", subject="pilot", authority=authority, queues=["*"]),
        ):
            path = layout.tokens / f"{authority}.{principal.role}"
            if not path.exists():
                path.touch(mode=0o600)
                path.write_text(ring.issue(principal, TOKEN_VALID_S), encoding="utf-8")
