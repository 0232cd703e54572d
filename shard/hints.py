"""The words of dispatch inside a shard: a class of a slot, and a hint that a job of it is ready."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class ClassKey(NamedTuple):
    """One requirement class of one slot."""

    slot: int
    class_id: int


class Hint(NamedTuple):
    """A job that is believed to be ready. Sorts in the order of dispatch: best rank, then oldest id."""

    ranking: int
    """Minus the priority."""
    id: int
    key: ClassKey


Tell = Callable[[Sequence[Hint]], Awaitable[None]]


@dataclass(frozen=True)
class Notices:
    """How a use case tells dispatch what it has committed."""

    announce: Tell
    """These jobs became ready."""
    withdraw: Tell
    """These ceased to be ready, by another way than a claim."""
