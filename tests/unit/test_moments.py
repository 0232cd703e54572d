"""Moments as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from culm.errors import ClientFault
from culm.moments import moment
from culm.wire import MAX_TIME

NOW = 1_764_000_000.0


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("90s", NOW - 90), ("15m", NOW - 900), ("2h", NOW - 7200), (" 3d ", NOW - 259200), ("1w", NOW - 604800),
        ("0s", NOW), ("999999w", 0.0), ("2026-11-25", 1795564800.0), ("2026-11-25T13:00", 1795611600.0),
        ("2026-11-25 13:00:30", 1795611630.0), ("2026-11-25T13:00+02:00", 1795604400.0),
        ("2026-11-25T13:00Z", 1795611600.0), ("1970-01-01", 0.0),
    ],
)  # fmt: skip
def test_what_people_write(text: str, at: float) -> None:
    assert moment(text, NOW) == at


@pytest.mark.parametrize(
    "text",
    ["", "h", "2", "-2h", "2h ago", "2y", "1234567s", "yesterday", "1969-12-31", "2026-13-01", "\u0662h", "0001-01-01"],
)
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(ClientFault) as told:
        moment(text, NOW)
    assert told.value.code == "bad_time"


@given(st.text(max_size=60))
def test_any_text_gives_a_time_or_a_clear_error(text: str) -> None:
    try:
        assert 0 <= moment(text, NOW) <= MAX_TIME
    except ClientFault as error:
        assert error.code == "bad_time"
