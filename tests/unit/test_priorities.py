"""PanDA's priority formula: exact numbers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from culm.priorities import MAX_PRIORITY, default_priority


@pytest.mark.parametrize(
    ("label", "serial", "offset", "weight", "express", "expected"),
    [
        ("user", 0, 0, 0.0, False, 1000),
        ("user", 4, 0, 0.0, False, 1000),
        ("user", 5, 0, 0.0, False, 999),
        ("user", 1234, 0, 0.0, False, 754),
        ("user", 12, 50, 0.0, False, 1048),
        ("user", 0, 0, 0.99, False, 1000),
        ("user", 0, 0, 1.0, False, 900),
        ("user", 7, 10, 2.345, False, 775),
        ("user", 9999, 0, 0.0, False, -999),
        ("panda", 900, 0, 3.0, False, 2000),
        ("panda", 900, 25, 0.0, False, 2025),
        ("user", 900, 25, 3.0, True, 6000),
        ("panda", 900, 25, 3.0, True, 6500),
        ("ddm", 900, 25, 3.0, True, 200_000),
        ("usermerge", 10, 0, 0.0, False, 998),
        ("user", 0, -300, 0.0, False, 700),
    ],
)
def test_exact_numbers(label: str, serial: int, offset: int, weight: float, express: bool, expected: int) -> None:
    assert default_priority(label, serial=serial, offset=offset, quota_weight=weight, express=express) == expected


@given(st.integers(0, 100_000), st.integers(0, 100_000), st.floats(0, 50), st.integers(-1000, 1000))
def test_more_jobs_of_an_owner_never_rank_higher(first: int, more: int, weight: float, offset: int) -> None:
    low = default_priority("user", serial=first + more, offset=offset, quota_weight=weight)
    high = default_priority("user", serial=first, offset=offset, quota_weight=weight)
    assert low <= high


@given(st.integers(0, 10**6), st.floats(1, 100))
def test_who_is_over_the_quota_ranks_below_who_is_not(serial: int, weight: float) -> None:
    assert default_priority("user", serial=serial, quota_weight=weight) <= default_priority("user", serial=serial) - 100


def test_every_fixed_lane_fits_the_range_of_a_priority() -> None:
    assert default_priority("ddm", serial=0) <= MAX_PRIORITY
