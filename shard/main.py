"""The shard process: wires the parts, runs the background loops, serves the link until it is told to stop."""

import asyncio
import contextlib
import logging
from collections.abc import Sequence

from culm import service
from culm.errors import CulmError
from culm.link import LinkServer
from culm.settings import ShardSettings
from culm.topology import Topology
from culm.topology_store import TopologyCache
from shard.archive import Archive
from shard.askers import Askers
from shard.bans import Bans
from shard.classes import ClassRegistry
from shard.database import Database
from shard.dispatch import Dispatcher, DispatchParts
from shard.dispatch_queue import DispatchQueue
from shard.happenings import Happenings
from shard.hints import Hint, Notices
from shard.intake import Intake
from shard.levels import LOOK_S, Levels
from shard.lifecycle import Lifecycle
from shard.migrate import migrate
from shard.obstacles import Obstacles
from shard.ownership import Ownership
from shard.pile_ups import PileUps
from shard.reaper import Reaper
from shard.refill import Refill
from shard.samples import Samples
from shard.shelf import Shelf
from shard.signs import Signs
from shard.terms import Terms
from shard.verbs import UseCases, Verbs
from shard.why import Why

START_PAUSE_S = 0.2
ASKERS_SAVE_S = 5.0
SAMPLES_LOOK_S = 30.0
"""How often it is looked whether another hour has begun."""
SLOW_TURNS = 60
"""Old jobs are looked for once in so many turns of the reaper."""

log = logging.getLogger("shard.main")


def run(settings: ShardSettings) -> None:
    """Run the shard until SIGTERM or SIGINT."""
    service.run(f"shard-{settings.name}", settings.log_level, lambda stop: Shard(settings).serve(stop))


class Shard:
    """The parts of one shard process."""

    def __init__(self, settings: ShardSettings) -> None:
        self.settings = settings
        self.topology = TopologyCache(settings.topology_dir, settings.authority)
        self.database = Database(settings.database)
        self.happenings = Happenings()
        self.database.on_commit = self.happenings.add
        self.database.on_doubt = self.happenings.doubt
        self.classes = ClassRegistry()
        self.queue = DispatchQueue(settings.name, settings.redis, settings.dispatch)
        self.ownership = Ownership(settings.name, self.database, self._fresh_topology)
        shelf = Shelf(settings.dispatch.shelf_mb << 20)
        self.refill = Refill(self.database, self.queue, self.classes, settings.dispatch, shelf)
        notices = Notices(self._announce, self._withdraw)
        self.terms = terms = Terms(settings.timeouts, settings.submit, lambda: self.topology.current)
        self.lifecycle = Lifecycle(self.database, self.ownership, notices, terms, settings.timeouts.max_releases)
        self.signs = Signs(self.database, self.ownership, self.lifecycle, notices)
        self.askers = Askers(self.database)
        parts = DispatchParts(self.database, self.queue, self.classes, self.ownership, self.refill, self.askers, terms)
        self.dispatcher = Dispatcher(parts, settings, self.lifecycle.release_request)
        obstacles = Obstacles(self.askers)
        self.intake = Intake(
            self.database,
            self.classes,
            self.ownership,
            settings.dispatch,
            terms,
            warn=lambda jobs: obstacles.warnings(self.topology.current, jobs),
            shelf=shelf,
            announce=self._announce,
        )
        swept = (self.database, self.ownership, self.classes, terms, notices)
        self.reaper = Reaper(*swept, grace_s=settings.timeouts.grace_s, heard_since=self._routers_since)
        self.bans = Bans(self.database, self.ownership, lambda: self.topology.current, notices)
        self.archive = Archive(self.database, self.ownership, settings.archive)
        why = Why(self.database, self.classes, self.askers, obstacles)
        self.levels = Levels(self.database, self.ownership, self.askers, lambda: self.topology.current)
        self.samples = Samples(self.database, settings.samples_kept_hours)
        cases = UseCases(
            settings.name,
            settings.authority,
            self.database,
            lambda: self.topology.current,
            self.intake,
            self.dispatcher,
            self.lifecycle,
            self.signs,
            why,
            self.happenings,
            self.archive,
            self.askers,
            PileUps(self.database, self.samples, why),
        )
        self.verbs = Verbs(cases)
        self.link = LinkServer(settings.name, self.verbs.handle, self.verbs.undelivered, self.verbs.begin)
        self._loops = service.Loops()
        self._started = False

    async def serve(self, stop: asyncio.Event) -> None:
        """Serve until `stop`; what was begun is ended first."""
        settings = self.settings
        async with service.side_http(settings.http, f"shard-{settings.name}", self._missing):
            if await self._begin(stop):
                self._start_loops()
                self.dispatcher.start()
                self.signs.start()
                await self.link.start(settings.link, settings.link_tls)
                self._started = True
                log.info("shard %s serves %d slots", settings.name, len(self.ownership.open))
                await stop.wait()
                log.info("stopping")
                await self.dispatcher.stop()
                await self.signs.stop()
                await self.link.stop(settings.stop_s)
            await self._loops.stop()
            await self.queue.close()
            await self.database.close()

    async def _begin(self, stop: asyncio.Event) -> bool:
        """Wait for the database, bring its schema up to date, take over what it holds; False if told to stop."""
        while not stop.is_set():
            try:
                await migrate(self.settings.database)
                await self.ownership.adopt()
                await self.refill.load()
                await self.askers.load()
            except CulmError as error:
                if not error.retryable:
                    raise
                log.warning("not ready: %s", error)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(START_PAUSE_S):
                        await stop.wait()
            else:
                return True
        return False

    def _start_loops(self) -> None:
        dispatch = self.settings.dispatch
        self._loops.every(self.settings.topology_poll_s, "ownership", self.ownership.adopt)
        self._loops.every(0.01, "refill", self.refill.turn)
        self._loops.every(dispatch.sweep_interval_s, "sweep", self._sweep)
        self._loops.every(self.settings.archive.interval_s, "archive", self.archive.turn)
        self._loops.every(self.settings.topology_poll_s, "bans", self.bans.turn)
        self._loops.every(ASKERS_SAVE_S, "askers", self.askers.save)
        self._loops.every(LOOK_S, "levels", self.levels.turn)
        self._loops.every(SAMPLES_LOOK_S, "samples", self.samples.turn)
        self._loops.every(dispatch.reap_interval_s, "reaper", self.reaper.end_leases)
        self._loops.every(dispatch.reap_interval_s * SLOW_TURNS, "close_old", self.reaper.close_old)
        self._loops.every(dispatch.reap_interval_s * SLOW_TURNS, "old_errors", self.reaper.drop_old_errors)

    def _routers_since(self) -> float | None:
        return self.link.routers_since

    async def _announce(self, hints: Sequence[Hint]) -> None:
        await self.dispatcher.announce(hints)

    async def _withdraw(self, hints: Sequence[Hint]) -> None:
        await self.dispatcher.withdraw(hints)

    async def _sweep(self) -> None:
        await self.refill.sweep()
        await self.dispatcher.look_again()

    def _fresh_topology(self) -> Topology:
        self.topology.refresh_if_changed()
        return self.topology.current

    async def _missing(self) -> str:
        if not self._started:
            return "starting"
        return "" if self.database.reachable else "database"
