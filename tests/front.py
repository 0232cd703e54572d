"""A router in the test's event loop, over a running partition, spoken to over real HTTP."""

import io
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from aiohttp import web
from yarl import URL

from culm import telemetry
from culm.client import Client
from culm.https import Https
from culm.link import LinkOptions
from culm.settings import RouterSettings
from culm.shard_links import ShardLinks
from culm.tokens import KeyRing, Verifier
from culm.topology_store import TopologyCache
from culm.wire import Principal
from router import door
from router.app import Front
from router.forward import Forward
from tests.partition import PILOT, USER, Partition
from tests.servers import free_ports
from tests.waiting import eventually

TOKEN_S = 600.0
CONNECT_S = 10.0
FAST_LANE = True
"""Whether routers of tests take the hot verbs on the fast lane, where a test does not say."""


@dataclass(frozen=True)
class Reply:
    """An answer as it came, decoded by its own content type."""

    status: int
    headers: Mapping[str, str]
    body: dict[str, Any]

    @property
    def code(self) -> str:
        """The error's code, after a look whether the error is whole."""
        assert self.body.keys() == {"error"}, self.body
        error = self.body["error"]
        assert error.keys() >= {"code", "message", "retryable", "retry_after_s"}, error
        assert error["message"]
        assert error["retryable"] == ("Retry-After" in self.headers) == (self.status == 503), self.body
        return str(error["code"])


@dataclass
class RunningFront:
    """A router and the key ring of its authority."""

    url: str
    ring: KeyRing
    forward: Forward
    folder: Path
    """Beside the topology: `keys/` and `trusted/` of this router."""
    verifier: Verifier

    def token(self, principal: Principal, valid_s: float = TOKEN_S) -> str:
        """A token that this router trusts."""
        return self.ring.issue(principal, valid_s)

    def client(self, principal: Principal = USER, **options: Any) -> Client:
        """A client; use it as a context manager."""
        return Client(self.url, self.token(principal), **options)

    async def send(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        kind: str = "application/json",
        token: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """One request as any client could send it; without `token` a user's, with "" none."""
        bearer = self.token(USER) if token is None else token
        all_headers = {"Content-Type": kind} if body is not None else {}
        all_headers |= {"Authorization": f"Bearer {bearer}"} if bearer else {}
        url = URL(f"{self.url}{path}", encoded=True)
        async with (
            aiohttp.ClientSession() as session,
            session.request(
                method, url, data=None if body is None else io.BytesIO(body), headers=all_headers | dict(headers or {})
            ) as response,
        ):
            answer = await response.read()
            decode = msgspec.msgpack.decode if response.content_type == "application/msgpack" else msgspec.json.decode
            return Reply(response.status, response.headers, decode(answer))

    def token_file(self, principal: Principal = PILOT) -> Path:
        """A token in a file, as a pilot wants it."""
        path = self.folder / f"{principal.subject}.token"
        path.touch(mode=0o600)
        path.write_text(self.token(principal), encoding="utf-8")
        return path


def front(shard: Partition, **settings: Any) -> AbstractAsyncContextManager[RunningFront]:
    """A router over one partition's topology; `settings` are fields of RouterSettings."""
    return front_over(Path(shard.settings.topology_dir), **settings)


@asynccontextmanager
async def front_over(topology_dir: Path, **settings: Any) -> AsyncIterator[RunningFront]:
    """A router over a topology whose shards are all up. It looks for a newer topology only when it must."""
    folder = topology_dir.parent
    ring = KeyRing(folder / "keys", folder / "trusted", "central")
    ring.ensure()
    port = free_ports(1)
    keys = {"topology_dir": str(topology_dir), "trusted_keys_dir": str(folder / "trusted")}
    values: dict[str, Any] = {"port": port, "fast_lane": FAST_LANE, **keys}
    options = RouterSettings(**(values | settings))
    topology = TopologyCache(options.topology_dir, options.authority)
    links = ShardLinks(
        lambda: topology.current,
        LinkOptions(stall_s=options.link_stall_s, window=options.link_window, waiting=options.link_waiting),
    )
    forward = Forward(topology, links, options.forward_deadline_s)
    verifier = Verifier(options.trusted_keys_dir)
    running_front = Front(options, forward, verifier)
    app = running_front.app(_ready)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=1.0)
    await runner.setup()
    await links.refresh()
    https = Https(options.https, options.host, behind_tls_front=options.behind_tls_front)
    assert runner.server is not None
    server = await door.listen(
        runner.server,
        running_front.connections(runner.server),
        door.bound(options.host, port),
        options.max_connections,
        https.context,
        shed=telemetry.SHED.labels("connections").inc,
    )
    try:
        await eventually(lambda: all(link.connected for link in links._links.values()), CONNECT_S, what="linked")
        url = f"http://127.0.0.1:{port}" if https.context is None else f"https://localhost:{port}"
        yield RunningFront(url, ring, forward, folder, verifier)
    finally:
        server.close()
        await runner.cleanup()
        await links.stop()


async def _ready() -> str:
    return ""
