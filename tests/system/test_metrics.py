"""What real processes export at /metrics is what docs/metrics.md says, and it moves when there is work."""

import re
import secrets
from dataclasses import dataclass

import aiohttp
import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from culm.client import Client
from culm.states import State
from culm.wire import CancelRequest, GetJobRequest, Grant, JobError, JobSpec, PilotInfo, ReportRequest, SubmitRequest
from ops.cluster.layout import Layout
from tests.cluster import ROOT, Cluster
from tests.traffic import ADMIN, PILOT, USER
from tests.waiting import eventually

pytestmark = pytest.mark.system
DEADLINE_S = 60.0
QUEUE = "BNL-q"
SHARD = "us1"
_ROW = re.compile(r"^\| `(culm_\w+)` \| (\w+) \| ([^|]+) \| ([^|]+) \|", re.MULTILINE)


@dataclass(frozen=True)
class Documented:
    """A row of the page."""

    kind: str
    labels: frozenset[str]
    processes: frozenset[str]


Values = dict[tuple[str, frozenset[tuple[str, str]]], float]
"""By the name of the sample and its labels."""


def documented(process: str) -> dict[str, Documented]:
    """The page's rows of a process, by the family's name as the parser has it."""
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    rows = {
        name.removesuffix("_total"): Documented(
            kind,
            frozenset(re.findall(r"`(\w+)`", labels)),
            frozenset(processes.split(", ")),
        )
        for name, kind, labels, processes in _ROW.findall(page)
    }
    return {name: one for name, one in rows.items() if process in one.processes}


async def families(running: Cluster, process: str, home: Layout | None = None) -> dict[str, Metric]:
    """What a process exports of ours, by the family's name."""
    home = home or running.layout
    if process in ("router", "monitor"):
        url = f"{home.router_url if process == 'router' else home.monitor_url}/metrics"
        admin = type(ADMIN)(role="admin", subject="root", authority=home.authority)
        options: dict[str, object] = {"headers": {"Authorization": f"Bearer {running.token(admin)}"}}
    else:
        url, options = "http://shard/metrics", {"connector": aiohttp.UnixConnector(str(home.socket(process, "http")))}
    async with aiohttp.ClientSession(**options) as http, http.get(url) as answer:  # type: ignore[arg-type]
        assert answer.status == 200, await answer.text()
        assert answer.content_type == "text/plain"
        found = text_string_to_metric_families(await answer.text())
        return {family.name: family for family in found if family.name.startswith("culm_")}


async def values(running: Cluster, process: str) -> Values:
    """Every sample of a process."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in (await families(running, process)).values()
        for sample in family.samples
    }


def grown(before: Values, after: Values, name: str, **labels: str) -> float:
    """By how much one sample has grown; what was not there was 0."""
    key = name, frozenset(labels.items())
    return after.get(key, 0.0) - before.get(key, 0.0)


async def submit(running: Cluster, n_jobs: int) -> list[int]:
    """Jobs that may be tried once."""
    specs = [JobSpec(queue=QUEUE, shell="true", max_attempts=1) for _ in range(n_jobs)]
    async with running.client(USER) as user:
        answer = await user.submit(SubmitRequest(idempotency_key=secrets.token_hex(8), jobs=specs))
    return [identifier for identifier in answer.ids if identifier is not None]


async def get_job(agent: Client, wait_s: float = 0.0) -> list[Grant]:
    """One get_job."""
    request = GetJobRequest(request_id=secrets.token_hex(8), queue=QUEUE, pilot=PilotInfo(id="p"), wait_s=wait_s)
    return (await agent.get_job(request)).jobs


async def report(agent: Client, grant: Grant, state: State, error: JobError | None = None) -> None:
    """The last word on an attempt."""
    lease = {"id": grant.id, "attempt": grant.attempt, "lease_token": grant.lease_token}
    await agent.report(ReportRequest(**lease, state=state, error=error))


async def test_every_process_exports_what_the_page_says_and_nothing_else(running: Cluster) -> None:
    for home in running.layout.homes:
        for process in ("router", "monitor", *home.shards):
            kind = process if process in ("router", "monitor") else "shard"
            expected, exported = documented(kind), await families(running, process, home)
            assert exported.keys() == expected.keys(), f"{home.authority} {process}"
            for name, family in exported.items():
                assert family.type == expected[name].kind, name
                assert family.documentation, name
                for sample in family.samples:
                    assert sample.labels.keys() - {"le"} == expected[name].labels, sample


async def test_what_pilots_and_users_do_is_seen(running: Cluster) -> None:
    shard, router = await values(running, SHARD), await values(running, "router")
    async with running.client(PILOT) as agent:
        assert await get_job(agent) == []
        ids = await submit(running, 3)
        [failing], [finishing] = await get_job(agent), await get_job(agent, wait_s=5.0)
        await report(agent, failing, State.FAILED, JobError(plane="exe", code=77))
        await report(agent, finishing, State.FINISHED)
    shard_now, router_now = await values(running, SHARD), await values(running, "router")
    for before, after in ((shard, shard_now), (router, router_now)):
        assert grown(before, after, "culm_getjob_seconds_count", op="at_once", outcome="hit") == 1
        assert grown(before, after, "culm_getjob_seconds_count", op="wait", outcome="hit") == 1
        assert grown(before, after, "culm_getjob_seconds_count", op="at_once", outcome="empty") == 1
        assert grown(before, after, "culm_request_seconds_count", verb="get_job", outcome="ok") == 0
        assert grown(before, after, "culm_request_seconds_count", verb="report", outcome="ok") == 2
    assert grown(shard, shard_now, "culm_jobs_dispatched_total") == 2
    for state, n_jobs in {"activated": 3, "sent": 2, "failed": 1, "finished": 1}.items():
        assert grown(shard, shard_now, "culm_job_transitions_total", state=state) == n_jobs
    assert grown(shard, shard_now, "culm_job_errors_total", component="exe", code="77") == 1
    assert grown(shard, shard_now, "culm_db_pool_wait_seconds_count", pool="claim") >= 2
    assert grown(shard, shard_now, "culm_db_query_seconds_count", query="insert_specs") == 1
    # Submit, two get_jobs that do not wait, two reports.
    assert grown(router, router_now, "culm_router_upstream_seconds_count", shard=SHARD) == 5
    await eventually(lambda: _lag_was_measured(running), DEADLINE_S, what="the lag of all loops")
    authorities = {"central", "CERN"}
    epochs = {
        dict(labels)["authority"]: epoch for (name, labels), epoch in router_now.items() if name.endswith("epoch")
    }
    assert epochs.keys() == authorities
    assert all(epoch >= 1 for epoch in epochs.values())
    await _cancel(running, *ids)


async def test_the_queue_of_a_site_and_its_pilots_are_seen(running: Cluster) -> None:
    bnl = frozenset({("site", "BNL")})
    async with running.client(PILOT) as agent:
        assert await get_job(agent) == []
    [identifier] = await submit(running, 1)

    async def seen() -> bool:
        now = await values(running, SHARD)
        return (
            now.get(("culm_queue_depth", bnl), 0) >= 1
            and now[("culm_queue_oldest_seconds", bnl)] > 0
            and now[("culm_jobs", frozenset({("state", "activated")}))] >= 1
            and now.get(("culm_pilots_seen", bnl), 0) >= 1
        )

    await eventually(seen, DEADLINE_S, what="the job that waits is seen")
    await _cancel(running, identifier)

    async def gone() -> bool:
        now = await values(running, SHARD)
        return now[("culm_queue_depth", bnl)] == now[("culm_queue_oldest_seconds", bnl)] == 0

    await eventually(gone, DEADLINE_S, what="the queue is seen empty")


async def test_the_monitor_hears_all_shards_though_nobody_looks(running: Cluster) -> None:
    async def heard() -> bool:
        ages = {
            dict(labels)["shard"]: age
            for (name, labels), age in (await values(running, "monitor")).items()
            if name == "culm_monitor_shard_stale_seconds"
        }
        return ages.keys() == {"us1", "eu1", "cern1"} and max(ages.values()) < 10.0

    await eventually(heard, DEADLINE_S, what="all were heard")


async def _lag_was_measured(running: Cluster) -> bool:
    none: frozenset[tuple[str, str]] = frozenset()
    of_all = [await values(running, process) for process in (SHARD, "router", "monitor")]
    return all(one[("culm_loop_lag_seconds_count", none)] > 0 for one in of_all)


async def _cancel(running: Cluster, *ids: int) -> None:
    """Nothing is left over for the other tests of the cluster."""
    async with running.client(USER) as user:
        await user.cancel(CancelRequest(ids=list(ids)))
