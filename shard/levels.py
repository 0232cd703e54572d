"""What there is now, for the gauges: jobs by state, the queues of the sites, the pilots that ask.

Looked up every few seconds and not when somebody scrapes, so that it costs the same however many do. From the tallies
and by the primary key of `ready`: it costs the same however many jobs there are.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Final

from culm.ids import id_range
from culm.places import UNPLACED, place
from culm.states import State
from culm.topology import Topology
from shard.askers import Askers
from shard.database import Database, Row, Transaction
from shard.metrics import JOBS, PILOTS_SEEN, QUEUE_DEPTH, QUEUE_OLDEST
from shard.ownership import Ownership

LOOK_S: Final = 5.0
SLOTS_PER_STATEMENT: Final = 100
_MICROSECONDS: Final = 1_000_000

_JOBS: Final = {state: JOBS.labels(state) for state in State}


class Levels:
    """The gauges of one shard."""

    def __init__(
        self, database: Database, ownership: Ownership, askers: Askers, topology: Callable[[], Topology]
    ) -> None:
        self._database = database
        self._ownership = ownership
        self._askers = askers
        self._topology = topology
        self._depth = _OfSites(QUEUE_DEPTH)
        self._oldest = _OfSites(QUEUE_OLDEST)
        self._pilots = _OfSites(PILOTS_SEEN)

    async def turn(self) -> None:
        """One turn of a background loop. Raises Unavailable. Safe to retry: yes."""
        topology, opened = self._topology(), sorted(self._ownership.open)
        of_states: Counter[str] = Counter()
        ready: Counter[int] = Counter()
        for slot, state, _vo, n_jobs in await self._database.run("read", lambda tx: tx.fetch("counts")):
            if slot in self._ownership.open:
                of_states[state] += int(n_jobs)
                ready[slot] += int(n_jobs) if state == State.ACTIVATED else 0
        for state, gauge in _JOBS.items():
            gauge.set(of_states[state])
        waited = await self._waited([slot for slot in opened if ready[slot] > 0])
        depth: Counter[str] = Counter()
        oldest: dict[str, float] = {}
        for slot in opened:
            _, site = place(topology, slot)
            depth[site] += ready[slot]
            oldest[site] = max(oldest.get(site, 0.0), waited.get(slot, 0.0))
        self._depth.set(depth)
        self._oldest.set(oldest)
        self._pilots.set(self._seen(topology))

    def _seen(self, topology: Topology) -> Mapping[str, float]:
        seen: Counter[str] = Counter()
        for queue in self._askers.queues():
            seen[topology.site_of_queue.get(queue, UNPLACED)] += self._askers.n_pilots(queue)
        return seen

    async def _waited(self, slots: list[int]) -> dict[int, float]:
        """How long the job with the lowest number of each slot has been ready, seconds."""
        found: dict[int, float] = {}
        for start in range(0, len(slots), SLOTS_PER_STATEMENT):
            some = slots[start : start + SLOTS_PER_STATEMENT]
            rows = await self._database.run("read", partial(_read_oldest, slots=some))
            found |= {slot: max(0, waited) / _MICROSECONDS for slot, waited in rows}
        return found


class _OfSites:
    """A gauge by site; a site that is here no more is shown no more."""

    def __init__(self, gauge: Any) -> None:
        self._gauge = gauge
        self._shown: set[str] = set()

    def set(self, values: Mapping[str, float]) -> None:
        for site in self._shown - values.keys():
            self._gauge.remove(site)
        for site, value in values.items():
            self._gauge.labels(site).set(value)
        self._shown = set(values)


async def _read_oldest(tx: Transaction, slots: Iterable[int]) -> list[Row]:
    return await tx.fetch_rows("oldest_ready", [id_range(slot) for slot in slots])
