"""Replaying a real grid's log: its jobs, users, groups and sites, scaled in time, against a live router.

Submitters and simulated pilots are clients over HTTP like any other; a pilot sleeps the job's scaled run time. What is
counted at the end comes from the clients' own books and from the server's answers, compared.
"""

import asyncio
import contextlib
import random
import secrets
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Final

import msgspec

from culm.client import Client
from culm.errors import Conflict
from culm.states import FINAL, State
from culm.wire import (
    MAX_JOBS_PER_SUBMIT,
    GetJobRequest,
    Grant,
    HeartbeatRequest,
    JobSpec,
    JobsQuery,
    PilotInfo,
    ReportRequest,
    SubmitRequest,
)
from loadtest.workload_log import LoggedJob

WAIT_S: Final = 5.0
"""A pilot's long poll, where it serves one site; several are asked in turn."""
TURN_S: Final = 0.2
SUBMIT_EVERY_S: Final = 0.25
"""Jobs of one user that come within this time go in one call."""
PAGE: Final = 1000
OVERHEAD_S: Final = 0.02
"""What a job costs a pilot beyond its run time, when the pilots are shared out."""
RUN_KEY: Final = "CULM_REPLAY_RUN_S"
"""The job carries its scaled run time in its environment: a real pilot could run it, too."""

Tokens = Callable[[str, str], str]
"""(user, group) -> a token."""


@dataclass
class Plan:
    """What to replay and how."""

    jobs: Sequence[LoggedJob]
    speed: float
    """Seconds of the log per second of ours."""
    n_pilots: int
    patience_s: float
    """How long after the last submit until what is not final counts as unfinished."""


class SiteWaits(msgspec.Struct, frozen=True):
    """How long the jobs of a site waited from the accepted submit to the pilot; seconds, not scaled."""

    site: str
    n_jobs: int
    median_s: float
    p95_s: float
    max_s: float


class ReplayReport(msgspec.Struct, frozen=True, kw_only=True):
    """What became of the replay. Any of lost, twice and unfinished is a fault, and so is a job that did not finish."""

    submitted: int
    finished: int
    states: dict[str, int]
    lost: int
    """Acknowledged, but the server does not know it."""
    twice: int
    """Run to its end by two pilots, or one key with two ids."""
    unfinished: int
    refused_reports: int
    """409: the lease had ended and another attempt had the job."""
    took_s: float
    waits: list[SiteWaits]

    @property
    def clean(self) -> bool:
        """Whether every job was run once and finished: no simulated pilot reports anything else."""
        return self.finished == self.submitted and not (self.lost or self.twice or self.unfinished)


@dataclass
class Replay:
    """One replay under way; `progress` reads its books."""

    plan: Plan
    jobset: int = field(default_factory=lambda: secrets.randbits(47) | 1)
    accepted: dict[int, tuple[str, float]] = field(default_factory=dict)
    """Id -> its site and when it was accepted."""
    waits: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    ended: Counter[int] = field(default_factory=Counter)
    """How often each job was reported finished and that was accepted."""
    twice: int = 0
    refused: int = 0
    _ended_one: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(
        self, url: str, user_token: Tokens, pilot_token: Callable[[str], str], admin_token: str
    ) -> ReplayReport:
        """Submit, run, wait until all is final, compare the books with the server's.

        Args:
            url: the router.
            user_token: a token for a user of a group.
            pilot_token: a token for the pilots of a site.
            admin_token: to read what became of the jobs.

        Raises CulmError that no client could repair.
        """
        began = time.monotonic()
        async with asyncio.TaskGroup() as group, AsyncExitStack() as stack:
            submitting = [
                group.create_task(self._submit(await _client(stack, url, user_token(*who)), jobs))
                for who, jobs in self._by_user().items()
            ]
            clients = {site: await _client(stack, url, pilot_token(site)) for site in self.sites}
            pilots = [
                group.create_task(self._pilot(number, sites, clients))
                for number, sites in enumerate(share_out(self._work_by_site(), self.plan.n_pilots))
            ]
            await asyncio.gather(*submitting)
            await self._until_ended()
            for pilot in pilots:
                pilot.cancel()
            states = await self._states(await _client(stack, url, admin_token))
        return self._report(states, time.monotonic() - began)

    @property
    def sites(self) -> list[str]:
        """The sites of the jobs."""
        return list(dict.fromkeys(job.site for job in self.plan.jobs))

    def _work_by_site(self) -> dict[str, float]:
        work: dict[str, float] = defaultdict(float)
        for job in self.plan.jobs:
            work[job.site] += job.run_s / self.plan.speed + OVERHEAD_S
        return work

    def _by_user(self) -> dict[tuple[str, str], list[LoggedJob]]:
        jobs: dict[tuple[str, str], list[LoggedJob]] = defaultdict(list)
        for job in self.plan.jobs:
            jobs[job.user, job.group].append(job)
        return jobs

    async def _submit(self, client: Client, jobs: Sequence[LoggedJob]) -> None:
        began, done = time.monotonic(), 0
        while done < len(jobs):
            due_s = jobs[done].at_s / self.plan.speed
            await asyncio.sleep(max(0.0, began + due_s - time.monotonic()))
            # What is due by now or soon goes in one call; a user's script does the same.
            until = max(time.monotonic() - began, due_s) + SUBMIT_EVERY_S
            some = [job for job in jobs[done : done + MAX_JOBS_PER_SUBMIT] if job.at_s / self.plan.speed <= until]
            await self._submit_call(client, some)
            done += len(some)

    async def _submit_call(self, client: Client, jobs: Sequence[LoggedJob]) -> None:
        specs = [
            JobSpec(
                site=job.site,
                name=f"replay-{job.user}",
                argv=["sleep", f"{job.run_s / self.plan.speed:.3f}"],
                environment={RUN_KEY: f"{job.run_s / self.plan.speed:.6f}"},
            )
            for job in jobs
        ]
        request = SubmitRequest(idempotency_key=secrets.token_hex(12), jobs=specs, jobset=self.jobset)
        answer = await client.submit(request)
        now = time.monotonic()
        for job, identifier in zip(jobs, answer.ids, strict=True):
            assert identifier is not None, "a complete answer has every id"
            if identifier in self.accepted:
                self.twice += 1
            self.accepted[identifier] = (job.site, now)

    async def _pilot(self, number: int, sites: Sequence[str], clients: dict[str, Client]) -> None:
        info = PilotInfo(id=f"replay-{number}", host="replay", type="", version="1")
        turn = number
        while True:
            site = sites[turn % len(sites)]
            turn += 1
            wait_s = WAIT_S if len(sites) == 1 else TURN_S
            request = GetJobRequest(
                request_id=secrets.token_hex(12), queue=queue_of(site), pilot=info, label="user", wait_s=wait_s
            )
            answer = await clients[site].get_job(request)
            for grant in answer.jobs:
                await self._execute(clients[site], grant, site)

    async def _execute(self, client: Client, grant: Grant, site: str) -> None:
        spec = msgspec.json.decode(grant.spec, type=JobSpec)
        if RUN_KEY not in spec.environment:
            await client.report(_report_of(grant, State.ACTIVATED))
            return
        _, accepted_at = self.accepted.get(grant.id, (site, time.monotonic()))
        self.waits[site].append(max(0.0, time.monotonic() - accepted_at))
        try:
            beat = HeartbeatRequest(
                id=grant.id, attempt=grant.attempt, lease_token=grant.lease_token, state=State.RUNNING
            )
            await client.heartbeat(beat)
            await asyncio.sleep(float(spec.environment[RUN_KEY]))
            await client.report(_report_of(grant, State.FINISHED))
        except Conflict:
            self.refused += 1
        else:
            self.ended[grant.id] += 1
            self._ended_one.set()

    async def _until_ended(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.plan.patience_s):
                while len(self.ended) < len(self.accepted):
                    self._ended_one.clear()
                    await self._ended_one.wait()

    async def _states(self, client: Client) -> dict[int, State]:
        states: dict[int, State] = {}
        after = 0
        while True:
            page = await client.jobs(JobsQuery(jobset=self.jobset, limit=PAGE, after=after))
            states.update((row.id, row.state) for row in page.jobs)
            if page.next is None:
                return states
            after = page.next

    def _report(self, states: dict[int, State], took_s: float) -> ReplayReport:
        return ReplayReport(
            submitted=len(self.accepted),
            finished=sum(state is State.FINISHED for state in states.values()),
            states=dict(sorted(Counter(state.value for state in states.values()).items())),
            lost=len(self.accepted.keys() - states.keys()),
            twice=self.twice + sum(n - 1 for n in self.ended.values() if n > 1),
            unfinished=sum(state not in FINAL for state in states.values()),
            refused_reports=self.refused,
            took_s=took_s,
            waits=[_waits(site, waits) for site, waits in sorted(self.waits.items())],
        )


def queue_of(site: str) -> str:
    """The computing queue under which the replay registers a site."""
    return f"{site}-replay"


def share_out(work_by_site: Mapping[str, float], n_pilots: int) -> list[list[str]]:
    """The sites of each pilot: by a site's share of the work, at least one pilot each; several sites to one if need be.

    >>> share_out({"a": 30.0, "b": 10.0}, 4)
    [['a'], ['a'], ['a'], ['b']]
    """
    sites = sorted(work_by_site, key=lambda site: -work_by_site[site])
    if n_pilots <= len(sites):
        return [sites[number::n_pilots] for number in range(n_pilots)]
    shares = [[site] for site in sites]
    served = Counter(sites)
    while len(shares) < n_pilots:
        neediest = max(sites, key=lambda site: work_by_site[site] / served[site])
        served[neediest] += 1
        shares.append([neediest])
    return sorted(shares)


async def _client(stack: AsyncExitStack, url: str, token: str) -> Client:
    # Started pilots do not all knock in the same instant.
    await asyncio.sleep(random.uniform(0.0, 0.002))  # noqa: S311  # spreads load, no secret
    return await stack.enter_async_context(Client(url, token, patience_s=60.0))


def _report_of(grant: Grant, state: State) -> ReportRequest:
    return ReportRequest(id=grant.id, attempt=grant.attempt, lease_token=grant.lease_token, state=state)


def _waits(site: str, waits: list[float]) -> SiteWaits:
    ordered = sorted(waits)
    return SiteWaits(site, len(ordered), ordered[len(ordered) // 2], ordered[int(len(ordered) * 0.95)], ordered[-1])
