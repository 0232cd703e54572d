"""Which states of a slot grow against the last hours, and why they probably do: pure, no input or output.

A state piles up where it holds clearly more jobs than in the hourly samples of the last hours and does not shrink.
Final states only ever grow: of those `failed` counts, where jobs fail clearly faster than before.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from culm.states import FINAL, UNREADY, State
from culm.wire import CauseCode, Refused
from culm.words import counted

MIN_JOBS: Final = 10
"""Fewer above the usual are no pile-up."""
MIN_PART: Final = 0.25
"""So much above the usual, as a part of it."""
MIN_PACE: Final = 2.0
"""Jobs fail at so many times the pace of before,"""
MIN_FAILED: Final = 0.1
"""and are so much of all that ended."""
SILENT: Final = 0.5
"""Leases without a sign of life, as a part of those that were looked at."""
_QUEUED: Final = UNREADY | {State.PENDING, State.ACTIVATED}


class Level(NamedTuple):
    """Jobs of a slot in a state, those in the archive counted in."""

    n_now: int = 0
    n_sum: int = 0
    """Over all samples."""
    n_last: int = 0
    """In the newest sample."""
    n_grown: int = 0
    """From the oldest to the newest sample, without what went: a final state shrinks by what was dropped only."""

    @property
    def n_since(self) -> int:
        """More of a final state than in the newest sample; 0 in the hour in which a month was dropped."""
        return max(0, self.n_now - self.n_last)


class Window(NamedTuple):
    """The samples that are compared with, of hours before this one; times in seconds since the epoch."""

    n_samples: int
    first_at: float
    last_at: float
    now: float


class Growth(NamedTuple):
    """A state that grows; the numbers as in `culm.wire.PileUp`."""

    state: State
    n_jobs: int
    n_usual: int
    n_before: int

    @property
    def n_above(self) -> int:
        """Jobs above the usual."""
        return self.n_jobs - self.n_usual


@dataclass(frozen=True)
class Asking:
    """What is known of those who may take jobs from a slot."""

    n_queues: int = 0
    n_offline: int = 0
    reason: str = ""
    """Why one of the offline computing queues is so, as the operator put it."""
    n_asked: int = 0
    n_pilots: int = 0
    """In the last minutes."""
    last_at: float = 0.0
    """When one last asked, seconds since the epoch; 0: never."""
    n_classes: int = 0
    """Requirement classes with ready jobs."""
    n_refused: int = 0
    """Those of them that no pilot which asked lately can take; if none did: no computing queue offers enough for."""
    refused: Refused | None = None
    """What most of those are refused for."""


@dataclass(frozen=True)
class Evidence:
    """What a cause is told by; only what its state needs is filled in."""

    asking: Asking = Asking()
    n_leases: int = 0
    n_silent: int = 0
    """Of the leases that were looked at: without a sign of life for three quarters of their time."""
    error: tuple[str, int, int, int] | None = None
    """Plane, code, jobs, a job: what most failed of in this hour and the one before."""


class Cause(NamedTuple):
    """A likely cause, a sentence, and a job that it holds for."""

    code: CauseCode
    text: str
    example: int | None = None


_INPUTS: Final = Cause("inputs_do_not_come", "the data side does not say that their inputs are there")
_OUTPUTS: Final = Cause("outputs_not_accounted", "they have run, and the data side does not account for their outputs")
_NO_SIGN: Final = "pilots take them and give no sign of life: they die at their start, or their network does"
_BY_STATE: Final[Mapping[State, Cause]] = {
    State.DEFINED: _INPUTS,
    State.WAITING: _INPUTS,
    State.ASSIGNED: _INPUTS,
    State.PENDING: Cause("owners_banned", "their owners were banned while they were ready (culm user list)"),
    State.SENT: Cause("pilots_give_no_sign", _NO_SIGN),
    State.HOLDING: _OUTPUTS,
    State.TRANSFERRING: _OUTPUTS,
    State.MERGING: _OUTPUTS,
}
"""Where the state says it all."""


def growing(levels: Mapping[State, Level], window: Window) -> list[Growth]:
    """The states of one slot that pile up; none without a sample."""
    if not window.n_samples:
        return []
    found = [_grown(state, level, window) for state, level in levels.items() if state not in FINAL]
    return [one for one in (*found, _failing(levels, window)) if one is not None]


def _grown(state: State, level: Level, window: Window) -> Growth | None:
    usual = level.n_sum / window.n_samples
    above = level.n_now - usual
    if above < max(MIN_JOBS, MIN_PART * usual) or level.n_now < level.n_last:
        return None
    return Growth(state, level.n_now, round(usual), level.n_last)


def _failing(levels: Mapping[State, Level], window: Window) -> Growth | None:
    level = levels.get(State.FAILED, Level())
    n_failed, n_ended = level.n_since, _ended(levels)
    before_s, since_s = window.last_at - window.first_at, window.now - window.last_at
    usual = level.n_grown / before_s * since_s if before_s > 0 else 0.0
    if n_failed - usual < MIN_JOBS or n_failed < MIN_PACE * usual or n_failed < MIN_FAILED * n_ended:
        return None
    return Growth(State.FAILED, n_failed, round(usual), 0)


def cause(grown: Growth, levels: Mapping[State, Level], window: Window, seen: Evidence) -> Cause:
    """Why a state of a slot probably grows: the nearest cause that the evidence shows."""
    state = grown.state
    match state:
        case State.ACTIVATED:
            return _of_ready(levels, window, seen.asking)
        case State.STARTING | State.RUNNING:
            return _of_running(state, levels, window, seen)
        case State.FAILED:
            return _of_failed(window, seen)
        case State.FINISHED | State.CANCELLED | State.CLOSED:
            raise AssertionError(f"{state} is no pile-up")
        case _:
            return _BY_STATE[state]


def _of_ready(levels: Mapping[State, Level], window: Window, asking: Asking) -> Cause:
    if not asking.n_queues:
        return Cause("no_queue_there", "no computing queue is registered where they may run")
    if asking.n_offline == asking.n_queues:
        because = f": {asking.reason}" if asking.reason else ""
        return Cause("site_offline", f"every computing queue where they may run is offline{because}")
    refused = asking.refused
    none_fits = refused is not None and asking.n_refused == asking.n_classes
    if not asking.n_asked and not none_fits:
        last = f"the last one {_hours(window.now - asking.last_at)} ago" if asking.last_at else "none ever did"
        return Cause("no_pilot_asked", f"no pilot has asked in the last minutes; {last}")
    if refused is not None and none_fits:
        asked = counted(asking.n_pilots, "pilot asks", "pilots ask") + ", and none can take any of them"
        told = asked if asking.n_asked else "no computing queue offers what any of them needs, and no pilot asks"
        told += "; most are refused for "
        told += f"{refused.code}: needed {refused.needed}, offered {refused.offered or 'none'}"
        return Cause("pilots_do_not_fit", told, refused.example)
    n_there = sum(level.n_now - level.n_last for state, level in levels.items() if state not in FINAL)
    n_came = max(0, n_there + _ended(levels))
    n_left = max(0, n_came - sum(levels[state].n_now - levels[state].n_last for state in _QUEUED & levels.keys()))
    told = f"in {_hours(window.now - window.last_at)} {n_came} jobs came and {n_left} left the queue"
    if refused is not None:
        kinds = counted(asking.n_classes, "kind of job", "kinds of jobs")
        told += f"; {asking.n_refused} of {kinds} no pilot can take ({refused.code})"
    return Cause("more_arrives_than_is_dispatched", told, refused.example if refused is not None else None)


def _of_running(state: State, levels: Mapping[State, Level], window: Window, seen: Evidence) -> Cause:
    if seen.n_silent >= max(1, SILENT * seen.n_leases):
        told = f"{seen.n_silent} of {seen.n_leases} that were looked at have sent no heartbeat for most of their time"
        return Cause("heartbeats_stop", told)
    told = f"their heartbeats come; in {_hours(window.now - window.last_at)} {_ended(levels)} jobs ended: "
    told += "more pilots work, or payloads are slow" if state is State.RUNNING else "payloads are slow to start"
    return Cause("more_starts_than_ends", told)


def _of_failed(window: Window, seen: Evidence) -> Cause:
    took = _hours(window.now - window.last_at)
    if seen.error is None:
        return Cause("jobs_fail", f"they failed in the last {took}, and no error was told")
    plane, code, n_jobs, example = seen.error
    told = (
        f"they failed in the last {took}; the most frequent error is {plane or 'without a plane'} {code}: {n_jobs} jobs"
    )
    return Cause("jobs_fail", told, example)


def _ended(levels: Mapping[State, Level]) -> int:
    return sum(levels[state].n_since for state in FINAL & levels.keys())


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{max(0.0, seconds) / 60:.0f} min"
