"""What one authority's home consists of: settings files, the first section, keys and tokens, processes."""

import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from culm import topology_store
from culm.errors import ClientFault, Conflict, CulmError
from culm.section_changes import register_sites
from culm.tokens import Verifier, adopt_keys, told_keys
from culm.topology import CENTRAL, SLOT_BLOCKS, Placement, Queue, Region, Section, Shard, SiteRegistration
from culm.topology_store import Who
from culm.wire import Principal
from ops.cluster.layout import FIRST_SHARDS, Layout, make_private
from ops.engines import innodb, valkey

TOKEN_VALID_S: Final = 365 * 86_400.0
RENEW_S: Final = 30 * 86_400.0
"""A token with less left is made anew at the next start."""
DEMO_SITES: Final = {"US": "BNL", "EU": "DESY", "CERN": "CERN-PROD"}
READY_S: Final = 60.0
RECOVERY_S: Final = 600.0
"""A database answers when it has gone through its log; to end it before that only makes it begin anew."""
log = logging.getLogger("culm.plan")

_RUN: Final = [sys.executable, "-P", "-m", "ops"]


@dataclass(frozen=True)
class Process:
    """One supervised process; it is up when `ready` answers: a unix socket, or a URL with /health.

    Those of one `part` depend on each other: of a shard its database and Valkey, of wave 0, are up before the shard
    itself, of wave 1, is started. Parts are started side by side, for one must not wait for another's trouble. Without
    those of the part "", router and monitor, there is no cluster. One that still runs but does not answer after
    `ready_s` seconds is ended.
    """

    name: str
    argv: list[str]
    ready: str
    wave: int
    environment: Mapping[str, str] = field(default_factory=dict)
    ready_s: float = READY_S
    part: str = ""


def prepare(layout: Layout) -> list[Process]:
    """Write what is missing and give the processes in the order of their start. Safe to retry: yes."""
    for folder in (layout.folder, layout.sockets):
        make_private(folder)
    for folder in (layout.configs, layout.logs, layout.tokens, layout.keys):
        folder.mkdir(mode=0o700, exist_ok=True)
    _topology(layout)
    _tokens(layout)
    for other in layout.homes:
        if other != layout:
            _introduce(layout, other)
    engine = innodb.find(layout.cache)
    processes = []
    for shard in layout.shards:
        processes += shard_processes(layout, shard, engine)
    common: dict[str, Any] = {
        "topology_dir": str(layout.topology),
        "trusted_keys_dir": str(layout.trusted),
        "authority": layout.authority,
    }
    peers = {
        "peer_token_file": str(layout.tokens / f"{layout.authority}.peer"),
        "peers": {other.authority: other.router_url for other in layout.homes if other != layout},
    }
    for number, (kind, name, more) in enumerate((("router", layout.router, peers), ("monitor", layout.monitor, {}))):
        config = _write(layout, name, common | {"name": name, "port": layout.port + number} | more)
        url = f"http://127.0.0.1:{layout.port + number}/health"
        processes.append(Process(name, [*_RUN, kind, "run", "--config", str(config)], url, 2))
    return processes


def shard_processes(layout: Layout, shard: str, engine: innodb.Engine) -> list[Process]:
    """Write what a shard of this home needs, and give its processes. Safe to retry: yes."""
    data = layout.data(shard)
    data.mkdir(mode=0o700, parents=True, exist_ok=True)
    innodb.prepare(engine, data / "db", layout.cache)
    sockets = {what: layout.socket(shard, what) for what in ("db", "valkey", "link", "http")}
    values = {
        "name": shard,
        "link": f"unix:{sockets['link']}",
        "http": f"unix:{sockets['http']}",
        "topology_dir": str(layout.topology),
        "authority": layout.authority,
        "redis": f"unix://{sockets['valkey']}",
        "database": {"socket": str(sockets["db"])},
    }
    config = _write(layout, shard, values)
    database = innodb.argv(engine, data / "db", sockets["db"])
    cache = valkey.argv(sockets["valkey"], data)
    run = [*_RUN, "shard", "run", "--config", str(config)]
    return [
        Process(f"{shard}-db", database, f"unix:{sockets['db']}", 0, engine.environment, RECOVERY_S, shard),
        Process(f"{shard}-valkey", cache, f"unix:{sockets['valkey']}", 0, part=shard),
        Process(shard, run, f"unix:{sockets['link']}", 1, part=shard),
    ]


def _write(layout: Layout, name: str, values: Mapping[str, Any]) -> Path:
    """The settings of a process, once: what an operator has changed in them stays."""
    path = layout.configs / f"{name}.toml"
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items() if not isinstance(value, dict)]
    for key, table in values.items():
        if isinstance(table, dict):
            lines += [f"\n[{key}]", *(f"{inner} = {json.dumps(value)}" for inner, value in table.items())]
    text = "\n".join(lines) + "\n"
    if path.exists() and path.stat().st_size:
        # Where router and monitor are is the command line's to say.
        said = {"port": values.get("port"), **values.get("peers", {})}
        kept = path.read_text(encoding="utf-8").splitlines()
        for n, line in enumerate(kept):
            key = line.partition(" =")[0]
            if said.get(key) is not None:
                kept[n] = f"{key} = {json.dumps(said[key])}"
        text = "\n".join(kept) + "\n"
        if text == path.read_text(encoding="utf-8"):
            return path
        mode = path.stat().st_mode & 0o777
    else:
        mode = 0o644
    _replace(path, text, mode)
    return path


def _replace(path: Path, text: str, mode: int) -> None:
    """Never seen half written, also after a full disk or a kill: what is there stays as it is for good."""
    beside = path.with_name(f"{path.name}.new")
    beside.unlink(missing_ok=True)
    beside.touch(mode=mode)
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def _topology(layout: Layout) -> None:
    authority = layout.authority
    if (layout.topology / f"{authority}.json").exists():
        return
    for other in layout.homes:
        if other != layout and topology_store.known_epoch(other.topology, authority):
            raise Conflict(
                "section_lost", f"{layout.topology} is gone, but {other.authority} knows it: culm topology restore"
            )
    first = SLOT_BLOCKS[authority][0]
    shards = FIRST_SHARDS[authority]
    section = Section(
        authority=authority,
        epoch=0,
        shards={name: Shard(link=f"unix:{layout.socket(name, 'link')}") for name in shards},
        regions={
            region: Region(slot=first + n, shards=[name], strict=authority != CENTRAL)
            for n, (name, region) in enumerate(shards.items())
        },
        placement={first + n: Placement(name, 1) for n, name in enumerate(shards)},
        default_region=next(iter(shards.values())),
    )
    sites = [
        SiteRegistration(
            name=site, region=region, queues={f"{site}-q": Queue(memory_mb=4000, walltime_s=86_400, cores=8)}
        )
        for region, site in DEMO_SITES.items()
        if region in section.regions
    ]
    who = Who(actor=f"{authority}:operator", reason="a new cluster", at=time.time())
    topology_store.create(layout.topology, register_sites(section, sites), who)


def _tokens(layout: Layout) -> None:
    authority = layout.authority
    ring = layout.ring
    ring.ensure()
    verifier = Verifier(layout.trusted)
    for principal in (
        Principal(role="admin", subject="operator", authority=authority),
        Principal(role="user", subject="demo", authority=authority, vo="demo"),
        Principal(role="pilot", subject="pilot", authority=authority, queues=["*"]),
        Principal(role="peer", subject="router", authority=authority),
    ):
        path = layout.tokens / f"{authority}.{principal.role}"
        if _is_spent(path, verifier):
            _replace(path, ring.issue(principal, TOKEN_VALID_S), 0o600)


def _is_spent(path: Path, verifier: Verifier) -> bool:
    """Whether there is no token, or one that soon ends. One that is not good here may be good elsewhere: it stays."""
    if not path.exists() or not path.stat().st_size:
        return True
    try:
        return verifier.expires_at(f"Bearer {path.read_text(encoding='utf-8').strip()}") - time.time() < RENEW_S
    except ClientFault as error:
        return error.code == "token_expired"


def _introduce(one: Layout, other: Layout) -> None:
    """Two homes of one machine get each other's public keys and sections at their start; afterwards their routers ask.

    Whichever is prepared later does it for both.
    """
    for teller, hearer in ((one, other), (other, one)):
        section = teller.topology / f"{teller.authority}.json"
        if section.exists() and hearer.topology.is_dir() and hearer.trusted.is_dir():
            try:
                adopt_keys(hearer.trusted, teller.authority, told_keys(teller.trusted, teller.authority))
                topology_store.adopt(hearer.topology, topology_store.load_section(teller.topology, teller.authority))
            except CulmError as error:
                # It would not be helped by an authority more that does not run.
                log.error("%s does not believe %s: %s", hearer.authority, teller.authority, error)  # noqa: TRY400
