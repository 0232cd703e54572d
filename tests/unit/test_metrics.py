"""What is declared, what bounds the labels, and how long a silent shard is said to be silent."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY

from culm import get_job_times
from culm.errors import Bug, ClientFault, Unavailable
from culm.metrics import Metrics
from culm.states import Event, State
from culm.wire import Happening, JobError, ShardCountsAnswer
from monitor_api.views import Views
from ops.docs import metrics_declared
from shard import counted
from shard.counted import Errors


def value(name: str, **labels: str) -> float:
    """One sample, 0 if it is not there."""
    return REGISTRY.get_sample_value(name, labels) or 0.0


# --- declarations


def test_a_name_is_declared_once() -> None:
    assert [name for name, n in Counter(one.name for one in metrics_declared()).items() if n > 1] == []


def test_sites_are_labels_of_gauges_only() -> None:
    assert [one.name for one in metrics_declared() if "site" in one.labels and one.kind != "gauge"] == []
    assert [one.name for one in metrics_declared() if "site" in one.labels] != []


def test_names_say_what_they_are() -> None:
    for one in metrics_declared():
        assert one.name.startswith("culm_"), one
        assert (one.kind == "counter") == one.name.endswith("_total"), one
        assert one.kind != "histogram" or one.name.endswith("_seconds"), one
        assert one.text, one
        assert "|" not in one.text, one
        assert set(one.processes) <= {"router", "shard", "monitor"}, one


def test_a_second_declaration_of_a_name_is_refused() -> None:
    with pytest.raises(ValueError, match="culm_build_info"):
        Metrics("router").gauge("culm_build_info", "again")


# --- errors of jobs


def _error(plane: str, code: int) -> JobError:
    return JobError(plane=plane, code=code)


def test_errors_of_jobs_have_no_more_labels_than_their_bound() -> None:
    errors = Errors(max_codes=2)
    name, other = "culm_job_errors_total", {"component": "trans", "code": "other"}
    before = value(name, **other)
    errors.add([_error("trans", 910_001), _error("pilot", 910_002), _error("trans", 910_003), _error("trans", 910_004)])
    errors.add([_error("trans", 910_001)])
    assert value(name, component="trans", code="910001") == 2
    assert value(name, component="pilot", code="910002") == 1
    assert value(name, component="trans", code="910003") == 0
    assert value(name, **other) == before + 2


def test_a_plane_of_nobodys_is_other_and_no_word_is_none() -> None:
    name = "culm_job_errors_total"
    before = value(name, component="none", code="0")
    Errors().add([_error("mine", 920_001), None])
    assert value(name, component="other", code="920001") == 1
    assert value(name, component="none", code="0") == before + 1


def test_changes_of_state_are_counted_by_the_state_that_was_reached() -> None:
    def happened(state: State, event: Event) -> Happening:
        return Happening(id=1, slot=0, state=state, event=event, attempt=1, owner="central:ann", vo="atlas")

    before = {state: value("culm_job_transitions_total", state=state) for state in State}
    counted.committed([happened(State.SENT, Event.CLAIM)] * 3 + [happened(State.RUNNING, Event.RUN)], [])
    grown = {state: value("culm_job_transitions_total", state=state) - before[state] for state in State}
    assert {state: n for state, n in grown.items() if n} == {State.SENT: 3, State.RUNNING: 1}


# --- get_job


@pytest.mark.parametrize(("waits", "op"), [(False, "at_once"), (True, "wait")])
def test_a_get_job_is_a_hit_empty_busy_or_an_error(waits: bool, op: str) -> None:
    def counts() -> dict[str, float]:
        outcomes = ("hit", "empty", "busy", "error")
        return {one: value("culm_getjob_seconds_count", op=op, outcome=one) for one in outcomes}

    before = counts()
    get_job_times.answered(0.1, waits=waits, has_jobs=True)
    get_job_times.answered(0.1, waits=waits, has_jobs=False)
    get_job_times.refused(0.1, Unavailable("overloaded", "full"), waits=waits)
    get_job_times.refused(0.1, ClientFault("forbidden", "no"), waits=waits)
    get_job_times.refused(0.1, Bug("ours"), waits=waits)
    grown = {one: n - before[one] for one, n in counts().items()}
    assert grown == {"hit": 1, "empty": 1, "busy": 1, "error": 2}


# --- the monitor


class _Links:
    """Shards that answer, or do not."""

    def __init__(self) -> None:
        self.silent: set[str] = set()

    async def ask_many(self, calls: list[tuple[str, Any]], *_how: object) -> list[Any]:
        down = Unavailable("shard_down", "no")
        return [
            down if shard in self.silent else ShardCountsAnswer(shard=shard, at=0.0, counts=[], owners={})
            for shard, _ in calls
        ]


async def test_a_silent_shard_gets_older_and_one_that_left_is_not_shown() -> None:
    now, links = 1000.0, _Links()
    topology: Any = SimpleNamespace(current=SimpleNamespace(shards={"m1": None, "m2": None}))
    views = Views(topology, links, 1.0)  # type: ignore[arg-type]
    views._clock = SimpleNamespace(monotonic=lambda: now)  # type: ignore[assignment]

    def ages() -> dict[str, float | None]:
        return {
            one: REGISTRY.get_sample_value("culm_monitor_shard_stale_seconds", {"shard": one}) for one in ("m1", "m2")
        }

    links.silent = {"m2"}
    await views.listen()
    now += 7
    assert ages() == {"m1": 7, "m2": 7}
    await views.listen()
    assert ages() == {"m1": 0, "m2": 7}
    links.silent = {"m1"}
    now += 3
    await views.listen()
    assert ages() == {"m1": 3, "m2": 0}
    del topology.current.shards["m1"]
    await views.listen()
    assert ages() == {"m1": None, "m2": 0}
    topology.current.shards.clear()
    await views.listen()
    assert ages() == {"m1": None, "m2": None}
