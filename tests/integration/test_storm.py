"""Many clients at once that hang up, repeat and are cut off, over a Valkey that is flushed and filled with rubbish.

In the end each accepted job has finished exactly once, and the audit finds nothing.
"""

import asyncio
import contextlib
import itertools
import random
import secrets
from collections import Counter

import pytest
from redis.exceptions import RedisError

from culm.errors import Conflict
from culm.matching import Offer
from culm.settings import DispatchSettings, Timeouts
from culm.states import State
from culm.wire import Grant, JobSpec
from ops.audit import audit
from shard.dispatch_queue import QueueLostError
from shard.hints import ClassKey, Hint
from tests.partition import OFFER, QUEUE, Partition, Servers, job, partition, patiently
from tests.waiting import eventually

DEADLINE_S = 20.0
N_JOBS = 240
N_PILOTS = 24
OFFERS = (
    OFFER,
    Offer(queue=QUEUE, labels=OFFER.labels, vos=None, cores=2),
    Offer(queue=QUEUE, labels=OFFER.labels, vos=None, cores=4, memory_mb=1000),
)


class _Storm:
    """The clients and what they know."""

    def __init__(self, shard: Partition, seed: int) -> None:
        self.shard = shard
        self.dice = random.Random(seed)
        self.accepted: list[int] = []
        self.finished: Counter[int] = Counter()
        self.granted: dict[tuple[int, int], str] = {}
        """(job, attempt) -> the request id that was told of it: one at most (invariant I3)."""
        self.n_hung_up = 0
        self.blowing = True

    @property
    def over(self) -> bool:
        return len(self.accepted) == N_JOBS and len(self.finished) == N_JOBS

    async def submitter(self, n_jobs: int) -> None:
        while n_jobs:
            size = min(n_jobs, self.dice.randrange(1, 9))
            specs = [
                # As many attempts as it takes: each may be lost.
                job(cores=self.dice.choice([1, 1, 2]), priority=self.dice.randrange(4), max_attempts=50)
                for _ in range(size)
            ]
            self.accepted += await self._submitted(specs)
            n_jobs -= size

    async def _submitted(self, specs: list[JobSpec]) -> list[int]:
        """Repeated with its key until it is answered; some tries hang up."""
        key = secrets.token_hex(8)
        while self.dice.random() < 0.3:
            await self._hang_up(self.shard.submit(*specs, key=key))
        return await patiently(lambda: self.shard.submit(*specs, key=key), DEADLINE_S)

    async def pilot(self, number: int) -> None:
        offer = OFFERS[number % len(OFFERS)]
        while not self.over:
            for grant in await self._asked(offer):
                await self._worked(grant)

    async def _asked(self, offer: Offer) -> list[Grant]:
        """One get_job; it may hang up and repeat its question, twice at once too."""
        name, n_jobs = secrets.token_hex(8), self.dice.choice([1, 1, 3])

        def ask() -> "asyncio.Future[list[Grant]]":
            return asyncio.ensure_future(
                self.shard.get(request_id=name, n_jobs=n_jobs, wait_s=self.dice.choice([0.0, 0.05]), offer=offer)
            )

        fate = self.dice.random()
        if fate < 0.25:
            await self._hang_up(ask())
            if fate < 0.1:
                # It never comes back: what it was given goes to others.
                return []
        elif fate < 0.4:
            first, second = await asyncio.gather(patiently(ask, DEADLINE_S), patiently(ask, DEADLINE_S))
            # The one may have been empty before there was a job.
            if first and second and n_jobs == 1:
                assert first == second
            return self._told(name, first or second)
        return self._told(name, await patiently(ask, DEADLINE_S))

    def _told(self, name: str, grants: list[Grant]) -> list[Grant]:
        for grant in grants:
            assert self.granted.setdefault((grant.id, grant.attempt), name) == name
        return grants

    async def _worked(self, grant: Grant) -> None:
        fate = self.dice.random()
        try:
            if fate < 0.1:
                return
            if fate < 0.5:
                await patiently(lambda: self.shard.heartbeat(grant), DEADLINE_S)
            if fate < 0.2:
                await patiently(lambda: self.shard.report(grant, State.ACTIVATED), DEADLINE_S)
                return
            while self.dice.random() < 0.2:
                await self._hang_up(self.shard.report(grant))
            answer = await patiently(lambda: self.shard.report(grant), DEADLINE_S)
        except Conflict as error:
            # Its lease ended meanwhile, or went back with a question that was hung up.
            assert error.code == "lease_lost"
            return
        assert answer.state is State.FINISHED
        self.finished[grant.id] += 1

    async def _hang_up(self, call: object) -> None:
        task: asyncio.Future[object] = asyncio.ensure_future(call)  # type: ignore[arg-type]
        for _ in range(self.dice.randrange(30)):
            if task.done():
                break
            await asyncio.wait([task], timeout=0.0002)
        task.cancel()
        self.n_hung_up += 1
        await asyncio.gather(task, return_exceptions=True)

    async def vandal(self) -> None:
        """Flushes Valkey, and fills it with hints that are wrong in every way."""
        queue = self.shard.shard.queue
        while self.blowing and not self.over:
            redis = queue._redis
            match self.dice.randrange(5):
                case 0:
                    await redis.flushdb()
                case 1:
                    await redis.set("culm:us1:generation", secrets.token_hex(16))
                case 2:
                    for name in await redis.keys("culm:us1:ready:*"):
                        # It may be of another type since the last act.
                        with contextlib.suppress(RedisError):
                            await redis.zadd(name, {self._member(): self.dice.randrange(-9, 9) for _ in range(5)})
                case 3:
                    await self._lie()
                case 4:
                    for name in await redis.keys("culm:us1:*"):
                        await redis.delete(name)
                        await redis.set(name, secrets.token_bytes(8))
            n_finished = len(self.finished)
            await eventually(lambda n=n_finished: len(self.finished) > n + 8 or self.over, DEADLINE_S)

    def _member(self) -> str:
        if self.accepted and self.dice.random() < 0.7:
            return f"{self.dice.choice(self.accepted):016d}"
        return self.dice.choice(["", "x" * 16, "9" * 16, "1" * 40])

    async def _lie(self) -> None:
        """Hints of jobs under other classes than theirs."""
        classes = self.shard.shard.classes.active() or [ClassKey(1, 1)]
        some = self.dice.sample(self.accepted, min(len(self.accepted), 9))
        try:
            await self.shard.shard.queue.push([Hint(-9, i, self.dice.choice(classes)) for i in some])
        except QueueLostError:
            self.shard.shard.refill.lost()


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
async def test_after_a_storm_each_job_has_finished_exactly_once(both: Servers, seed: int) -> None:
    dispatch = DispatchSettings(cap=20, breaker_s=0.05, sweep_interval_s=0.2, reap_interval_s=0.05)
    # Shorter than anybody works: leases end in the middle.
    timeouts = Timeouts(first_lease_s=0.5, heartbeat_s=0.5, grace_s=0.001)
    async with partition(both, timeouts=timeouts, dispatch=dispatch) as shard:
        storm = _Storm(shard, seed)
        async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as group:
            for _ in range(4):
                group.create_task(storm.submitter(N_JOBS // 4))
            for number in range(N_PILOTS):
                group.create_task(storm.pilot(number))
            group.create_task(storm.vandal())
        assert len(set(storm.accepted)) == N_JOBS
        assert set(storm.finished) == set(storm.accepted)
        assert storm.n_hung_up > 20
        rows = await shard.rows("SELECT id, state FROM job")
        assert sorted(rows) == sorted((identifier, "finished") for identifier in storm.accepted)
        ends = await shard.rows("SELECT COUNT(*), COUNT(DISTINCT id) FROM job_event WHERE event = 'finish'")
        assert ends == [(N_JOBS, N_JOBS)]
        assert (await audit([shard.settings], shard.topology)).findings == []
        assert shard.shard.dispatcher._requests == {}


async def test_many_unlike_pilots_share_few_jobs_without_a_false_empty_answer(both: Servers) -> None:
    """Every batch mixes offers whose classes overlap; at no time are fewer jobs left than are asked for."""
    async with partition(both, dispatch=DispatchSettings(cap=5, sweep_interval_s=0.05)) as shard:
        ids = await shard.submit(*[job(priority=n % 3) for n in range(200)], *[job(cores=2)] * 100)
        numbers = itertools.count()
        granted: list[int] = []

        async def client() -> None:
            while (number := next(numbers)) < len(ids):
                [grant] = await shard.get(offer=OFFERS[number % len(OFFERS)])
                granted.append(grant.id)

        async with asyncio.timeout(DEADLINE_S):
            await asyncio.gather(*(client() for _ in range(48)))
        assert sorted(granted) == ids
        assert (await audit([shard.settings], shard.topology)).findings == []
