"""The yardstick: one aiohttp and uvloop process that decodes a get_job, and encodes an answer of the same bytes.

`python -m loadtest.bench.echo PORT FILE`: the FILE holds a GetJobAnswer as MessagePack, and that is what it answers to
every `POST /v1/get_job`, under a new job id each time. It checks no token, knows no queue and stores nothing: what any
aiohttp service pays before it does anything at all.
"""

import asyncio
import itertools
import signal
import sys
from pathlib import Path
from typing import Any, Final

import msgspec
import uvloop
from aiohttp import web

from culm.wire import GetJobAnswer, GetJobRequest

JSON: Final = "application/json"
MSGPACK: Final = "application/msgpack"


def app(answer: GetJobAnswer) -> web.Application:
    """The application, in the dialect of each request."""
    ids = itertools.count(1)
    decoders: dict[str, Any] = {
        JSON: msgspec.json.Decoder(GetJobRequest),
        MSGPACK: msgspec.msgpack.Decoder(GetJobRequest),
    }
    encoders: dict[str, Any] = {JSON: msgspec.json.Encoder(), MSGPACK: msgspec.msgpack.Encoder()}
    grant = answer.jobs[0]
    stored = msgspec.msgpack.decode(grant.spec)
    specs = {dialect: msgspec.Raw(encoder.encode(stored)) for dialect, encoder in encoders.items()}

    async def get_job(request: web.Request) -> web.Response:
        dialect = request.content_type
        decoders[dialect].decode(await request.read())
        given = msgspec.structs.replace(grant, id=next(ids), spec=specs[dialect])
        return web.Response(body=encoders[dialect].encode(GetJobAnswer(jobs=[given])), content_type=dialect)

    application = web.Application()
    application.add_routes([web.post("/v1/get_job", get_job), web.get("/health", _health)])
    return application


async def _health(_request: web.Request) -> web.Response:
    return web.Response()


async def _serve(port: int, answer: GetJobAnswer) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    runner = web.AppRunner(app(answer), access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    await stop.wait()
    await runner.cleanup()


def main() -> None:
    """Serve until SIGTERM."""
    answer = msgspec.msgpack.decode(Path(sys.argv[2]).read_bytes(), type=GetJobAnswer)
    uvloop.run(_serve(int(sys.argv[1]), answer))


if __name__ == "__main__":
    main()
