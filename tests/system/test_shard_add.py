"""A shard joins a cluster under load: no request fails, nothing moves, the new region's jobs run on it."""

import asyncio
import itertools
from collections import Counter
from pathlib import Path

from culm import topology_store
from culm.client import Client
from culm.errors import CulmError
from culm.states import State
from culm.wire import GetJobRequest, JobSpec, PilotInfo, ReportRequest, SubmitRequest
from ops.cluster import control
from tests.cluster import Cluster, cluster, decoded
from tests.traffic import PILOT, USER, Crowd

ASIA = ("add", "asia1", "--region", "ASIA", "--reason", "the new region")


async def _impatient(running: Cluster, stop: asyncio.Event, told: Counter[str]) -> None:
    """Submit, pull and report without one retry, and count how each request ended."""
    async with (
        Client(running.layout.router_url, running.token(USER), patience_s=0.0) as user,
        Client(running.layout.router_url, running.token(PILOT), patience_s=0.0) as pilot,
    ):
        for number in itertools.count():
            if stop.is_set():
                return
            key = f"impatient-{id(told)}-{number}"
            try:
                await user.submit(SubmitRequest(idempotency_key=key, jobs=[JobSpec(site="BNL", argv=["true"])]))
                told["submitted"] += 1
                request = GetJobRequest(request_id=key, queue="BNL-q", pilot=PilotInfo(id="p"))
                for grant in (await pilot.get_job(request)).jobs:
                    final = ReportRequest(
                        id=grant.id, attempt=grant.attempt, lease_token=grant.lease_token, state=State.FINISHED
                    )
                    await pilot.report(final)
                    told["finished"] += 1
            except CulmError as error:
                told[f"failed: {error}"] += 1


async def test_a_shard_joins_under_load(folder: Path) -> None:
    with cluster(folder) as running:
        home = control.running(folder)
        before = topology_store.load_section(home.topology, "central")
        planned = await asyncio.to_thread(running.culm, "shard", *ASIA, "--plan", "-o", "json")
        assert {"+ shards.asia1.link", "+ regions.ASIA.shards"} <= {
            line.partition(":")[0] for line in decoded(planned)["changes"]
        }
        assert topology_store.load_section(home.topology, "central") == before
        assert not home.data("asia1").exists()

        stop, told = asyncio.Event(), Counter[str]()
        crowd = Crowd(running, ("DESY", "CERN-PROD"))
        async with crowd.at_work(), asyncio.TaskGroup() as group:
            impatient = group.create_task(_impatient(running, stop, told))
            await crowd.until(lambda books: len(books.finished) > 20)
            added = await asyncio.to_thread(running.culm, "shard", *ASIA, "-o", "json", timeout_s=120.0)
            assert decoded(added)["changes"] == decoded(planned)["changes"]
            at_join = told["finished"]
            registered = await asyncio.to_thread(running.culm, "site", "add", "TOKYO", "--region", "ASIA")
            assert registered.returncode == 0, registered.stderr
            # At once, without a retry, whichever of the router's workers is asked.
            async with Client(home.router_url, running.token(USER), patience_s=0.0) as user:
                ids = [
                    (
                        await user.submit(
                            SubmitRequest(idempotency_key=f"asia-{n}", jobs=[JobSpec(site="TOKYO", argv=["true"])])
                        )
                    ).ids[0]
                    for n in range(20)
                ]
            await crowd.until(lambda _books: told["finished"] > at_join + 20)
            stop.set()
            await impatient
        crowd.check()
        assert [what for what in told if what.startswith("failed")] == []

        ran = await asyncio.to_thread(
            running.culm, "pilot", "run", "--queue", "TOKYO-q", "--max-jobs", "20", "--idle-exit", "20"
        )
        assert ran.returncode == 0, ran.stderr
        async with running.client(USER) as user:
            assert {(await user.job(job)).job.state for job in ids} == {State.FINISHED}
        after = topology_store.load_section(home.topology, "central")
        assert {slot: after.placement[slot] for slot in before.placement} == before.placement
        # All that is new is on the new shard, and the audit sees the jobs of each slot on its own shard only.
        assert {after.placement[slot].shard for slot in after.placement.keys() - before.placement.keys()} == {"asia1"}
        assert await asyncio.to_thread(running.audit) == []

        listed = decoded(await asyncio.to_thread(running.culm, "shard", "list", "-o", "json"))
        assert {row["name"]: row["answers"] for row in listed} == dict.fromkeys(("us1", "eu1", "cern1", "asia1"), True)
        shown = decoded(await asyncio.to_thread(running.culm, "shard", "show", "asia1", "-o", "json"))
        assert (shown["regions"], shown["sites"], shown["n_slots"]) == (["ASIA"], ["TOKYO"], 2)
        history = decoded(await asyncio.to_thread(running.culm, "topology", "history", "-o", "json"))
        assert [row["reason"] for row in history] == ["", "the new region", "a new cluster"]
        diff = await asyncio.to_thread(running.culm, "topology", "diff", str(before.epoch), str(before.epoch + 1))
        assert "+ shards.asia1.link" in diff.stdout
        again = await asyncio.to_thread(running.culm, "shard", *ASIA)
        assert "nothing to change" in again.stdout
        # It is supervised as the others are.
        running.wait_back("asia1", running.kill("asia1"))


def test_what_cannot_join_is_refused_and_starts_nothing(running: Cluster) -> None:
    before = {process.name for process in running.processes}
    for words, code, said in (
        (("../x", "--region", "US"), 2, "bad_name"),
        (("monitor", "--region", "US"), 2, "bad_name"),
        (("us1-db", "--region", "US"), 2, "bad_name"),
        (("us1", "--region", "EU"), 5, "shard_exists"),
        (("cern1", "--region", "US"), 5, "name_taken"),
        (("far1", "--region", "CERN"), 5, "name_taken"),
        (("far1", "--link", "127.0.0.1:1"), 4, "shard_down"),
        (("far1", "--link", "nowhere"), 2, "bad_address"),
    ):
        done = running.culm("shard", "add", *words)
        assert (done.returncode, said in done.stderr) == (code, True), done.stderr
        if words[0] != "us1":
            assert not running.layout.data(words[0]).exists()
    assert {process.name for process in running.processes} == before
