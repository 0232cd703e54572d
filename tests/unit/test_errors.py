"""The error kinds: what a program reads off them, and that they cross the link unharmed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from culm import frames, wire
from culm.errors import Bug, ClientFault, Conflict, CulmError, Moved, Unavailable

KINDS = [
    (ClientFault("unknown_queue", "no such queue", http_status=404), 404, False),
    (ClientFault("bad_request", "no"), 400, False),
    (ClientFault("too_large", "3 MB", http_status=413, details={"limit": 2}), 413, False),
    (Conflict("stale_attempt", "attempt 2 is the last"), 409, False),
    (Moved(17, 42), 503, True),
    (Unavailable("shard_down", "us1", retry_after_s=2.5, details={"shard": "us1"}), 503, True),
    (Bug("an invariant"), 500, False),
]


@pytest.mark.parametrize(("error", "status", "retryable"), KINDS)
def test_status_and_retryable(error: CulmError, status: int, retryable: bool) -> None:
    assert error.http_status == status
    assert error.retryable is retryable
    assert str(error) == f"{error.code}: {error.message}"
    assert isinstance(error, CulmError)


def test_a_status_of_one_error_is_not_the_status_of_its_kind() -> None:
    ClientFault("forbidden", "not yours", http_status=403)
    assert ClientFault("bad_request", "no").http_status == 400
    assert ClientFault.http_status == 400


def test_details_are_never_shared() -> None:
    first = ClientFault("a", "b")
    first.details["x"] = 1
    assert ClientFault("a", "b").details == {}


def test_what_asks_for_a_repeat_says_when() -> None:
    assert Unavailable("busy", "later").retry_after_s == 1.0
    assert Moved(1, 2).retry_after_s == 0.2
    assert Conflict("stale_attempt", "no").retry_after_s is None


def test_moved_names_the_slot_and_the_epoch() -> None:
    assert Moved(17, 42).details == {"slot": 17, "epoch": 42}


def test_a_bug_has_one_code_for_programs() -> None:
    assert Bug("whatever").code == "internal"


@pytest.mark.parametrize("error", [row[0] for row in KINDS])
def test_an_error_crosses_the_link_as_what_it_was(error: CulmError) -> None:
    received = frames.error_from_body(frames.error_body(error))
    assert type(received) is type(error)
    assert received.code == error.code
    assert received.message == error.message
    assert received.http_status == error.http_status
    assert received.retryable == error.retryable
    assert received.retry_after_s == error.retry_after_s
    assert received.details == error.details


@given(st.sampled_from([400, 401, 403, 404, 413, 415, 409, 500, 503, 429]), st.booleans())
def test_no_error_body_of_a_newer_peer_is_unreadable(status: int, retryable: bool) -> None:
    body = wire.ErrorBody(code="new_code", message="m", retryable=retryable, details={"status": status, "more": 1})
    received = frames.error_from_body(body)
    assert isinstance(received, CulmError)
    assert received.retryable is (retryable and status != 409)
