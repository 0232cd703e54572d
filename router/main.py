"""The router process: a parent that keeps its workers alive, and the workers, which share one port."""

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import time
from types import FrameType
from typing import Final

from aiohttp import web

from culm import service, telemetry
from culm.https import POLL_S, Https
from culm.link import LinkOptions
from culm.settings import RouterSettings
from culm.shard_links import ShardLinks
from culm.tokens import Verifier
from culm.topology_store import TopologyCache
from router import door
from router.app import Front
from router.forward import Forward
from router.metrics import EPOCH, UPSTREAM
from router.peers import Peers, require_private

RESTART_PAUSE_S: Final = 0.2
STOP_S: Final = 15.0
SHUTDOWN_S: Final = 5.0
KEYS_POLL_S: Final = 5.0
PR_SET_PDEATHSIG: Final = 1

log = logging.getLogger("router.main")


def run(settings: RouterSettings) -> None:
    """Run the router until SIGTERM or SIGINT: `workers` processes, each restarted when it dies."""
    # Told here, and not by workers that die one after the other.
    Https(settings.https, settings.host, behind_tls_front=settings.behind_tls_front)
    require_private(settings.peers)
    if settings.workers == 1:
        _work(settings)
        return
    telemetry.configure_logging(settings.name, settings.log_level)
    _Parent(settings).run()


class _Parent:
    """Forks before any event loop exists, so that nothing is shared but the port."""

    def __init__(self, settings: RouterSettings) -> None:
        self._settings = settings
        self._pids: set[int] = set()
        self._stopping = False

    def run(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        # Held, not listened on: the port stays ours while every worker is down.
        with door.bound(self._settings.host, self._settings.port):
            while not self._stopping:
                while len(self._pids) < self._settings.workers and not self._stopping:
                    self._fork()
                self._wait()
            self._end()

    def _fork(self) -> None:
        parent = os.getpid()
        pid = os.fork()
        if pid:
            self._pids.add(pid)
            if self._stopping:
                os.kill(pid, signal.SIGTERM)
            return
        status = 1
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() == parent:
                _work(self._settings)
                status = 0
        except Exception:  # a forked child must never run its parent's code to the end
            log.exception("worker failed")
        finally:
            os._exit(status)

    def _wait(self) -> None:
        try:
            pid, status = os.wait()
        except ChildProcessError:
            return
        self._pids.discard(pid)
        telemetry.worker_ended(pid)
        if not self._stopping:
            log.warning("worker %d ended with status %d, starting another", pid, os.waitstatus_to_exitcode(status))
            time.sleep(RESTART_PAUSE_S)

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        self._stopping = True
        for pid in self._pids:
            # The signal can come between a worker's end and our note of it.
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def _end(self) -> None:
        deadline = time.monotonic() + STOP_S
        while self._pids and time.monotonic() < deadline:
            pid, _ = os.waitpid(-1, os.WNOHANG)
            self._pids.discard(pid)
            time.sleep(0.02)
        for pid in self._pids:
            os.kill(pid, signal.SIGKILL)


def _work(settings: RouterSettings) -> None:
    service.run(settings.name, settings.log_level, lambda stop: _serve(settings, stop))


async def _serve(settings: RouterSettings, stop: asyncio.Event) -> None:
    topology = TopologyCache(settings.topology_dir, settings.authority)
    options = LinkOptions(
        stall_s=settings.link_stall_s,
        window=settings.link_window,
        waiting=settings.link_waiting,
        tls=settings.link_tls,
    )
    links = ShardLinks(lambda: topology.current, options, lambda shard: UPSTREAM.labels(shard).observe)
    verifier = Verifier(settings.trusted_keys_dir)
    front = Front(settings, Forward(topology, links, settings.forward_deadline_s), verifier)
    https = Https(settings.https, settings.host, behind_tls_front=settings.behind_tls_front)
    loops = service.Loops()

    async def follow() -> None:
        topology.refresh_if_changed()
        await links.refresh()
        for authority, section in topology.current.sections.items():
            EPOCH.labels(authority).set(section.epoch)

    async def ready() -> str:
        return "" if topology.current.sections else "topology"

    await follow()
    loops.every(settings.topology_poll_s, "topology", follow)
    loops.every(KEYS_POLL_S, "keys", verifier.poll)
    loops.every(POLL_S, "certificate", https.poll)
    loops.every(settings.peer_poll_s, "peers", Peers(settings).poll)
    # handler_cancellation: a pilot that hangs up while it waits must not be given a job.
    runner = web.AppRunner(
        front.app(ready),
        access_log=None,
        handler_cancellation=True,
        shutdown_timeout=SHUTDOWN_S,
        keepalive_timeout=door.KEEPALIVE_S,
    )
    await runner.setup()
    try:
        assert runner.server is not None
        at = door.bound(settings.host, settings.port)
        server = await door.listen(
            runner.server,
            front.connections(runner.server),
            at,
            settings.max_connections,
            https.context,
            shed=telemetry.SHED.labels("connections").inc,
        )
        log.info("worker %d serves %s:%d", os.getpid(), settings.host, settings.port)
        await stop.wait()
        server.close()
    finally:
        await runner.cleanup()
        await loops.stop()
        await links.stop()
