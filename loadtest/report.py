"""A stored run as one HTML page that needs nothing else: tables, and plots drawn by matplotlib."""

import base64
import io
from collections.abc import Callable
from importlib import resources
from typing import Any, Final

import jinja2
import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loadtest.book import GET_JOB
from loadtest.latencies import Histogram
from loadtest.runs import CLIENT, OTHERS, Run
from loadtest.verdicts import SATURATED

SIZE: Final = (9.0, 3.2)
"""Of a plot, in inches."""
_STYLE: Final = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9.0,
    "axes.grid": True,
    "grid.alpha": 0.3,
}
_PAGE: Final = resources.files("loadtest").joinpath("templates/report.html").read_text(encoding="utf-8")


def page(run: Run) -> str:
    """The page. Whatever stands in the run is shown as text."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(_PAGE).render(run=run, plots=_plots(run), client=CLIENT, saturated=SATURATED)


def _plots(run: Run) -> list[tuple[str, str]]:
    """(title, address) of each plot; none of what the run does not have."""
    drawn = [("Processor time, as a share of one core", _draw(run, _cpu))] if run.cpu else []
    if run.windows:
        drawn = [
            ("Answers per second", _draw(run, _rates)),
            ("Latency of getJob, from when it was due", _draw(run, _latencies)),
            ("Failures, and answers that asked to come again, per second", _draw(run, _errors)),
            *drawn,
        ]
    if run.steps:
        drawn.insert(0, ("The ramp: p99 of getJob by the rate that was asked for", _draw(run, _ramp)))
    return drawn


def _draw(run: Run, plot: Callable[[Run, Axes], None]) -> str:
    with mpl.rc_context(_STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.add_subplot()
        plot(run, axes)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(loc="upper left", fontsize=7, ncols=2)
        image = io.BytesIO()
        figure.savefig(image, format="svg", metadata={"Date": None, "Creator": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(image.getvalue()).decode()}"


def _over_time(run: Run, axes: Axes) -> list[float]:
    axes.set_xlabel("seconds")
    for t, text in run.events:
        axes.axvline(t, color="black", linestyle=":", linewidth=1)
        axes.annotate(text, (t, 1.0), xycoords=("data", "axes fraction"), fontsize=6, rotation=90, va="top")
    return [n * run.window_s for n in range(len(run.windows))]


def _rates(run: Run, axes: Axes) -> None:
    times = _over_time(run, axes)
    for name in sorted({name for window in run.windows for name in window.n_ok}):
        axes.plot(times, [window.n_ok.get(name, 0) / run.window_s for window in run.windows], label=name, linewidth=1)
    if any(window.rate for window in run.windows):
        axes.plot(times, [window.rate for window in run.windows], "k--", label="arrivals wanted", linewidth=1)
    axes.set_ylim(bottom=0)


def _latencies(run: Run, axes: Axes) -> None:
    times = _over_time(run, axes)
    for share, label in ((0.5, "p50"), (0.95, "p95"), (0.99, "p99"), (1.0, "longest")):
        found = [
            (t, window.felt[GET_JOB]) for t, window in zip(times, run.windows, strict=True) if GET_JOB in window.felt
        ]
        values = [Histogram(buckets).percentile(share) for _, buckets in found]
        axes.plot([t for t, _ in found], values, label=label, linewidth=1)
    axes.set_yscale("log")
    axes.set_ylabel("ms")


def _errors(run: Run, axes: Axes) -> None:
    times = _over_time(run, axes)
    failed = [sum(window.n_failed.values()) / run.window_s for window in run.windows]
    busy = [sum(window.n_busy.values()) / run.window_s for window in run.windows]
    axes.plot(times, failed, color="tab:red", label="failed", linewidth=1)
    axes.plot(times, busy, color="tab:orange", label="asked to come again", linewidth=1)
    axes.set_ylim(bottom=0)


def _cpu(run: Run, axes: Axes) -> None:
    _over_time(run, axes)
    for name, use in sorted(run.cpu.items(), key=lambda one: -one[1].mean):
        style: dict[str, Any] = {"linewidth": 2 if name == CLIENT else 1, "alpha": 0.5 if name == OTHERS else 1.0}
        axes.plot([t for t, _ in use.series], [share for _, share in use.series], label=name, **style)
    axes.axhline(SATURATED, color="tab:red", linestyle="--", linewidth=1)


def _ramp(run: Run, axes: Axes) -> None:
    wanted = [rate for rate, _ in run.steps]
    axes.plot(wanted, [seen.p99_ms for _, seen in run.steps], "o-", label="p99 (ms)")
    axes.axhline(run.slo.ramp_p99_ms, color="tab:red", linestyle="--", linewidth=1)
    if run.knee:
        axes.axvline(run.knee, color="tab:green", linewidth=1, label="knee")
    axes.set_xlabel("jobs asked for, per second")
    axes.set_yscale("log")
