"""Where jobs pile up: the samples are judged (`growth`), and what the likely causes need is looked up."""

import asyncio
from typing import Final

from culm import access
from culm.ids import id_range
from culm.states import State
from culm.topology import Topology
from culm.wire import ShardPileUps, ShardPileUpsAnswer, SlotPileUp
from shard.database import Database
from shard.growth import Evidence, cause, growing
from shard.samples import HOUR_S, Samples
from shard.why import Why

MAX_PILE_UPS: Final = 50
MAX_LEASES: Final = 500
"""Leases of a slot that are looked at."""
KNOWN_S: Final = 20.0
MAX_KNOWN: Final = 2000
"""What was found for a cause is good for so long; so many are remembered."""


class PileUps:
    """The use case."""

    def __init__(self, database: Database, samples: Samples, why: Why) -> None:
        self._database = database
        self._samples = samples
        self._why = why
        self._looking = asyncio.Lock()
        self._known: dict[tuple[int, State, str | None], tuple[float, Evidence]] = {}
        """By slot, state and VO (None: of all), when it was looked up and what was found."""

    async def judge(self, topology: Topology, shard: str, call: ShardPileUps) -> ShardPileUpsAnswer:
        """The states that grow, the most jobs above the usual first; judged by the jobs that the caller may read.

        Raises ClientFault(forbidden), Unavailable. Safe to retry: yes.
        """
        access.require_role(call.principal, "user", "admin")
        window, levels = await self._samples.compare(call)
        found = [(slot, grown) for slot, of_slot in levels.items() for grown in growing(of_slot, window)]
        found.sort(key=lambda one: (-one[1].n_above, one[0], one[1].state))
        told = []
        for slot, grown in found[:MAX_PILE_UPS]:
            seen = await self._evidence(topology, call, (slot, grown.state), window.now)
            why = cause(grown, levels[slot], window, seen)
            told.append(
                SlotPileUp(
                    slot=slot,
                    state=grown.state,
                    n_jobs=grown.n_jobs,
                    n_usual=grown.n_usual,
                    n_before=grown.n_before,
                    cause=why.code,
                    text=why.text,
                    example=why.example,
                )
            )
        return ShardPileUpsAnswer(shard=shard, n_samples=window.n_samples, pile_ups=told)

    async def _evidence(self, topology: Topology, call: ShardPileUps, where: tuple[int, State], now: float) -> Evidence:
        """One reader looks at a time, and not again for what was looked up lately: to reload a page costs little."""
        vo = call.principal.vo if call.principal.role == "user" else None
        async with self._looking:
            known = self._known.get((*where, vo))
            if known is None or known[0] < now - KNOWN_S:
                known = now, await self._look(topology, call, *where, now)
                self._known[*where, vo] = known
                if len(self._known) > MAX_KNOWN:
                    self._known.pop(next(iter(self._known)))
            return known[1]

    async def _look(self, topology: Topology, call: ShardPileUps, slot: int, state: State, now: float) -> Evidence:
        of_vo = (int(call.principal.role == "user"), call.principal.vo)
        match state:
            case State.ACTIVATED:
                return Evidence(asking=await self._why.asking(topology, slot, call.principal))
            case State.STARTING | State.RUNNING:
                some = (*id_range(slot), MAX_LEASES, state, *of_vo)
                [(n_leases, n_silent)] = await self._database.run("user", lambda tx: tx.fetch("silent_leases", *some))
                return Evidence(n_leases=n_leases, n_silent=int(n_silent))
            case State.FAILED:
                lately = (int(now) // HOUR_S - 1, slot, *of_vo)
                rows = await self._database.run("user", lambda tx: tx.fetch("slot_errors", *lately))
                return Evidence(error=(rows[0][0], rows[0][1], int(rows[0][2]), rows[0][3]) if rows else None)
            case _:
                return Evidence()
