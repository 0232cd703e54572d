"""Stored runs: one folder each under the cluster's `loads`, with everything that is needed to compare them later."""

import re
import time
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Final

import msgspec

from culm.errors import ClientFault, Conflict
from loadtest.book import Result, Window, operation
from loadtest.latencies import Histogram, together
from loadtest.shapes import StepFigures
from loadtest.verdicts import Facts, Row, Slo, Verdict

FOLDER: Final = "loads"
FILE: Final = "run.json"
BUSIEST_S: Final = 10.0
LAST: Final = "last"
CLIENT: Final = "client"
OTHERS: Final = "all others"
"""Among the processor times: the clients, and what has nothing to do with the run."""
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9.-]{0,100}")


class CpuUse(msgspec.Struct, frozen=True, kw_only=True):
    """Of a process with its children: shares of one core, over the run and in its busiest ten seconds."""

    mean: float
    busiest: float
    series: list[tuple[float, float]] = []
    """Seconds since the run's begin, share of one core since the sample before."""


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Where it ran: figures of two machines say little about each other."""

    platform: str
    python: str
    cpu: str
    n_cpus: int
    memory_mb: int
    sync_ms: float
    """Median time of an fdatasync where the cluster's data are: every commit waits for one."""
    load_before: float
    """Of the machine, the minute before: what else was going on."""


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One run. Times are seconds since the epoch, `t` seconds since its begin."""

    id: str
    scenario: str
    commit: str
    """"" where the source is no git checkout; a `+` at its end: with changes that are not committed."""
    began_at: float
    seconds: float
    seed: int
    options: dict[str, float | int | str]
    settings: dict[str, str]
    """What the processes were told, file by file, secrets left out."""
    machine: Machine
    rows: list[Row]
    """By operation, then by operation and shard."""
    cpu: dict[str, CpuUse]
    windows: list[Window]
    window_s: float
    texts: dict[str, int]
    events: list[tuple[float, str]]
    """What was done to the cluster: t, text."""
    n_submitted: int
    n_granted: int
    n_ended: int
    n_empty: int
    n_unanswered: int
    duplicates: list[str]
    n_lost: int
    wait_p50_ms: float
    wait_p99_ms: float
    """From an accepted submit to the pilot that got the job."""
    knee: float
    broken_by: str
    steps: list[tuple[float, StepFigures]]
    slo: Slo
    verdict: Verdict


def rows_of(result: Result) -> list[Row]:
    """The figures by operation, then of each operation by shard."""
    seconds = max(result.ended_at - result.began_at, 1e-3)
    operations: dict[str, list[str]] = {}
    for name in sorted(result.names):
        operations.setdefault(operation(name), []).append(name)
    groups = list(operations.items())
    groups += [(name, [name]) for names in operations.values() if names != [operation(names[0])] for name in names]
    return [_row(name, names, result, seconds) for name, names in groups]


def _row(name: str, names: Iterable[str], result: Result, seconds: float) -> Row:
    some = [result.names[one] for one in names]
    felt = together(Histogram(one.felt) for one in some)
    service = together(Histogram(one.service) for one in some)
    if not felt.n:
        # What is refused on purpose has no end that anybody waits for.
        felt = service
    n_ok = sum(one.n_ok for one in some)
    return Row(
        name=name,
        n_ok=n_ok,
        n_busy=sum(one.n_busy for one in some),
        n_failed=sum(one.n_failed for one in some),
        rate=n_ok / seconds,
        p50_ms=felt.percentile(0.5),
        p95_ms=felt.percentile(0.95),
        p99_ms=felt.percentile(0.99),
        p999_ms=felt.percentile(0.999),
        service_p50_ms=service.percentile(0.5),
        service_p99_ms=service.percentile(0.99),
    )


def by_operation(rows: Iterable[Row]) -> list[Row]:
    """Those that are not of one shard."""
    return [row for row in rows if "[" not in row.name]


def facts_of(result: Result, n_lost: int, client_cpu: float) -> Facts:
    """What is judged."""
    return Facts(
        rows=by_operation(rows_of(result)),
        n_duplicates=len(result.duplicates),
        n_lost=n_lost,
        n_unanswered=result.n_unanswered,
        client_cpu=client_cpu,
        knee=result.knee,
    )


def cpu_use(samples: Iterable[tuple[float, float]]) -> CpuUse:
    """From (t, processor seconds so far), two or more; fewer say nothing."""
    points = list(samples)
    if len(points) < 2:
        return CpuUse(mean=0.0, busiest=0.0)
    span, used = points[-1][0] - points[0][0], points[-1][1] - points[0][1]
    busiest = 0.0
    start = 0
    for end in range(1, len(points)):
        while points[end][0] - points[start + 1][0] >= BUSIEST_S:
            start += 1
        width = points[end][0] - points[start][0]
        if width >= min(BUSIEST_S, span) - 1e-6:
            busiest = max(busiest, (points[end][1] - points[start][1]) / width)
    series = [
        (later[0], max(0.0, later[1] - earlier[1]) / (later[0] - earlier[0]))
        for earlier, later in pairwise(points)
        if later[0] > earlier[0]
    ]
    return CpuUse(mean=used / span if span else 0.0, busiest=busiest, series=series)


def place(folder: Path, scenario: str) -> Path:
    """Make the folder of a new run; its name is the run's id. Raises Conflict(run_exists) within the same second."""
    path = folder / FOLDER / f"{scenario}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
    try:
        path.mkdir(mode=0o700, parents=True)
    except FileExistsError:
        raise Conflict("run_exists", f"{path.name} was begun this very second") from None
    return path


def store(folder: Path, run: Run) -> Path:
    """Keep it in its place in the cluster's folder; its file."""
    path = folder / FOLDER / run.id / FILE
    beside = path.with_suffix(".new")
    beside.write_bytes(msgspec.json.format(msgspec.json.encode(run)))
    beside.replace(path)
    return path


def names(folder: Path) -> list[str]:
    """The stored runs, oldest first."""
    found = sorted((folder / FOLDER).glob(f"*/{FILE}"), key=lambda path: path.stat().st_mtime)
    return [path.parent.name for path in found]


def load(folder: Path, name: str) -> Run:
    """A stored run by its id, or `last`. Raises ClientFault(unknown_run, bad_run)."""
    known = names(folder)
    wanted = known[-1] if name == LAST and known else name
    if wanted not in known or not _NAME.fullmatch(wanted):
        raise ClientFault("unknown_run", f"no run {name!r} in {folder / FOLDER} (culm load list)", http_status=404)
    try:
        return msgspec.json.decode((folder / FOLDER / wanted / FILE).read_bytes(), type=Run)
    except (OSError, msgspec.DecodeError) as error:
        raise ClientFault("bad_run", f"{wanted}: {error}") from None


class Compared(msgspec.Struct, frozen=True, kw_only=True):
    """One figure of two runs; `ratio` is the second's over the first's, None where that is nothing."""

    name: str
    figure: str
    first: float
    second: float
    ratio: float | None


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """Two runs beside each other; `differences` is what else differs between them."""

    first: str
    second: str
    figures: list[Compared]
    differences: list[str]


_FIGURES: Final = ("rate", "p50_ms", "p95_ms", "p99_ms", "p999_ms")


def compare(first: Run, second: Run) -> Comparison:
    """Every operation that both have, the processor time per finished job, the knee; and what else differs."""
    others = {row.name: row for row in by_operation(second.rows)}
    figures = [
        _compared(row.name, figure, getattr(row, figure), getattr(others[row.name], figure))
        for row in by_operation(first.rows)
        if row.name in others
        for figure in _FIGURES
    ]
    for name, use in first.cpu.items():
        if name in second.cpu and first.n_ended and second.n_ended:
            figures.append(_compared(name, "cpu_ms_per_job", _per_job(use, first), _per_job(second.cpu[name], second)))
    if first.knee or second.knee:
        figures.append(_compared("ramp", "knee", first.knee, second.knee))
    return Comparison(first=first.id, second=second.id, figures=figures, differences=list(_differences(first, second)))


def _per_job(use: CpuUse, run: Run) -> float:
    return use.mean * run.seconds * 1000 / run.n_ended


def _compared(name: str, figure: str, first: float, second: float) -> Compared:
    return Compared(name=name, figure=figure, first=first, second=second, ratio=second / first if first else None)


def _differences(first: Run, second: Run) -> Iterable[str]:
    for field in ("scenario", "commit", "seed"):
        one, other = getattr(first, field), getattr(second, field)
        if one != other:
            yield f"{field}: {one} and {other}"
    yield from _differing("option", first.options, second.options)
    yield from _differing("machine", msgspec.to_builtins(first.machine), msgspec.to_builtins(second.machine))
    for file in sorted(first.settings.keys() | second.settings.keys()):
        if first.settings.get(file) != second.settings.get(file):
            yield f"settings of {file}"
    for run in (first, second):
        if run.verdict.outcome != "met":
            yield f"{run.id}: {run.verdict.note or '; '.join(run.verdict.misses)}"


def _differing(what: str, first: Mapping[str, object], second: Mapping[str, object]) -> Iterable[str]:
    # What is measured anew for each run says nothing by differing.
    for key in sorted((first.keys() | second.keys()) - {"load_before", "sync_ms"}):
        if first.get(key) != second.get(key):
            yield f"{what} {key}: {first.get(key)} and {second.get(key)}"
