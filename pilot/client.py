"""The router as the pilot sees it: JSON over HTTP, every call repeated until it is answered or refused."""

import http.client
import json
import random
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

TIMEOUT_S = 15.0
FIRST_PAUSE_S = 0.5
MAX_PAUSE_S = 30.0
MAX_ANSWER_BYTES = 16 << 20
BAD_ANSWER = "bad_answer"
"""Not the router itself said it: a proxy in front of it, or another server."""
_BUSY = {408, 429}


class RefusedError(Exception):
    """The router said no, and will again: status, code and message."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.status = status
        self.code = code

    @property
    def lost(self) -> bool:
        """Whether it says that the job is not ours any more, or never was."""
        return self.code == "unknown_job" or (self.status == 409 and self.code != BAD_ANSWER)

    @property
    def malformed(self) -> bool:
        """Whether it says that the message itself is wrong."""
        return self.status == 400 and self.code != BAD_ANSWER


class UnreachableError(Exception):
    """No answer in the time that the caller had."""


class Router:
    """One router and one token.

    Args:
        url: e.g. http://127.0.0.1:25080
        token: the token now, without "Bearer"; asked at every call, for a site renews it. It may raise OSError.
        ca_file: PEM of the certificate authority of an https URL; "" for the system's. May raise OSError.
    """

    def __init__(self, url: str, token: Callable[[], str], ca_file: str = "") -> None:
        self._url = url.rstrip("/")
        self._token = token
        # A redirect would take the token to wherever it points.
        context = ssl.create_default_context(cafile=ca_file or None)
        self._open = urllib.request.build_opener(_NoRedirect, urllib.request.HTTPSHandler(context=context)).open

    def call(
        self, verb: str, message: dict[str, Any], patience_s: float, timeout_s: float = TIMEOUT_S
    ) -> dict[str, Any]:
        """Ask; again with the same body, after a jittered pause, while that may help and there is time.

        Raises RefusedError, and UnreachableError after about `patience_s` seconds; one try takes at most `timeout_s`.
        Safe to retry: yes, every verb is.
        """
        deadline, pause_s = time.monotonic() + patience_s, FIRST_PAUSE_S
        while True:
            try:
                return self._once(verb, message, timeout_s)
            except _TryAgainError as error:
                pause = max(error.after_s, pause_s) * random.uniform(1.0, 1.5)  # noqa: S311  # spreads load, no secret
                if time.monotonic() + pause > deadline:
                    raise UnreachableError(str(error)) from None
            time.sleep(pause)
            pause_s = min(pause_s * 2, MAX_PAUSE_S)

    def _once(self, verb: str, message: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        try:
            request = urllib.request.Request(
                f"{self._url}/v1/{verb}",
                data=json.dumps(message).encode(),
                headers={"Content-Type": "application/json", "Authorization": f"Bearer {self._token()}"},
            )
            with self._open(request, timeout=timeout_s) as answer:
                decoded = json.loads(answer.read(MAX_ANSWER_BYTES))
        except urllib.error.HTTPError as error:
            raise _refusal(error) from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise _TryAgainError(f"{type(error).__name__}: {error}") from None
        if not isinstance(decoded, dict):
            raise _TryAgainError("the answer is no object")
        return decoded


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


class _TryAgainError(Exception):
    def __init__(self, message: str, after_s: float = 0.0) -> None:
        super().__init__(message)
        self.after_s = after_s


def _refusal(error: urllib.error.HTTPError) -> Exception:
    with error:
        try:
            body = error.read(MAX_ANSWER_BYTES)
        except (OSError, http.client.HTTPException) as cut:
            return _TryAgainError(f"HTTP {error.code}, and then {type(cut).__name__}")
    return _of(error.code, body)


def _of(status: int, body: bytes) -> Exception:
    try:
        told = json.loads(body)["error"]
        code, message = str(told["code"]), str(told["message"])
        # In this order NaN, which JSON may hold and no sleep takes, becomes 0.
        retryable, after_s = bool(told["retryable"]), max(0.0, float(told.get("retry_after_s") or 0.0))
    except (ValueError, KeyError, TypeError):
        code, message, retryable, after_s = BAD_ANSWER, f"HTTP {status}", status >= 500 or status in _BUSY, 0.0
    return _TryAgainError(f"{code}: {message}", after_s) if retryable else RefusedError(status, code, message)
