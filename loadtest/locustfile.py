"""What `python -m locust -f` is given: the order is read, the users are told of it, the book is written at the end."""

import os
import time
from pathlib import Path
from typing import Any, Final

import msgspec
from locust import LoadTestShape, events

from loadtest.book import GET_JOB, Result
from loadtest.orders import ENVIRONMENT, Order, Target
from loadtest.shapes import RAMP, SHAPES, Ramp
from loadtest.users import Api, ArrivalUser, BadPilot, PilotUser, Shifter, Stage, Submitter

__all__ = ["ArrivalUser", "BadPilot", "OrderedShape", "PilotUser", "Shifter", "Submitter"]

SPAWN_RATE: Final = 200.0
STEP_S: Final = 5.0
"""Of a ramp; its first second is not judged."""
SETTLE_S: Final = 1.0
_ORDER: Final = msgspec.json.decode(Path(os.environ[ENVIRONMENT]).read_bytes(), type=Order)
_STAGE: Final = Stage(_ORDER)
Api.stage = _STAGE
for _kind in (PilotUser, ArrivalUser, Submitter, Shifter, BadPilot):
    _kind.host = _ORDER.router
    if _kind is not PilotUser or _ORDER.rate:
        _kind.fixed_count = _ORDER.users.get(_kind.__name__, 0)
_ramp = Ramp(_ORDER.rate, _ORDER.ramp_p99_ms) if _ORDER.shape == RAMP else None
_cpu_s = 0.0


class OrderedShape(LoadTestShape):
    """The shape that the order names."""

    _step_from_s = 0.0
    _has_more = False

    def tick(self) -> tuple[int, float] | None:
        """Users now, or None at the end; the rate of the arrivals is set by the way."""
        t = _STAGE.now() - _STAGE.book.began_at
        if t >= _ORDER.seconds:
            return None
        if not self._has_more and Path(_ORDER.more).exists():
            self._has_more = True
            _STAGE.targets = msgspec.json.decode(Path(_ORDER.more).read_bytes(), type=list[Target])
        users = dict(_ORDER.users)
        if _ramp is not None:
            if t - self._step_from_s >= STEP_S:
                began, self._step_from_s = _STAGE.book.began_at, t
                until = int(_STAGE.now() - began)
                seen = _STAGE.book.step(GET_JOB, began + until - STEP_S + SETTLE_S, began + until)
                if not _ramp.judge(seen):
                    return None
            _STAGE.rate = _ramp.rate
        else:
            share = SHAPES[_ORDER.shape](t / _ORDER.seconds)
            _STAGE.rate = _ORDER.rate * share
            if not _ORDER.rate:
                users["PilotUser"] = round(users.get("PilotUser", 0) * share)
        window = _STAGE.book.window(_STAGE.now())
        window.n_users, window.rate = sum(users.values()), _STAGE.rate
        return sum(users.values()), SPAWN_RATE


def begin(**_: Any) -> None:
    """An empty book."""
    global _cpu_s  # noqa: PLW0603  # one run of a process at a time
    _cpu_s = time.process_time()
    _STAGE.begin()
    beside = Path(f"{_ORDER.began}.new")
    beside.write_text(repr(_STAGE.book.began_at), encoding="utf-8")
    beside.replace(_ORDER.began)


def broke(exception: BaseException, **_: Any) -> None:
    """A user's own mistake is a failure of the run: what he did not do would be missing from it."""
    _STAGE.book.answered("client", _STAGE.now(), 0.0, "failed", f"{type(exception).__name__}: {exception}")


def end(**_: Any) -> None:
    """Write the book."""
    book = _STAGE.book
    result = Result(
        began_at=book.began_at,
        ended_at=_STAGE.now(),
        cpu_s=time.process_time() - _cpu_s,
        window_s=book.window_s,
        windows=book.windows,
        names=book.names,
        texts=dict(book.texts),
        n_granted=book.n_granted,
        n_ended=book.n_ended,
        n_empty=book.n_empty,
        n_unanswered=_STAGE.n_unanswered,
        duplicates=book.duplicates,
        accepted=list(book.accepted),
        ended=book.ended_own(),
        waits=book.waits.counts,
        knee=_ramp.knee if _ramp is not None else 0.0,
        broken_by=_ramp.broken_by if _ramp is not None else "",
        steps=_ramp.steps if _ramp is not None else [],
    )
    beside = Path(f"{_ORDER.into}.new")
    beside.write_bytes(msgspec.json.encode(result))
    beside.replace(_ORDER.into)


events.test_start.add_listener(begin)  # type: ignore[no-untyped-call]
events.user_error.add_listener(broke)  # type: ignore[no-untyped-call]
events.test_stop.add_listener(end)  # type: ignore[no-untyped-call]
