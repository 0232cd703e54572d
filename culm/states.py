"""The state machine of a job, as one literal table.

States and their meaning are PanDA's (terminology of panda-docs; the server of January 2009 and of 2026). Every
transition writes one `job_event` row in the transaction that makes it. `shard/transitions.py`, the one place where a
state changes, asks this table about each change, with the job's row locked; SQL itself guards no more than that the
row has the version that was read. `docs/states.md` is made from this table. Final states absorb: no event leaves them
(invariant I7).
"""

from enum import StrEnum
from typing import Final

from culm.errors import Conflict


class State(StrEnum):
    """Where a job stands. The values are stored and sent as they are."""

    DEFINED = "defined"
    """Accepted and stored; some of its inputs are not there."""
    WAITING = "waiting"
    """Its inputs were looked for and are missing."""
    ASSIGNED = "assigned"
    """It has a place, and its inputs are on their way there."""
    PENDING = "pending"
    """Ready, but held back: its owner is banned."""
    ACTIVATED = "activated"
    """Ready: the next pilot that fits may take it."""
    SENT = "sent"
    """A pilot was given it; no sign of life yet."""
    STARTING = "starting"
    """The pilot prepares it (or holds it in a batch queue)."""
    RUNNING = "running"
    """The payload runs."""
    HOLDING = "holding"
    """The payload has ended; the outputs are being accounted for."""
    TRANSFERRING = "transferring"
    """The outputs are moving to their destination."""
    MERGING = "merging"
    """The outputs wait for a merge job."""
    FINISHED = "finished"
    """Done, with its outputs."""
    FAILED = "failed"
    """It ended with an error, or no attempt remains."""
    CANCELLED = "cancelled"
    """Ended by its owner, a manager or an admin."""
    CLOSED = "closed"
    """Ended by the system: expired, moved elsewhere, no longer wanted."""


class Event(StrEnum):
    """What moves a job. `submit` and `submit_ready` are the only two that make one."""

    SUBMIT = "submit"
    """A job is accepted whose inputs are not all there."""
    SUBMIT_READY = "submit_ready"
    """A job is accepted that can run at once."""
    INPUTS_MISSING = "inputs_missing"
    """The data side did not find the inputs."""
    ASSIGN = "assign"
    """The data side has ordered the inputs to the job's place."""
    INPUTS_READY = "inputs_ready"
    """All inputs are there."""
    CLAIM = "claim"
    """A pilot's get_job takes it: attempt + 1, and a lease."""
    RELEASE = "release"
    """The pilot gives it back unharmed, or its client was gone before the answer: no attempt is used up."""
    EXPIRE = "expire"
    """The attempt is lost, and others remain: its lease ended by the database's clock, or a pilot found it dead."""
    LOSE = "lose"
    """The attempt is lost, and none remains; or the outputs never came."""
    START = "start"
    """The pilot's first sign of life."""
    RUN = "run"
    """The pilot says that the payload runs."""
    HOLD = "hold"
    """The pilot reports the payload's end; the outputs are not accounted for yet."""
    TRANSFER = "transfer"
    """The pilot reports the payload's end, with outputs still to be moved."""
    MOVE_OUTPUTS = "move_outputs"
    """The data side moves the outputs of a job that is held."""
    MERGE = "merge"
    """The data side hands the outputs to a merge job."""
    FINISH = "finish"
    """The pilot or the data side reports success."""
    FAIL = "fail"
    """The pilot or the data side reports an error, or a job it waits for has failed."""
    CANCEL = "cancel"
    """Its owner, a manager or an admin ends it."""
    HOLD_BACK = "hold_back"
    """Its owner was banned: it is not to be dispatched."""
    LET_GO = "let_go"
    """Its owner is not banned any more."""
    CLOSE = "close"
    """The system ends it: it was never taken, or never became ready, in time."""


UNREADY: Final = frozenset({State.DEFINED, State.WAITING, State.ASSIGNED})
"""Accepted, but not to be dispatched yet: no `ready` row and no lease."""
LEASED: Final = frozenset({State.SENT, State.STARTING, State.RUNNING, State.HOLDING, State.TRANSFERRING, State.MERGING})
"""Exactly these have a `lease` row; exactly `activated` has a `ready` row."""
FINAL: Final = frozenset({State.FINISHED, State.FAILED, State.CANCELLED, State.CLOSED})
_ON_WORKER: Final = frozenset({State.SENT, State.STARTING, State.RUNNING})


def _rows(
    sources: frozenset[State] | set[State], event: Event, target: State
) -> dict[tuple[State | None, Event], State]:
    return {(source, event): target for source in sources}


TRANSITIONS: Final[dict[tuple[State | None, Event], State]] = {
    (None, Event.SUBMIT): State.DEFINED,
    (None, Event.SUBMIT_READY): State.ACTIVATED,
    (State.DEFINED, Event.INPUTS_MISSING): State.WAITING,
    **_rows({State.DEFINED, State.WAITING}, Event.ASSIGN, State.ASSIGNED),
    **_rows(UNREADY, Event.INPUTS_READY, State.ACTIVATED),
    (State.ACTIVATED, Event.CLAIM): State.SENT,
    (State.ACTIVATED, Event.HOLD_BACK): State.PENDING,
    (State.PENDING, Event.LET_GO): State.ACTIVATED,
    # The pilot was told to go, or its client was gone before the answer: no attempt is used up.
    **_rows(_ON_WORKER, Event.RELEASE, State.ACTIVATED),
    # The attempt is lost and others remain.
    **_rows(_ON_WORKER, Event.EXPIRE, State.ACTIVATED),
    # The attempt is lost and none remains, or the outputs never came.
    **_rows(LEASED, Event.LOSE, State.FAILED),
    (State.SENT, Event.START): State.STARTING,
    # Skips are real: a worker whose first sign of life is "running" (seen with Harvester).
    **_rows({State.SENT, State.STARTING}, Event.RUN, State.RUNNING),
    **_rows(_ON_WORKER, Event.HOLD, State.HOLDING),
    # A pilot's `transfer` never overwrites holding; the data side moves on with `move_outputs`.
    **_rows(_ON_WORKER, Event.TRANSFER, State.TRANSFERRING),
    (State.HOLDING, Event.MOVE_OUTPUTS): State.TRANSFERRING,
    **_rows({State.HOLDING, State.TRANSFERRING}, Event.MERGE, State.MERGING),
    **_rows(LEASED, Event.FINISH, State.FINISHED),
    **_rows(LEASED, Event.FAIL, State.FAILED),
    # An upstream failure ends a job that waits for its inputs.
    **_rows(UNREADY, Event.FAIL, State.FAILED),
    **_rows(UNREADY | {State.PENDING, State.ACTIVATED} | LEASED, Event.CANCEL, State.CANCELLED),
    **_rows(UNREADY | {State.PENDING, State.ACTIVATED} | LEASED, Event.CLOSE, State.CLOSED),
}

PILOT_EVENTS: Final[dict[State, Event]] = {
    State.STARTING: Event.START,
    State.RUNNING: Event.RUN,
    State.HOLDING: Event.HOLD,
    State.TRANSFERRING: Event.TRANSFER,
    State.MERGING: Event.MERGE,
    State.FINISHED: Event.FINISH,
    State.FAILED: Event.FAIL,
    State.CANCELLED: Event.CANCEL,
    State.ACTIVATED: Event.RELEASE,
}
"""What a pilot means by the state that it reports; `activated` gives the job back, with an error as a lost attempt."""


def next_state(state: State | None, event: Event) -> State:
    """The state after `event`. Raises Conflict(bad_transition) where the table has no such row."""
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        where = "a new job" if state is None else f"a job that is {state}"
        raise Conflict("bad_transition", f"{event} is not possible for {where}") from None
