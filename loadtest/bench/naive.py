"""The build that culm is compared with: the same tables, claims and guarantees, one request at a time.

`python -m loadtest.bench.naive shard CONFIG PORT` is culm's shard with batches of one request, so that each costs a
round trip to Redis and a transaction of its own, on sixteen connections; it has an HTTP door of its own, made of the
router's handlers. `python -m loadtest.bench.naive router PORT URL` is a router that proxies HTTP to it by a
ClientSession. Nothing of what is stored differs from culm's, and `culm audit` holds for it.
"""

import asyncio
import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import aiohttp
import msgspec
from aiohttp import web

from culm import service, settings
from culm.link import LinkOptions
from culm.shard_links import A, ShardLinks
from culm.tokens import Verifier
from router.app import Front
from router.forward import Forward
from shard.main import Shard

CONNECTIONS: Final = 16
"""Of the claim pool; more made it slower (shared measurements: 16 beat 1 and 64)."""
DEADLINE_S: Final = 10.0
_PASSED_ON: Final = ("Authorization", "Content-Type", "Accept")


class _Direct(ShardLinks):
    """The shard in this process in place of a link to it."""

    def __init__(self, shard: Shard) -> None:
        super().__init__(lambda: shard.topology.current, LinkOptions())
        self._shard = shard

    async def refresh(self) -> None:
        """There is nothing to connect to."""

    async def ask(
        self,
        shard: str,
        verb: str,
        message: msgspec.Struct,
        answer: type[A],
        deadline_s: float,
        *,
        waits: bool = False,  # noqa: ARG002  # an in-process call has no window to leave
    ) -> A:
        """Call the shard's handler. Raises CulmError as it does."""
        assert shard == self._shard.settings.name
        body = await self._shard.verbs.handle(verb, msgspec.msgpack.encode(message), deadline_s)
        return msgspec.msgpack.decode(body, type=answer)


async def _shard(config: Path, port: int, trusted: Path, stop: asyncio.Event) -> None:
    options = settings.load(config, settings.ShardSettings, prefix="CULM_SHARD_")
    one_by_one = msgspec.structs.replace(
        options,
        dispatch=msgspec.structs.replace(options.dispatch, max_batch=1),
        database=msgspec.structs.replace(options.database, claim_connections=CONNECTIONS),
    )
    shard = Shard(one_by_one)
    router_settings = settings.RouterSettings(topology_dir=options.topology_dir, trusted_keys_dir=str(trusted))
    front = Front(router_settings, Forward(shard.topology, _Direct(shard), DEADLINE_S), Verifier(trusted))

    async def ready() -> str:
        return "" if shard.database.reachable else "database"

    async with _served(front.app(ready), port):
        await shard.serve(stop)


async def _router(port: int, url: str, stop: asyncio.Event) -> None:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def forward(request: web.Request) -> web.Response:
            headers = {name: request.headers[name] for name in _PASSED_ON if name in request.headers}
            body = await request.read()
            async with session.request(request.method, url + request.path_qs, data=body, headers=headers) as answer:
                return web.Response(body=await answer.read(), status=answer.status, content_type=answer.content_type)

        application = web.Application(client_max_size=2 << 20)
        application.add_routes([web.route("*", "/{path:.*}", forward)])
        async with _served(application, port):
            await stop.wait()


@contextlib.asynccontextmanager
async def _served(application: web.Application, port: int) -> Any:
    runner = web.AppRunner(application, access_log=None, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    try:
        yield
    finally:
        await runner.cleanup()


def main() -> None:
    """Serve until SIGTERM."""
    kind, *words = sys.argv[1:]
    serve: Callable[[asyncio.Event], Any]
    if kind == "shard":
        config, port, trusted = words
        serve = lambda stop: _shard(Path(config), int(port), Path(trusted), stop)  # noqa: E731
    else:
        port, url = words
        serve = lambda stop: _router(int(port), url, stop)  # noqa: E731
    service.run(f"naive-{kind}", "INFO", serve)


if __name__ == "__main__":
    main()
