"""The pilot's HTTP client against a small real server: what it tries again, what it takes for a refusal."""

import json
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from pilot import client
from pilot.client import RefusedError, Router, UnreachableError

PATIENCE_S = 10.0
GOOD = (200, b'{"state": "running"}')


def _error(code: str, *, retryable: bool, after_s: float | None = None) -> bytes:
    told = {"code": code, "message": "told why", "retryable": retryable, "retry_after_s": after_s}
    return json.dumps({"error": told}).encode()


@dataclass
class Server:
    """Gives the answers that a test has laid out, the last one for ever, and keeps what it was asked."""

    url: str
    answers: list[tuple[int, bytes] | bytes] = field(default_factory=list)
    """(status, body), or the raw bytes of a connection that is closed after them."""
    headers: dict[str, str] = field(default_factory=dict)
    asked: list[tuple[str, dict[str, str], Any]] = field(default_factory=list)

    def next(self) -> tuple[int, bytes] | bytes:
        """The answer to this request."""
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


@pytest.fixture
def server() -> Iterator[Server]:
    """A server in a thread."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            laid_out.asked.append((self.path, dict(self.headers), body))
            answer = laid_out.next()
            if isinstance(answer, bytes):
                self.wfile.write(answer)
                return
            self.send_response(answer[0])
            for name, value in laid_out.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer[1])

        def do_GET(self) -> None:
            laid_out.asked.append((self.path, dict(self.headers), None))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: Any) -> None:
            return

    with HTTPServer(("127.0.0.1", 0), Handler) as listening:
        laid_out = Server(f"http://127.0.0.1:{listening.server_port}")
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield laid_out
        finally:
            listening.shutdown()
            thread.join()


@pytest.fixture
def router(server: Server, monkeypatch: pytest.MonkeyPatch) -> Router:
    """A router at that server, asked again at once."""
    monkeypatch.setattr(client, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(client, "MAX_PAUSE_S", 0.01)
    return Router(server.url + "/", lambda: "t0ken")


def test_a_call_is_a_post_of_json_with_the_token(server: Server, router: Router) -> None:
    server.answers = [GOOD]
    assert router.call("heartbeat", {"id": 1, "text": "ü\x00"}, PATIENCE_S) == {"state": "running"}
    [(path, headers, body)] = server.asked
    assert (path, body) == ("/v1/heartbeat", {"id": 1, "text": "ü\x00"})
    assert (headers["Authorization"], headers["Content-Type"]) == ("Bearer t0ken", "application/json")


@pytest.mark.parametrize(
    "first",
    [
        (503, _error("shard_down", retryable=True)),
        (503, _error("moved", retryable=True, after_s=0.001)),
        (503, _error("moved", retryable=True, after_s=-1.0)),
        (503, _error("moved", retryable=True, after_s=math.nan)),
        (502, b"<html>Bad Gateway</html>"),
        (504, b""),
        (500, b"oops"),
        (429, b"slow down"),
        (200, b"<html>Welcome to the network of the hotel</html>"),
        (200, b"[]"),
        (200, b""),
        (200, b'{"cut": '),
        b"",
        b"rubbish\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{",
        b"HTTP/1.1 503 Busy\r\nContent-Length: 100\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{",
    ],
)
def test_what_may_be_better_next_time_is_asked_again_with_the_same_body(
    server: Server, router: Router, first: tuple[int, bytes] | bytes
) -> None:
    server.answers = [first, GOOD]
    assert router.call("get_job", {"request_id": "one"}, PATIENCE_S) == {"state": "running"}
    assert [body for _, _, body in server.asked] == [{"request_id": "one"}] * 2


@pytest.mark.parametrize(
    ("answer", "told", "lost", "malformed"),
    [
        ((409, _error("lease_lost", retryable=False)), (409, "lease_lost"), True, False),
        ((409, _error("bad_transition", retryable=False)), (409, "bad_transition"), True, False),
        ((404, _error("unknown_job", retryable=False)), (404, "unknown_job"), True, False),
        ((400, _error("bad_request", retryable=False)), (400, "bad_request"), False, True),
        ((401, _error("bad_token", retryable=False)), (401, "bad_token"), False, False),
        ((403, _error("forbidden", retryable=False)), (403, "forbidden"), False, False),
        ((404, _error("unknown_path", retryable=False)), (404, "unknown_path"), False, False),
        ((500, _error("internal", retryable=False)), (500, "internal"), False, False),
        # Not our router: nothing that it says is about our job or our message.
        ((404, b"<html>Not Found</html>"), (404, "bad_answer"), False, False),
        ((409, b"{}"), (409, "bad_answer"), False, False),
        ((400, b'{"error": "no"}'), (400, "bad_answer"), False, False),
        ((403, b"\xff"), (403, "bad_answer"), False, False),
    ],
)
def test_a_refusal_is_told_at_once(
    server: Server, router: Router, answer: tuple[int, bytes], told: tuple[int, str], lost: bool, malformed: bool
) -> None:
    server.answers = [answer]
    with pytest.raises(RefusedError) as caught:
        router.call("report", {}, PATIENCE_S)
    assert (caught.value.status, caught.value.code) == told
    assert (caught.value.lost, caught.value.malformed) == (lost, malformed)
    assert len(server.asked) == 1


def test_a_router_that_stays_away_is_unreachable_when_patience_ends(server: Server, router: Router) -> None:
    server.answers = [(503, _error("shard_down", retryable=True))]
    with pytest.raises(UnreachableError, match="shard_down: told why"):
        router.call("get_job", {}, 0.1)
    assert len(server.asked) > 3


def test_no_router_at_all_is_unreachable(router: Router, server: Server) -> None:
    # Port 9 of loopback: nobody listens there.
    nowhere = Router("http://127.0.0.1:9", lambda: "t0ken")
    with pytest.raises(UnreachableError, match="refused"):
        nowhere.call("get_job", {}, 0.05)


def test_a_wait_that_the_router_asks_for_and_patience_does_not_allow_ends_it(server: Server, router: Router) -> None:
    server.answers = [(503, _error("stopping", retryable=True, after_s=60.0))]
    with pytest.raises(UnreachableError, match="stopping"):
        router.call("get_job", {}, PATIENCE_S)
    assert len(server.asked) == 1


def test_pauses_grow_to_a_bound_and_are_spread(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(client.time, "sleep", pauses.append)
    server.answers = [(503, _error("shard_down", retryable=True))] * 9 + [GOOD]
    Router(server.url, lambda: "t0ken").call("get_job", {}, 3600.0)
    bounds = [0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    assert len(pauses) == len(bounds)
    assert all(bound <= pause <= bound * 1.5 for bound, pause in zip(bounds, pauses, strict=True))
    assert len({pause / bound for bound, pause in zip(bounds, pauses, strict=True)}) > 5


def test_a_redirect_does_not_take_the_token_elsewhere(server: Server, router: Router) -> None:
    server.headers = {"Location": f"{server.url}/elsewhere"}
    server.answers = [(302, b"")]
    with pytest.raises(RefusedError, match="HTTP 302"):
        router.call("get_job", {}, PATIENCE_S)
    assert [path for path, _, _ in server.asked] == ["/v1/get_job"]


def test_the_token_is_asked_for_at_every_call(server: Server) -> None:
    server.answers = [GOOD]
    tokens = iter(["old", "new"])
    renewed = Router(server.url, lambda: next(tokens))
    for _ in range(2):
        renewed.call("heartbeat", {}, PATIENCE_S)
    assert [headers["Authorization"] for _, headers, _ in server.asked] == ["Bearer old", "Bearer new"]


def test_a_token_that_cannot_be_read_now_is_read_again(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is renewed the file may be missing for a moment."""
    monkeypatch.setattr(client, "FIRST_PAUSE_S", 0.001)
    server.answers = [GOOD]
    readings = iter([FileNotFoundError("token"), "new"])

    def token() -> str:
        match next(readings):
            case str(text):
                return text
            case error:
                raise error

    assert Router(server.url, token).call("heartbeat", {}, PATIENCE_S) == {"state": "running"}
