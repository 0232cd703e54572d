"""The errors that cross a process boundary: a code, a message, whether to try again, and the HTTP status.

Foreign exceptions (driver, Redis, sockets) are mapped to these in one table per boundary; nothing else leaves a
process. Four kinds: the caller erred (ClientFault), the state of a job or slot forbids it (Conflict), the service
cannot answer now (Unavailable), we erred (Bug).
"""

from typing import Any


class CulmError(Exception):
    """The base: `code` is stable and for programs, `message` is for people."""

    http_status = 500
    retryable = False

    def __init__(
        self,
        code: str,
        message: str,
        *,
        http_status: int | None = None,
        retry_after_s: float | None = None,
        details: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s
        self.details = details or {}
        if http_status is not None:
            self.http_status = http_status


class ClientFault(CulmError):
    """The request is wrong and stays wrong: 400, or 401, 403, 404, 413, 415 where that says more."""

    http_status = 400


class Conflict(CulmError):
    """The request was right once: a stale attempt, a key reused for another body. 409, nothing was changed."""

    http_status = 409


class Moved(CulmError):
    """The slot is not served here at this epoch. Routers refresh and ask again. Details: slot, epoch."""

    http_status = 503
    retryable = True

    def __init__(self, slot: int, epoch: int) -> None:
        super().__init__(
            "moved", f"slot {slot} is not open here", retry_after_s=0.2, details={"slot": slot, "epoch": epoch}
        )


class Unavailable(CulmError):
    """No answer now, the outcome may be unknown: repeat the same request after `retry_after_s`. 503."""

    http_status = 503
    retryable = True

    def __init__(
        self, code: str, message: str, *, retry_after_s: float = 1.0, details: dict[str, Any] | None = None
    ) -> None:
        super().__init__(code, message, retry_after_s=retry_after_s, details=details)


class Bug(CulmError):
    """An invariant of ours did not hold. 500, not retryable, always logged."""

    def __init__(self, message: str) -> None:
        super().__init__("internal", message)
