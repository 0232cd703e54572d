"""What the cells of `culm bench` are measured on, and how much of everything."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Protocol

from loadtest.bench.rig import Bed


class Beds(Protocol):
    """What can be measured on; each is started when it is first asked for, and stays."""

    async def ours(self) -> Bed:
        """Router, one shard."""
        ...

    async def fresh(
        self, name: str, *, n_shards: int = 1, environment: Mapping[str, str] = MappingProxyType({})
    ) -> Bed:
        """A new one, with further shards in regions MORE1, MORE2..; it ends with its cell."""
        ...

    async def naive(self) -> Bed:
        """The naive build, by its router."""
        ...

    async def naive_shard(self) -> Bed:
        """The naive build's shard, asked directly."""
        ...

    async def echo(self) -> Bed:
        """The echo, one process."""
        ...

    def user(self, bed: Bed, number: int) -> str:
        """The token of one of many users."""
        ...

    async def flush(self, bed: Bed) -> None:
        """Empty its dispatch queue."""
        ...


@dataclass(frozen=True)
class Sizes:
    """How much of everything; `quick` is for a look, not for a figure to be told."""

    jobs: int = 8000
    few: int = 2000
    """Jobs of a variant that is slow."""
    backlog: int = 1_000_000
    churn: int = 1_000_000
    parked: int = 10_000
    huge: int = 10_000_000


QUICK: Final = Sizes(jobs=3000, few=800, backlog=50_000, churn=20_000, parked=1000, huge=200_000)
