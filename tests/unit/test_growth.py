"""What grows, and why: judged from numbers alone."""

import pytest

from culm.states import FINAL, State
from culm.wire import Refused
from shard.growth import Asking, Cause, Evidence, Growth, Level, Window, cause, growing

HOUR = 3600.0
WINDOW = Window(n_samples=5, first_at=0.0, last_at=4 * HOUR, now=5 * HOUR)
REFUSED = Refused(code="too_little_memory_mb", needed="4000", offered="2000", n_classes=2, example=77)


def steady(n: int, now: int) -> Level:
    """So many in every sample, so many now."""
    return Level(n_now=now, n_sum=n * WINDOW.n_samples, n_last=n)


def grown(state: State, level: Level) -> list[tuple[int, int, int]]:
    return [one[1:] for one in growing({state: level}, WINDOW)]


@pytest.mark.parametrize(
    ("usual", "now", "grows"),
    [
        (0, 9, False),
        (0, 10, True),
        (1000, 1010, False),
        (1000, 1249, False),
        (1000, 1250, True),
        (1000, 0, False),
        (20, 29, False),
        (20, 30, True),
    ],
)
def test_a_state_grows_where_it_is_a_quarter_and_ten_jobs_above_the_usual(usual: int, now: int, grows: bool) -> None:
    assert grown(State.ACTIVATED, steady(usual, now)) == ([(now, usual, usual)] if grows else [])


def test_what_shrinks_again_is_no_pile_up() -> None:
    assert grown(State.TRANSFERRING, Level(n_now=500, n_sum=500, n_last=501)) == []
    assert grown(State.TRANSFERRING, Level(n_now=501, n_sum=500, n_last=501)) == [(501, 100, 501)]


def test_without_a_sample_nothing_can_be_said() -> None:
    assert growing({State.ACTIVATED: Level(n_now=10_000)}, Window(0, 0.0, 0.0, 0.0)) == []


@pytest.mark.parametrize("state", sorted(FINAL - {State.FAILED}))
def test_jobs_that_end_well_or_were_ended_pile_up_nowhere(state: State) -> None:
    assert grown(state, steady(0, 10_000)) == []


@pytest.mark.parametrize(
    ("first", "last", "now", "finished", "told"),
    [
        # Ten an hour before, and now 30 in an hour.
        (100, 140, 170, 0, [Growth(State.FAILED, 30, 10, 0)]),
        # Not twice the pace of before, or not ten more.
        (100, 140, 159, 0, []),
        (100, 100, 109, 0, []),
        (100, 100, 110, 0, [Growth(State.FAILED, 10, 0, 0)]),
        # Nine of ten end well: that much more work is done.
        (100, 140, 170, 270, [Growth(State.FAILED, 30, 10, 0)]),
        (100, 140, 170, 271, []),
    ],
)
def test_failed_jobs_are_judged_by_their_pace(
    first: int, last: int, now: int, finished: int, told: list[Growth]
) -> None:
    failed = Level(n_now=now, n_sum=0, n_last=last, n_grown=last - first)
    levels = {State.FAILED: failed, State.FINISHED: Level(n_now=1000 + finished, n_last=1000)}
    assert growing(levels, WINDOW) == told


def test_a_month_that_was_dropped_makes_nothing_look_as_if_it_failed_faster_than_before() -> None:
    """100,000 had failed; the drop leaves 100. In its hour nothing is said, then the other hours count."""
    finished = Level(n_now=5, n_last=100_000)
    assert growing({State.FAILED: Level(n_now=100, n_last=100_000), State.FINISHED: finished}, WINDOW) == []
    after = {State.FAILED: Level(n_now=101, n_last=100, n_grown=0), State.FINISHED: Level(n_now=5, n_last=0)}
    assert growing(after, WINDOW) == []
    assert growing(after | {State.FAILED: Level(n_now=120, n_last=100)}, WINDOW) == [Growth(State.FAILED, 20, 0, 0)]
    told = why(State.ACTIVATED, Evidence(asking=Asking(n_queues=1, n_asked=1)), failed=Level(n_now=100, n_last=100_000))
    assert "100 jobs came and 0 left" in told.text


def test_the_first_hour_of_a_shard_has_no_pace_to_compare_with() -> None:
    window = Window(n_samples=1, first_at=0.0, last_at=0.0, now=HOUR)
    assert growing({State.FAILED: Level(n_now=10)}, window) == [Growth(State.FAILED, 10, 0, 0)]


# --- causes ----------------------------------------------------------------------------------------------------------


def why(state: State, seen: Evidence = Evidence(), **levels: Level) -> Cause:  # noqa: B008  # it is immutable
    known = {state: steady(0, 100)} | {State(name): level for name, level in levels.items()}
    return cause(Growth(state, 100, 0, 0), known, WINDOW, seen)


@pytest.mark.parametrize(
    ("asking", "code", "said"),
    [
        (Asking(), "no_queue_there", "no computing queue"),
        (Asking(n_queues=2, n_offline=2, reason="cooling"), "site_offline", "offline: cooling"),
        (Asking(n_queues=2, n_offline=1), "no_pilot_asked", "none ever did"),
        (Asking(n_queues=1, last_at=3 * HOUR), "no_pilot_asked", "the last one 2.0 h ago"),
        (
            Asking(n_queues=1, n_classes=2, n_refused=2, refused=REFUSED),
            "pilots_do_not_fit",
            "no computing queue offers what any of them needs, and no pilot asks; most are refused for too_little",
        ),
        (Asking(n_queues=1, n_classes=3, n_refused=2, refused=REFUSED), "no_pilot_asked", "none ever did"),
        (
            Asking(n_queues=1, n_asked=9, n_pilots=3, n_classes=2, n_refused=2, refused=REFUSED),
            "pilots_do_not_fit",
            "3 pilots ask, and none can take any of them; most are refused for too_little_memory_mb: needed 4000",
        ),
        (
            Asking(n_queues=1, n_asked=9, n_pilots=3, n_classes=3, n_refused=2, refused=REFUSED),
            "more_arrives_than_is_dispatched",
            "2 of 3 kinds of jobs no pilot can take (too_little_memory_mb)",
        ),
        (Asking(n_queues=1, n_asked=9, n_classes=3), "more_arrives_than_is_dispatched", "100 jobs came and 0 left"),
    ],
)
def test_ready_jobs_wait_for_what_is_known_of_the_pilots(asking: Asking, code: str, said: str) -> None:
    told = why(State.ACTIVATED, Evidence(asking=asking))
    assert told.code == code
    assert said in told.text
    assert told.example == (77 if asking.refused and code != "no_pilot_asked" else None)


def test_what_came_and_what_left_are_counted_over_all_states() -> None:
    """60 were waiting and are not any more, 40 more are ready, 30 more run, 50 more have finished: 60 came, 80 left."""
    asking = Evidence(asking=Asking(n_queues=1, n_asked=1))
    levels = {"assigned": steady(60, 0), "activated": steady(0, 40), "running": steady(0, 30)}
    told = why(State.ACTIVATED, asking, **levels, finished=steady(100, 150))
    assert "in 1.0 h 60 jobs came and 80 left" in told.text


@pytest.mark.parametrize("state", [State.STARTING, State.RUNNING])
def test_running_jobs_grow_because_heartbeats_stop_or_because_more_starts(state: State) -> None:
    assert why(state, Evidence(n_leases=10, n_silent=5)).code == "heartbeats_stop"
    assert why(state, Evidence(n_leases=10, n_silent=4), finished=steady(5, 25)).code == "more_starts_than_ends"
    assert "20 jobs ended" in why(state, Evidence(n_leases=10, n_silent=4), finished=steady(5, 25)).text
    assert why(state, Evidence()).code == "more_starts_than_ends"


def test_failed_jobs_tell_their_most_frequent_error() -> None:
    told = why(State.FAILED, Evidence(error=("pilot", 1099, 42, 77)))
    assert (told.code, told.example) == ("jobs_fail", 77)
    assert "pilot 1099: 42 jobs" in told.text
    assert "no error was told" in why(State.FAILED).text


@pytest.mark.parametrize(
    ("states", "code"),
    [
        ((State.DEFINED, State.WAITING, State.ASSIGNED), "inputs_do_not_come"),
        ((State.HOLDING, State.TRANSFERRING, State.MERGING), "outputs_not_accounted"),
        ((State.PENDING,), "owners_banned"),
        ((State.SENT,), "pilots_give_no_sign"),
    ],
)
def test_other_states_say_it_themselves(states: tuple[State, ...], code: str) -> None:
    assert [why(state).code for state in states] == [code] * len(states)


def test_every_state_that_can_grow_has_a_cause() -> None:
    for state in set(State) - FINAL | {State.FAILED}:
        assert why(state).text
