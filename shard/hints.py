"""The words of dispatch inside a shard: a class of a slot, and a hint that a job of it is ready."""

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
