"""Rounds: all variants of a cell one after the other, again and again, in another order each time.

A figure is worked out within a round, so that whatever else the machine does meanwhile hits both sides of the ratio.
"""

import statistics
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

import msgspec

from loadtest.bench.figures import FIGURES
from loadtest.bench.rig import SATURATED, Sample

Variant = Callable[[], Awaitable[Sample]]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Cell:
    """Variants that are measured against each other, and what figures they give.

    `work_out` makes the figures, by id, of one round's samples, by the names of the variants.
    """

    name: str
    ids: tuple[str, ...]
    variants: Mapping[str, Variant]
    work_out: Callable[[Mapping[str, Sample]], Mapping[str, float]]
    warm_up: bool = True
    """Whether a first round is thrown away."""


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """A figure: the median of its rounds with the smallest and the largest."""

    value: float
    target: float
    spread: tuple[float, float]
    rounds: int
    met: bool
    note: str = ""


async def run(cell: Cell, n_rounds: int, progress: Progress) -> dict[str, Told]:
    """Run a cell; its figures by id. Raises CulmError(bench_failed)."""
    values: dict[str, list[float]] = {identifier: [] for identifier in cell.ids}
    saturated: set[str] = set()
    names = list(cell.variants)
    for number in range(-1 if cell.warm_up else 0, n_rounds):
        samples: dict[str, Sample] = {}
        for name in names:
            what = "warm-up" if number < 0 else f"round {number + 1} of {n_rounds}"
            progress(f"{cell.name}: {what}, {name}")
            samples[name] = await cell.variants[name]()
            progress(f"{cell.name}: {name} {describe(samples[name])}")
        names.append(names.pop(0))
        if number < 0:
            continue
        saturated |= {name for name, sample in samples.items() if sample.client_share > SATURATED}
        for identifier, value in cell.work_out(samples).items():
            values[identifier].append(value)
    note = f"clients above {SATURATED:.0%} of a core in: {', '.join(sorted(saturated))}" if saturated else ""
    return {identifier: tell(identifier, found, note) for identifier, found in values.items()}


def tell(identifier: str, values: list[float], note: str = "") -> Told:
    """The figure of these rounds."""
    figure, value = FIGURES[identifier], statistics.median(values)
    return Told(
        value=value,
        target=figure.target,
        spread=(min(values), max(values)),
        rounds=len(values),
        met=figure.met(value),
        note=note,
    )


def describe(sample: Sample) -> str:
    """One line on a sample."""
    parts = ", ".join(f"{name} {value:.0f}" for name, value in sample.parts.items())
    return (
        f"{sample.cpu_us:.0f} us ({parts}), {sample.rate:.0f}/s, p50 {sample.p50_ms:.1f} ms, p99 {sample.p99_ms:.1f} ms"
    )
