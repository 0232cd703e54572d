"""A page of jobs over all shards: what the router and the monitor answer alike."""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import msgspec

from culm import access
from culm.errors import ClientFault, CulmError
from culm.positions import position, position_of, words_of
from culm.shard_links import ShardLinks
from culm.topology import SLOT_BLOCKS, Topology
from culm.wire import JobsAnswer, JobsQuery, Principal, ShardJobs

T = TypeVar("T")


class Resolve(Protocol):
    """What a function finds in the topology, after a look for a newer one where it finds nothing."""

    def __call__(self, find: Callable[[Topology], T], /) -> T:
        """Raises as `find`."""
        ...


async def merged_jobs(
    resolve: Resolve, links: ShardLinks, principal: Principal, query: JobsQuery, deadline_s: float
) -> JobsAnswer:
    """A page over all shards that the filters leave, in the order that was asked for; stable while jobs come and go.

    It may be short while more is to come: a shard looks at a bounded number of rows. What a missing shard has is
    missing from the walk too. The caller has checked the role.

    Raises ClientFault (unknown_site, unknown_region, bad_target, bad_request). Safe to retry: yes.
    """
    _check_cursor(query)
    if query.owner and access.authority_of(query.owner) not in SLOT_BLOCKS:
        query = msgspec.structs.replace(query, owner=f"{principal.authority}:{query.owner}")
    calls = list(resolve(lambda topology: _calls_of_query(topology, principal, query)).items())
    answers = await links.ask_many(calls, "jobs", JobsAnswer, deadline_s)
    missing = [shard for (shard, _), answer in zip(calls, answers, strict=True) if isinstance(answer, CulmError)]
    pages = [answer for answer in answers if not isinstance(answer, CulmError)]
    return _newest(pages, query.limit, missing) if query.order == "newest" else _by_id(pages, query.limit, missing)


def _check_cursor(query: JobsQuery) -> None:
    """Raises ClientFault(bad_request)."""
    if query.order == "newest" and query.after:
        raise ClientFault("bad_request", '`after` goes with the order "id"; the newest first go on with `before`')
    if query.order == "id" and query.before:
        raise ClientFault(
            "bad_request", '`before` goes with the order "newest"; the order of the id goes on with `after`'
        )
    if query.before:
        position_of(query.before)


def _by_id(pages: Sequence[JobsAnswer], limit: int, missing: list[str]) -> JobsAnswer:
    # Beyond the smallest `next` some shard has not looked yet.
    known_to = min((page.next for page in pages if page.next is not None), default=None)
    merged = sorted((row for page in pages for row in page.jobs), key=lambda row: row.id)
    whole = [row for row in merged if known_to is None or row.id <= known_to]
    if len(whole) > limit:
        whole = whole[:limit]
        known_to = whole[-1].id
    return JobsAnswer(jobs=whole, next=known_to, missing_shards=missing)


def _newest(pages: Sequence[JobsAnswer], limit: int, missing: list[str]) -> JobsAnswer:
    # Before the latest `before` some shard has not looked yet.
    known_to = max((position_of(page.before) for page in pages if page.before is not None), default=None)
    merged = sorted((row for page in pages for row in page.jobs), key=position, reverse=True)
    whole = [row for row in merged if known_to is None or position(row) >= known_to]
    if len(whole) > limit:
        whole = whole[:limit]
        known_to = position(whole[-1])
    return JobsAnswer(jobs=whole, before=words_of(known_to) if known_to is not None else None, missing_shards=missing)


def _calls_of_query(topology: Topology, principal: Principal, query: JobsQuery) -> dict[str, ShardJobs]:
    """By shard. A site's jobs are those that wait in its slots, and those of its region that ran there."""
    queues: list[str] = []
    also: list[int] = []
    if query.site:
        site = topology.site(query.site)
        if query.region not in ("", site.region):
            raise ClientFault("bad_target", f"site {query.site} belongs to region {site.region}, not to {query.region}")
        slots = list(site.slots)
        queues, also = sorted(site.queues), [topology.region(site.region).slot]
    elif query.region:
        region = topology.region(query.region)
        slots = [
            region.slot,
            *(s for site in topology.sites.values() if site.region == query.region for s in site.slots),
        ]
    else:
        return {shard: ShardJobs(principal=principal, query=query) for shard in topology.shards}
    calls: dict[str, ShardJobs] = {}
    for wanted, kind in ((slots, "slots"), (also if queues else [], "also")):
        for slot in wanted:
            call = calls.setdefault(
                topology.place(slot).shard,
                ShardJobs(principal=principal, query=query, slots=[], also=[], queues=queues),
            )
            getattr(call, kind).append(slot)
    return calls
