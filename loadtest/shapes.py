"""How the load goes through a run: pure functions of the time, and the ramp that looks for the knee."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

Shape = Callable[[float], float]
"""Share of the run that is over (0 to 1) -> share of the full load (0 to 1)."""
N_STEPS: Final = 5


def constant(_x: float) -> float:
    """The full load all the time."""
    return 1.0


def step(x: float) -> float:
    """Up in five equal steps."""
    return (min(int(x * N_STEPS), N_STEPS - 1) + 1) / N_STEPS


def spike(x: float) -> float:
    """A tenth of the load, and ten times that in the middle fifth."""
    return 1.0 if 0.4 <= x < 0.6 else 0.1


def diurnal(x: float) -> float:
    """One day: from a fifth at night to the full load at noon and back."""
    return 0.6 - 0.4 * math.cos(2 * math.pi * x)


SHAPES: Final[dict[str, Shape]] = {"constant": constant, "step": step, "spike": spike, "diurnal": diurnal}
RAMP: Final = "ramp"


@dataclass(frozen=True)
class StepFigures:
    """What was seen in one step of a ramp; the rate in operations a second, the shares 0 to 1."""

    rate: float
    p99_ms: float
    failed_share: float
    """Of operations, those that failed or were told to come again."""


@dataclass
class Ramp:
    """A rate that grows step by step until the service does not keep up: the knee is the last rate that was good.

    A step is bad where the p99 is above the limit, too much failed, or less than `KEPT_UP` of the wanted rate was
    served. A bad step is tried once more, so that one hiccup of the machine ends nothing.
    """

    rate: float
    """Wanted in this step, operations a second."""
    limit_ms: float
    limit_failed: float = 0.01
    growth: float = 1.25
    knee: float = 0.0
    """The highest rate that was served well; 0 while none was."""
    broken_by: str = ""
    """Why it ended; "" while it goes on."""
    _second_try: bool = False
    steps: list[tuple[float, StepFigures]] = field(default_factory=list)
    """Every step with the rate that was wanted."""

    KEPT_UP: Final = 0.95

    def judge(self, seen: StepFigures) -> bool:
        """Take in a step's figures; whether to go on, with `rate` as the next step's."""
        self.steps.append((self.rate, seen))
        fault = self._fault(seen)
        if not fault:
            self.knee = max(self.knee, seen.rate)
            self.rate *= self.growth
            self._second_try = False
            return True
        if not self._second_try:
            self._second_try = True
            return True
        self.broken_by = fault
        return False

    def _fault(self, seen: StepFigures) -> str:
        if seen.failed_share > self.limit_failed:
            return f"{seen.failed_share:.1%} failed or were refused at {self.rate:.0f}/s"
        if seen.rate < self.KEPT_UP * self.rate:
            return f"{seen.rate:.0f}/s were served of {self.rate:.0f}/s"
        if seen.p99_ms > self.limit_ms:
            return f"p99 {seen.p99_ms:.0f} ms at {self.rate:.0f}/s, above {self.limit_ms:.0f} ms"
        return ""
