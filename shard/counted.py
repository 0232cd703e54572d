"""What is counted of the database: statements as they are answered, changes of state when they are committed."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

from culm.states import State
from culm.wire import Happening, JobError
from shard.metrics import ERRORS, QUERY, TRANSITIONS

PLANES: Final = frozenset({"pilot", "exe", "sup", "ddm", "brokerage", "jobDispatcher", "taskBuffer", "trans"})
MAX_CODES: Final = 300
"""Series of errors: codes come from the jobs, and there is no end of them."""
OTHER: Final = "other"
NOBODY_SAID: Final = ("none", "0")

_REACHED: Final = {state: TRANSITIONS.labels(state) for state in State}


class _OfStatements(dict[str, Any]):
    """The histograms of statements by name: as many as there are names in the files."""

    def __missing__(self, name: str) -> Any:
        self[name] = made = QUERY.labels(name)
        return made


QUERY_TIMES: Final = _OfStatements()


class Errors:
    """Failed jobs by plane and code, no more than `max_codes` different pairs, and one `other` per plane."""

    def __init__(self, max_codes: int = MAX_CODES) -> None:
        self._max_codes = max_codes
        self._known: set[tuple[str, str]] = set()

    def add(self, failed: Sequence[JobError | None]) -> None:
        """Jobs failed, for these reasons."""
        for error in failed:
            ERRORS.labels(*self._labels(error)).inc()

    def _labels(self, error: JobError | None) -> tuple[str, str]:
        if error is None:
            return NOBODY_SAID
        component = error.plane if error.plane in PLANES else OTHER
        labels = (component, str(error.code))
        if labels not in self._known:
            if len(self._known) >= self._max_codes:
                return component, OTHER
            self._known.add(labels)
        return labels


_ERRORS: Final = Errors()


def committed(happened: Sequence[Happening], failed: Sequence[JobError | None]) -> None:
    """A transaction with these changes of state was committed."""
    for state, n_jobs in Counter([one.state for one in happened]).items():
        _REACHED[state].inc(n_jobs)
    _ERRORS.add(failed)
