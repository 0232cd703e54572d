"""The router as the pilot sees it: JSON over HTTP, every call repeated until it is answered or refused."""

import json
import random
import time
import urllib.error
import urllib.request
from typing import Any

TIMEOUT_S = 15.0
FIRST_PAUSE_S = 0.5
MAX_PAUSE_S = 60.0


class RefusedError(Exception):
    """The router said no, and will again: status, code and message."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.status = status
        self.code = code


class UnreachableError(Exception):
    """No answer in the time that the caller had."""


class Router:
    """One router and one token.

    Args:
        url: e.g. http://127.0.0.1:25080
        token: without "Bearer".
    """

    def __init__(self, url: str, token: str) -> None:
        self._url = url.rstrip("/")
        self._token = token

    def call(self, verb: str, message: dict[str, Any], patience_s: float, wait_s: float = 0.0) -> dict[str, Any]:
        """Ask; again with the same body, after a jittered pause, while that may help and there is time.

        Raises RefusedError, and UnreachableError after `patience_s` seconds. Safe to retry: yes, every verb is.
        """
        deadline, pause_s = time.monotonic() + patience_s, FIRST_PAUSE_S
        while True:
            try:
                return self._once(verb, message, TIMEOUT_S + wait_s)
            except _TryAgainError as error:
                pause = max(error.after_s, pause_s) * random.uniform(1.0, 1.5)  # noqa: S311  # spreads load, no secret
                if time.monotonic() + pause > deadline:
                    raise UnreachableError(str(error)) from None
            time.sleep(pause)
            pause_s = min(pause_s * 2, MAX_PAUSE_S)

    def _once(self, verb: str, message: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{self._url}/v1/{verb}",
            data=json.dumps(message).encode(),
            headers={"Content-Type": "application/json", "Authorization": f"Bearer {self._token}"},
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as answer:
                decoded = json.loads(answer.read())
        except urllib.error.HTTPError as error:
            raise _of(error.code, error.read()) from None
        except (OSError, ValueError) as error:
            raise _TryAgainError(f"{type(error).__name__}: {error}") from None
        if not isinstance(decoded, dict):
            raise _TryAgainError("the answer is no object")
        return decoded


class _TryAgainError(Exception):
    def __init__(self, message: str, after_s: float = 0.0) -> None:
        super().__init__(message)
        self.after_s = after_s


def _of(status: int, body: bytes) -> Exception:
    try:
        told = json.loads(body)["error"]
        code, message = str(told["code"]), str(told["message"])
        retryable, after_s = bool(told["retryable"]), float(told.get("retry_after_s") or 0.0)
    except (ValueError, KeyError, TypeError):
        code, message, retryable, after_s = "bad_answer", f"HTTP {status}", status >= 500, 0.0
    return _TryAgainError(f"{code}: {message}", after_s) if retryable else RefusedError(status, code, message)
