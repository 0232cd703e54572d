"""What stands between a job and the pilots that could take it: the code that dispatches explains, with its figures.

`why` asks it for one job, a submit for each kind of jobs that it brings. It reads no more than memory.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from culm import labels
from culm.matching import Offer, Refusal, Requirements, matches, refusals
from culm.topology import Queue, Topology
from culm.wire import MAX_WARNINGS, Reason, SubmitWarning
from shard.askers import WINDOW_S, Askers

MAX_LOOKS: Final = 2000
"""Computing queues and offers that one submit is held against: its answer must not hold up the others."""
REASONS_PER_WARNING: Final = 3
NO_QUEUE: Final = Reason(code="no_queue_there", text="no computing queue is registered where it may run")
_SENTENCES: Final[Mapping[str, str]] = {
    "wrong_label": "its label is {needed}, the pilots of {queue} take {offered}",
    "wrong_vo": "it is of VO {needed!r}, the pilots of {queue} take jobs of {offered}",
    "wrong_queue": "it is pinned to {needed}, this is {queue}",
    "wrong_pilot_type": "it wants a pilot of type {needed}, those of {queue} are of type {offered!r}",
    "too_few_cores": "it needs {needed} cores, {queue} offers {offered}",
    "too_little_memory_mb": "it needs {needed} MiB of memory, {queue} offers {offered}",
    "too_little_disk_mb": "it needs {needed} MiB of disk, {queue} offers {offered}",
    "too_little_walltime_s": "it needs {needed} s of walltime, {queue} offers {offered}",
    "no_matching_release": "it needs release {needed}, {queue} has {offered}",
    "no_matching_platform": "it needs platform {needed}, {queue} has {offered}",
}


@dataclass
class _Looks:
    left: float


class Obstacles:
    """The reasons why the pilots of computing queues do not take a job."""

    def __init__(self, askers: Askers) -> None:
        self._askers = askers
        self._seen: Topology | None = None
        self._queues: dict[int, dict[str, Queue]] = {}

    def queues(self, topology: Topology, slot: int) -> Mapping[str, Queue]:
        """The computing queues whose pilots may take from a slot: of its site, or of all sites of its region."""
        if topology is not self._seen:
            self._seen = topology
            self._queues.clear()
        found = self._queues.get(slot)
        if found is None:
            found = self._queues[slot] = _queues_of(topology, slot)
        return found

    def between(self, needs: Requirements, queues: Mapping[str, Queue]) -> tuple[list[Reason], Offer | None]:
        """Why none of these computing queues takes a job, the nearest reason first, and None.

        Or no reason, and an offer that a pilot made lately and that fits.
        """
        found = self._between(needs, queues, _Looks(math.inf))
        assert found is not None
        return found

    def warnings(self, topology: Topology, jobs: Iterable[tuple[int, Requirements]]) -> list[SubmitWarning]:
        """Which of these jobs nobody can run as things are, and why: once for all that need the same in the same place.

        Args:
            topology: as it is now.
            jobs: the slot of each and what it needs; their order is what `SubmitWarning.index` counts.

        At most MAX_WARNINGS, and MAX_LOOKS looks: what is not reached is not warned of.
        """
        alike: dict[tuple[int, Requirements], list[int]] = {}
        for index, key in enumerate(jobs):
            alike.setdefault(key, []).append(index)
        looks = _Looks(MAX_LOOKS)
        found: list[SubmitWarning] = []
        for (slot, needs), indexes in alike.items():
            told = self._between(needs, self.queues(topology, slot), looks)
            if told is None or len(found) == MAX_WARNINGS:
                break
            if told[0]:
                reasons = told[0][:REASONS_PER_WARNING]
                found.append(SubmitWarning(index=indexes[0], n_jobs=len(indexes), reasons=reasons))
        return found

    def _between(
        self, needs: Requirements, queues: Mapping[str, Queue], looks: _Looks
    ) -> tuple[list[Reason], Offer | None] | None:
        """None where there were not enough looks for all."""
        if not queues:
            return [NO_QUEUE], None
        pinned = queues.get(needs.queue)
        found: list[Reason] = []
        for name, queue in ({needs.queue: pinned} if pinned else {} if needs.queue else queues).items():
            offers = self._askers.offers(name)
            looks.left -= 1 + len(offers)
            if looks.left < 0:
                return None
            reasons, fitting = self._of_pair(needs, name, queue, offers)
            if fitting is not None:
                return [], fitting
            found += reasons
        if not found:
            told = f"it is pinned to {needs.queue}, which is not registered where it may run"
            return [Reason(code="no_queue_there", text=told)], None
        # Where no more than a pilot is missing, it is nearest to run.
        return sorted(found, key=lambda reason: reason.code != "no_pilot_asked"), None

    def _of_pair(
        self, needs: Requirements, name: str, queue: Queue, offers: Sequence[Offer]
    ) -> tuple[list[Reason], Offer | None]:
        """Why the pilots of a computing queue do not take a job; or the offer that would, and no reason."""
        if queue.status == "offline":
            because = f": {queue.reason}" if queue.reason else ""
            return [Reason(code="queue_offline", text=f"{name} is offline{because}", queue=name)], None
        in_test = queue.status == "test"
        if in_test and needs.label not in labels.allowed_job_labels(
            "unified", queue_status="test", queue_type=queue.type
        ):
            because = f" ({queue.reason})" if queue.reason else ""
            told = f"{name} is in test{because}: its pilots take test jobs only, this one's label is {needs.label}"
            return [Reason(code="queue_in_test", text=told, queue=name)], None
        refused = refusals(needs, widest(name, queue, needs))
        if refused:
            return [_refusal(name, one) for one in refused], None
        if not offers:
            last = self._askers.last_at(name)
            told = f"no pilot of {name} has asked in the last {WINDOW_S / 60:.0f} minutes"
            return [
                Reason(code="no_pilot_asked", text=told + ("" if last else ", or ever"), queue=name, since=last or None)
            ], None
        fitting = next((offer for offer in offers if matches(needs, offer)), None)
        if fitting is not None:
            return [], fitting
        nearest = min((refusals(needs, offer) for offer in offers), key=len)
        return [_refusal(name, one) for one in nearest], None


def _queues_of(topology: Topology, slot: int) -> dict[str, Queue]:
    """The computing queues whose pilots may take from a slot: of its site, or of all sites of its region."""
    name = topology.site_of_slot.get(slot)
    if name is not None:
        return dict(topology.sites[name].queues) if name in topology.sites else {}
    region = topology.region_of_slot.get(slot)
    return {
        queue: described
        for site in topology.sites.values()
        if site.region == region
        for queue, described in site.queues.items()
    }


def widest(name: str, queue: Queue, needs: Requirements) -> Offer:
    """What the best pilot of a computing queue could offer: what this refuses no pilot of it will ever take."""
    return Offer(
        queue=name,
        labels=frozenset({needs.label}),
        cores=queue.cores or needs.cores,
        memory_mb=queue.memory_mb,
        disk_mb=queue.disk_mb,
        walltime_s=queue.walltime_s,
        releases=frozenset(queue.releases),
        platforms=frozenset(queue.platforms),
        pilot_type=needs.pilot_type,
    )


def _refusal(queue: str, one: Refusal) -> Reason:
    values: dict[str, Any] = {"needed": one.needed, "offered": one.offered or "none", "queue": queue}
    text = _SENTENCES[one.reason].format(**values)
    return Reason(code=one.reason, text=text, queue=queue, needed=one.needed, offered=one.offered)  # type: ignore[arg-type]
