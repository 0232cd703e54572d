"""What the monitor asks of all shards at once: the use cases behind its JSON answers and its pages."""

from collections.abc import Iterable
from functools import partial
from typing import Final, TypeVar

import msgspec

from culm import access, clock
from culm.errors import ClientFault, CulmError
from culm.ids import slot_of
from culm.merged_jobs import merged_jobs
from culm.shard_links import ShardLinks
from culm.topology_store import TopologyCache
from culm.wire import (
    CountsAnswer,
    ErrorsAnswer,
    JobsAnswer,
    JobsQuery,
    JobView,
    PileUpsAnswer,
    PilotsAnswer,
    Principal,
    ShardCounts,
    ShardCountsAnswer,
    ShardErrors,
    ShardErrorsAnswer,
    ShardJob,
    ShardPileUps,
    ShardPileUpsAnswer,
    ShardPilots,
    ShardPilotsAnswer,
    ShardsAnswer,
    WhyAnswer,
)
from monitor_api.merge import Heard, merge, merge_errors, merge_pile_ups, merge_pilots, merge_shards
from monitor_api.metrics import STALE
from monitor_api.queries import PilotsQuery

MAX_HOURS: Final = 24 * 30

A = TypeVar("A", bound=msgspec.Struct)


class Views:
    """Every view has a deadline; a shard that gives no answer in time is named, and shown as last heard."""

    def __init__(self, topology: TopologyCache, links: ShardLinks, deadline_s: float) -> None:
        self._topology = topology
        self._links = links
        self._deadline_s = deadline_s
        self._clock = clock.SystemClock()
        self._heard: dict[str, Heard] = {}
        self._known_since: dict[str, float] = {}

    async def listen(self) -> None:
        """One turn of a background loop: hear all shards, so that what is shown of one that falls silent is not old."""
        await self._ask_counts()
        shards = self._topology.current.shards
        for gone in self._known_since.keys() - shards.keys():
            del self._known_since[gone]
            STALE.remove(gone)
        for shard in shards.keys() - self._known_since.keys():
            self._known_since[shard] = self._clock.monotonic()
            STALE.labels(shard).set_function(partial(self._stale_s, shard))

    def _stale_s(self, shard: str) -> float:
        # Worked out when it is scraped: it must grow, too, when this loop stands still.
        heard = self._heard.get(shard)
        return self._clock.monotonic() - (heard.at if heard is not None else self._known_since.get(shard, 0.0))

    async def counts(self, who: Principal) -> CountsAnswer:
        """Jobs by state, region, site and VO. Raises ClientFault(forbidden). Safe to retry: yes."""
        access.require_role(who, "user", "admin")
        missing = await self._ask_counts(who.account if who.role == "user" else "")
        return merge(self._topology.current, self._heard, missing, self._clock.monotonic(), who)

    async def shards(self, who: Principal) -> ShardsAnswer:
        """All shards, and which of them answer. Raises ClientFault(forbidden). Safe to retry: yes."""
        access.require_role(who, "user", "admin")
        missing = await self._ask_counts()
        return merge_shards(self._topology.current, self._heard, missing, self._clock.monotonic())

    async def errors(self, who: Principal, hours: int) -> ErrorsAnswer:
        """Errors by (plane, code, site) of the last hours.

        Raises ClientFault (forbidden, bad_hours). Safe to retry: yes.
        """
        access.require_role(who, "user", "admin")
        if not 1 <= hours <= MAX_HOURS:
            raise ClientFault("bad_hours", f"hours are 1 to {MAX_HOURS}")
        call = ShardErrors(principal=who, hours=hours)
        heard, missing = await self._ask_all(self._topology.current.shards, call, "errors", ShardErrorsAnswer)
        return ErrorsAnswer(hours=hours, errors=merge_errors(self._topology.current, heard), missing_shards=missing)

    async def pile_ups(self, who: Principal, hours: int) -> PileUpsAnswer:
        """Which state grows where against the last hours, with the likely cause; a user's by the jobs of his VO.

        Raises ClientFault (forbidden, bad_hours). Safe to retry: yes.
        """
        access.require_role(who, "user", "admin")
        if not 1 <= hours <= MAX_HOURS:
            raise ClientFault("bad_hours", f"hours are 1 to {MAX_HOURS}")
        call = ShardPileUps(principal=who, hours=hours)
        heard, missing = await self._ask_all(self._topology.current.shards, call, "pile_ups", ShardPileUpsAnswer)
        return PileUpsAnswer(
            hours=hours,
            pile_ups=merge_pile_ups(self._topology.current, heard),
            n_samples={answer.shard: answer.n_samples for answer in heard},
            missing_shards=missing,
        )

    async def pilots(self, who: Principal, query: PilotsQuery) -> PilotsAnswer:
        """Who asked for work lately; of a site: for its computing queues. A user's may take jobs of his VO.

        Raises ClientFault (forbidden, unknown_site). Safe to retry: yes.
        """
        access.require_role(who, "user", "admin")
        topology, queues = self._topology.current, None
        shards = list(topology.shards)
        if query.site:
            site = topology.site(query.site)
            queues = sorted(site.queues)
            slots = [*site.slots, topology.region(site.region).slot]
            shards = list(dict.fromkeys(topology.place(slot).shard for slot in slots))
        call = ShardPilots(principal=who, since_s=60.0 * query.minutes, limit=query.limit, queues=queues)
        heard, missing = await self._ask_all(shards, call, "pilots", ShardPilotsAnswer)
        merged = merge_pilots(topology, heard, query.limit)
        return msgspec.structs.replace(merged, missing_shards=missing)

    async def jobs(self, who: Principal, query: JobsQuery) -> JobsAnswer:
        """A page of jobs. Raises ClientFault (forbidden, unknown_site, unknown_region). Safe to retry: yes."""
        access.require_role(who, "user", "admin")
        return await merged_jobs(lambda find: find(self._topology.current), self._links, who, query, self._deadline_s)

    async def job(self, who: Principal, identifier: int) -> JobView:
        """One job with its history. Raises ClientFault (forbidden, unknown_job, unknown_slot), Unavailable."""
        access.require_role(who, "user", "admin")
        place, call = self._call(who, identifier)
        return await self._links.ask(place, "job", call, JobView, self._deadline_s)

    async def why(self, who: Principal, identifier: int) -> WhyAnswer:
        """Why a job is not running. Raises as `job`."""
        access.require_role(who, "user", "admin")
        place, call = self._call(who, identifier)
        return await self._links.ask(place, "why", call, WhyAnswer, self._deadline_s)

    def _call(self, who: Principal, identifier: int) -> tuple[str, ShardJob]:
        topology, slot = self._topology.current, slot_of(identifier)
        return topology.place(slot).shard, ShardJob(at=topology.slot(slot), principal=who, id=identifier)

    async def _ask_all(
        self, shards: Iterable[str], call: msgspec.Struct, verb: str, kind: type[A]
    ) -> tuple[list[A], list[str]]:
        """The same of several shards: what they say, and who gave no answer."""
        names = list(shards)
        answers = await self._links.ask_many([(name, call) for name in names], verb, kind, self._deadline_s)
        heard = [answer for answer in answers if not isinstance(answer, CulmError)]
        missing = [name for name, answer in zip(names, answers, strict=True) if isinstance(answer, CulmError)]
        return heard, sorted(missing)

    async def _ask_counts(self, account: str = "") -> list[str]:
        """Ask all, remember what they say; who gave no answer."""
        topology = self._topology.current
        names = list(topology.shards)
        answers = await self._links.ask_many(
            [(name, ShardCounts(account=account)) for name in names], "counts", ShardCountsAnswer, self._deadline_s
        )
        missing = []
        for name, answer in zip(names, answers, strict=True):
            if isinstance(answer, CulmError):
                missing.append(name)
            else:
                self._heard[name] = Heard(answer, self._clock.monotonic())
        for gone in self._heard.keys() - topology.shards.keys():
            del self._heard[gone]
        return missing
