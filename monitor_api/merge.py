"""The merged views: pure. What shards said of their slots becomes counts and errors by region, site, state and VO."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from culm.states import FINAL
from culm.topology import Topology
from culm.wire import (
    CountsAnswer,
    ErrorRow,
    Principal,
    ShardCountsAnswer,
    ShardErrorsAnswer,
    ShardRow,
    ShardsAnswer,
    SlotCount,
)

UNPLACED: Final = "(not in the topology)"
REGION_ONLY: Final = "(any site of {region})"
MAX_OWNERS: Final = 100


@dataclass(frozen=True)
class Heard:
    """A shard's last answer, and when it came on the monitor's monotonic clock, seconds."""

    answer: ShardCountsAnswer
    at: float


def merge(
    topology: Topology, heard: Mapping[str, Heard], missing: list[str], now: float, who: Principal
) -> CountsAnswer:
    """One view of all shards (invariant I11): a shard that did not answer is named and shown as last heard.

    Args:
        topology: gives slots their sites and regions.
        heard: per shard what it last said; one that never answered is absent.
        missing: the shards that gave no answer this time.
        now: on the clock of `Heard.at`.
        who: asks; a user is shown the jobs of his VO, and of accounts his own.
    """
    total: Counter[str] = Counter()
    by_region: dict[str, Counter[str]] = {}
    by_site: dict[str, Counter[str]] = {}
    by_vo: dict[str, Counter[str]] = {}
    owners: Counter[str] = Counter()
    archived: Counter[str] = Counter()
    for one in heard.values():
        for count in one.answer.counts:
            if who.role == "user" and count.vo != who.vo:
                continue
            region, site = place(topology, count.slot)
            total[count.state] += count.n_jobs
            by_region.setdefault(region, Counter())[count.state] += count.n_jobs
            by_site.setdefault(site, Counter())[count.state] += count.n_jobs
            by_vo.setdefault(count.vo, Counter())[count.state] += count.n_jobs
        for count in one.answer.archived:
            if who.role != "user" or count.vo == who.vo:
                archived[count.state] += count.n_jobs
        owners.update(one.answer.owners)
    shown = owners.most_common(MAX_OWNERS)
    if who.role == "user":
        shown = [(who.account, owners[who.account])] if owners[who.account] else []
    return CountsAnswer(
        total=dict(total),
        by_region=_sorted(by_region),
        by_site=_sorted(by_site),
        shards={name: round(now - one.at, 3) for name, one in sorted(heard.items())},
        missing_shards=sorted(missing),
        by_vo=_sorted(by_vo),
        active_by_owner=dict(shown),
        archived=dict(archived),
    )


def merge_errors(topology: Topology, answers: Iterable[ShardErrorsAnswer]) -> list[ErrorRow]:
    """Errors by (plane, code, site), the most frequent first."""
    found: dict[tuple[str, int, str, str], ErrorRow] = {}
    for answer in answers:
        for one in answer.errors:
            region, site = place(topology, one.slot)
            key = (one.plane, one.code, site, region)
            before = found.get(key)
            found[key] = ErrorRow(
                plane=one.plane,
                code=one.code,
                site=site,
                region=region,
                n_jobs=one.n_jobs + (before.n_jobs if before else 0),
                example=max(one.example, before.example if before else 0),
                last_at=max(one.last_at, before.last_at if before else 0.0),
            )
    return sorted(found.values(), key=lambda row: (-row.n_jobs, row.plane, row.code, row.site))


def merge_shards(topology: Topology, heard: Mapping[str, Heard], missing: Iterable[str], now: float) -> ShardsAnswer:
    """Every shard of the topology, with what is known of it."""
    gone = set(missing)
    rows = []
    for section in topology.sections.values():
        for name, shard in sorted(section.shards.items()):
            known = heard.get(name)
            rows.append(
                ShardRow(
                    name=name,
                    authority=section.authority,
                    link=shard.link,
                    regions=sorted(region for region, one in section.regions.items() if name in one.shards),
                    n_slots=sum(place.shard == name for place in section.placement.values()),
                    n_active=_active(known.answer.counts) if known else None,
                    age_s=round(now - known.at, 3) if known else None,
                    answers=name not in gone,
                )
            )
    return ShardsAnswer(epochs=topology.epochs, shards=rows)


def place(topology: Topology, slot: int) -> tuple[str, str]:
    """The region and the site of a slot, as they are shown."""
    region = topology.region_of_slot.get(slot, UNPLACED)
    return region, topology.site_of_slot.get(slot, REGION_ONLY.format(region=region))


def _active(counts: Iterable[SlotCount]) -> int:
    return sum(count.n_jobs for count in counts if count.state not in FINAL)


def _sorted(counted: Mapping[str, Counter[str]]) -> dict[str, dict[str, int]]:
    return {name: dict(counts) for name, counts in sorted(counted.items())}
