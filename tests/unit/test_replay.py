"""Sharing pilots out over sites, and the judgement of a replay's books."""

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from culm.states import FINAL, State
from loadtest.replay import Plan, Replay, share_out
from loadtest.workload_log import LoggedJob

works = st.dictionaries(st.text("abcdef", min_size=1, max_size=3), st.floats(0.001, 1e6), min_size=1, max_size=20)


@given(works, st.integers(1, 60))
def test_every_site_has_a_pilot_and_every_pilot_a_site(work: dict[str, float], n_pilots: int) -> None:
    shares = share_out(work, n_pilots)
    assert len(shares) == n_pilots
    assert {site for share in shares for site in share} == set(work)
    assert all(shares)


@given(works, st.integers(1, 10))
def test_pilots_beyond_one_a_site_follow_the_work(work: dict[str, float], factor: int) -> None:
    n_pilots = len(work) * factor
    served = Counter(share[0] for share in share_out(work, n_pilots))
    loads = {site: work[site] / served[site] for site in work}
    for site, n_served in served.items():
        # Taking one away would make this site at least as needy as the neediest is.
        if n_served > 1:
            assert work[site] / (n_served - 1) >= max(loads.values()) or math.isclose(
                work[site] / (n_served - 1), max(loads.values())
            )


def _replay(n_jobs: int = 3) -> Replay:
    jobs = [LoggedJob(float(n), 1.0, "u", "g", "s") for n in range(n_jobs)]
    replay = Replay(Plan(jobs, 10.0, 1, 1.0))
    replay.accepted.update(dict.fromkeys(range(1, n_jobs + 1), ("s", 0.0)))
    replay.ended.update(dict.fromkeys(range(1, n_jobs + 1), 1))
    return replay


FINISHED = {1: State.FINISHED, 2: State.FINISHED, 3: State.FINISHED}


def test_a_replay_whose_books_agree_is_clean() -> None:
    report = _replay()._report(FINISHED, 1.0)
    assert report.clean
    assert (report.submitted, report.finished, report.states) == (3, 3, {"finished": 3})


def test_a_job_that_the_server_does_not_know_is_lost() -> None:
    report = _replay()._report({1: State.FINISHED, 2: State.FINISHED}, 1.0)
    assert (report.lost, report.clean) == (1, False)


def test_a_job_that_two_pilots_ended_is_counted_twice() -> None:
    replay = _replay()
    replay.ended[2] += 1
    report = replay._report(FINISHED, 1.0)
    assert (report.twice, report.clean) == (1, False)


@pytest.mark.parametrize("state", [State.ACTIVATED, State.RUNNING, State.HOLDING])
def test_a_job_that_is_not_final_is_unfinished(state: State) -> None:
    report = _replay()._report(FINISHED | {3: state}, 1.0)
    assert (report.unfinished, report.clean) == (1, False)


@pytest.mark.parametrize("state", sorted(FINAL - {State.FINISHED}))
def test_a_job_that_ended_otherwise_is_no_success(state: State) -> None:
    assert not _replay()._report(FINISHED | {3: state}, 1.0).clean
    assert not _replay()._report(dict.fromkeys(FINISHED, state), 1.0).clean


def test_waits_are_told_by_site() -> None:
    replay = _replay()
    replay.waits["s"] += [3.0, 1.0, 2.0]
    [waits] = replay._report(FINISHED, 1.0).waits
    assert (waits.site, waits.n_jobs, waits.median_s, waits.max_s) == ("s", 3, 2.0, 3.0)
