"""The pilot's loop: one job at a time, from get_job to report.

What is in its hands is on disk before it acts on it (see `journal`), and a signal interrupts only where it waits (see
`stop`): killed between any two lines, or told to go, the job goes back or its outcome is reported, by this pilot or by
the next one in the same work directory.
"""

import random
import socket
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pilot import __version__, journal, runner
from pilot.client import BAD_ANSWER, TIMEOUT_S, RefusedError, Router, UnreachableError
from pilot.stop import Stop, StoppedError

POLL_S = 0.05
RELEASE_PATIENCE_S = 5.0
HANG_UP_S = 0.2
"""Until a router has noticed that a client is gone."""
HEARTBEAT_PATIENCE_S = 1.0
HEARTBEAT_TIMEOUT_S = 10.0
HEARTBEAT_MIN_S = 0.2
HEARTBEAT_MAX_S = 300.0
"""Heartbeats bring the command to cancel, so they do not wait for a third of a lease of hours."""
RETRY_BEAT_S = 10.0
CLEAR_UP_S = 60.0
STOP_TERM_S = 2.0
"""A stopped pilot's payload has less time to end itself: the batch system kills us soon."""
EMPTY_PAUSE_S = 2.0
MAX_EMPTY_PAUSE_S = 30.0

DONE, UNREACHABLE, REFUSED, UNUSABLE, STOPPED = 0, 4, 5, 6, 143
RELEASED = {"state": "activated"}
LOST = RELEASED | {"error": runner.failure(runner.KILLED, "the pilot was killed while it ran the job")}
"""Uses up an attempt: a job that takes its pilots with it must come to an end."""
_CANCEL = "cancel"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a pilot was told to do; durations in seconds."""

    queue: str
    name: str
    work: Path
    """Absolute, and there."""
    wait_s: float
    max_jobs: int
    """0: no limit."""
    idle_exit_s: float
    """0: never."""
    heartbeat_s: float
    """0: as the lease asks."""
    patience_s: float
    """How long a router that does not answer is asked for work."""
    report_patience_s: float


class Agent:
    """One pilot."""

    def __init__(self, plan: Plan, router: Router, stop: Stop) -> None:
        self._plan = plan
        self._router = router
        self._stop = stop
        self._question: journal.Entry | None = None
        """The get_job that is under way, or was answered with nothing."""
        self._clear_up_at = time.monotonic()
        self._n_empty = 0

    def run(self) -> int:
        """Pull and run until told to go, or idle for long enough; an exit code."""
        _say(f"asks for work on {self._plan.queue}")
        try:
            self._loop()
        except StoppedError:
            return STOPPED
        except RefusedError as error:
            _say(f"refused: {error}")
            return REFUSED
        except UnreachableError as error:
            _say(f"the router does not answer: {error}")
            return UNREACHABLE
        except OSError as error:
            _say(f"cannot work here: {error}")
            return UNUSABLE
        else:
            self._answered()
            return DONE
        finally:
            if self._question is not None:
                # It may have been granted something: the next pilot asks again.
                self._question.leave()

    def _loop(self) -> None:
        plan = self._plan
        n_jobs, idle_since = 0, time.monotonic()
        while not plan.max_jobs or n_jobs < plan.max_jobs:
            self._clear_up()
            asked_at = time.monotonic()
            idle_left_s = max(0.0, idle_since + plan.idle_exit_s - asked_at)
            wait_s = min(plan.wait_s, idle_left_s) if plan.idle_exit_s else plan.wait_s
            held = self._get(wait_s)
            if held is not None:
                self._do(*held)
                n_jobs, idle_since, self._n_empty = n_jobs + 1, time.monotonic(), 0
            elif plan.idle_exit_s and time.monotonic() - idle_since >= plan.idle_exit_s:
                return
            else:
                self._pause(time.monotonic() - asked_at, wait_s)

    def _pause(self, waited_s: float, wait_s: float) -> None:
        """After an empty answer: none if it was waited for, else longer every time."""
        if wait_s and waited_s >= wait_s * 0.9:
            self._n_empty = 0
            return
        most_s = min(EMPTY_PAUSE_S * 2 ** min(self._n_empty, 10), MAX_EMPTY_PAUSE_S)
        if self._plan.idle_exit_s:
            most_s = min(most_s, self._plan.idle_exit_s)
        self._n_empty += 1
        with self._stop:
            time.sleep(most_s * random.uniform(0.5, 1.0))  # noqa: S311  # spreads load, no secret

    # --- get_job

    def _get(self, wait_s: float) -> "tuple[journal.Entry, dict[str, Any]] | None":
        """A job and its grant, in the journal; None if there is none."""
        plan = self._plan
        if self._question is None:
            self._question = journal.question(plan.work, plan.queue)
        me = {"id": plan.name, "host": socket.gethostname()[:128], "version": __version__}
        request = {"request_id": self._question.record["request_id"], "queue": plan.queue, "pilot": me}
        asked = request | ({"wait_s": wait_s} if wait_s else {})
        try:
            with self._stop:
                answer = self._router.call("get_job", asked, plan.patience_s, TIMEOUT_S + wait_s)
        except StoppedError:
            self._give_back_unseen(request)
            raise
        return self._take(_grants(answer))

    def _take(self, grants: list[dict[str, Any]]) -> "tuple[journal.Entry, dict[str, Any]] | None":
        if not grants:
            return None
        try:
            entries = [journal.begin(self._plan.work, grant) for grant in grants]
        except OSError:
            self._give_back_grants(grants)
            raise
        # Only now: had we died before, the next pilot would have asked again with the same request id.
        self._answered()
        for entry in entries[1:]:
            self._give_back(entry)
        return entries[0], grants[0]

    def _give_back_unseen(self, request: dict[str, Any]) -> None:
        """Stopped while it asked: what was granted meanwhile is what the same request id gets again."""
        # Else this joins the long poll that we have just hung up on, and waits as long as that would have.
        time.sleep(HANG_UP_S)
        try:
            answer = self._router.call("get_job", request, RELEASE_PATIENCE_S, RELEASE_PATIENCE_S)
            grants = _grants(answer)
        except (UnreachableError, RefusedError) as error:
            _say(f"could not ask what was granted: {error}")
            return
        if self._give_back_grants(grants):
            self._answered()

    def _give_back_grants(self, grants: list[dict[str, Any]]) -> bool:
        try:
            for grant in grants:
                self._router.call("report", _lease(grant) | RELEASED, RELEASE_PATIENCE_S, RELEASE_PATIENCE_S)
        except RefusedError as error:
            _say(f"could not give back: {error}")
            return error.lost
        except UnreachableError as error:
            _say(f"could not give back: {error}")
            return False
        return True

    def _answered(self) -> None:
        if self._question is not None:
            self._question.close()
        self._question = None

    # --- one job

    def _do(self, entry: journal.Entry, grant: dict[str, Any]) -> None:
        try:
            outcome = self._run(entry, grant)
        except RefusedError as error:
            _say(f"job {grant['id']}: {error}")
            if error.lost:
                entry.close()
            else:
                self._give_back(entry)
        except (StoppedError, OSError):
            self._give_back(entry)
            raise
        else:
            _say(f"job {grant['id']}: {outcome['state']}")
            self._finish(entry, outcome)

    def _run(self, entry: journal.Entry, grant: dict[str, Any]) -> dict[str, Any]:
        """The outcome of the payload. Raises RefusedError if the lease is not ours, StoppedError, OSError."""
        if self._beat(entry, "starting", self._plan.patience_s) == _CANCEL:
            return {"state": runner.CANCELLED, "error": runner.failure(runner.CODES[runner.CANCELLED], "not begun")}
        environment = {"CULM_JOB_ID": str(grant["id"]), "CULM_ATTEMPT": str(grant["attempt"])}
        # Before anything of it runs: what it may do to us counts against it.
        entry.note(begun=True)
        try:
            payload = runner.start(grant["spec"], entry.payload, environment)
        except runner.PayloadError as error:
            return {"state": "failed", "error": runner.failure(runner.CANNOT_RUN, str(error))}
        try:
            entry.note(pid=payload.process.pid, started=payload.started)
            return self._watch(entry, payload, float(grant["heartbeat_s"]))
        finally:
            # Whatever happened, it does not outlive our hold on the job.
            payload.end(term_s=STOP_TERM_S)

    def _watch(self, entry: journal.Entry, payload: runner.Payload, heartbeat_s: float) -> dict[str, Any]:
        interval_s = self._plan.heartbeat_s or min(max(HEARTBEAT_MIN_S, heartbeat_s / 3), HEARTBEAT_MAX_S)
        next_beat = time.monotonic()
        while True:
            code = payload.poll()
            if code is not None:
                return payload.outcome(code)
            self._stop.check()
            if time.monotonic() >= next_beat:
                next_beat = time.monotonic() + interval_s
                try:
                    if self._beat(entry, "running", HEARTBEAT_PATIENCE_S, payload.usage()) == _CANCEL:
                        payload.end(runner.CANCELLED)
                except (UnreachableError, RefusedError) as error:
                    if isinstance(error, RefusedError) and error.lost:
                        raise
                    # The payload goes on: the router may be back, or the token renewed, before the lease ends.
                    _say(f"job {entry.record['id']}: no heartbeat: {error}")
                    next_beat = time.monotonic() + min(interval_s, RETRY_BEAT_S)
            time.sleep(POLL_S)

    def _beat(
        self, entry: journal.Entry, state: str, patience_s: float, usage: "dict[str, Any] | None" = None
    ) -> "str | None":
        message = _lease(entry.record) | {"state": state} | ({"usage": usage} if usage else {})
        with self._stop:
            command = self._router.call("heartbeat", message, patience_s, HEARTBEAT_TIMEOUT_S).get("command")
        return str(command) if command else None

    # --- its end

    def _finish(self, entry: journal.Entry, outcome: dict[str, Any]) -> None:
        """Report. Raises UnreachableError, RefusedError, StoppedError with the outcome left in the journal."""
        try:
            entry.note(outcome=outcome)
        except OSError as error:
            # The report matters, the journal is for the case that it fails.
            _say(f"job {entry.record['id']}: no journal: {error}")
        try:
            with self._stop:
                self._report(entry, outcome, self._plan.report_patience_s)
        except StoppedError:
            self._report_quietly(entry, outcome, RELEASE_PATIENCE_S)
            raise

    def _report(
        self, entry: journal.Entry, outcome: dict[str, Any], patience_s: float, timeout_s: float = TIMEOUT_S
    ) -> None:
        """Report, and be done with the entry. Raises UnreachableError, RefusedError: it is kept."""
        try:
            try:
                self._router.call("report", _lease(entry.record) | outcome, patience_s, timeout_s)
            except RefusedError as error:
                if not error.malformed:
                    raise
                # Something in the tails or texts: what became of the job is worth more than they.
                _say(f"job {entry.record['id']}: {error}")
                bare = {name: outcome[name] for name in ("state", "exit_code") if name in outcome}
                self._router.call("report", _lease(entry.record) | bare, patience_s, timeout_s)
        except RefusedError as error:
            if not (error.lost or error.malformed):
                raise
            # Somebody else has the job. What we have done of it counts for nothing.
            _say(f"job {entry.record['id']}: {error}")
        entry.close()

    def _report_quietly(self, entry: journal.Entry, outcome: dict[str, Any], patience_s: float) -> bool:
        """Report if it can be done now, else leave it to a later look; whether to go on with the next one."""
        try:
            self._report(entry, outcome, patience_s, patience_s)
        except (UnreachableError, RefusedError) as error:
            _say(f"job {entry.record['id']} stays in the journal: {error}")
            entry.leave()
            return isinstance(error, RefusedError)
        return True

    def _give_back(self, entry: journal.Entry) -> None:
        self._report_quietly(entry, RELEASED, RELEASE_PATIENCE_S)

    def _clear_up(self) -> None:
        """What killed pilots have left on this host: report what they finished or lost, give back the rest."""
        if time.monotonic() < self._clear_up_at:
            return
        self._clear_up_at = time.monotonic() + CLEAR_UP_S
        for entry in journal.left_behind(self._plan.work):
            outcome = entry.record.get("outcome") or (LOST if entry.record.get("begun") else RELEASED)
            with self._stop:
                if not self._report_quietly(entry, outcome, RELEASE_PATIENCE_S):
                    return


def _grants(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """The jobs of an answer. Raises RefusedError if that is no answer of a router."""
    grants = answer.get("jobs")
    needed = {"id", "attempt", "lease_token", "heartbeat_s", "spec"}
    if not isinstance(grants, list) or not all(isinstance(g, dict) and g.keys() >= needed for g in grants):
        raise RefusedError(200, BAD_ANSWER, "the answer to get_job is none")
    return grants


def _lease(known: dict[str, Any]) -> dict[str, Any]:
    return {name: known[name] for name in ("id", "attempt", "lease_token")}


def _say(text: str) -> None:
    # Nobody may be left to read it (a closed terminal), which must not cost the job.
    with suppress(OSError):
        sys.stderr.write(f"pilot: {text}\n")
        sys.stderr.flush()
