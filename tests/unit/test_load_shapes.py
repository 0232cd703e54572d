"""Shapes, the ramp that finds the knee, the open loop's schedule, and the histogram beneath all figures."""

import ast
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.arrivals import Schedule
from loadtest.latencies import GROWTH, PERCENTILES, Histogram, together
from loadtest.orders import Target, specs, weights
from loadtest.scenarios import SCENARIOS, TAGS
from loadtest.shapes import RAMP, SHAPES, Ramp, StepFigures, diurnal, spike, step
from tests.checks.repository import ROOT

# --- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
@given(x=st.floats(0, 1))
def test_a_shape_is_a_share_of_the_full_load_at_any_time(name: str, x: float) -> None:
    assert 0 <= SHAPES[name](x) <= 1


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_reaches_the_full_load(name: str) -> None:
    assert max(SHAPES[name](n / 1000) for n in range(1000)) == pytest.approx(1.0, abs=1e-4)


def test_steps_go_up_one_after_the_other() -> None:
    assert [step(n / 10) for n in range(10)] == [0.2, 0.2, 0.4, 0.4, 0.6, 0.6, 0.8, 0.8, 1.0, 1.0]


def test_a_spike_is_ten_times_the_load_in_the_middle() -> None:
    assert [spike(x) for x in (0.0, 0.39, 0.4, 0.59, 0.6, 1.0)] == [0.1, 0.1, 1.0, 1.0, 0.1, 0.1]


def test_a_day_has_its_night_and_its_noon() -> None:
    assert (diurnal(0), diurnal(0.5), diurnal(1)) == pytest.approx((0.2, 1.0, 0.2))


def test_every_scenario_names_a_shape_and_users_that_there_are() -> None:
    module = ast.parse(Path(ROOT / "loadtest" / "users.py").read_text(encoding="utf-8"))
    # Locust cannot be imported here: it would change this process to gevent.
    users = {node.name for node in module.body if isinstance(node, ast.ClassDef)}
    for name, scenario in SCENARIOS.items():
        assert scenario.shape in {*SHAPES, RAMP}, name
        assert scenario.users.keys() <= users, name
        # Who follows the shape is there, and somebody feeds him.
        assert ("ArrivalUser" in scenario.users) == (scenario.rate > 0), name
        assert scenario.rate > 0 or scenario.users["PilotUser"] > 0, name
        assert scenario.users["Submitter"] > 0, name


def test_the_table_of_tags_says_what_the_users_do() -> None:
    module = ast.parse(Path(ROOT / "loadtest" / "users.py").read_text(encoding="utf-8"))
    classes = {node.name: node for node in module.body if isinstance(node, ast.ClassDef)}
    tasks = {"PilotUser": "_PilotTasks"}
    for name, tags in TAGS.items():
        found = {
            str(argument.value)
            for call in ast.walk(classes[tasks.get(name, name)])
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "tag"
            for argument in call.args
            if isinstance(argument, ast.Constant)
        }
        assert found == tags, name


# --- the ramp --------------------------------------------------------------------------------------------------------


def _service(limit: float) -> "Ramp":
    """Ramp a service that serves up to `limit` a second, and slows down near it, until it breaks."""
    ramp = Ramp(rate=100.0, limit_ms=500.0)
    for _ in range(100):
        served = min(ramp.rate, limit)
        if not ramp.judge(StepFigures(rate=served, p99_ms=20.0 if ramp.rate <= limit else 5000.0, failed_share=0.0)):
            return ramp
    raise AssertionError("it never broke")


@given(limit=st.floats(100, 10_000))
def test_the_ramp_finds_the_knee_to_a_step(limit: float) -> None:
    ramp = _service(limit)
    assert ramp.knee <= limit < ramp.knee * 1.2501
    assert ramp.broken_by


def test_one_bad_step_is_tried_again() -> None:
    ramp = Ramp(rate=100.0, limit_ms=500.0)
    good, bad = StepFigures(100.0, 20.0, 0.0), StepFigures(130.0, 900.0, 0.0)
    assert ramp.judge(bad)
    assert (ramp.rate, ramp.knee) == (100.0, 0.0)
    assert ramp.judge(good)
    assert (ramp.rate, ramp.knee) == (125.0, 100.0)
    assert ramp.judge(bad)
    assert not ramp.judge(bad)
    assert (ramp.knee, "900 ms" in ramp.broken_by) == (100.0, True)


@pytest.mark.parametrize(
    ("seen", "word"),
    [
        (StepFigures(100.0, 501.0, 0.0), "p99"),
        (StepFigures(94.0, 20.0, 0.0), "served"),
        (StepFigures(100.0, 20.0, 0.02), "failed"),
    ],
)
def test_what_breaks_a_step_is_told(seen: StepFigures, word: str) -> None:
    ramp = Ramp(rate=100.0, limit_ms=500.0)
    assert ramp.judge(seen)
    assert not ramp.judge(seen)
    assert word in ramp.broken_by


# --- coordinated omission --------------------------------------------------------------------------------------------


def _stalled(answered_at: float, began: float, ended: float) -> float:
    """A service that answers in 1 ms, but nothing from `began` to `ended`: when what was sent then is answered."""
    return ended + 0.001 if began <= answered_at < ended else answered_at + 0.001


def test_a_stall_hits_all_that_were_due_in_it_and_not_the_one_that_was_under_way() -> None:
    """100 s at 100/s with a stall of 10 s: a tenth of all requests waited, up to 10 s, on average 5."""
    closed, now = Histogram(), 0.0
    while now < 100:
        answer = _stalled(now, 50, 60)
        closed.add((answer - now) * 1000)
        now = max(answer, now + 0.01)
    opened, schedule, now = Histogram(), Schedule(next_at=0.0, rate=100.0), 0.0
    while now < 100:
        for due in schedule.due(now):
            # One connection: what is due in the stall is sent after it, and its time runs from when it was due.
            answer = _stalled(now, 50, 60)
            opened.add((answer - due) * 1000)
            now = answer if answer > 59 and now < 60 else now
        now += 0.005
    assert closed.percentile(0.99) < 2
    assert opened.n == pytest.approx(10_000, abs=2)
    assert opened.percentile(0.89) < 10
    assert opened.percentile(0.95) == pytest.approx(5000, rel=0.05)
    assert opened.percentile(0.99) == pytest.approx(9000, rel=0.05)


def test_arrivals_keep_their_rate_however_seldom_anybody_looks() -> None:
    often, seldom = Schedule(0.0, 50.0), Schedule(0.0, 50.0)
    one = [at for n in range(1001) for at in often.due(n / 100)]
    other = [at for now in (0.3, 7.0, 10.0) for at in seldom.due(now)]
    assert one == pytest.approx(other)
    assert len(one) == pytest.approx(500, abs=1)


def test_a_rate_of_nothing_owes_nothing_later() -> None:
    schedule = Schedule(0.0, 0.0)
    assert schedule.due(100.0) == []
    schedule.change(10.0, 100.0)
    assert len(schedule.due(101.0)) == pytest.approx(10, abs=1)


def test_a_higher_rate_begins_at_once() -> None:
    schedule = Schedule(0.0, 0.01)
    assert schedule.due(0.0) == [0.0]
    schedule.change(100.0, 1.0)
    assert len(schedule.due(2.0)) == pytest.approx(100, abs=1)


# --- figures ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0.01, 1e6), min_size=1, max_size=300), st.sampled_from(PERCENTILES))
def test_a_percentile_is_right_to_a_bucket(values: list[float], share: float) -> None:
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    ordered = sorted(values)
    exact = ordered[max(0, -int(-share * len(values) // 1) - 1)]
    assert exact * 0.999 <= histogram.percentile(share) <= exact * GROWTH * 1.001


def test_histograms_add_up() -> None:
    one, other = Histogram(), Histogram()
    for n in range(1, 101):
        (one if n % 2 else other).add(float(n))
    assert together([one, other]).n == 100
    assert together([one, other]).percentile(0.5) == pytest.approx(50, rel=0.02)
    assert Histogram().percentile(0.99) == 0


# --- who gets how much -----------------------------------------------------------------------------------------------


def test_half_of_the_load_goes_to_the_hot_site() -> None:
    assert weights(5, 0.5) == [0.5, 0.125, 0.125, 0.125, 0.125]
    assert weights(4, 0.0) == [0.25] * 4
    assert weights(1, 0.5) == [1.0]


def test_the_same_seed_makes_the_same_jobs() -> None:
    some = [
        Target(site=site, queue=f"{site}-q", shard="us1", weight=weight, pilot_token="")
        for site, weight in (("A", 0.5), ("B", 0.5))
    ]
    first, second = (specs(some, 50, random.Random(7)) for _ in range(2))
    assert first == second
    assert {spec.site for spec in first} == {"A", "B"}
