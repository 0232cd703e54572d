"""The merged view: pure. What the shards last said of their slots becomes counts by state, region and site."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from culm.topology import Topology
from culm.wire import CountsAnswer, ShardCountsAnswer

UNPLACED = "(not in the topology)"
REGION_ONLY = "(any site of {region})"


@dataclass(frozen=True)
class Heard:
    """A shard's last answer, and when it came on the monitor's monotonic clock, seconds."""

    answer: ShardCountsAnswer
    at: float


def merge(topology: Topology, heard: Mapping[str, Heard], missing: list[str], now: float) -> CountsAnswer:
    """One view of all shards (invariant I11): a shard that did not answer is named and shown as last heard.

    Args:
        topology: gives slots their sites and regions.
        heard: per shard what it last said; one that never answered is absent.
        missing: the shards that gave no answer this time.
        now: on the clock of `Heard.at`.
    """
    total: Counter[str] = Counter()
    by_region: dict[str, Counter[str]] = {}
    by_site: dict[str, Counter[str]] = {}
    for one in heard.values():
        for count in one.answer.counts:
            region = topology.region_of_slot.get(count.slot, UNPLACED)
            site = topology.site_of_slot.get(count.slot, REGION_ONLY.format(region=region))
            total[count.state] += count.n_jobs
            by_region.setdefault(region, Counter())[count.state] += count.n_jobs
            by_site.setdefault(site, Counter())[count.state] += count.n_jobs
    return CountsAnswer(
        total=dict(total),
        by_region={name: dict(counts) for name, counts in sorted(by_region.items())},
        by_site={name: dict(counts) for name, counts in sorted(by_site.items())},
        shards={name: round(now - one.at, 3) for name, one in sorted(heard.items())},
        missing_shards=sorted(missing),
    )
