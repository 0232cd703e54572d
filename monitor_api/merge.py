"""The merged views: pure. What shards said of their slots becomes counts and errors by region, site, state and VO."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import msgspec

from culm.places import UNPLACED, place
from culm.states import FINAL
from culm.topology import Topology
from culm.wire import (
    CountsAnswer,
    ErrorRow,
    PileUp,
    PilotsAnswer,
    PilotSeen,
    Principal,
    QueueSeen,
    ShardCountsAnswer,
    ShardErrorsAnswer,
    ShardPileUpsAnswer,
    ShardPilotsAnswer,
    ShardRow,
    ShardsAnswer,
    SlotCount,
    SlotPileUp,
)

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


def merge_pile_ups(topology: Topology, answers: Iterable[ShardPileUpsAnswer]) -> list[PileUp]:
    """Pile-ups by site and state, the most jobs above the usual first.

    A site may have several slots, on several shards: the cause is that of the slot with the most jobs above the usual.
    """
    parts: dict[tuple[str, str, str], list[tuple[str, SlotPileUp]]] = {}
    for answer in answers:
        for one in answer.pile_ups:
            region, site = place(topology, one.slot)
            parts.setdefault((region, site, one.state), []).append((answer.shard, one))
    found = []
    for (region, site, _), some in parts.items():
        most = max((one for _, one in some), key=_above)
        found.append(
            PileUp(
                site=site,
                region=region,
                state=most.state,
                n_jobs=sum(one.n_jobs for _, one in some),
                n_usual=sum(one.n_usual for _, one in some),
                n_before=sum(one.n_before for _, one in some),
                cause=most.cause,
                text=most.text,
                example=most.example,
                shards=sorted({shard for shard, _ in some}),
            )
        )
    return sorted(found, key=lambda one: (-_above(one), one.region, one.site, one.state))


def merge_pilots(topology: Topology, answers: Iterable[ShardPilotsAnswer], limit: int) -> PilotsAnswer:
    """Pilots and computing queues over shards: a pilot asks all that have slots of its site, and gets from each."""
    queues: dict[str, QueueSeen] = {}
    pilots: dict[tuple[str, str], PilotSeen] = {}
    window_s, n_left_out = 0.0, 0
    for answer in answers:
        window_s, n_left_out = answer.window_s, max(n_left_out, answer.n_left_out)
        for queue in answer.queues:
            queues[queue.queue] = _both_queues(queues.get(queue.queue), queue, topology)
        for pilot in answer.pilots:
            key = (pilot.queue, pilot.id)
            pilots[key] = _both_pilots(pilots.get(key), pilot, topology)
    latest = sorted(pilots.values(), key=lambda one: (-one.last_at, one.queue, one.id))
    return PilotsAnswer(
        window_s=window_s,
        queues=[queues[name] for name in sorted(queues)],
        pilots=latest[:limit],
        n_left_out=n_left_out + max(0, len(latest) - limit),
    )


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
                    dispatched_per_s=_rate(known.answer) if known else None,
                )
            )
    return ShardsAnswer(epochs=topology.epochs, shards=rows)


def _above(one: SlotPileUp | PileUp) -> int:
    return one.n_jobs - one.n_usual


def _both_queues(before: QueueSeen | None, one: QueueSeen, topology: Topology) -> QueueSeen:
    if before is None:
        return msgspec.structs.replace(one, site=topology.site_of_queue.get(one.queue, UNPLACED))
    last = [at for at in (before.last_asked_at, one.last_asked_at) if at is not None]
    return msgspec.structs.replace(
        before,
        last_asked_at=max(last, default=None),
        n_pilots=max(before.n_pilots, one.n_pilots),
        n_asked=max(before.n_asked, one.n_asked),
        n_given=before.n_given + one.n_given,
    )


def _both_pilots(before: PilotSeen | None, one: PilotSeen, topology: Topology) -> PilotSeen:
    if before is None:
        return msgspec.structs.replace(one, site=topology.site_of_queue.get(one.queue, UNPLACED))
    last = [at for at in (before.last_job_at, one.last_job_at) if at is not None]
    return msgspec.structs.replace(
        before,
        host=max(before, one, key=lambda seen: seen.last_at).host,
        first_at=min(before.first_at, one.first_at),
        last_at=max(before.last_at, one.last_at),
        n_asked=max(before.n_asked, one.n_asked),
        n_answered=before.n_answered + one.n_answered,
        n_jobs=before.n_jobs + one.n_jobs,
        last_job_at=max(last, default=None),
    )


def _rate(answer: ShardCountsAnswer) -> float | None:
    return answer.n_dispatched / answer.window_s if answer.window_s else None


def _active(counts: Iterable[SlotCount]) -> int:
    return sum(count.n_jobs for count in counts if count.state not in FINAL)


def _sorted(counted: Mapping[str, Counter[str]]) -> dict[str, dict[str, int]]:
    return {name: dict(counts) for name, counts in sorted(counted.items())}
