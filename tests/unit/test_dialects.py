"""JSON and MessagePack: which one is spoken, how errors leave, how stored specs reach a client."""

import msgspec
import pytest
from aiohttp.test_utils import make_mocked_request

from culm.errors import Bug, ClientFault, Conflict, CulmError, Moved, Unavailable
from culm.service import RETRY_JITTER
from culm.wire import GetJobAnswer, Grant, JobSpec, JobsQuery
from router import dialects
from router.dialects import JSON, MSGPACK

SPEC = JobSpec(site="BNL", argv=["echo", "höhe"])


def grant() -> Grant:
    return Grant(
        id=1,
        attempt=1,
        lease_token="t",
        lease_s=1.0,
        heartbeat_s=1.0,
        jobset=1,
        owner="ann",
        vo="atlas",
        priority=0,
        spec=msgspec.Raw(msgspec.msgpack.encode(SPEC)),
    )


@pytest.mark.parametrize(
    ("headers", "dialect"),
    [
        ({}, JSON),
        ({"Content-Type": JSON}, JSON),
        ({"Content-Type": f"{JSON}; charset=utf-8"}, JSON),
        ({"Content-Type": MSGPACK}, MSGPACK),
        ({"Content-Type": MSGPACK, "Accept": JSON}, MSGPACK),
        ({"Content-Type": JSON, "Accept": MSGPACK}, JSON),
        ({"Accept": MSGPACK}, MSGPACK),
        ({"Accept": "*/*"}, JSON),
        ({"Content-Type": "text/html"}, JSON),
    ],
)
def test_the_answer_is_in_the_dialect_of_the_body_else_as_accepted(headers: dict[str, str], dialect: str) -> None:
    assert dialects.answer_dialect(make_mocked_request("POST", "/v1/submit", headers=headers)) == dialect


@pytest.mark.parametrize("kind", ["text/plain", "text/json", "application/x-www-form-urlencoded", ""])
def test_other_content_types_are_415(kind: str) -> None:
    with pytest.raises(ClientFault) as caught:
        dialects.dialect_of(make_mocked_request("POST", "/v1/submit", headers={"Content-Type": kind}))
    assert (caught.value.code, caught.value.http_status) == ("unsupported_media_type", 415)


@pytest.mark.parametrize(("dialect", "decode"), [(JSON, msgspec.json.decode), (MSGPACK, msgspec.msgpack.decode)])
def test_a_stored_spec_reaches_the_client_in_its_own_dialect(dialect: str, decode: object) -> None:
    answer = dialects.encode(dialect, dialects.grants_in(dialect, GetJobAnswer(jobs=[grant()])))
    assert answer.content_type == dialect
    [received] = decode(answer.body)["jobs"]  # type: ignore[operator]  # one of two functions
    assert msgspec.convert(received["spec"], JobSpec) == SPEC


@pytest.mark.parametrize(
    ("error", "status", "retryable"),
    [
        (ClientFault("bad_request", "no"), 400, False),
        (ClientFault("forbidden", "no", http_status=403), 403, False),
        (Conflict("lease_lost", "no"), 409, False),
        (Unavailable("shard_down", "no", retry_after_s=4.0), 503, True),
        (Moved(1, 2), 503, True),
        (Bug("ours"), 500, False),
    ],
    ids=lambda value: getattr(value, "code", None),
)
@pytest.mark.parametrize(("dialect", "decode"), [(JSON, msgspec.json.decode), (MSGPACK, msgspec.msgpack.decode)])
def test_an_error_has_one_body_in_either_dialect(
    error: CulmError, status: int, dialect: str, decode: object, *, retryable: bool
) -> None:
    answer = dialects.encode_error(dialect, error)
    assert (answer.status, answer.content_type) == (status, dialect)
    body = decode(answer.body)  # type: ignore[operator]  # one of two functions
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"code", "message", "retryable", "retry_after_s", "details"}
    assert (body["error"]["code"], body["error"]["retryable"]) == (error.code, retryable)
    assert ("Retry-After" in answer.headers) is retryable


def test_the_clients_of_a_dead_shard_are_told_different_times() -> None:
    said = set()
    for _ in range(50):
        answer = dialects.encode_error(JSON, Unavailable("shard_down", "no", retry_after_s=10.0))
        after_s = msgspec.json.decode(answer.body)["error"]["retry_after_s"]
        assert 10.0 <= after_s <= 10.0 * (1 + RETRY_JITTER)
        assert answer.headers["Retry-After"] == str(round(after_s))
        said.add(after_s)
    assert len(said) > 10


def test_a_short_wait_is_still_a_whole_second_in_the_header() -> None:
    assert dialects.encode_error(JSON, Moved(1, 2)).headers["Retry-After"] == "1"


def test_a_refused_token_says_what_is_needed() -> None:
    answer = dialects.encode_error(JSON, ClientFault("no_token", "no", http_status=401))
    assert answer.headers["WWW-Authenticate"] == "Bearer"


def test_a_query_is_read_with_its_types() -> None:
    request = make_mocked_request("GET", "/v1/jobs?site=BNL&limit=5&after=7&state=running")
    read = dialects.query(request, JobsQuery)
    assert (read.site, read.limit, read.after, read.state) == ("BNL", 5, 7, "running")


@pytest.mark.parametrize(
    "text", ["limit=0", "limit=1001", "limit=x", "limit=1.5", "after=-1", f"after={2**53}", "state=asleep", "sites=BNL"]
)
def test_a_query_that_is_not_good_is_refused(text: str) -> None:
    with pytest.raises(ClientFault) as caught:
        dialects.query(make_mocked_request("GET", f"/v1/jobs?{text}"), JobsQuery)
    assert (caught.value.code, caught.value.http_status) == ("bad_request", 400)
