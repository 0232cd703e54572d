"""Judging a run: what must hold (an SLO file), and what a run was."""

import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, Literal

import msgspec

from culm.errors import ClientFault

SATURATED: Final = 0.85
"""Of one core: clients above it measure themselves."""


class Slo(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What must hold. Shares are 0 to 1, of all requests; None is not judged.

    A request that is bad on purpose failed if it was not refused as it should be.

    Latencies and rates go by operation (`getJob`, `heartbeat`, `report`, `submit`, `monitor`), latencies in
    milliseconds from when a request was due. They, and only they, are not judged where the clients were saturated.
    """

    failed_share: float = 0.0
    busy_share: float | None = None
    """Answers that asked to come again."""
    n_duplicates: int = 0
    n_lost: int = 0
    n_unanswered: int | None = 0
    """Requests that were due and had no answer when the run was over."""
    p50_ms: dict[str, float] = {}
    p95_ms: dict[str, float] = {}
    p99_ms: dict[str, float] = {}
    p999_ms: dict[str, float] = {}
    min_rate: dict[str, float] = {}
    """Answers a second, at least."""
    min_knee: float = 0.0
    """Of a ramp: jobs a second that must be served well."""
    ramp_p99_ms: float = 500.0
    """Of a ramp: the getJob above which a step is broken. The latencies above are of the whole run."""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One operation, or one of them at one shard; rates per second, latencies in milliseconds.

    `service` is from the sending of a request, the others from when it was due, repeats included.
    """

    name: str
    n_ok: int
    n_busy: int
    n_failed: int
    rate: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    p999_ms: float
    service_p50_ms: float
    service_p99_ms: float


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What of a run is judged."""

    rows: list[Row]
    """By operation."""
    n_duplicates: int
    n_lost: int
    n_unanswered: int
    client_cpu: float
    """The clients' processor time, as a share of one core, in their busiest seconds."""
    knee: float = 0.0


Outcome = Literal["met", "missed", "none"]


class Verdict(msgspec.Struct, frozen=True):
    """`none`: nothing that could be judged was missed, but speed could not be judged."""

    outcome: Outcome
    misses: list[str]
    note: str = ""


def read(path: Path) -> Slo:
    """An SLO file, TOML. Raises ClientFault(bad_slo)."""
    try:
        return msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), Slo)
    except (OSError, ValueError) as error:
        raise ClientFault("bad_slo", f"{path}: {error}") from None


def judge(slo: Slo, facts: Facts) -> Verdict:
    """Whether it holds."""
    misses = list(_wrong(slo, facts))
    if not (_judges_speed(slo) or facts.knee):
        return Verdict("missed" if misses else "met", misses)
    if facts.client_cpu > SATURATED:
        note = f"the clients used {facts.client_cpu:.0%} of a core, above {SATURATED:.0%}: their own speed was measured"
        return Verdict("missed" if misses else "none", misses, note)
    misses += _slow(slo, facts)
    return Verdict("missed" if misses else "met", misses)


def _wrong(slo: Slo, facts: Facts) -> Iterator[str]:
    """What has nothing to do with speed."""
    n_all = sum(row.n_ok + row.n_busy + row.n_failed for row in facts.rows)
    n_failed = sum(row.n_failed for row in facts.rows)
    n_busy = sum(row.n_busy for row in facts.rows)
    if not n_all:
        yield "no request was answered"
        return
    if n_failed / n_all > slo.failed_share:
        yield f"{n_failed} of {n_all} requests failed ({n_failed / n_all:.2%} > {slo.failed_share:.2%})"
    if slo.busy_share is not None and n_busy / n_all > slo.busy_share:
        yield f"{n_busy} of {n_all} answers asked to come again ({n_busy / n_all:.2%} > {slo.busy_share:.2%})"
    for what, n, limit in (
        ("duplicates", facts.n_duplicates, slo.n_duplicates),
        ("jobs lost", facts.n_lost, slo.n_lost),
        ("requests without an answer", facts.n_unanswered, slo.n_unanswered),
    ):
        if limit is not None and n > limit:
            yield f"{n} {what} > {limit}"


def _limits(slo: Slo) -> Mapping[str, Mapping[str, float]]:
    return {
        "p50_ms": slo.p50_ms,
        "p95_ms": slo.p95_ms,
        "p99_ms": slo.p99_ms,
        "p999_ms": slo.p999_ms,
    }


def _judges_speed(slo: Slo) -> bool:
    return any(_limits(slo).values()) or bool(slo.min_rate) or slo.min_knee > 0


def _slow(slo: Slo, facts: Facts) -> Iterator[str]:
    rows = {row.name: row for row in facts.rows}
    for field, limits in _limits(slo).items():
        for name, limit in limits.items():
            if name not in rows:
                yield f"{name}: no request was answered"
            elif getattr(rows[name], field) > limit:
                yield f"{name}: {field.removesuffix('_ms')} {getattr(rows[name], field):.1f} ms > {limit:g} ms"
    for name, least in slo.min_rate.items():
        rate = rows[name].rate if name in rows else 0.0
        if rate < least:
            yield f"{name}: {rate:.1f}/s < {least:g}/s"
    if facts.knee < slo.min_knee:
        yield f"the knee is at {facts.knee:.0f}/s < {slo.min_knee:g}/s"
