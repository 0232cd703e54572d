"""The pilot's view of a router: what is asked again, what is given up, over a real HTTP server."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pilot import client
from pilot.client import RefusedError, Router, UnreachableError
from tests.servers import free_ports

PATIENCE_S = 10.0


class Script(ThreadingHTTPServer):
    """Answers with what is in `answers`, in turn, the last one for ever; keeps what was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: list[tuple[int, bytes]] = []
        self.headers: dict[str, str] = {}
        self.asked: list[tuple[str, bytes, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Script

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.path, body, self.headers["Authorization"]))
        answers = self.server.answers
        status, text = answers.pop(0) if len(answers) > 1 else answers[0]
        if not status:
            # Hung up on in the middle of an answer.
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n" + text)
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self) -> None:
        """What a followed redirect would be."""
        self.server.asked.append((self.path, b"", self.headers["Authorization"]))
        self.send_error(404)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Script]:
    monkeypatch.setattr(client, "FIRST_PAUSE_S", 0.01)
    with Script() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def _error(code: str, retryable: bool, after: str = "null") -> bytes:
    text = '{"error": {"code": "%s", "message": "m", "retryable": %s, "retry_after_s": %s}}'
    return (text % (code, json.dumps(retryable), after)).encode()


def _router(script: Script) -> Router:
    return Router(script.url, lambda: "t0")


def test_an_answer_comes_back_and_the_token_goes_along(script: Script) -> None:
    script.answers = [(200, b'{"jobs": []}')]
    assert _router(script).call("get_job", {"queue": "é"}, PATIENCE_S) == {"jobs": []}
    [(path, body, authorization)] = script.asked
    assert (path, json.loads(body), authorization) == ("/v1/get_job", {"queue": "é"}, "Bearer t0")


@pytest.mark.parametrize(
    "first",
    [
        (503, _error("shard_down", True)),
        (503, _error("shard_down", True, "0.01")),
        (503, _error("shard_down", True, "-3")),
        (503, _error("shard_down", True, "NaN")),
        (502, b"<html>proxy</html>"),
        (429, b"slow down"),
        (200, b"<html>captive portal</html>"),
        (200, b"[]"),
        (0, b'{"half'),
    ],
    ids=["503", "retry after", "negative", "not a number", "proxy", "429", "html", "no object", "cut"],
)
def test_what_may_pass_is_asked_again_with_the_same_body(script: Script, first: tuple[int, bytes]) -> None:
    script.answers = [first, (200, b"{}")]
    assert _router(script).call("get_job", {"request_id": "r"}, PATIENCE_S) == {}
    assert [body for _, body, _ in script.asked] == [b'{"request_id": "r"}'] * 2


@pytest.mark.parametrize(
    ("status", "body", "lost"),
    [
        (409, _error("lease_lost", False), True),
        (404, _error("unknown_job", False), True),
        (404, _error("unknown_queue", False), False),
        (401, _error("bad_token", False), False),
        (403, _error("forbidden", False), False),
        (404, b"<html>not found</html>", False),
        (409, b"<html>conflict</html>", False),
    ],
)
def test_a_refusal_is_final_and_says_whether_the_job_is_lost(
    script: Script, status: int, body: bytes, lost: bool
) -> None:
    script.answers = [(status, body)]
    with pytest.raises(RefusedError) as caught:
        _router(script).call("report", {}, PATIENCE_S)
    assert (caught.value.status, caught.value.lost) == (status, lost)
    assert len(script.asked) == 1


def test_a_redirect_is_not_followed_with_the_token(script: Script) -> None:
    script.headers = {"Location": f"{script.url}/elsewhere"}
    script.answers = [(302, b"")]
    with pytest.raises(RefusedError):
        _router(script).call("get_job", {}, PATIENCE_S)
    assert [path for path, _, _ in script.asked] == ["/v1/get_job"]


def test_a_renewed_token_is_used_at_once(script: Script) -> None:
    script.answers = [(200, b"{}")]
    tokens = iter(["old", "new"])
    router = Router(script.url, lambda: next(tokens))
    for _ in range(2):
        router.call("heartbeat", {}, PATIENCE_S)
    assert [authorization for _, _, authorization in script.asked] == ["Bearer old", "Bearer new"]


def test_nobody_there_is_given_up_within_the_patience() -> None:
    router, begun = Router(f"http://127.0.0.1:{free_ports(1)}", lambda: "t"), time.monotonic()
    with pytest.raises(UnreachableError):
        router.call("get_job", {}, 0.6)
    assert time.monotonic() - begun < 5


def test_a_wait_longer_than_the_patience_is_not_begun(script: Script) -> None:
    script.answers = [(503, _error("busy", True, "3600"))]
    with pytest.raises(UnreachableError):
        _router(script).call("get_job", {}, PATIENCE_S)
    assert len(script.asked) == 1
