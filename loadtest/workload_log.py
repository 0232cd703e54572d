"""The Standard Workload Format: one line per job of a real grid's log.

Format: the Parallel Workloads Archive, version 2.2: 18 whole numbers a line, -1 for unknown; lines that begin with ";"
are the header, in which `Partition: 7 pnpi.nw.ru` names a site.
"""

import gzip
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Final

from culm.errors import ClientFault

_N_FIELDS: Final = 18
_SUBMIT, _RUN, _USER, _GROUP, _PARTITION = 1, 3, 11, 12, 15
_SITE: Final = re.compile(r"^;\s*Partition:\s*(\d+)\s+(\S+)")
_REGIONS: Final = {
    "at": "Austria", "be": "Belgium", "bg": "Bulgaria", "ca": "Canada", "ch": "Switzerland", "cn": "China",
    "cy": "Cyprus", "cz": "CzechR", "de": "Germany", "dk": "Nordic", "edu": "US", "es": "Spain", "fr": "France",
    "gov": "US", "gr": "Greece", "ie": "Ireland", "il": "Israel", "it": "Italy", "jp": "Japan", "nl": "Holland",
    "pk": "Pakistan", "pl": "Poland", "pt": "Portugal", "ro": "Romania", "ru": "Russia", "se": "Nordic",
    "sg": "Singapore", "si": "Slovenia", "sk": "Slovakia", "su": "Russia", "tr": "Turkey", "tw": "Taiwan", "uk": "UK",
}  # fmt: skip
"""Top-level domain -> region as PanDA's catalogue of 2009 names it."""
CERN_DOMAIN: Final = ".cern.ch"


@dataclass(frozen=True, slots=True)
class LoggedJob:
    """One job: when it came (seconds after the first), how long it ran (seconds), who sent it, where it ran."""

    at_s: float
    run_s: float
    user: str
    group: str
    site: str


def read(path: Path, n_jobs: int) -> list[LoggedJob]:
    """The first jobs of a log, in the order of their submission. Raises ClientFault(bad_log) with the line's number."""
    try:
        with (
            gzip.open(path, "rt", encoding="latin-1") if path.suffix == ".gz" else path.open(encoding="latin-1") as file
        ):
            jobs = list(islice(_jobs(file), n_jobs))
    except (OSError, EOFError) as error:
        raise ClientFault("bad_log", f"cannot read {path}: {error}") from None
    if not jobs:
        raise ClientFault("bad_log", f"{path} holds no job")
    first = min(job.at_s for job in jobs)
    return sorted(
        (LoggedJob(job.at_s - first, job.run_s, job.user, job.group, job.site) for job in jobs),
        key=lambda job: job.at_s,
    )


def region_of(site: str) -> str:
    """The region of a site by its domain name; CERN's own, the country's, else "International"."""
    if site.endswith(CERN_DOMAIN):
        return "CERN"
    return _REGIONS.get(site.rpartition(".")[2], "International")


def _jobs(file: IO[str]) -> Iterator[LoggedJob]:
    sites: dict[str, str] = {}
    for number, line in enumerate(file, start=1):
        if line.startswith(";"):
            named = _SITE.match(line)
            if named:
                sites[named[1]] = named[2]
            continue
        fields = line.split()
        if not fields:
            continue
        if len(fields) != _N_FIELDS:
            raise ClientFault("bad_log", f"line {number} has {len(fields)} fields, not {_N_FIELDS}")
        try:
            at_s, run_s = float(fields[_SUBMIT]), float(fields[_RUN])
        except ValueError:
            raise ClientFault(
                "bad_log", f"line {number}: {fields[_SUBMIT]!r} and {fields[_RUN]!r} are no times"
            ) from None
        partition = fields[_PARTITION]
        yield LoggedJob(
            at_s=at_s,
            # -1: the log does not know; such jobs end at once.
            run_s=max(run_s, 0.0),
            user=f"user-{fields[_USER]}",
            group=f"group-{fields[_GROUP]}",
            site=sites.get(partition, f"site-{partition}"),
        )
