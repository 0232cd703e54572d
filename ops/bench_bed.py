"""What `culm bench` measures on: real processes in a private folder, started as a cluster's, without a supervisor."""

import asyncio
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from culm.errors import CulmError
from ops.cluster.child import Child, Pace
from ops.cluster.layout import Layout
from ops.cluster.plan import Process, prepare

SHARD: Final = "us1"
"""The shard that is measured; BNL is its site, BNL-q that site's computing queue."""


class Bed:
    """One router over one shard, with the shard's database and Valkey."""

    def __init__(self, folder: Path, port: int, *, naive: bool = False) -> None:
        self.layout = Layout(folder, port)
        self._naive = naive
        self._children: list[Child] = []

    @property
    def port(self) -> int:
        """Of the router."""
        return self.layout.port

    @property
    def pids(self) -> dict[str, int]:
        """The processes whose time counts: router, shard, valkey, database."""
        names = {SHARD: "shard", f"{SHARD}-db": "database", f"{SHARD}-valkey": "valkey", "router": "router"}
        return {names[c.process.name]: c.running.pid for c in self._children if c.running is not None}

    async def __aenter__(self) -> "Bed":
        processes = {process.name: process for process in await asyncio.to_thread(prepare, self.layout)}
        wanted = [processes[name] for name in (f"{SHARD}-db", f"{SHARD}-valkey", SHARD, "router")]
        if self._naive:
            wanted = [*wanted[:2], *self._naive_processes(wanted[2])]
        environment = {"CULM_ROUTER_WORKERS": "1"}
        self._children = [
            Child(replace(one, environment=dict(one.environment) | environment), self._log(one), Pace())
            for one in wanted
        ]
        try:
            for child in self._children:
                await self._start(child)
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stop()

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


def token(bed: Bed, role: str) -> str:
    """A token of the bed's authority."""
    return (bed.layout.tokens / f"{bed.layout.authority}.{role}").read_text(encoding="utf-8").strip()


def environment() -> Mapping[str, str]:
    """For child processes that are no part of the bed."""
    return os.environ
