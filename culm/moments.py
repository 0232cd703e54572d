"""Moments as people write them: `90s`, `15m`, `2h`, `3d` ago, or a date with or without a time (UTC unless it says)."""

import math
import re
from datetime import UTC, datetime
from typing import Final

from culm.errors import ClientFault
from culm.wire import MAX_TIME

_AGO: Final = re.compile(r"(\d{1,6})([smhdw])", re.ASCII)
_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def moment(text: str, now: float) -> float:
    """Unix time, 0..MAX_TIME. Raises ClientFault(bad_time)."""
    text = text.strip()
    ago = _AGO.fullmatch(text)
    if ago is not None:
        return max(0.0, now - int(ago[1]) * _UNITS[ago[2]])
    try:
        at = datetime.fromisoformat(text)
        unix = (at if at.tzinfo is not None else at.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        unix = math.nan
    if not 0 <= unix <= MAX_TIME:
        raise ClientFault("bad_time", f"{text[:40]!r} is no time: write 15m, 2h, 3d (ago) or 2026-11-25T13:00 (UTC)")
    return unix
