"""The scenarios of `culm load run`: who asks, how much, in which shape, what happens meanwhile, what must hold.

A scenario runs at sites of its own (`LOAD-..`), which it registers: the jobs of others are never touched.
"""

from dataclasses import dataclass, field
from typing import Final, Literal

from loadtest.verdicts import Slo

Event = Literal["", "kill_shard", "pause_shards", "add_shard"]
CORRECT: Final = Slo()
"""Nothing failed, nothing twice, nothing lost; as slow as it may be."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One line of the table. Of `users`, `PilotUser` follows the shape where there is no `rate`.

    With a `rate`, arrivals (`ArrivalUser`) come at it, times the shape, whether or not they are answered.
    """

    text: str
    users: dict[str, int]
    """Users by class; the full number of those that follow the shape."""
    shape: str = "constant"
    rate: float = 0.0
    """Jobs asked for a second at the full load, open loop; 0: closed loop, by the number of pilots."""
    seconds: float = 60.0
    sites_per_region: int = 2
    hot_share: float = 0.0
    """Share of all jobs and pilots that one site has; 0: all have the same."""
    n_beats: int = 2
    """Heartbeats of a job."""
    job_s: float = 1.0
    """What a job takes of a pilot of the closed loop."""
    backlog: int = 500
    """Jobs that wait, at least, unless they are taken faster than they can be made."""
    event: Event = ""
    slo: Slo = field(default=CORRECT)


_FEED: Final = {"Submitter": 2, "Shifter": 1}
_ARRIVALS: Final = {"ArrivalUser": 1, **_FEED}
_SPEED: Final = Slo(p99_ms={"getJob": 500.0}, p50_ms={"getJob": 100.0})
_FAULT: Final = Slo(failed_share=0.01, busy_share=0.5)

SCENARIOS: Final[dict[str, Scenario]] = {
    "smoke": Scenario(
        text="a little of everything, for correctness: pilots, submits, reads, bad pilots",
        users={"PilotUser": 12, "Submitter": 1, "Shifter": 1, "BadPilot": 2},
        seconds=10.0,
        job_s=0.3,
        backlog=100,
    ),
    "pilots": Scenario(
        text="pilots that ask, send heartbeats and report, one after the other (closed loop)",
        users={"PilotUser": 100, "BadPilot": 1, **_FEED},
        slo=_SPEED,
    ),
    "arrivals": Scenario(
        text="requests at a constant rate, whether or not they are answered (open loop)",
        users=_ARRIVALS,
        rate=100.0,
        slo=_SPEED,
    ),
    "step": Scenario(text="the rate goes up in five steps", users=_ARRIVALS, shape="step", rate=200.0, slo=_SPEED),
    "spike": Scenario(
        text="ten times the rate for a fifth of the time",
        users=_ARRIVALS,
        shape="spike",
        rate=300.0,
        backlog=5000,
        slo=_SPEED,
    ),
    "diurnal": Scenario(
        text="one day of a fifth to the full rate and back",
        users=_ARRIVALS,
        shape="diurnal",
        rate=200.0,
        seconds=120.0,
        slo=_SPEED,
    ),
    "ramp": Scenario(
        text="the rate grows by a quarter every few seconds until it breaks: finds the knee",
        users=_ARRIVALS | {"Submitter": 4},
        shape="ramp",
        rate=50.0,
        seconds=300.0,
        backlog=5000,
        slo=Slo(failed_share=0.05, n_unanswered=None),
    ),
    "shard-loss": Scenario(
        text="a shard's process is killed in the middle; its sites wait, the others go on",
        users=_ARRIVALS,
        rate=60.0,
        event="kill_shard",
        slo=_FAULT,
    ),
    "add-shard": Scenario(
        text="a shard joins in the middle, takes its share, and stays: no request may fail",
        users=_ARRIVALS,
        rate=60.0,
        event="add_shard",
    ),
    "hot-site": Scenario(
        text="half of the load on one site, as at BNL",
        users=_ARRIVALS,
        rate=100.0,
        hot_share=0.5,
        sites_per_region=4,
        slo=_SPEED,
    ),
    "herd": Scenario(
        text="all shards are silent for a while, then all pilots that waited come back at once",
        users={"PilotUser": 200, **_FEED},
        job_s=0.5,
        event="pause_shards",
        slo=_FAULT,
    ),
}
TAGS: Final[dict[str, frozenset[str]]] = {
    "PilotUser": frozenset({"getjob", "update"}),
    "ArrivalUser": frozenset({"getjob", "update"}),
    "Submitter": frozenset({"submit"}),
    "Shifter": frozenset({"monitor"}),
    "BadPilot": frozenset({"getjob", "update"}),
}
"""What each user does, by the tags of his tasks: one who has none of the tags that are asked for stays at home."""
LCG: Final = "lcg"
LCG_SLO: Final = Slo()
LCG_TEXT: Final = "the log of a real grid, scaled in time (--speed), as `culm replay` sends it"
