"""The clients' book of a run: what was asked, how long it took, which job was given to whom. No input or output."""

from collections import Counter
from typing import Final, Literal

import msgspec

from loadtest.latencies import Histogram, together
from loadtest.shapes import StepFigures

Outcome = Literal["ok", "busy", "failed"]
"""`busy`: the service asked to come again (503 and retryable), which is no failure where it does."""
MAX_TEXTS: Final = 50
"""Different texts that are kept."""
GET_JOB: Final = "getJob"


class Name(msgspec.Struct):
    """What is known of one kind of request at one shard, `getJob [us1]`."""

    n_ok: int = 0
    n_busy: int = 0
    """Answers that asked to come again."""
    n_failed: int = 0
    service: dict[int, int] = {}
    """Buckets: from the sending of a request to its answer."""
    felt: dict[int, int] = {}
    """Buckets: from when it was due to the answer that ended it, repeats and the wait for a free client included."""


class Window(msgspec.Struct):
    """A few seconds of a run, by operation."""

    n_ok: dict[str, int] = {}
    n_busy: dict[str, int] = {}
    n_failed: dict[str, int] = {}
    felt: dict[str, dict[int, int]] = {}
    n_users: int = 0
    rate: float = 0.0
    """Wanted of the open loop, arrivals a second."""


class Result(msgspec.Struct, kw_only=True):
    """What the clients hand over at the end. Times are seconds since the epoch."""

    began_at: float
    ended_at: float
    cpu_s: float
    """Processor time of the clients' process between the two."""
    window_s: float
    windows: list[Window]
    names: dict[str, Name]
    texts: dict[str, int]
    """Failures, and answers that asked to come again, by their text."""
    n_granted: int
    n_ended: int
    """Jobs whose end was reported and accepted, those that an earlier run had left among them."""
    n_empty: int
    """Answers to get_job without a job."""
    n_unanswered: int
    """Requests that were due and had no answer at the end; many seconds after it they were given up."""
    duplicates: list[str]
    accepted: list[int]
    """Ids of all jobs that were submitted and acknowledged."""
    ended: list[int]
    """Those of them whose end was reported and accepted."""
    waits: dict[int, int]
    """Buckets: from an accepted submit to the pilot."""
    knee: float = 0.0
    broken_by: str = ""
    steps: list[tuple[float, StepFigures]] = []


def operation(name: str) -> str:
    """What a name is of, without its shard.

    >>> operation("getJob [us1]")
    'getJob'
    """
    return name.partition(" [")[0]


class Book:
    """Filled by the users as they go; `now` is given by them, seconds since the epoch."""

    def __init__(self, began_at: float, window_s: float) -> None:
        self.began_at = began_at
        self.window_s = window_s
        self.windows: list[Window] = []
        self.names: dict[str, Name] = {}
        self.texts: Counter[str] = Counter()
        self.n_empty = 0
        self.n_ended = 0
        self.duplicates: list[str] = []
        self.accepted: dict[int, tuple[float, str]] = {}
        """By id, when, and for which site."""
        self.n_waiting: Counter[str] = Counter()
        """By site, jobs that were accepted and not yet given to anybody."""
        self.waits = Histogram()
        self._holders: dict[tuple[int, int], str] = {}
        self._given: set[int] = set()
        """Those of `accepted` that a pilot was given."""
        self._ended: dict[int, int] = {}

    @property
    def n_granted(self) -> int:
        """Different (job, attempt) that were given to a pilot."""
        return len(self._holders)

    def window(self, now: float) -> Window:
        """The window that this time falls into."""
        index = max(0, int((now - self.began_at) / self.window_s))
        while len(self.windows) <= index:
            # Who is there stays there until somebody says otherwise.
            last = self.windows[-1] if self.windows else Window()
            self.windows.append(Window(n_users=last.n_users, rate=last.rate))
        return self.windows[index]

    def answered(self, name: str, now: float, service_ms: float, outcome: Outcome, text: str = "") -> None:
        """One request was answered, or broke."""
        kept = self.names.setdefault(name, Name())
        window, of = self.window(now), operation(name)
        match outcome:
            case "ok":
                kept.n_ok += 1
                counts = window.n_ok
            case "busy":
                kept.n_busy += 1
                counts = window.n_busy
                self._note(f"{name}: {text}")
            case "failed":
                kept.n_failed += 1
                counts = window.n_failed
                self._note(f"{name}: {text}")
        counts[of] = counts.get(of, 0) + 1
        _add(kept.service, service_ms)

    def felt(self, name: str, now: float, felt_ms: float) -> None:
        """An operation ended well after so long, counted from when it was due."""
        _add(self.names.setdefault(name, Name()).felt, felt_ms)
        _add(self.window(now).felt.setdefault(operation(name), {}), felt_ms)

    def accept(self, job: int, site: str, now: float) -> None:
        """A job was submitted and acknowledged. An id that another submit had got before is a duplicate."""
        if job in self.accepted:
            self.duplicates.append(f"job {job}: the id of two submits")
            return
        self.accepted[job] = now, site
        self.n_waiting[site] += 1

    def grant(self, job: int, attempt: int, request_id: str, now: float) -> None:
        """A get_job was answered with this. The same (job, attempt) under another request id is a duplicate."""
        holder = self._holders.setdefault((job, attempt), request_id)
        if holder != request_id:
            self.duplicates.append(f"job {job} attempt {attempt}: given to {holder} and to {request_id}")
        elif job in self.accepted and job not in self._given:
            self._given.add(job)
            accepted_at, site = self.accepted[job]
            self.n_waiting[site] -= 1
            self.waits.add((now - accepted_at) * 1000)

    def end(self, job: int, attempt: int) -> None:
        """The final report of an attempt was accepted. A job that two attempts have ended is a duplicate."""
        first = self._ended.setdefault(job, attempt)
        if first != attempt:
            self.duplicates.append(f"job {job}: ended by the attempts {first} and {attempt}")
        else:
            self.n_ended = len(self._ended)

    def ended_own(self) -> list[int]:
        """The ended jobs that this run has submitted: a run before may have left others."""
        return [job for job in self._ended if job in self.accepted]

    def step(self, operation_: str, since: float, until: float) -> StepFigures:
        """What was seen of an operation in the whole windows of this span."""
        some = self.windows[int((since - self.began_at) / self.window_s) : int((until - self.began_at) / self.window_s)]
        felt = together(Histogram(one.felt.get(operation_)) for one in some)
        n_bad = sum(one.n_failed.get(operation_, 0) + one.n_busy.get(operation_, 0) for one in some)
        return StepFigures(
            rate=felt.n / (len(some) * self.window_s) if some else 0.0,
            p99_ms=felt.percentile(0.99),
            failed_share=n_bad / max(1, n_bad + felt.n),
        )

    def _note(self, text: str) -> None:
        if text in self.texts or len(self.texts) < MAX_TEXTS:
            self.texts[text] += 1
        else:
            self.texts["others"] += 1


def _add(buckets: dict[int, int], ms: float) -> None:
    one = Histogram()
    one.counts = buckets
    one.add(ms)
