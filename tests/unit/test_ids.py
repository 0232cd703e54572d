"""Job ids: the arithmetic, its limits and what an id promises to its readers."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from culm import ids
from culm.errors import ClientFault

slots = st.integers(0, ids.MAX_SLOT)
seqs = st.integers(1, ids.MAX_SEQ)


@pytest.mark.parametrize(
    ("slot", "seq", "expected"),
    [
        (0, 1, 1),
        (0, 2, 2),
        (1, 1, 549_755_813_889),
        (12_288, 7, 6_755_399_441_055_751),
        (16_383, 549_755_813_887, 9_007_199_254_740_991),
    ],
)
def test_exact_ids(slot: int, seq: int, expected: int) -> None:
    assert ids.job_id(slot, seq) == expected


def test_the_largest_id_is_the_largest_safe_integer_of_javascript() -> None:
    assert ids.MAX_JOB_ID == 2**53 - 1


@given(slots, seqs)
def test_an_id_names_its_slot_and_lies_in_its_range(slot: int, seq: int) -> None:
    identifier = ids.job_id(slot, seq)
    assert ids.slot_of(identifier) == slot
    first, last = ids.id_range(slot)
    assert first <= identifier <= last
    assert identifier - first == seq - 1


@given(slots, seqs)
def test_an_id_survives_a_reader_that_knows_doubles_only(slot: int, seq: int) -> None:
    identifier = ids.job_id(slot, seq)
    assert int(json.loads(str(identifier), parse_int=float)) == identifier


@given(slots.filter(lambda slot: slot < ids.MAX_SLOT))
def test_ranges_of_slots_never_touch(slot: int) -> None:
    assert ids.id_range(slot)[1] < ids.id_range(slot + 1)[0]
    assert ids.id_range(slot)[1] < ids.job_id(slot + 1, 1)


@pytest.mark.parametrize(("slot", "seq"), [(-1, 1), (16_384, 1), (0, 0), (0, -5), (0, 2**39), (16_383, 2**39)])
def test_no_id_outside_the_ranges(slot: int, seq: int) -> None:
    with pytest.raises(ValueError, match="outside"):
        ids.job_id(slot, seq)


@pytest.mark.parametrize("identifier", [0, -1, 2**53, 1 << 39, 5 << 39, 2**64])
def test_what_can_be_no_id_is_the_callers_fault(identifier: int) -> None:
    with pytest.raises(ClientFault) as caught:
        ids.slot_of(identifier)
    assert caught.value.code == "bad_job_id"
    assert caught.value.http_status == 400
    assert not caught.value.retryable
