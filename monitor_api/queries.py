"""What a query string says, by its types: for the JSON answers and for the pages."""

from collections.abc import Mapping
from typing import Annotated, Final, TypeVar

import msgspec
from msgspec import Meta

from culm.errors import ClientFault

ERROR_HOURS: Final = 24
PILE_UP_HOURS: Final = 6
"""So far back is looked unless another time is asked for."""

S = TypeVar("S", bound=msgspec.Struct)


class PilotsQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which pilots are asked for."""

    site: str = ""
    minutes: Annotated[int, Meta(ge=1, le=1440)] = 60
    """Those that asked in the last so many."""
    limit: Annotated[int, Meta(ge=1, le=1000)] = 200


def hours_of(query: Mapping[str, str], default: int) -> int:
    """The hours that are asked for. Raises ClientFault(bad_hours)."""
    text = query.get("hours", str(default))
    if not text.isdecimal() or len(text) > 6:
        raise ClientFault("bad_hours", f"{text[:20]!r} is not a number of hours")
    return int(text)


def query_of(query: Mapping[str, str], kind: type[S]) -> S:
    """A query by its type. Raises ClientFault(bad_request)."""
    try:
        return msgspec.convert(dict(query), kind, strict=False)
    except msgspec.ValidationError as error:
        raise ClientFault("bad_request", str(error)) from None


def filled(query: Mapping[str, str]) -> dict[str, str]:
    """A form sends every field; those that were left empty are as by default."""
    return {name: value for name, value in query.items() if value}
