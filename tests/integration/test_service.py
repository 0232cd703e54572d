"""What every service process does alike, with real sockets and a real process."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest

from culm import telemetry
from culm.errors import ClientFault, Unavailable
from culm.service import Loops, side_http
from tests.servers import free_ports
from tests.waiting import eventually, eventually_sync

DEADLINE_S = 5.0
PORT = free_ports(1)


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="culm-") as name:
        yield Path(name)


def _value(name: str) -> tuple[float, float]:
    runs = telemetry.LOOP_RUNS.labels(name)._value.get()
    return runs, telemetry.LOOP_ERRORS.labels(name)._value.get()


async def test_a_loop_runs_again_and_again_and_ends_with_the_process() -> None:
    loops, turns = Loops(), 0

    async def turn() -> None:
        nonlocal turns
        turns += 1

    loops.every(0.001, "test-counting", turn)
    await eventually(lambda: turns >= 3, DEADLINE_S)
    await loops.stop()
    assert _value("test-counting") == (turns, 0)


@pytest.mark.parametrize("fault", [Unavailable("db", "gone"), ZeroDivisionError("ours")])
async def test_a_loop_outlives_every_fault_and_counts_it(fault: Exception) -> None:
    loops, turns = Loops(), 0
    name = f"test-{type(fault).__name__}"

    async def turn() -> None:
        nonlocal turns
        turns += 1
        if turns <= 2:
            raise fault

    loops.every(0.001, name, turn)
    await eventually(lambda: turns >= 4, DEADLINE_S)
    await loops.stop()
    runs, errors = _value(name)
    assert errors == 2
    assert runs >= 1


@pytest.mark.parametrize("where", ["unix", f"tcp:127.0.0.1:{PORT}"])
@pytest.mark.parametrize(("missing", "status"), [("", 200), ("the database", 503)])
async def test_health_says_what_is_missing(folder: Path, where: str, missing: str, status: int) -> None:
    async def ready() -> str:
        return missing

    path = f"{folder}/h"
    connector = aiohttp.UnixConnector(path) if where == "unix" else aiohttp.TCPConnector()
    async with (
        side_http(f"unix:{path}" if where == "unix" else where, "shard us1", ready),
        aiohttp.ClientSession(connector=connector) as http,
    ):
        base = "http://shard" if where == "unix" else f"http://127.0.0.1:{PORT}"
        async with http.get(f"{base}/health") as answer:
            body = await answer.json()
        assert answer.status == status
        assert body["status"] == ("unavailable" if missing else "ok")
        assert body.get("missing", "") == missing
        async with http.get(f"{base}/metrics") as answer:
            text = await answer.text()
        assert answer.status == 200
        assert "culm_loop_runs_total" in text


async def test_a_side_address_is_never_plain_where_tls_was_asked_for(folder: Path) -> None:
    async def ready() -> str:
        return ""

    with pytest.raises(ClientFault) as caught:
        async with side_http(f"tls:127.0.0.1:{PORT}", "shard us1", ready):
            pass
    assert caught.value.code == "bad_address"


PROCESS = """
import asyncio, pathlib, sys
from culm import service

async def main(stop):
    pathlib.Path(sys.argv[1]).touch()
    await stop.wait()
    pathlib.Path(sys.argv[2]).touch()

service.run("test", "INFO", main)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_service_in_good_order(folder: Path, number: signal.Signals) -> None:
    up, down = folder / "up", folder / "down"
    process = subprocess.Popen(
        [sys.executable, "-c", PROCESS, str(up), str(down)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    try:
        eventually_sync(up.exists, DEADLINE_S)
        process.send_signal(number)
        assert process.wait(DEADLINE_S) == 0
    finally:
        process.kill()
        process.wait()
    assert down.exists()


async def test_a_loop_ends_also_when_a_library_swallows_its_cancellation() -> None:
    loops, begun = Loops(), asyncio.Event()

    async def turn() -> None:
        begun.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()

    loops.every(0.001, "test-swallowing", turn)
    await begun.wait()
    async with asyncio.timeout(DEADLINE_S):
        await loops.stop()
