"""The messages: round trips in both dialects, and what their bounds refuse."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from culm import wire
from culm.states import State
from tests.golden.samples import BY_NAME, GRANT, SPEC, plain

BINARY_ONLY = {"Grant", "GetJobAnswer", "Frame"}
"""They carry raw MessagePack or bytes inside."""


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_messagepack_round_trip(name: str) -> None:
    sample = BY_NAME[name]
    received = msgspec.msgpack.decode(msgspec.msgpack.encode(sample), type=type(sample))
    assert plain(received) == plain(sample)
    assert name in BINARY_ONLY or received == sample


@pytest.mark.parametrize("name", sorted(BY_NAME.keys() - BINARY_ONLY))
def test_json_round_trip(name: str) -> None:
    sample = BY_NAME[name]
    assert msgspec.json.decode(msgspec.json.encode(sample), type=type(sample)) == sample


def test_a_grant_carries_the_spec_as_it_was_stored() -> None:
    received = msgspec.msgpack.decode(msgspec.msgpack.encode(GRANT), type=wire.Grant)
    assert msgspec.msgpack.decode(received.spec, type=wire.JobSpec) == SPEC


def test_a_small_job_is_a_small_message() -> None:
    """Defaults are not sent: they are most of a job, and 2,000 of them travel in one call."""
    assert msgspec.json.encode(wire.JobSpec(shell="true")) == b'{"shell":"true"}'


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=50)


@given(
    st.builds(
        wire.JobSpec,
        name=texts,
        argv=st.lists(texts, max_size=5),
        environment=st.dictionaries(texts.filter(bool), texts, max_size=5),
        priority=st.none() | st.integers(0, 1_000_000),
        memory_mb=st.integers(0, 2**31 - 1),
        parent_id=st.none() | st.integers(1, 2**53 - 1),
    )
)
def test_any_spec_survives_both_dialects(spec: wire.JobSpec) -> None:
    assert msgspec.json.decode(msgspec.json.encode(spec), type=wire.JobSpec) == spec
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(spec), type=wire.JobSpec) == spec


@given(st.binary(max_size=200), st.sampled_from(sorted(BY_NAME)))
def test_rubbish_is_refused_and_nothing_worse(data: bytes, name: str) -> None:
    kind = type(BY_NAME[name])
    for decode in (msgspec.json.decode, msgspec.msgpack.decode):
        try:
            decode(data, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue


# --- bounds ----------------------------------------------------------------------------------------------------------

GET = {"request_id": "r-12345678", "queue": "Q", "pilot": {"id": "p"}}
BEAT = {"id": 1, "attempt": 1, "lease_token": "t", "state": "running"}
JOB = {"shell": "true"}
REPORT = {"id": 1}
ERROR = {"plane": "exe", "code": 1}

GOOD: list[tuple[type[msgspec.Struct], dict[str, Any]]] = [
    (wire.SubmitRequest, {"idempotency_key": "k", "jobs": [JOB] * 2000}),
    (wire.SubmitRequest, {"idempotency_key": "k" * 128, "jobs": [JOB], "jobset": 2**53 - 1}),
    (wire.JobSpec, {"priority": 0}),
    (wire.JobSpec, {"priority": 1_000_000}),
    (wire.JobSpec, {"priority": None}),
    (wire.JobSpec, {"max_attempts": 50, "cores": 4096, "memory_mb": 2**31 - 1}),
    (wire.JobSpec, {"argv": ["x"] * 1024, "shell": "y" * 65536}),
    (wire.GetJobRequest, GET | {"wait_s": 60, "n_jobs": 100}),
    (wire.GetJobRequest, GET | {"label": ""}),
    (wire.HeartbeatRequest, BEAT),
    (wire.ReportRequest, REPORT | {"exit_code": -255, "stdout_tail": "x" * 8192}),
    (wire.ReportRequest, REPORT | {"state": "activated", "attempt": 1}),
    (wire.CancelRequest, {"ids": [1] * 1000}),
    (wire.JobsQuery, {"limit": 1000, "after": 2**53 - 1}),
    (wire.Usage, {"cpu_s": 1e12}),
]

BAD: list[tuple[type[msgspec.Struct], dict[str, Any], str]] = [
    (wire.SubmitRequest, {"idempotency_key": "k", "jobs": [JOB] * 2001}, "jobs"),
    (wire.SubmitRequest, {"idempotency_key": "k", "jobs": []}, "jobs"),
    (wire.SubmitRequest, {"idempotency_key": "", "jobs": [JOB]}, "idempotency_key"),
    (wire.SubmitRequest, {"idempotency_key": "k" * 129, "jobs": [JOB]}, "idempotency_key"),
    (wire.SubmitRequest, {"jobs": [JOB]}, "idempotency_key"),
    (wire.SubmitRequest, {"idempotency_key": "k", "jobs": [JOB], "jobset": 0}, "jobset"),
    (wire.SubmitRequest, {"idempotency_key": "k", "jobs": [JOB], "owner": "mallory"}, "owner"),
    (wire.SubmitRequest, {"idempotency_key": "k", "jobs": [JOB, JOB | {"priority": -1}]}, "jobs[1].priority"),
    (wire.JobSpec, {"priority": -1}, "priority"),
    (wire.JobSpec, {"priority": 1_000_001}, "priority"),
    (wire.JobSpec, {"priority": 1.5}, "priority"),
    (wire.JobSpec, {"priority": "900"}, "priority"),
    (wire.JobSpec, {"memory_mb": -1}, "memory_mb"),
    (wire.JobSpec, {"memory_mb": 2**31}, "memory_mb"),
    (wire.JobSpec, {"cores": 0}, "cores"),
    (wire.JobSpec, {"cores": True}, "cores"),
    (wire.JobSpec, {"max_attempts": 0}, "max_attempts"),
    (wire.JobSpec, {"max_attempts": 51}, "max_attempts"),
    (wire.JobSpec, {"argv": "echo hi"}, "argv"),
    (wire.JobSpec, {"argv": ["x"] * 1025}, "argv"),
    (wire.JobSpec, {"argv": [1]}, "argv"),
    (wire.JobSpec, {"shell": "y" * 65537}, "shell"),
    (wire.JobSpec, {"environment": {"": "x"}}, "environment"),
    (wire.JobSpec, {"environment": {"A": 1}}, "environment"),
    (wire.JobSpec, {"environment": {f"A{i}": "" for i in range(257)}}, "environment"),
    (wire.JobSpec, {"label": ""}, "label"),
    (wire.JobSpec, {"parent_id": 2**53}, "parent_id"),
    (wire.JobSpec, {"inputs": [{"name": ""}]}, "name"),
    (wire.JobSpec, {"comand": "typing error"}, "comand"),
    (wire.GetJobRequest, GET | {"request_id": "short"}, "request_id"),
    (wire.GetJobRequest, GET | {"request_id": "r" * 65}, "request_id"),
    (wire.GetJobRequest, GET | {"queue": ""}, "queue"),
    (wire.GetJobRequest, GET | {"wait_s": 60.5}, "wait_s"),
    (wire.GetJobRequest, GET | {"wait_s": -1}, "wait_s"),
    (wire.GetJobRequest, GET | {"n_jobs": 0}, "n_jobs"),
    (wire.GetJobRequest, GET | {"n_jobs": 101}, "n_jobs"),
    (wire.GetJobRequest, GET | {"pilot": {}}, "id"),
    (wire.GetJobRequest, GET | {"pilot": None}, "pilot"),
    (wire.HeartbeatRequest, BEAT | {"attempt": 0}, "attempt"),
    (wire.HeartbeatRequest, BEAT | {"state": "dreaming"}, "state"),
    (wire.HeartbeatRequest, BEAT | {"id": 0}, "id"),
    (wire.HeartbeatRequest, BEAT | {"lease_token": ""}, "lease_token"),
    (wire.ReportRequest, REPORT | {"exit_code": 256}, "exit_code"),
    (wire.ReportRequest, REPORT | {"stdout_tail": "x" * 8193}, "stdout_tail"),
    (wire.ReportRequest, REPORT | {"event": "explode"}, "event"),
    (wire.ReportRequest, REPORT | {"error": ERROR | {"code": -1}}, "code"),
    (wire.ReportRequest, REPORT | {"error": ERROR | {"text": "x" * 1001}}, "text"),
    (wire.ReportRequest, REPORT | {"usage": {"rss_mb": -1}}, "rss_mb"),
    (wire.CancelRequest, {"ids": [1] * 1001}, "ids"),
    (wire.CancelRequest, {"ids": ["1"]}, "ids"),
    (wire.JobsQuery, {"limit": 0}, "limit"),
    (wire.JobsQuery, {"limit": 1001}, "limit"),
    (wire.JobsQuery, {"state": "RUNNING"}, "state"),
    (wire.JobsQuery, {"order": "oldest"}, "order"),
    (wire.JobsQuery, {"since": -1}, "since"),
    (wire.JobsQuery, {"until": 1e12}, "until"),
    (wire.JobsQuery, {"before": "1764000000000000"}, "before"),
    (wire.JobsQuery, {"before": "1.2\n"}, "before"),
    (wire.Usage, {"cpu_s": 1e13}, "cpu_s"),
]


def _short(value: object) -> str:
    return str(value)[:40]


@pytest.mark.parametrize(("kind", "body"), GOOD, ids=_short)
def test_the_largest_and_smallest_are_accepted(kind: type[msgspec.Struct], body: dict[str, Any]) -> None:
    assert msgspec.json.decode(msgspec.json.encode(body), type=kind) == msgspec.msgpack.decode(
        msgspec.msgpack.encode(body), type=kind
    )


@pytest.mark.parametrize(("kind", "body", "named"), BAD, ids=_short)
def test_what_is_refused_is_named_in_both_dialects(
    kind: type[msgspec.Struct], body: dict[str, Any], named: str
) -> None:
    with pytest.raises(msgspec.ValidationError) as from_json:
        msgspec.json.decode(msgspec.json.encode(body), type=kind)
    with pytest.raises(msgspec.ValidationError) as from_messagepack:
        msgspec.msgpack.decode(msgspec.msgpack.encode(body), type=kind)
    assert named in str(from_json.value)
    assert named in str(from_messagepack.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("kind", "base", "field"), [(wire.GetJobRequest, GET, "wait_s"), (wire.Usage, {}, "wall_s")])
def test_messagepack_cannot_smuggle_what_json_cannot_say(
    kind: type[msgspec.Struct], base: dict[str, Any], field: str, value: float
) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode(base | {field: value}), type=kind)


def test_answers_of_a_newer_server_are_read() -> None:
    body = {"state": "running", "lease_s": 1.0, "heartbeat_s": 1.0, "news": [1]}
    answer = msgspec.json.decode(msgspec.json.encode(body), type=wire.HeartbeatAnswer)
    assert answer == wire.HeartbeatAnswer(state=State.RUNNING, lease_s=1.0, heartbeat_s=1.0)


def test_a_full_submit_fits_the_limits() -> None:
    """2,000 ordinary jobs stay far below the largest body, so that the count is the limit that users meet."""
    job = {"name": "simulation-000001", "argv": ["/bin/sim", "--events", "1000"], "memory_mb": 2000, "walltime_s": 3600}
    body = msgspec.json.encode({"idempotency_key": "k", "jobs": [job] * wire.MAX_JOBS_PER_SUBMIT})
    assert len(body) < wire.MAX_BODY_BYTES / 4
    assert wire.MAX_BODY_BYTES < wire.MAX_FRAME_BYTES
