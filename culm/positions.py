"""Places in a list of jobs with the newest first: when a job was submitted, and its id among those of the same time."""

from typing import Final

from culm.errors import ClientFault
from culm.ids import MAX_JOB_ID
from culm.wire import MAX_TIME, JobRow

Position = tuple[int, int]
"""Submitted at, unix time in microseconds; id."""
_MICROSECONDS: Final = 1_000_000
START: Final[Position] = (MAX_TIME * _MICROSECONDS, MAX_JOB_ID)
"""Before the newest."""


def position(job: JobRow) -> Position:
    """Where a job is. Times of the wire are whole microseconds, which its floats hold without loss until 2255."""
    return round(job.created_at * _MICROSECONDS), job.id


def words_of(place: Position) -> str:
    """As `JobsQuery.before` says it."""
    return f"{place[0]}.{place[1]}"


def position_of(words: str) -> Position:
    """What `words_of` wrote. Raises ClientFault(bad_request)."""
    at, _, identifier = words.partition(".")
    if not (at.isdecimal() and identifier.isdecimal()):
        raise ClientFault("bad_request", f"{words[:40]!r} is no place in a list: pass on what the page before told")
    return min((int(at), int(identifier)), START)
