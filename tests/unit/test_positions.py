"""Places in a list with the newest first."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from culm.errors import ClientFault
from culm.ids import MAX_JOB_ID
from culm.positions import START, position, position_of, words_of
from tests.golden.samples import ROW

PLACES = st.tuples(st.integers(0, 2**52), st.integers(1, MAX_JOB_ID))


@given(PLACES)
def test_words_say_a_place_and_a_row_has_it_without_loss(place: tuple[int, int]) -> None:
    assert position_of(words_of(place)) == place
    row = msgspec.structs.replace(ROW, created_at=place[0] / 1_000_000, id=place[1])
    carried = msgspec.msgpack.decode(msgspec.msgpack.encode(row), type=type(row))
    assert position(carried) == place


def test_nothing_comes_before_the_start() -> None:
    assert position_of("999999999999999999.9999999999999999") == START


@pytest.mark.parametrize("words", ["", "1", "1.", ".1", "1.2.3", "a.b", "-1.2", "1.\u0662x"])
def test_what_is_no_place(words: str) -> None:
    with pytest.raises(ClientFault) as told:
        position_of(words)
    assert told.value.code == "bad_request"
