"""What was looked at and what is to be said of it."""

from typing import Literal

import msgspec


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the doctor's report. `advice` says what to do; a good one needs none."""

    name: str
    level: Literal["ok", "warn", "bad"] = "ok"
    text: str
    advice: str = ""
