"""What holds for a job: the policy of its computing queue, else of its VO, else the settings of the shard.

Policies come from the topology as this process has it in memory, so that a change is obeyed within a poll of it and
nobody who asks waits for anything.
"""

from collections.abc import Callable
from typing import Final

import msgspec

from culm.policies import Policy, over
from culm.settings import SubmitDefaults, Timeouts
from culm.states import State
from culm.topology import Topology
from culm.wire import JobSpec

MAX_REMEMBERED: Final = 10_000


class Terms:
    """Policies with every gap filled: a time-out, the cores and the attempts are never 0 here."""

    def __init__(self, timeouts: Timeouts, submit: SubmitDefaults, topology: Callable[[], Topology]) -> None:
        self._topology = topology
        self._settings = _policy_of(timeouts, submit)
        self._seen: Topology | None = None
        self._known: dict[tuple[int, str, str], Policy] = {}
        self._shortest: dict[int, tuple[float, float]] = {}

    def of(self, slot: int, vo: str, queue: str = "") -> Policy:
        """What holds for a VO's jobs of a slot, pinned to or held by a computing queue ("": none). Never raises."""
        topology = self._current()
        key = (slot, vo, queue)
        known = self._known.get(key)
        if known is None:
            if len(self._known) >= MAX_REMEMBERED:
                self._known.clear()
            known = self._known[key] = over(topology.policy(slot, vo, queue), self._settings)
        return known

    def shortest(self, slot: int) -> tuple[float, float]:
        """The least `activated_s` and `unready_s` that any job of the slot may have, seconds. Never raises."""
        topology = self._current()
        found = self._shortest.get(slot)
        if found is None:
            said = [self._settings, *topology.policies(slot)]
            activated = min(one.activated_s for one in said if one.activated_s)
            found = self._shortest[slot] = activated, min(one.unready_s for one in said if one.unready_s)
        return found

    def _current(self) -> Topology:
        topology = self._topology()
        if topology is not self._seen:
            self._seen = topology
            self._known.clear()
            self._shortest.clear()
        return topology


def with_defaults(spec: JobSpec, policy: Policy) -> JobSpec:
    """The job as it is stored: what it does not say is what the policy says. Pure."""
    return msgspec.structs.replace(
        spec,
        cores=spec.cores or policy.default_cores,
        memory_mb=spec.memory_mb or policy.default_memory_mb,
        disk_mb=spec.disk_mb or policy.default_disk_mb,
        walltime_s=spec.walltime_s or policy.default_walltime_s,
        max_attempts=spec.max_attempts or policy.default_max_attempts,
    )


def silence_s(state: State, policy: Policy, lease: tuple[float, float]) -> float:
    """How long a leased job may be silent in a state, seconds; `lease` are the first and the heartbeat it was granted.

    What a pilot was told at the claim holds until the lease ends: it may not look again.
    """
    match state:
        case State.SENT:
            return lease[0]
        case State.TRANSFERRING:
            return policy.transferring_s
        case State.HOLDING | State.MERGING:
            return policy.holding_s
        case _:
            return lease[1]


def _policy_of(timeouts: Timeouts, submit: SubmitDefaults) -> Policy:
    return Policy(
        first_lease_s=timeouts.first_lease_s,
        heartbeat_s=timeouts.heartbeat_s,
        holding_s=timeouts.holding_s,
        transferring_s=timeouts.transferring_s,
        activated_s=timeouts.activated_s,
        unready_s=timeouts.unready_s,
        default_cores=submit.cores,
        default_memory_mb=submit.memory_mb,
        default_disk_mb=submit.disk_mb,
        default_walltime_s=submit.walltime_s,
        default_max_attempts=submit.max_attempts,
        max_priority=submit.max_priority,
    )
