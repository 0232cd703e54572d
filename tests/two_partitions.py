"""Two whole shards in the test's event loop, each with its own schema: what a router and a monitor merge."""

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from culm import topology_store
from culm.section_changes import register_sites
from culm.settings import ArchiveSettings, DatabaseSettings, DispatchSettings, ShardSettings, Timeouts
from culm.topology import Placement, Queue, Region, Section, SiteRegistration, Topology
from culm.topology import Shard as ShardEntry
from culm.topology_store import Who
from shard.driver import connect
from shard.main import Shard
from tests import servers
from tests.partition import DEADLINE_S, Servers, _numbers
from tests.waiting import eventually

NAMES = ("us1", "eu1")
SITES = {"BNL": "US", "FZK": "EU"}
WHO = Who(actor="test", reason="a test", at=0.0)


class TwoPartitions:
    """`us1` serves region US with site BNL, `eu1` serves EU with FZK; each may be stopped and started again."""

    def __init__(self, folder: Path, servers: Servers) -> None:
        self.folder = folder
        self.topology_dir = folder / "topology"
        topology_store.create(self.topology_dir, _section(folder))
        self._settings = {name: self._settings_of(name, servers) for name in NAMES}
        self._running: dict[str, tuple[asyncio.Event, asyncio.Task[None]]] = {}

    @property
    def topology(self) -> Topology:
        """As it is on disk now."""
        return topology_store.load(self.topology_dir)

    async def start(self, name: str) -> None:
        """Start a shard; returns when it accepts connections."""
        stop = asyncio.Event()
        task = asyncio.create_task(Shard(self._settings[name]).serve(stop))
        self._running[name] = (stop, task)
        socket = self.folder / f"{name}.d" / "link.sock"
        await eventually(lambda: socket.is_socket() or task.done(), DEADLINE_S, what=f"{name} serves")
        if task.done():
            task.result()

    async def stop(self, name: str) -> None:
        """End a shard; its data stays."""
        stop, task = self._running.pop(name)
        stop.set()
        await task
        (self.folder / f"{name}.d" / "link.sock").unlink(missing_ok=True)

    async def stop_all(self) -> None:
        """End both."""
        for name in list(self._running):
            await self.stop(name)

    async def rows(self, name: str, text: str) -> list[tuple[Any, ...]]:
        """Look into a shard's database, or change it, behind its back."""
        connection = await connect(self._settings[name].database, autocommit=True)
        try:
            async with connection.cursor() as cursor:
                await cursor.execute(text)
                return list(await cursor.fetchall())
        finally:
            connection.close()

    async def n_jobs(self, name: str) -> int:
        """How many jobs a shard holds."""
        return int((await self.rows(name, "SELECT COUNT(*) FROM job"))[0][0])

    def place(self, slot: int, shard: str) -> None:
        """Say in the topology that a slot is on another shard, since the next epoch."""

        def edit(section: Section) -> Section:
            epoch = section.epoch + 1
            regions = {
                name: Region(slot=region.slot, shards=list(NAMES)) if region.slot == slot else region
                for name, region in section.regions.items()
            }
            return Section(
                authority=section.authority,
                epoch=epoch,
                shards=section.shards,
                regions=regions,
                sites=section.sites,
                placement=section.placement | {slot: Placement(shard, epoch)},
                default_region=section.default_region,
            )

        topology_store.change(self.topology_dir, "central", edit, WHO)

    def _settings_of(self, name: str, needs: Servers) -> ShardSettings:
        number = next(_numbers)
        folder = self.folder / f"{name}.d"
        return ShardSettings(
            name=name,
            link=f"unix:{folder / 'link.sock'}",
            http=f"unix:{folder / 'http.sock'}",
            topology_dir=str(self.topology_dir),
            redis=f"unix://{needs.valkey.socket}?db={number % 16}",
            database=DatabaseSettings(socket=str(needs.database.socket), name=f"t{number}_{secrets.token_hex(3)}"),
            timeouts=Timeouts(grace_s=0.001),
            dispatch=DispatchSettings(reap_interval_s=0.05, sweep_interval_s=0.2),
            # The archive's pass is the test's to make.
            archive=ArchiveSettings(after_s=0.0),
            topology_poll_s=0.05,
            stop_s=1.0,
        )


def _section(folder: Path) -> Section:
    """Both regions with a slot of their own; region BOTH has its slot on eu1 and its site UTA on us1."""
    section = Section(
        authority="central",
        epoch=1,
        shards={name: ShardEntry(link=f"unix:{folder / f'{name}.d' / 'link.sock'}") for name in NAMES},
        regions={
            "US": Region(slot=0, shards=["us1"]),
            "EU": Region(slot=1, shards=["eu1"]),
            "BOTH": Region(slot=2, shards=["us1"]),
        },
        placement={0: Placement("us1", 1), 1: Placement("eu1", 1), 2: Placement("eu1", 1)},
        default_region="US",
    )
    wanted = SITES | {"UTA": "BOTH"}
    return register_sites(
        section,
        [
            SiteRegistration(name=site, region=region, queues={f"{site}-q": Queue(cores=8)})
            for site, region in wanted.items()
        ],
    )


@asynccontextmanager
async def two_partitions(needs: Servers) -> AsyncIterator[TwoPartitions]:
    """Both shards running."""
    with servers.folder() as name:
        pair = TwoPartitions(Path(name), needs)
        try:
            for shard in NAMES:
                await pair.start(shard)
            yield pair
        finally:
            await pair.stop_all()
