"""Clients that submit and pilots that pull, over real HTTP, and the books they keep of what they were told."""

import asyncio
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from culm.client import Client
from culm.errors import Conflict
from culm.states import FINAL, State
from culm.wire import (
    GetJobRequest,
    Grant,
    HeartbeatRequest,
    JobSpec,
    JobsQuery,
    PilotInfo,
    Principal,
    ReportRequest,
    SubmitRequest,
)
from tests.cluster import Cluster
from tests.waiting import eventually

USER = Principal(role="user", subject="ann", authority="central", vo="atlas")
ADMIN = Principal(role="admin", subject="root", authority="central")
PILOT = Principal(role="pilot", subject="crowd", authority="central", queues=["*"])
CERN_PILOT = Principal(role="pilot", subject="crowd", authority="CERN", queues=["*"])
PATIENCE_S = 60.0
SITES = ("BNL", "DESY", "CERN-PROD")
"""One site on each shard."""


@dataclass
class Books:
    """What the clients were told."""

    acknowledged: list[int] = field(default_factory=list)
    grants: Counter[tuple[int, int]] = field(default_factory=Counter)
    """(job, attempt) -> how many requests it was granted to."""
    finished: Counter[int] = field(default_factory=Counter)
    """How often a report of success was accepted."""
    lost_leases: int = 0
    """409: another attempt has the job."""


class Crowd:
    """Submitters and pilots at work until `stop`."""

    def __init__(self, running: Cluster, sites: tuple[str, ...] = SITES) -> None:
        self.books = Books()
        self.jobset = secrets.randbits(40) | 1
        self._running = running
        self._sites = sites
        self._submitting = True

    @asynccontextmanager
    async def at_work(self, *, n_submitters: int = 3, n_pilots: int = 12) -> AsyncIterator["Crowd"]:
        """Work until the block ends; then nothing new is submitted, and what was is run to its end."""
        async with (
            self._running.client(USER, patience_s=PATIENCE_S) as user,
            self._running.client(PILOT, patience_s=PATIENCE_S) as agent,
            self._running.client(CERN_PILOT, patience_s=PATIENCE_S) as agent_of_cern,
            self._running.client(ADMIN, patience_s=PATIENCE_S) as admin,
            asyncio.TaskGroup() as group,
        ):
            submitters = [group.create_task(self._submit(user, number)) for number in range(n_submitters)]
            pilots = []
            for number in range(n_pilots):
                site = self._sites[number % len(self._sites)]
                client = agent_of_cern if site.startswith("CERN") else agent
                pilots.append(group.create_task(self._pull(client, number, f"{site}-q")))
            yield self
            self._submitting = False
            await asyncio.gather(*submitters)
            await eventually(lambda: self._all_final(admin), PATIENCE_S, what="everything accepted is final")
            for pilot in pilots:
                pilot.cancel()

    async def until(self, condition: Callable[[Books], bool], deadline_s: float = PATIENCE_S) -> None:
        """Wait for something in the books."""
        await eventually(lambda: condition(self.books), deadline_s, what="the crowd goes on")

    def check(self) -> None:
        """What must hold of the books, whatever happened meanwhile."""
        books = self.books
        assert len(set(books.acknowledged)) == len(books.acknowledged), "an id was given to two jobs"
        assert set(books.finished) <= set(books.acknowledged), "a job ran that nobody was told of"
        # I5: one accepted report of success; none for a job whose answer to the report was lost is possible too.
        assert [job for job, n in books.finished.items() if n > 1] == []
        # I3: an attempt is granted to one request.
        assert [grant for grant, n in books.grants.items() if n > 1] == []

    async def _submit(self, client: Client, number: int) -> None:
        while self._submitting:
            site = self._sites[number % len(self._sites)]
            jobs = [JobSpec(site=site, argv=["true"], max_attempts=10) for _ in range(5)]
            request = SubmitRequest(idempotency_key=secrets.token_hex(8), jobs=jobs, jobset=self.jobset)
            answer = await client.submit(request)
            assert None not in answer.ids
            self.books.acknowledged += [identifier for identifier in answer.ids if identifier is not None]
            # Not more than the pilots can run: the backlog is not what is tested.
            await eventually(lambda: self._backlog() < 60 or not self._submitting, PATIENCE_S)

    def _backlog(self) -> int:
        return len(self.books.acknowledged) - len(self.books.finished)

    async def _pull(self, client: Client, number: int, queue: str) -> None:
        me = PilotInfo(id=f"crowd-{number}", host="test")
        while True:
            request = GetJobRequest(request_id=secrets.token_hex(12), queue=queue, pilot=me, wait_s=1.0)
            for grant in (await client.get_job(request)).jobs:
                self.books.grants[grant.id, grant.attempt] += 1
                try:
                    await self._run(client, grant)
                except Conflict:
                    self.books.lost_leases += 1

    async def _run(self, client: Client, grant: Grant) -> None:
        held = {"id": grant.id, "attempt": grant.attempt, "lease_token": grant.lease_token}
        await client.heartbeat(HeartbeatRequest(**held, state=State.RUNNING))
        report = ReportRequest(**held, state=State.FINISHED, exit_code=0)
        assert (await client.report(report)).state is State.FINISHED
        self.books.finished[grant.id] += 1

    async def _all_final(self, client: Client) -> bool:
        states: dict[int, State] = {}
        after = 0
        while True:
            page = await client.jobs(JobsQuery(jobset=self.jobset, limit=1000, after=after))
            if page.missing_shards:
                return False
            states |= {row.id: row.state for row in page.jobs}
            if page.next is None:
                break
            after = page.next
        # I1: what was acknowledged is there; and it ends.
        assert set(self.books.acknowledged) <= set(states), "an acknowledged job is lost"
        return all(state in FINAL for state in states.values())
