"""The users of the load tests, for Locust.

Imported by `locustfile.py` only: Locust changes the whole process to gevent.
"""

import random
import time
from collections.abc import Callable
from typing import Any, ClassVar, Final, NamedTuple, TypeVar

import gevent
import msgspec
from gevent.pool import Pool
from locust import FastHttpUser, SequentialTaskSet, tag, task
from locust.contrib.fasthttp import LocustUserAgent
from locust.user.task import LOCUST_STATE_STOPPING

from culm.states import State
from culm.wire import (
    ErrorBody,
    GetJobAnswer,
    GetJobRequest,
    Grant,
    HeartbeatAnswer,
    HeartbeatRequest,
    PilotInfo,
    ReportAnswer,
    ReportRequest,
    SubmitAnswer,
    SubmitRequest,
)
from loadtest.arrivals import Schedule
from loadtest.book import GET_JOB, Book
from loadtest.orders import Order, Target, new_key, specs

PATIENCE_S: Final = 60.0
"""How long a request is repeated that was told to come again."""
PAUSE_S: Final = 0.25
BATCH: Final = 100
MAX_AT_ONCE: Final = 400
"""Requests of the open loop that are under way; what is due beyond it waits, and its time runs."""
LOOK_S: Final = 0.02
JOIN_S: Final = 10.0
EMPTY: Final = f"{GET_JOB} empty"
OK: Final = 200
# Every status is an answer, which we judge; the client's own way with an error cannot read MessagePack.
LocustUserAgent.valid_response_codes = frozenset(range(100, 600))
_MSGPACK: Final = "application/msgpack"
_ENCODE: Final = msgspec.msgpack.Encoder().encode

A = TypeVar("A")


class _Got(NamedTuple):
    """What came back: `status` is 0 where the connection broke."""

    status: int
    content: bytes
    service_ms: float


class _Envelope(msgspec.Struct):
    error: ErrorBody


class Stage:
    """What all users of a run share."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.rng = random.Random(order.seed)  # noqa: S311  # spreads load, no secret
        self.targets = order.targets
        self.rate = 0.0
        self.n_users = 0
        """Users that were ever made."""
        self.n_unanswered = 0
        """Requests that are due or under way."""
        self._wall, self._clock = time.time(), time.perf_counter()
        self.book = Book(self._wall, order.window_s)

    def now(self) -> float:
        """Seconds since the epoch, by a clock that never jumps."""
        return self._wall + time.perf_counter() - self._clock

    def begin(self) -> None:
        """The run begins now, with an empty book."""
        self.book = Book(self.now(), self.order.window_s)
        for job, (at, site) in self.order.fed.items():
            self.book.accept(job, site, at)
        self.n_unanswered = 0

    def target(self) -> Target:
        """One of the sites, by their weights."""
        return self.rng.choices(self.targets, [one.weight for one in self.targets])[0]


class Api(FastHttpUser):
    """Somebody who speaks /v1."""

    abstract = True
    stage: ClassVar[Stage]
    connection_timeout = 10.0
    network_timeout = 30.0

    def __init__(self, environment: Any) -> None:
        super().__init__(environment)
        self.stage.n_users += 1
        self.number = self.stage.n_users
        # Every user's choices follow from the run's seed and his number.
        self.rng = random.Random(self.stage.order.seed * 1_000_003 + self.number)  # noqa: S311  # no secret

    def stop(self, force: bool = False) -> bool:
        """Let who waits wake up and go. Locust would kill him, who may be in his next request when it comes to it."""
        if force:
            return bool(super().stop(force=True))
        self._state = LOCUST_STATE_STOPPING
        return False

    def call(
        self,
        name: str,
        path: str,
        request: Any,
        kind: type[A],
        *,
        token: str,
        due_at: float | None = None,
        named: Callable[[A], str] | None = None,
    ) -> A | None:
        """Send, and again while the service asks for it; None where that failed, which the book then says.

        Args:
            due_at: from when on its time counts; None: from now.
            named: the name that it goes by when it is known what the answer was.
        """
        body = _ENCODE(request)
        due = self.stage.now() if due_at is None else due_at
        # A user that is ended in the middle of it never comes to the subtraction.
        self.stage.n_unanswered += 1
        answer: A | None = None
        while True:
            got = self._send(name, path, body, token)
            now = self.stage.now()
            if got.status == OK:
                answer = msgspec.msgpack.decode(got.content, type=kind)
                shown = name if named is None else named(answer)
                self.stage.book.answered(shown, now, got.service_ms, "ok")
                self.stage.book.felt(shown, now, (now - due) * 1000)
                break
            error = _error_of(got.content)
            self._blame(name, got, error)
            if got.status and not (error is not None and error.retryable):
                break
            if now - due > PATIENCE_S:
                self._wrong(name, f"no answer in {PATIENCE_S:.0f} s")
                break
            gevent.sleep((error.retry_after_s if error is not None else None) or PAUSE_S)
        self.stage.n_unanswered -= 1
        return answer

    def refused(self, name: str, path: str, request: Any, status: int, *, token: str) -> None:
        """Send what is to be refused with this status; anything else is a failure."""
        body = request if isinstance(request, bytes) else _ENCODE(request)
        got = self._send(name, path, body, token, wanted=status)
        if got.status == status:
            self.stage.book.answered(name, self.stage.now(), got.service_ms, "ok")
        elif got.status == OK:
            self._wrong(name, f"{path} was answered, and should have been refused with {status}")
        else:
            self._blame(name, got, _error_of(got.content))

    def _send(self, name: str, path: str, body: bytes, token: str, *, wanted: int = OK) -> _Got:
        """Send once; Locust's own books are told."""
        headers = {"Authorization": f"Bearer {token}", "Content-Type": _MSGPACK, "Accept": _MSGPACK}
        # Its type knows no bytes, which are what it sends.
        data: Any = body
        with self.client.request(
            "POST", f"/v1/{path}", name=name, data=data, headers=headers, catch_response=True
        ) as response:
            if response.status_code == wanted:
                response.success()
            else:
                response.failure(f"{response.status_code or 'broken'}")
            return _Got(response.status_code, response.content or b"", response.request_meta["response_time"])

    def _blame(self, name: str, got: _Got, error: ErrorBody | None) -> None:
        text = f"{got.status or 'broken connection'} {error.code if error is not None else ''}".strip()
        busy = error is not None and error.retryable
        self.stage.book.answered(name, self.stage.now(), got.service_ms, "busy" if busy else "failed", text)

    def _wrong(self, name: str, text: str) -> None:
        self.stage.book.answered(name, self.stage.now(), 0.0, "failed", text)

    # --- what a pilot does --------------------------------------------------------------------------------------------

    def get_job(self, target: Target, *, request_id: str = "", due_at: float | None = None) -> Grant | None:
        """Ask for a job; None where there is none, or the asking failed."""
        wanted = request_id or new_key()
        request = GetJobRequest(
            request_id=wanted, queue=target.queue, pilot=PilotInfo(id=f"load-{self.number}", host="load")
        )
        answer = self.call(
            f"{GET_JOB} [{target.shard}]",
            "get_job",
            request,
            GetJobAnswer,
            token=target.pilot_token,
            due_at=due_at,
            # An empty answer costs less, and is no job served.
            named=lambda got: f"{GET_JOB if got.jobs else EMPTY} [{target.shard}]",
        )
        if answer is None:
            return None
        if not answer.jobs:
            self.stage.book.n_empty += 1
            return None
        grant = answer.jobs[0]
        self.stage.book.grant(grant.id, grant.attempt, wanted, self.stage.now())
        return grant

    def beat(self, target: Target, grant: Grant, n: int) -> None:
        """The n-th sign of life: starting, then running."""
        state = State.STARTING if n == 0 and self.stage.order.n_beats > 1 else State.RUNNING
        request = HeartbeatRequest(id=grant.id, attempt=grant.attempt, lease_token=grant.lease_token, state=state)
        self.call(f"heartbeat [{target.shard}]", "heartbeat", request, HeartbeatAnswer, token=target.pilot_token)

    def report(self, target: Target, grant: Grant, state: State = State.FINISHED) -> ReportAnswer | None:
        """The job's end, or its hand-back (`activated`)."""
        request = ReportRequest(id=grant.id, attempt=grant.attempt, lease_token=grant.lease_token, state=state)
        answer = self.call(f"report [{target.shard}]", "report", request, ReportAnswer, token=target.pilot_token)
        if answer is not None and state is State.FINISHED:
            self.stage.book.end(grant.id, grant.attempt)
        return answer


class _PilotTasks(SequentialTaskSet):
    """One job after the other."""

    user: "PilotUser"

    @tag("getjob")
    @task
    def ask(self) -> None:
        """A job, or a pause."""
        self.user.grant = None
        self.user.take()

    @tag("update")
    @task
    def live(self) -> None:
        """Heartbeats over the job's time."""
        user = self.user
        # Where `ask` is left out by the tags, or got none.
        if user.grant is None:
            user.take()
        pause_s = user.stage.order.job_s / (user.stage.order.n_beats + 1)
        for n in range(user.stage.order.n_beats):
            if user.grant is not None:
                gevent.sleep(pause_s * user.rng.uniform(0.5, 1.5))
                user.beat(user.target, user.grant, n)

    @tag("update")
    @task
    def end(self) -> None:
        """The report."""
        user = self.user
        if user.grant is not None:
            gevent.sleep(user.stage.order.job_s / (user.stage.order.n_beats + 1))
            user.report(user.target, user.grant)
            user.grant = None


class PilotUser(Api):
    """A pilot of one site, closed loop: it asks when it has nothing to do."""

    tasks = [_PilotTasks]  # noqa: RUF012  # Locust's way
    grant: Grant | None = None

    def on_start(self) -> None:
        """Its site."""
        self.target = self.stage.target()

    def take(self) -> None:
        """Get a job, or wait a moment."""
        self.grant = self.get_job(self.target)
        if self.grant is None:
            gevent.sleep(PAUSE_S)

    def on_stop(self) -> None:
        """Give back what it has."""
        if self.grant is not None:
            self.report(self.target, self.grant, State.ACTIVATED)


class ArrivalUser(Api):
    """The open loop: pilots that come when they come, each with a job from get_job to its report."""

    concurrency = MAX_AT_ONCE

    def on_start(self) -> None:
        """Nobody has come yet."""
        self._pool = Pool(MAX_AT_ONCE)
        self._schedule = Schedule(self.stage.now(), 0.0)

    def on_stop(self) -> None:
        """Let those that are under way come to their end."""
        self._pool.join(timeout=JOIN_S)
        self._pool.kill(block=False)

    @tag("getjob", "update")
    @task
    def arrive(self) -> None:
        """All that are due now."""
        now = self.stage.now()
        self._schedule.change(self.stage.rate, now)
        due = self._schedule.due(now)
        self.stage.n_unanswered += len(due)
        for at in due:
            self._pool.spawn(self._come, at)
        gevent.sleep(max(0.0, min(LOOK_S, self._schedule.next_at - self.stage.now())))

    def _come(self, due_at: float) -> None:
        target = self.stage.target()
        # From here on it is counted as any other request.
        self.stage.n_unanswered -= 1
        grant = self.get_job(target, due_at=due_at)
        if grant is not None:
            for n in range(self.stage.order.n_beats):
                self.beat(target, grant, n)
            self.report(target, grant)


class Submitter(Api):
    """Somebody who sends jobs, so that enough are waiting."""

    @tag("submit")
    @task
    def submit(self) -> None:
        """A hundred jobs for the sites where too few wait."""
        order, book = self.stage.order, self.stage.book
        short = [one for one in self.stage.targets if book.n_waiting[one.site] < order.backlog * one.weight]
        if not short:
            gevent.sleep(LOOK_S)
            return
        jobs = specs(short, BATCH, self.rng)
        request = SubmitRequest(idempotency_key=new_key(), jobs=jobs, jobset=order.jobset)
        answer = self.call("submit", "submit", request, SubmitAnswer, token=order.user_token)
        if answer is not None:
            for spec, job in zip(jobs, answer.ids, strict=True):
                assert job is not None, "a complete answer has every id"
                book.accept(job, spec.site, self.stage.now())


class Shifter(Api):
    """Somebody who looks at the monitor."""

    _PAGES: Final = ("counts", "jobs?limit=100", "errors?hours=1", "pilots", "pile-ups?hours=6", "shards")

    @tag("monitor")
    @task
    def look(self) -> None:
        """One of the reads."""
        order, page = self.stage.order, self.rng.choice(self._PAGES)
        name = f"monitor [{page.partition('?')[0]}]"
        began = time.perf_counter()
        with self.client.get(
            f"{order.monitor}/v1/{page}",
            name=name,
            headers={"Authorization": f"Bearer {order.user_token}"},
            catch_response=True,
        ) as response:
            ms, now = (time.perf_counter() - began) * 1000, self.stage.now()
            ok = response.status_code == 200
            text = "" if ok else f"{response.status_code or 'broken'} {response.error}"
            outcome: Any = "ok" if ok else "busy" if response.status_code == 503 else "failed"
            self.stage.book.answered(name, now, ms, outcome, text)
            if ok:
                self.stage.book.felt(name, now, ms)
                response.success()
            else:
                response.failure(text)
        gevent.sleep(PAUSE_S)


class BadPilot(Api):
    """What must be refused, and what must be answered as before. A wrong answer is a failure."""

    wait_time = lambda _self: 0.1  # noqa: E731  # Locust's way

    @tag("getjob")
    @task
    def malformed(self) -> None:
        """Bytes that are no message, and a message with a field too many."""
        target = self.stage.target()
        name = f"bad [{target.shard}]"
        self.refused(name, "get_job", self.rng.randbytes(40), 400, token=target.pilot_token)
        body = _ENCODE({"request_id": new_key(), "queue": target.queue, "pilot": {"id": "bad"}, "n_job": 1})
        self.refused(name, "get_job", body, 400, token=target.pilot_token)

    @tag("getjob")
    @task
    def forged(self) -> None:
        """A token whose signature is not its own, and one that is good for another site."""
        target, other = self.stage.target(), self.stage.target()
        head, body, signature = target.pilot_token.split(".")
        request = GetJobRequest(request_id=new_key(), queue=target.queue, pilot=PilotInfo(id="bad"))
        name = f"bad [{target.shard}]"
        self.refused(name, "get_job", request, 401, token=f"{head}.{body}.{signature[::-1]}")
        if other.queue != target.queue:
            self.refused(name, "get_job", request, 403, token=other.pilot_token)

    @tag("getjob", "update")
    @task
    def replayed(self) -> None:
        """The same get_job twice, the same report twice."""
        target, request_id = self.stage.target(), new_key()
        grant = self.get_job(target, request_id=request_id)
        if grant is None:
            return
        again = self.get_job(target, request_id=request_id)
        name = f"bad [{target.shard}]"
        if again is not None and (again.id, again.lease_token) != (grant.id, grant.lease_token):
            self._wrong(name, f"a repeated get_job got job {again.id} after {grant.id}")
        first, second = self.report(target, grant), self.report(target, grant)
        if first is not None and second is not None and first != second:
            self._wrong(name, f"a repeated report got {second.state} after {first.state}")

    @tag("update")
    @task
    def stale(self) -> None:
        """A report under another lease; a heartbeat and an end of a job given back; the hand-back once more."""
        target = self.stage.target()
        grant = self.get_job(target)
        if grant is None:
            return
        name = f"bad [{target.shard}]"
        lease = {"id": grant.id, "attempt": grant.attempt, "lease_token": grant.lease_token}
        foreign = lease | {"lease_token": grant.lease_token[::-1], "state": State.FINISHED}
        self.refused(name, "report", _ENCODE(foreign), 409, token=target.pilot_token)
        first = self.report(target, grant, State.ACTIVATED)
        for path, state in (("heartbeat", State.RUNNING), ("report", State.FINISHED)):
            self.refused(name, path, _ENCODE(lease | {"state": state}), 409, token=target.pilot_token)
        second = self.report(target, grant, State.ACTIVATED)
        if first is not None and second is not None and first != second:
            self._wrong(name, f"a repeated hand-back got {second.state} after {first.state}")


def _error_of(content: bytes) -> ErrorBody | None:
    try:
        return msgspec.msgpack.decode(content, type=_Envelope).error
    except msgspec.DecodeError:
        return None
