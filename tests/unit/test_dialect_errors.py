"""The dialects of the front door: which one is spoken, and how an error looks in it."""

import msgspec
import pytest
from aiohttp.test_utils import make_mocked_request

from culm.errors import Bug, ClientFault, Conflict, CulmError, Moved, Unavailable
from culm.wire import GetJobAnswer, Grant, JobSpec, JobsQuery
from router import dialects
from router.dialects import JSON, MSGPACK, RETRY_JITTER


@pytest.mark.parametrize(
    ("headers", "body", "answer"),
    [
        ({"Content-Type": JSON}, JSON, JSON),
        ({"Content-Type": "application/json; charset=utf-8"}, JSON, JSON),
        ({"Content-Type": MSGPACK}, MSGPACK, MSGPACK),
        ({"Content-Type": MSGPACK, "Accept": JSON}, MSGPACK, MSGPACK),
        ({"Content-Type": "APPLICATION/JSON"}, JSON, JSON),
        ({"Content-Type": "text/plain"}, None, JSON),
        ({"Content-Type": "text/plain", "Accept": MSGPACK}, None, MSGPACK),
        ({"Accept": f"text/html, {MSGPACK};q=0.5"}, None, MSGPACK),
        ({"Accept": "*/*"}, None, JSON),
        ({}, None, JSON),
    ],
)
def test_the_dialect_of_a_request_and_of_its_answer(headers: dict[str, str], body: str | None, answer: str) -> None:
    request = make_mocked_request("POST", "/", headers=headers)
    assert dialects.answer_dialect(request) == answer
    if body is not None:
        assert dialects.dialect_of(request) == body
    else:
        with pytest.raises(ClientFault) as caught:
            dialects.dialect_of(request)
        assert caught.value.http_status == 415


@pytest.mark.parametrize("dialect", [JSON, MSGPACK])
@pytest.mark.parametrize(
    ("error", "status", "retryable"),
    [
        (ClientFault("bad_job", "x"), 400, False),
        (ClientFault("forbidden", "x", http_status=403), 403, False),
        (Conflict("lease_lost", "x", details={"state": "running"}), 409, False),
        (Unavailable("shard_down", "x"), 503, True),
        (Moved(3, 4), 503, True),
        (Bug("x"), 500, False),
    ],
    ids=lambda value: value.code if isinstance(value, CulmError) else "",
)
def test_an_error_is_whole_in_both_dialects(dialect: str, error: CulmError, status: int, retryable: bool) -> None:
    response = dialects.encode_error(dialect, error)
    decode = msgspec.json.decode if dialect == JSON else msgspec.msgpack.decode
    body = decode(response.body)["error"]  # type: ignore[arg-type]
    assert (response.status, response.content_type) == (status, dialect)
    assert (body["code"], body["retryable"]) == (error.code, retryable)
    assert body["details"].items() >= error.details.items()
    assert ("Retry-After" in response.headers) is retryable


def test_clients_of_a_dead_shard_do_not_come_back_at_once() -> None:
    error = Unavailable("shard_down", "x", retry_after_s=4.0)
    waits = []
    for _ in range(50):
        response = dialects.encode_error(JSON, error)
        wait_s = msgspec.json.decode(response.body)["error"]["retry_after_s"]  # type: ignore[arg-type]
        assert 4.0 <= wait_s <= 4.0 * (1 + RETRY_JITTER)
        assert abs(int(response.headers["Retry-After"]) - wait_s) <= 0.5
        waits.append(wait_s)
    assert max(waits) - min(waits) > 0.5


def test_a_short_wait_is_still_a_whole_second_in_the_header() -> None:
    response = dialects.encode_error(JSON, Unavailable("moved", "x", retry_after_s=0.2))
    assert response.headers["Retry-After"] == "1"


def test_who_shows_no_token_is_told_which_kind() -> None:
    assert dialects.encode_error(JSON, ClientFault("no_token", "x", http_status=401)).headers["WWW-Authenticate"]


def test_a_query_is_read_from_text() -> None:
    request = make_mocked_request("GET", "/v1/jobs?limit=5&jobset=7&state=running&owner=a%20b&after=9")
    query = dialects.query(request, JobsQuery)
    assert (query.limit, query.jobset, query.state, query.owner, query.after) == (5, 7, "running", "a b", 9)


@pytest.mark.parametrize("text", ["limit=", "limit=0", "state=", "jobset=x", "after=1.5", "unknown=1"])
def test_a_bad_query_is_said(text: str) -> None:
    with pytest.raises(ClientFault) as caught:
        dialects.query(make_mocked_request("GET", f"/v1/jobs?{text}"), JobsQuery)
    assert caught.value.code == "bad_request"


def test_specs_are_stored_as_messagepack_and_sent_in_the_clients_dialect() -> None:
    spec = JobSpec(argv=["echo", "ü"], environment={"A": "1"})
    grant = Grant(
        id=1, attempt=1, lease_token="t", lease_s=1.0, heartbeat_s=1.0, jobset=1, owner="ann", vo="", priority=1,
        spec=msgspec.Raw(msgspec.msgpack.encode(spec)),
    )  # fmt: skip
    stored = GetJobAnswer(jobs=[grant])
    assert dialects.grants_in(MSGPACK, stored) is stored
    body = dialects.encode(JSON, dialects.grants_in(JSON, stored)).body
    assert msgspec.convert(msgspec.json.decode(body)["jobs"][0]["spec"], JobSpec) == spec  # type: ignore[arg-type]
    body = dialects.encode(MSGPACK, dialects.grants_in(MSGPACK, stored)).body
    assert msgspec.convert(msgspec.msgpack.decode(body)["jobs"][0]["spec"], JobSpec) == spec  # type: ignore[arg-type]
