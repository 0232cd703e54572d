"""Real pilots on a real cluster: killed, told to go, and the jobs that they had."""

import asyncio
import os
import secrets
import signal
import subprocess
from pathlib import Path

import aiohttp
import pytest

from culm.client import Client
from culm.states import State
from culm.wire import CancelRequest, GetJobRequest, JobSpec, JobView, PilotInfo, SubmitRequest
from tests.cluster import Cluster, pilot
from tests.traffic import PILOT, USER
from tests.waiting import eventually

pytestmark = pytest.mark.system
DEADLINE_S = 60.0
QUEUE = "BNL-q"


async def _submit(client: Client, shell: str) -> int:
    spec = JobSpec(queue=QUEUE, shell=shell, max_attempts=3)
    answer = await client.submit(SubmitRequest(idempotency_key=secrets.token_hex(8), jobs=[spec]))
    [identifier] = answer.ids
    assert identifier is not None
    return identifier


async def _reaches(client: Client, identifier: int, state: State) -> JobView:
    async def there() -> JobView | None:
        view = await client.job(identifier)
        return view if view.job.state is state else None

    found = await eventually(there, DEADLINE_S, what=f"job {identifier} is {state}")
    assert found is not None
    return found


async def test_a_killed_pilots_job_is_activated_after_the_lease_and_finishes(running: Cluster, folder: Path) -> None:
    """Its host is gone with it: only the lease's end, 3 s here, tells the shard."""
    mark = folder.parent / "second"
    async with running.client(USER) as user:
        with pilot(running, QUEUE, folder / "a", "--heartbeat", "0.5") as first:
            identifier = await _submit(user, f"test -e {mark} && exit 0; sleep 600")
            await _reaches(user, identifier, State.RUNNING)
            first.kill()
        mark.touch()
        with pilot(running, QUEUE, folder / "b", "--heartbeat", "0.5"):
            view = await _reaches(user, identifier, State.FINISHED)
    events = [event.event.value for event in view.history]
    assert "expire" in events
    # Two, unless a busy machine was late with a heartbeat of the second pilot too.
    assert view.job.attempt == events.count("claim") >= 2
    assert await asyncio.to_thread(running.audit) == []
    _end_orphans(folder)


async def test_a_pilot_told_to_go_gives_its_job_back_at_once(running: Cluster, folder: Path) -> None:
    async with running.client(USER) as user:
        with pilot(running, QUEUE, folder / "a", "--heartbeat", "0.5") as first:
            identifier = await _submit(user, "sleep 600")
            await _reaches(user, identifier, State.RUNNING)
            first.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(first.wait, 30) == 143
            view = await user.job(identifier)
        assert view.job.state is State.ACTIVATED
        assert view.history[-1].event.value == "release"
        await _cancel(user, identifier)


async def test_a_killed_job_ends_its_payload_at_the_next_heartbeat(running: Cluster, folder: Path) -> None:
    async with running.client(USER) as user:
        with pilot(running, QUEUE, folder / "a", "--heartbeat", "0.3"):
            identifier = await _submit(user, "echo begun; sleep 600")
            await _reaches(user, identifier, State.RUNNING)
            await asyncio.to_thread(_kill_by_command, running, identifier)
            view = await _reaches(user, identifier, State.CANCELLED)
    assert [report.stdout_tail for report in view.reports] == ["begun\n"]


async def test_pilots_ride_out_a_restart_of_their_shard_and_its_database(running: Cluster, folder: Path) -> None:
    async with running.client(USER) as user:
        with pilot(running, QUEUE, folder / "a", "--wait", "1"), pilot(running, QUEUE, folder / "b", "--wait", "1"):
            ids = [await _submit(user, "sleep 0.1") for _ in range(10)]
            for victim in ("us1", "us1-db"):
                killed = running.kill(victim)
                ids += [await _submit(user, "sleep 0.1") for _ in range(5)]
                await asyncio.to_thread(running.wait_back, victim, killed)
            for identifier in ids:
                await _reaches(user, identifier, State.FINISHED)
    assert await asyncio.to_thread(running.audit) == []


async def test_a_client_that_hangs_up_in_its_long_poll_takes_no_job(running: Cluster) -> None:
    """The job that comes after it has gone is dispatched to the next one at once, not after a lease's end."""
    async with running.client(USER) as user, running.client(PILOT) as next_pilot:
        for _ in range(5):
            async with aiohttp.ClientSession() as http:
                body = {"request_id": secrets.token_hex(8), "queue": QUEUE, "pilot": {"id": "gone"}, "wait_s": 30}
                headers = {"Authorization": f"Bearer {running.token(PILOT)}"}
                url = f"{running.layout.router_url}/v1/get_job"
                waiting = asyncio.create_task(http.post(url, json=body, headers=headers))
                await eventually(lambda: _parked(running), DEADLINE_S, what="it waits")
                waiting.cancel()
                await asyncio.gather(waiting, return_exceptions=True)
            identifier = await _submit(user, "true")
            request = GetJobRequest(
                request_id=secrets.token_hex(8), queue=QUEUE, pilot=PilotInfo(id="next"), wait_s=2.0
            )
            [grant] = (await next_pilot.get_job(request)).jobs
            assert grant.id == identifier
            await _cancel(user, identifier)


async def _parked(running: Cluster) -> bool:
    """What the shard's own metrics say."""
    connector = aiohttp.UnixConnector(str(running.layout.socket("us1", "http")))
    async with aiohttp.ClientSession(connector=connector) as http, http.get("http://shard/metrics") as answer:
        lines = (await answer.text()).splitlines()
    return any(line.startswith("culm_parked_requests") and float(line.split()[-1]) >= 1 for line in lines)


async def _cancel(client: Client, identifier: int) -> None:
    await client.cancel(CancelRequest(ids=[identifier]))


def _kill_by_command(running: Cluster, identifier: int) -> None:
    done = running.culm("job", "kill", str(identifier))
    # The demo user of the command line is another one than ann.
    assert "forbidden" in done.stdout
    token = running.layout.tokens / "central.user"
    saved = token.read_text(encoding="utf-8")
    token.write_text(running.token(USER), encoding="utf-8")
    try:
        done = running.culm("job", "kill", str(identifier))
    finally:
        token.write_text(saved, encoding="utf-8")
    assert done.returncode == 0
    assert "requested" in done.stdout


def _end_orphans(folder: Path) -> None:
    """The payload of a pilot that was killed with its host's memory of it: the test is the host, so it clears up."""
    for path in Path("/proc").glob("[0-9]*/cwd"):
        try:
            if str(path.readlink()).startswith(str(folder)):
                os.kill(int(path.parent.name), signal.SIGKILL)
        except (OSError, subprocess.SubprocessError):
            continue
