"""Whatever is sent to a router: a clear error each, nothing stored, and the next good request is served."""

import asyncio
import gzip
import json
import secrets
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from culm.ids import MAX_JOB_ID, job_id
from culm.wire import MAX_BODY_BYTES, MAX_JOBS_PER_SUBMIT, SubmitRequest
from router import dialects
from tests.front import Reply, RunningFront, front
from tests.partition import ADMIN, PILOT, QUEUE, USER, Partition, Servers, job, partition
from tests.servers import Server

pytestmark = pytest.mark.asyncio(loop_scope="module")

JSON = "application/json"
MSGPACK = "application/msgpack"
ENCODE: dict[str, Callable[[Any], bytes]] = {JSON: msgspec.json.encode, MSGPACK: msgspec.msgpack.encode}
BOTH = pytest.mark.parametrize("kind", [JSON, MSGPACK])


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(mariadb: Server, valkey: Server) -> AsyncIterator[tuple[Partition, RunningFront]]:
    """One shard and one router for all of these tests: that they go on working is what is tested."""
    async with partition(Servers(mariadb, valkey)) as shard, front(shard) as router:
        yield shard, router


@pytest_asyncio.fixture(loop_scope="module")
async def router(running: tuple[Partition, RunningFront]) -> AsyncIterator[RunningFront]:
    """The router; afterwards nothing was stored, and the next good job is taken."""
    shard, router = running
    stored = await _stored(shard)
    yield router
    assert await _stored(shard) == stored
    async with router.client(patience_s=0) as user:
        await user.submit(SubmitRequest(idempotency_key=secrets.token_hex(8), jobs=[job()]))
    assert await _stored(shard) == [n + 1 for n in stored]


async def _stored(shard: Partition) -> list[int]:
    return [int((await shard.rows(f"SELECT COUNT(*) FROM {table}"))[0][0]) for table in ("job", "spec", "submission")]


async def refused(reply: Reply, status: int, code: str, word: str = "") -> None:
    """The reply is this error, and says this word."""
    assert (reply.status, reply.code) == (status, code), reply.body
    assert word in reply.body["error"]["message"], reply.body


def submit_of(**changes: Any) -> dict[str, Any]:
    """A submit whose one job has these changes."""
    return {"idempotency_key": "bad", "jobs": [{"site": "BNL", "argv": ["true"]} | changes]}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"idempotency_key": "x", "jobs": [{"site": "BNL", "argv": ["true"]}]',
        b"not json",
        b"[]",
        b"null",
        b'{"idempotency_key": "\xff\xfe", "jobs": []}',
        b'{"idempotency_key": "\\ud800", "jobs": [{"argv": ["true"]}]}',
        b"[" * 500_000,
        b'{"jobs":' * 200_000,
        b'{"idempotency_key": "x", "jobs": [{"argv": ["true"]}], "jobset": ' + b"9" * 5000 + b"}",
        b'{"idempotency_key": "x", "jobs": [{"argv": ["true"], "cores": 1e400}]}',
        b'{"idempotency_key": "x", "jobs": [{"argv": ["true"], "memory_mb": NaN}]}',
        b"\x00" * 100,
    ],
    ids=lambda body: repr(body[:40]),
)
async def test_malformed_json_is_a_bad_request(router: RunningFront, body: bytes) -> None:
    await refused(await router.send("POST", "/v1/submit", body), 400, "bad_request")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        b"\x81",
        b"\x82\xa1a\x01",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x91" * 500_000,
        b"\x81\xaaidempotency\xff\xff",
        msgspec.msgpack.encode(submit_of()) + b"\x00",
        msgspec.msgpack.encode(submit_of(name=b"bytes")),
        b'{"idempotency_key": "json under a wrong name"}',
    ],
    ids=lambda body: repr(body[:40]),
)
async def test_rubbish_instead_of_messagepack_is_a_bad_request(router: RunningFront, body: bytes) -> None:
    reply = await router.send("POST", "/v1/submit", body, kind=MSGPACK)
    assert reply.headers["Content-Type"] == MSGPACK
    await refused(reply, 400, "bad_request")


@BOTH
@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"cores": "four"}, "cores"),
        ({"cores": 0}, "cores"),
        ({"cores": 1.5}, "cores"),
        ({"memory_mb": -1}, "memory_mb"),
        ({"memory_mb": 2**31}, "memory_mb"),
        ({"disk_mb": 2**63 - 1}, "disk_mb"),
        ({"priority": -1}, "priority"),
        ({"priority": 10**9}, "priority"),
        ({"max_attempts": 0}, "max_attempts"),
        ({"argv": "true"}, "argv"),
        ({"argv": [1]}, "argv"),
        ({"argv": ["x"] * 1025}, "argv"),
        ({"environment": [["A", "1"]]}, "environment"),
        ({"environment": {"": "1"}}, "environment"),
        ({"name": "x" * 257}, "name"),
        ({"site": "x" * 129}, "site"),
        ({"parent_id": 0}, "parent_id"),
        ({"parent_id": 2**53}, "parent_id"),
        ({"walltime": 60}, "walltime"),
        ({"inputs": [{"name": "f", "size": 3}]}, "size"),
        ({"inputs": [{}]}, "name"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, dict) else "",
)
async def test_wrong_types_ranges_and_fields_name_the_field(
    router: RunningFront, kind: str, change: dict[str, Any], word: str
) -> None:
    reply = await router.send("POST", "/v1/submit", ENCODE[kind](submit_of(**change)), kind=kind)
    await refused(reply, 400, "bad_request", word)


@BOTH
@pytest.mark.parametrize(
    ("change", "status", "code", "word"),
    [
        ({"argv": []}, 400, "bad_job", "argv and shell"),
        ({"shell": "true"}, 400, "bad_job", "argv and shell"),
        ({"argv": [""]}, 400, "bad_job", "argv[0]"),
        ({"argv": ["echo", "a\0b"]}, 400, "bad_job", "NUL"),
        ({"argv": [], "shell": "\0"}, 400, "bad_job", "NUL"),
        ({"environment": {"A": "\0"}}, 400, "bad_job", "NUL"),
        ({"environment": {"A=B": "1"}}, 400, "bad_job", "="),
        ({"outputs": ["../../etc/passwd"]}, 400, "bad_job", "without a path"),
        ({"outputs": ["a\0b"]}, 400, "bad_job", "NUL"),
        ({"inputs": [{"name": "a\0b"}]}, 400, "bad_job", "NUL"),
        ({"label": "nonsense"}, 400, "bad_job", "label"),
        ({"label": "managed"}, 403, "forbidden", "production"),
        ({"priority": 1001}, 403, "forbidden", "priority"),
        ({"working_group": "susy"}, 403, "forbidden", "susy"),
        ({"site": "Atlantis"}, 404, "unknown_site", "Atlantis"),
        ({"queue": "Atlantis-q"}, 404, "unknown_queue", "Atlantis-q"),
        ({"site": "", "region": "XX"}, 404, "unknown_region", "XX"),
        ({"region": "EU"}, 400, "bad_target", "EU"),
        ({"parent_id": job_id(0, 12345)}, 404, "unknown_parent", "12345"),
        ({"parent_id": job_id(9999, 1)}, 404, "unknown_slot", "9999"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, dict) else "",
)
async def test_what_no_job_may_ask_for_is_said(
    router: RunningFront, kind: str, change: dict[str, Any], status: int, code: str, word: str
) -> None:
    reply = await router.send("POST", "/v1/submit", ENCODE[kind](submit_of(**change)), kind=kind)
    await refused(reply, status, code, word)


async def test_one_bad_job_among_good_ones_is_named_and_none_is_stored(router: RunningFront) -> None:
    jobs = [submit_of()["jobs"][0] for _ in range(10)]
    jobs[7] = jobs[7] | {"site": "Atlantis"}
    reply = await router.send("POST", "/v1/submit", msgspec.json.encode({"idempotency_key": "x", "jobs": jobs}))
    await refused(reply, 404, "unknown_site", "jobs[7]")
    assert reply.body["error"]["details"]["index"] == 7


@BOTH
@pytest.mark.parametrize("n_jobs", [0, MAX_JOBS_PER_SUBMIT + 1])
async def test_a_call_of_no_job_or_of_2001_is_refused(router: RunningFront, kind: str, n_jobs: int) -> None:
    body = ENCODE[kind]({"idempotency_key": "x", "jobs": submit_of()["jobs"] * n_jobs})
    await refused(await router.send("POST", "/v1/submit", body, kind=kind), 400, "bad_request", "jobs")


@BOTH
async def test_a_body_of_3_mb_is_too_large(router: RunningFront, kind: str) -> None:
    reply = await router.send("POST", "/v1/submit", b"x" * 3_000_000, kind=kind)
    await refused(reply, 413, "body_too_large", str(MAX_BODY_BYTES))


async def test_a_small_body_that_unpacks_to_a_large_one_is_too_large(router: RunningFront) -> None:
    bomb = gzip.compress(b"[" * 50_000_000)
    assert len(bomb) < 100_000
    reply = await router.send("POST", "/v1/submit", bomb, headers={"Content-Encoding": "gzip"})
    assert reply.status in {400, 413}
    assert reply.code in {"bad_request", "body_too_large"}


async def test_a_body_that_is_not_packed_as_it_says_is_a_bad_request(router: RunningFront) -> None:
    reply = await router.send("POST", "/v1/submit", b"plain", headers={"Content-Encoding": "gzip"})
    await refused(reply, 400, "bad_request")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/xml", "nonsense"])
async def test_another_content_type_is_not_understood(router: RunningFront, kind: str) -> None:
    reply = await router.send("POST", "/v1/submit", msgspec.json.encode(submit_of()), kind=kind)
    await refused(reply, 415, "unsupported_media_type", MSGPACK)


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/", "/v1/steal", "/v2/submit", "/v1/job", "/v1/job/1/2", "/%00"])
async def test_an_unknown_path_is_404(router: RunningFront, path: str) -> None:
    await refused(await router.send("GET", path), 404, "unknown_path")


@pytest.mark.parametrize(("method", "path"), [("GET", "/v1/submit"), ("PUT", "/v1/get_job"), ("DELETE", "/v1/job/1")])
async def test_a_wrong_method_is_405(router: RunningFront, method: str, path: str) -> None:
    await refused(await router.send(method, path, b"{}"), 405, "method_not_allowed", method)


@pytest.mark.parametrize(
    "identifier", ["0", "-1", "1.5", "abc", "9" * 30, str(MAX_JOB_ID + 1), str(1 << 39), "0x10", "%00", "1%20", "²"]
)
async def test_what_is_no_job_id_is_said(router: RunningFront, identifier: str) -> None:
    path = f"/v1/job/{identifier.encode().decode('latin-1') if identifier != '²' else '%C2%B2'}"
    await refused(await router.send("GET", path), 400, "bad_job_id")


async def test_a_job_that_never_was_is_404(router: RunningFront) -> None:
    await refused(await router.send("GET", f"/v1/job/{job_id(0, 99)}"), 404, "unknown_job")
    await refused(await router.send("GET", f"/v1/job/{job_id(8000, 99)}"), 404, "unknown_slot")


@pytest.mark.parametrize(
    "query",
    [
        "limit=0", "limit=1001", "limit=abc", "limit=1.5", "after=-1", "after=99999999999999999999", "state=asleep",
        "jobset=0", "colour=red", f"owner={'x' * 129}",
    ],
)  # fmt: skip
async def test_a_bad_query_is_said(router: RunningFront, query: str) -> None:
    await refused(await router.send("GET", f"/v1/jobs?{query}"), 400, "bad_request", "the query is not good")


@pytest.mark.parametrize("owner", ["%ff", "%00", "'%20OR%201=1%20--", "%25s", "%F0%9F%8E%8B"])
async def test_a_strange_filter_finds_nothing_and_breaks_nothing(router: RunningFront, owner: str) -> None:
    reply = await router.send("GET", f"/v1/jobs?owner={owner}")
    assert (reply.status, reply.body["jobs"], reply.body["missing_shards"]) == (200, [], [])


@BOTH
@pytest.mark.parametrize(
    ("verb", "message", "status", "code"),
    [
        ("get_job", {"request_id": "r" * 8, "queue": "Atlantis-q", "pilot": {"id": "p"}}, 404, "unknown_queue"),
        ("get_job", {"request_id": "short", "queue": QUEUE, "pilot": {"id": "p"}}, 400, "bad_request"),
        ("get_job", {"request_id": "r" * 8, "queue": QUEUE, "pilot": {"id": ""}}, 400, "bad_request"),
        ("get_job", {"request_id": "r" * 8, "queue": QUEUE, "pilot": {"id": "p"}, "n_jobs": 101}, 400, "bad_request"),
        ("get_job", {"request_id": "r" * 8, "queue": QUEUE, "pilot": {"id": "p"}, "wait_s": 61}, 400, "bad_request"),
        ("heartbeat", {"id": 0, "attempt": 1, "lease_token": "t", "state": "running"}, 400, "bad_request"),
        ("heartbeat", {"id": 5, "attempt": 1, "lease_token": "t", "state": "running"}, 404, "unknown_job"),
        ("heartbeat", {"id": 5, "attempt": 1, "lease_token": "t", "state": "finished"}, 400, "bad_state"),
        ("heartbeat", {"id": 5, "attempt": 2**70, "lease_token": "t", "state": "running"}, 400, "bad_request"),
        ("heartbeat", {"id": 1 << 39, "attempt": 1, "lease_token": "t", "state": "running"}, 400, "bad_job_id"),
        ("report", {"id": 5}, 400, "bad_report"),
        ("report", {"id": 5, "state": "finished"}, 400, "bad_report"),
        ("report", {"id": 5, "state": "finished", "lease_token": "t", "exit_code": 999}, 400, "bad_request"),
        ("report", {"id": 5, "state": "finished", "lease_token": "t", "stdout_tail": "x" * 8193}, 400, "bad_request"),
        ("report", {"id": 5, "state": "finished", "lease_token": "t"}, 404, "unknown_job"),
        ("report", {"id": 5, "event": "finish", "state": "finished", "lease_token": "t"}, 400, "bad_report"),
        ("cancel", {}, 400, "bad_cancel"),
        ("cancel", {"ids": [1], "jobset": 1}, 400, "bad_cancel"),
        ("cancel", {"ids": [0]}, 400, "bad_request"),
        ("cancel", {"ids": [1 << 39]}, 400, "bad_job_id"),
        ("cancel", {"ids": [2**53]}, 400, "bad_request"),
        ("cancel", {"ids": ["1"]}, 400, "bad_request"),
        ("cancel", {"ids": [1] * 1001}, 400, "bad_request"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else str(value),
)
async def test_every_verb_refuses_what_it_cannot_mean(
    router: RunningFront, kind: str, verb: str, message: dict[str, Any], status: int, code: str
) -> None:
    token = router.token(ADMIN if verb != "get_job" else PILOT)
    reply = await router.send("POST", f"/v1/{verb}", _encoded(kind, message), kind=kind, token=token)
    await refused(reply, status, code)


def _encoded(kind: str, message: dict[str, Any]) -> bytes:
    # The standard library's: msgspec writes no whole number beyond 64 bits.
    return json.dumps(message).encode() if kind == JSON or 2**70 in message.values() else ENCODE[kind](message)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -1.0])
async def test_numbers_that_only_messagepack_can_say(router: RunningFront, number: float) -> None:
    message = {"request_id": "r" * 8, "queue": QUEUE, "pilot": {"id": "p"}, "wait_s": number}
    body, token = msgspec.msgpack.encode(message), router.token(PILOT)
    await refused(await router.send("POST", "/v1/get_job", body, kind=MSGPACK, token=token), 400, "bad_request")


async def test_an_error_without_a_body_speaks_what_the_client_accepts(router: RunningFront) -> None:
    reply = await router.send("GET", "/v1/nowhere", headers={"Accept": MSGPACK})
    assert reply.headers["Content-Type"] == MSGPACK
    await refused(reply, 404, "unknown_path")


async def test_a_body_that_comes_by_drops_is_not_waited_for(
    router: RunningFront, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dialects, "READ_S", 0.1)
    host, port = router.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"POST /v1/submit HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {router.token(USER)}\r\n"
    writer.write(f"{head}Content-Type: {JSON}\r\nContent-Length: 1000\r\n\r\n{{".encode())
    async with asyncio.timeout(20.0):
        status = await reader.readline()
        headers = (await reader.readuntil(b"\r\n\r\n")).decode().splitlines()
        [size] = [int(line.split(": ")[1]) for line in headers if line.lower().startswith("content-length: ")]
        body = await reader.readexactly(size)
    assert status.startswith(b"HTTP/1.1 408")
    assert msgspec.json.decode(body)["error"]["code"] == "body_too_slow"
    writer.close()
