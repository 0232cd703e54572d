"""What `culm bench` measures on: real processes in a private folder, started as a cluster's, without a supervisor."""

import asyncio
import contextlib
import shutil
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Final

import msgspec

from culm import settings
from culm.client import Client
from culm.errors import CulmError
from culm.registry_wire import ChangedAnswer, ShardRequest
from culm.settings import DatabaseSettings, ShardSettings
from culm.topology import CENTRAL
from culm.wire import GetJobAnswer, Grant, Principal
from loadtest.bench import rig
from ops.cluster.child import Child, Pace
from ops.cluster.layout import Layout
from ops.cluster.plan import Process, prepare, shard_processes
from ops.engines import innodb
from shard.dispatch_queue import DispatchQueue

SHARD: Final = "us1"
"""The shard that is measured; BNL is its site, BNL-q that site's computing queue."""
PORTS_PER_BED: Final = 4
FIRST_FRESH: Final = 3
MAX_FRESH: Final = 6
"""At once; a cell needs two."""
TOKEN_S: Final = 86_400.0


class Bed:
    """One router over one shard or several, each with its database and Valkey."""

    def __init__(
        self,
        folder: Path,
        port: int,
        *,
        naive: bool = False,
        n_shards: int = 1,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.layout = Layout(folder, port)
        self._naive = naive
        self._more = [f"more{number}" for number in range(1, n_shards)]
        self._environment = {"CULM_ROUTER_WORKERS": "1", **environment}
        self._children: list[Child] = []

    @property
    def port(self) -> int:
        """Of the router."""
        return self.layout.port

    @property
    def pids(self) -> dict[str, int]:
        """The processes whose time counts: router, shard, valkey, database; further shards' by their names."""
        names = {SHARD: "shard", f"{SHARD}-db": "database", f"{SHARD}-valkey": "valkey", "router": "router"}
        names |= {f"{name}{kind}": f"{name}{kind}" for name in self._more for kind in ("", "-db", "-valkey")}
        return {names[c.process.name]: c.running.pid for c in self._children if c.running is not None}

    async def __aenter__(self) -> "Bed":
        processes = {process.name: process for process in await asyncio.to_thread(prepare, self.layout)}
        wanted = [processes[name] for name in (f"{SHARD}-db", f"{SHARD}-valkey", SHARD, "router")]
        if self._more:
            engine = await asyncio.to_thread(innodb.find, self.layout.cache)
            for name in self._more:
                wanted += await asyncio.to_thread(shard_processes, self.layout, name, engine)
        if self._naive:
            wanted = [*wanted[:2], *self._naive_processes(wanted[2])]
        self._children = [
            Child(replace(one, environment=dict(one.environment) | self._environment), self._log(one), Pace())
            for one in wanted
        ]
        try:
            for child in self._children:
                await self._start(child)
            await self._register()
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stop()

    async def _register(self) -> None:
        """A region for each further shard."""
        async with Client(f"http://127.0.0.1:{self.port}", self.token("admin")) as client:
            for name in self._more:
                link = f"unix:{self.layout.socket(name, 'link')}"
                request = ShardRequest(name=name, link=link, region=name.upper(), reason="a benchmark")
                await client.post("shard", request, ChangedAnswer)

    async def _start(self, child: Child) -> None:
        await child.start()
        if not await child.ready():
            raise CulmError("start_failed", f"{child.process.name} did not come up, see {self._log(child.process)}")

    async def _stop(self) -> None:
        for child in reversed(self._children):
            await child.stop()
        await asyncio.to_thread(shutil.rmtree, self.layout.sockets, ignore_errors=True)

    def _log(self, process: Process) -> Path:
        return self.layout.logs / f"{process.name}.log"

    def _naive_processes(self, shard: Process) -> list[Process]:
        python = [sys.executable, "-P", "-m", "loadtest.bench.naive"]
        config, inner = shard.argv[-1], self.port + 1
        trusted = str(self.layout.trusted)
        return [
            replace(shard, argv=[*python, "shard", config, str(inner), trusted]),
            Process(
                "router",
                [*python, "router", str(self.port), f"http://127.0.0.1:{inner}"],
                f"http://127.0.0.1:{self.port}/health",
                2,
            ),
        ]

    @property
    def databases(self) -> list[DatabaseSettings]:
        """Of its shards."""
        return [self._settings_of(name).database for name in (SHARD, *self._more)]

    @property
    def shard_settings(self) -> ShardSettings:
        """As its first shard has read them."""
        return self._settings_of(SHARD)

    def _settings_of(self, shard: str) -> ShardSettings:
        path = self.layout.configs / f"{shard}.toml"
        return settings.load(path, ShardSettings, prefix="CULM_SHARD_", environment={})

    def token(self, role: str) -> str:
        """A token of the bed's authority."""
        return (self.layout.tokens / f"{CENTRAL}.{role}").read_text(encoding="utf-8").strip()


@dataclass(frozen=True)
class Direct:
    """The naive bed's shard, asked without its router."""

    bed: Bed

    @property
    def port(self) -> int:
        """Of the shard's own door."""
        return self.bed.port + 1

    @property
    def pids(self) -> dict[str, int]:
        """All but the router."""
        return {name: pid for name, pid in self.bed.pids.items() if name != "router"}

    @property
    def databases(self) -> list[DatabaseSettings]:
        """The bed's."""
        return self.bed.databases

    def token(self, role: str) -> str:
        """The bed's."""
        return self.bed.token(role)


@dataclass(frozen=True)
class Echo:
    """The echo's process."""

    port: int
    pid: int

    @property
    def pids(self) -> Mapping[str, int]:
        """It alone."""
        return {"echo": self.pid}

    @property
    def databases(self) -> Sequence[DatabaseSettings]:
        """None."""
        return ()

    def token(self, _role: str) -> str:
        """As long as a real one, so that the bytes are the same."""
        return "x" * 420


@dataclass
class Beds:
    """All beds of one run under `folder`, with ports from `port` on; each is started when it is first asked for."""

    folder: Path
    port: int
    stack: contextlib.AsyncExitStack
    _beds: dict[str, Bed] = field(default_factory=dict)
    _of_cell: contextlib.AsyncExitStack = field(default_factory=contextlib.AsyncExitStack)
    _n_fresh: int = 0
    _echo: Echo | None = None

    async def ours(self) -> Bed:
        """Router, one shard."""
        return await self._bed("ours", 0)

    async def fresh(
        self, name: str, *, n_shards: int = 1, environment: Mapping[str, str] = MappingProxyType({})
    ) -> Bed:
        """The same once more, without a history; it ends with its cell."""
        self._n_fresh += 1
        number = FIRST_FRESH + self._n_fresh % MAX_FRESH
        port = self.port + number * PORTS_PER_BED
        bed = Bed(self.folder / f"{name}-{self._n_fresh}", port, n_shards=n_shards, environment=environment)
        return await self._of_cell.enter_async_context(bed)

    async def leave(self) -> None:
        """End what belongs to a cell."""
        await self._of_cell.aclose()

    async def naive(self) -> Bed:
        """The naive build, by its router."""
        return await self._bed("naive", 2, naive=True)

    async def naive_shard(self) -> Direct:
        """The naive build's shard, asked directly."""
        return Direct(await self.naive())

    async def echo(self) -> Echo:
        """The echo, one process."""
        if self._echo is None:
            self._echo = await self.stack.enter_async_context(_echo(self.folder, self.port + 10 * PORTS_PER_BED))
        return self._echo

    def user(self, bed: rig.Bed, number: int) -> str:
        """The token of one of many users."""
        assert isinstance(bed, Bed)
        who = Principal(role="user", subject=f"user-{number}", authority=CENTRAL, vo="demo")
        return bed.layout.ring.issue(who, TOKEN_S)

    async def flush(self, bed: rig.Bed) -> None:
        """Empty its dispatch queue, as a restart of Valkey would."""
        assert isinstance(bed, Bed)
        options = bed.shard_settings
        queue = DispatchQueue(options.name, options.redis, options.dispatch)
        try:
            # One that knows no generation begins an empty one.
            await queue.begin()
        finally:
            await queue.close()

    async def _bed(self, name: str, number: int, *, naive: bool = False) -> Bed:
        if name not in self._beds:
            bed = Bed(self.folder / name, self.port + number * PORTS_PER_BED, naive=naive)
            self._beds[name] = await self.stack.enter_async_context(bed)
        return self._beds[name]


@contextlib.asynccontextmanager
async def _echo(folder: Path, port: int) -> AsyncIterator[Echo]:
    grant = Grant(
        id=1,
        attempt=1,
        lease_token="x" * 24,
        lease_s=600.0,
        heartbeat_s=7200.0,
        jobset=2**47,
        owner=f"{CENTRAL}:demo",
        vo="demo",
        priority=1000,
        spec=msgspec.Raw(msgspec.msgpack.encode(rig.spec())),
    )
    answer = folder / "echo.answer"
    answer.write_bytes(msgspec.msgpack.encode(GetJobAnswer(jobs=[grant])))
    argv = [sys.executable, "-P", "-m", "loadtest.bench.echo", str(port), str(answer)]
    child = Child(Process("echo", argv, f"http://127.0.0.1:{port}/health", 0), folder / "echo.log", Pace())
    await child.start()
    try:
        if not await child.ready() or child.running is None:
            raise CulmError("start_failed", f"the echo did not come up, see {folder / 'echo.log'}")
        yield Echo(port, child.running.pid)
    finally:
        await child.stop()
