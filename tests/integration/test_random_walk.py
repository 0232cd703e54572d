"""Random walks of many jobs over a real shard, compared after each step with a small model of the table of states.

The model knows the table, attempts, and who holds which lease; the shard must answer every step, also a wrong one, as
the model says, and in the end the audit of the stored data finds nothing.
"""

import random
from dataclasses import dataclass, field

import msgspec
import pytest

from culm.errors import ClientFault, Conflict, CulmError
from culm.settings import DispatchSettings, Timeouts
from culm.states import FINAL, LEASED, PILOT_EVENTS, TRANSITIONS, UNREADY, Event, State
from culm.wire import Grant, InputFile, JobSpec
from ops.audit import audit
from shard.lifecycle import DATA_EVENTS, HEARTBEAT_STATES, REPORTED
from tests.partition import ADMIN, Partition, Servers, job, partition

N_STEPS = 300
ON_WORKER = frozenset({State.SENT, State.STARTING, State.RUNNING})
AFTER_WORKER = LEASED - ON_WORKER
DATA = sorted(DATA_EVENTS)
QUIET = DispatchSettings(cap=4, sweep_interval_s=0.3, reap_interval_s=600.0)
FOR_EVER = Timeouts(grace_s=0.001)


@dataclass
class _Modelled:
    """What the model knows of one job."""

    spec: JobSpec
    state: State
    attempt: int = 0
    lost: int = 0
    asked_to_cancel: bool = False
    grants: list[Grant] = field(default_factory=list)
    """All that were ever given, the last one being the lease while there is one."""
    reported: dict[int, State] = field(default_factory=dict)
    """By attempt: the answer of the report that ended it."""
    said: set[tuple[int, Event]] = field(default_factory=set)
    """By attempt, whatever has happened."""
    given_back: set[int] = field(default_factory=set)
    """Attempts whose pilots gave the job back."""

    history: set[Event] = field(default_factory=set)
    """What has moved it: the data side's repeat of one of these is answered."""

    def go(self, event: Event) -> None:
        self.history.add(event)
        self.state = TRANSITIONS[self.state, event]
        self.asked_to_cancel = self.asked_to_cancel and self.state in LEASED


class _Walk:
    """One walk: the shard, the model, the dice."""

    def __init__(self, shard: Partition, seed: int) -> None:
        self.shard = shard
        self.dice = random.Random(seed)
        self.jobs: dict[int, _Modelled] = {}
        self.n_refused = 0
        self.seen: set[tuple[State | None, Event]] = set()

    async def step(self) -> None:
        """One random act of somebody."""
        acts = [self.submit, self.get_job, self.get_job, self.heartbeat, self.report, self.report, self.data]
        await self.dice.choice([*acts, self.data, self.cancel, self.expire, self.stale])()

    async def submit(self) -> None:
        specs = [
            job(
                priority=self.dice.randrange(5),
                max_attempts=self.dice.randrange(1, 3),
                cores=self.dice.choice([1, 2]),
                inputs=[InputFile(name="in.root", ready=self.dice.random() < 0.5)],
            )
            for _ in range(self.dice.randrange(1, 4))
        ]
        for identifier, spec in zip(await self.shard.submit(*specs), specs, strict=True):
            ready = spec.inputs[0].ready
            self.jobs[identifier] = _Modelled(spec, State.ACTIVATED if ready else State.DEFINED)
            self.seen.add((None, Event.SUBMIT_READY if ready else Event.SUBMIT))

    async def get_job(self) -> None:
        ready = [(-(one.spec.priority or 0), i) for i, one in self.jobs.items() if one.state is State.ACTIVATED]
        wanted = self.dice.randrange(1, 4)
        grants = await self.shard.get(n_jobs=wanted)
        assert [(-grant.priority, grant.id) for grant in grants] == sorted(ready)[:wanted]
        for grant in grants:
            one = self.jobs[grant.id]
            self.moved(one, Event.CLAIM)
            one.attempt += 1
            assert (grant.attempt, msgspec.msgpack.decode(grant.spec, type=JobSpec)) == (one.attempt, one.spec)
            one.grants.append(grant)

    async def heartbeat(self) -> None:
        one = self.pick(LEASED)
        if one is None:
            return
        says = self.dice.choice(sorted(HEARTBEAT_STATES))
        answer = await self.shard.heartbeat(one.grants[-1], says)
        event = PILOT_EVENTS[says]
        if (one.state, event) in TRANSITIONS:
            self.moved(one, event)
        assert (answer.state, answer.command) == (one.state, "cancel" if one.asked_to_cancel else None)

    async def report(self) -> None:
        one = self.pick(LEASED)
        if one is None:
            return
        says = self.dice.choice(sorted(PILOT_EVENTS))
        event = PILOT_EVENTS[says]
        if says not in REPORTED:
            await self.refused(self.shard.report(one.grants[-1], says), "bad_report", ClientFault)
            return
        if event is Event.RELEASE and one.asked_to_cancel:
            event = Event.CANCEL
        said_before = (one.attempt, event) in one.said and (one.state, event) not in TRANSITIONS
        repeated = says in AFTER_WORKER and (says == one.state or said_before)
        if not repeated and (one.state, event) not in TRANSITIONS:
            await self.refused(self.shard.report(one.grants[-1], says), "bad_transition")
            return
        answer = await self.shard.report(one.grants[-1], says)
        if not repeated:
            self.moved(one, event)
        if one.state not in LEASED:
            one.reported[one.attempt] = one.state
            if says is State.ACTIVATED:
                one.given_back.add(one.attempt)
        assert (answer.state, answer.attempt) == (says if repeated else one.state, one.attempt)

    async def data(self) -> None:
        one = self.pick(UNREADY | AFTER_WORKER) if self.dice.random() < 0.8 else self.pick(frozenset(State))
        if one is None:
            return
        event = self.dice.choice(DATA)
        identifier = self.id_of(one)
        there = any(target is one.state and e is event for (_, e), target in TRANSITIONS.items())
        repeated = there or event in one.history
        ends = event in (Event.FINISH, Event.FAIL)
        allowed = (one.state, event) in TRANSITIONS and (not ends or one.state in UNREADY | AFTER_WORKER)
        if not repeated and not allowed:
            await self.refused(self.shard.say(identifier, event), "bad_transition")
            return
        answer = await self.shard.say(identifier, event)
        if not repeated:
            leased = one.state in LEASED
            self.moved(one, event)
            if leased and one.state not in LEASED:
                one.reported[one.attempt] = one.state
        assert answer.state is one.state

    async def cancel(self) -> None:
        one = self.pick(frozenset(State))
        if one is None or self.dice.random() < 0.4:
            return
        [told] = (await self.shard.cancel(self.id_of(one))).jobs
        if one.state in FINAL:
            assert told.outcome == "already_final"
        elif one.state in ON_WORKER:
            assert told.outcome == "requested"
            one.asked_to_cancel = True
        else:
            assert told.outcome == "cancelled"
            self.moved(one, Event.CANCEL)
        assert told.state is one.state

    async def expire(self) -> None:
        """The database's clock runs past some leases, and the reaper comes by."""
        ended = [i for i, one in self.jobs.items() if one.state in LEASED and self.dice.random() < 0.3]
        if not ended:
            return
        listed = ", ".join(map(str, ended))
        await self.shard.sql(f"UPDATE lease SET expires_at = '2001-01-01' WHERE id IN ({listed})")
        assert await self.shard.shard.reaper.end_leases() == len(ended)
        for identifier in ended:
            one = self.jobs[identifier]
            if one.asked_to_cancel:
                self.moved(one, Event.CANCEL)
                continue
            retried = one.state in ON_WORKER and one.lost + 1 < one.spec.max_attempts
            one.lost += 1
            self.moved(one, Event.EXPIRE if retried else Event.LOSE)

    async def stale(self) -> None:
        """A pilot that lost its lease long ago speaks up."""
        holders = [one for one in self.jobs.values() if one.grants]
        if not holders:
            return
        one = self.dice.choice(holders)
        grant = self.dice.choice(one.grants)
        if one.state in LEASED and grant is one.grants[-1]:
            wrong = self.dice.choice([{"lease_token": "0" * 24}, {"attempt": grant.attempt + 1}])
            await self.refused(self.shard.report(grant, **wrong), "lease_lost")
            await self.refused(self.shard.heartbeat(grant, **wrong), "lease_lost")
        elif grant.attempt in one.reported:
            # Told once more, in other words too: the first answer. But who gave it back has nothing else to say.
            says = self.dice.choice([State.FINISHED, State.FAILED, State.ACTIVATED])
            if grant.attempt in one.given_back and says is not State.ACTIVATED:
                await self.refused(self.shard.report(grant, says), "lease_lost")
                return
            assert (await self.shard.report(grant, says)).state is one.reported[grant.attempt]
        else:
            await self.refused(self.shard.report(grant), "lease_lost")
            await self.refused(self.shard.heartbeat(grant), "lease_lost")

    async def refused(self, call: object, code: str, kind: type[CulmError] = Conflict) -> None:
        with pytest.raises(CulmError) as told:
            await call  # type: ignore[misc]
        assert (told.type, told.value.code) == (kind, code)
        self.n_refused += 1

    async def compare(self) -> None:
        """Every job of the shard is as the model has it."""
        rows = await self.shard.rows("SELECT id, state, attempt, lost, cancel_requested FROM job")
        assert {row[0]: row[1:] for row in rows} == {
            identifier: (one.state, one.attempt, one.lost, int(one.asked_to_cancel))
            for identifier, one in self.jobs.items()
        }

    def moved(self, one: _Modelled, event: Event) -> None:
        self.seen.add((one.state, event))
        one.said.add((one.attempt, event))
        one.go(event)

    def pick(self, states: frozenset[State]) -> _Modelled | None:
        found = [one for one in self.jobs.values() if one.state in states]
        return self.dice.choice(found) if found else None

    def id_of(self, one: _Modelled) -> int:
        return next(identifier for identifier, other in self.jobs.items() if other is one)


@pytest.mark.parametrize("seed", [1, 2, 3, 4, 5, 6])
async def test_the_shard_walks_as_the_model_does(both: Servers, seed: int) -> None:
    async with partition(both, timeouts=FOR_EVER, dispatch=QUIET) as shard:
        walk = _Walk(shard, seed)
        for _ in range(N_STEPS):
            await walk.step()
            await walk.compare()
        assert (await audit([shard.settings], shard.topology)).findings == []
        # A walk that went nowhere would prove nothing.
        assert walk.n_refused > 5
        assert len(walk.seen) > 20
        for identifier, one in walk.jobs.items():
            history = (await shard.job(identifier)).history
            assert history[-1].target is one.state


async def test_every_accepted_job_is_granted_in_the_end(both: Servers) -> None:
    """After any walk the backlog drains: whatever is not final is granted, and finishes (invariants I1 and I12)."""
    async with partition(both, timeouts=FOR_EVER, dispatch=QUIET) as shard:
        walk = _Walk(shard, 5)
        for _ in range(N_STEPS // 4):
            await walk.step()
        for identifier, one in walk.jobs.items():
            if one.state in UNREADY:
                await shard.say(identifier, Event.INPUTS_READY, ADMIN)
            elif one.state in AFTER_WORKER:
                await shard.say(identifier, Event.FINISH, ADMIN)
        await shard.sql("UPDATE lease SET expires_at = '2001-01-01'")
        await shard.shard.reaper.end_leases()
        expected = {row[0] for row in await shard.rows("SELECT id FROM job WHERE state = 'activated'")}
        granted: set[int] = set()
        while grants := await shard.get(n_jobs=7):
            granted |= {grant.id for grant in grants}
            for grant in grants:
                await shard.report(grant)
        assert granted == expected
        assert granted
        assert {State(row[0]) for row in await shard.rows("SELECT DISTINCT state FROM job")} <= FINAL
        assert (await audit([shard.settings], shard.topology)).findings == []
