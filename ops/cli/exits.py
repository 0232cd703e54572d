"""Exit codes of the command line."""

from typing import Final

from culm.errors import CulmError

FAILED: Final = 1
USAGE: Final = 2
NOT_FOUND: Final = 3
UNAVAILABLE: Final = 4
REFUSED: Final = 5
FINDINGS: Final = 6
INTERRUPTED: Final = 130

EPILOG: Final = (
    "Exit codes: 0 done, 1 failed, 2 wrong use, 3 not found, 4 unavailable, or not all shards answered (try again), "
    "5 refused, 6 the audit found something, 130 interrupted."
)
_BY_STATUS: Final = {400: USAGE, 401: REFUSED, 403: REFUSED, 404: NOT_FOUND, 409: REFUSED, 503: UNAVAILABLE}


def of(error: CulmError) -> int:
    """The exit code of an error."""
    return INTERRUPTED if error.code == "interrupted" else _BY_STATUS.get(error.http_status, FAILED)
