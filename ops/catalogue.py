"""A catalogue of computing queues as CSV, read into site registrations.

The columns are those of PanDA's schedconfig as its controller kept them in 2009: nickname (the computing queue), site,
siteid, region, status, cmtconfig, releases, maxtime (s), memory (MB). Empty means unknown, 0 means no limit. `space` is
the free space of the site's storage, not a limit of a job, and is not taken over.

A file may have no column for a field, and no file has one for cores or leases: there a computing queue that is known
stays as it is.
"""

import csv
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec

from culm.errors import ClientFault
from culm.topology import Queue, Site, SiteRegistration

REQUIRED: Final = frozenset({"nickname", "site", "region"})
FIELD_OF: Final = {
    "status": "status",
    "maxtime": "walltime_s",
    "memory": "memory_mb",
    "releases": "releases",
    "cmtconfig": "platforms",
}
"""Column -> the field of a computing queue that it gives."""
_OPTIONAL: Final = ("siteid", *FIELD_OF)
_PASSED_OVER: Final = ("space",)
UNKNOWN_REGION: Final = "unknown"
_STATUS: Final = {
    "online": "online",
    "offline": "offline",
    "test": "test",
    "brokeroff": "brokeroff",
    # Not in use any more, or never set: no job may go there until an operator says so.
    "obsolete": "offline",
    "": "offline",
}
_ANALYSIS_PREFIX: Final = "ANALY"
"""PanDA's naming rule for analysis queues."""


@dataclass(frozen=True)
class Catalogue:
    """The sites in the order of their first computing queue, and the fields that the file has columns for."""

    sites: list[SiteRegistration]
    fields: frozenset[str]
    unused: list[str] = field(default_factory=list)
    """Columns that are not known here."""

    def remarks(self) -> list[str]:
        """What the reader of the file may not expect, a line each."""
        told = [] if self.sites else ["the file has no computing queue"]
        if self.unused:
            told.append(f"columns that are not used: {', '.join(self.unused)}")
        if "status" not in self.fields and self.sites:
            told.append("there is no column `status`: computing queues that are new are offline")
        return told

    def over(self, known: Mapping[str, Site]) -> list[SiteRegistration]:
        """The registrations that change nothing but these fields in computing queues that are known. Pure."""
        return [
            msgspec.structs.replace(
                one, queues={name: self._over(queue, known.get(one.name), name) for name, queue in one.queues.items()}
            )
            for one in self.sites
        ]

    def _over(self, queue: Queue, site: Site | None, name: str) -> Queue:
        before = site.queues.get(name) if site is not None else None
        if before is None:
            return queue
        # No reason: a status that an operator gave one for is kept where it is registered.
        return msgspec.structs.replace(before, reason="", **{field: getattr(queue, field) for field in self.fields})


def read(path: Path) -> Catalogue:
    """Read a catalogue. Raises ClientFault(bad_catalogue) with the line's number."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file)
            sites = _sites(rows)
            columns = rows.fieldnames or ()
            known = {*REQUIRED, *_OPTIONAL, *_PASSED_OVER}
            return Catalogue(
                sites,
                frozenset(FIELD_OF[column] for column in columns if column in FIELD_OF),
                [column for column in columns if column not in known],
            )
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ClientFault("bad_catalogue", f"cannot read {path}: {error}") from None


def _sites(rows: "csv.DictReader[str]") -> list[SiteRegistration]:
    missing = REQUIRED - set(rows.fieldnames or ())
    if missing:
        raise ClientFault("bad_catalogue", f"columns are missing: {', '.join(sorted(missing))}")
    regions: dict[str, str] = {}
    queues: dict[str, dict[str, Queue]] = {}
    for line, row in _numbered(rows):
        site = _site_of(row)
        region = row["region"] or UNKNOWN_REGION
        if regions.setdefault(site, region) != region:
            raise _bad(line, f"site {site} is in {regions[site]} above and in {region} here")
        name = row["nickname"]
        if not name or any(name in known for known in queues.values()):
            raise _bad(line, f"the computing queue {name!r} has no name or stands twice")
        queues.setdefault(site, {})[name] = _queue(line, row)
    return [SiteRegistration(name=site, region=regions[site], queues=known) for site, known in queues.items()]


def _numbered(rows: Iterable[dict[str, str]]) -> Iterator[tuple[int, dict[str, str]]]:
    for line, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise _bad(line, "it has another number of fields than the header")
        yield line, dict.fromkeys(_OPTIONAL, "") | {name: value.strip() for name, value in row.items()}


def _site_of(row: dict[str, str]) -> str:
    """Queues whose site is unknown ("?") each stand for themselves, unless they name a site id."""
    return row["site"] if row["site"] not in {"", "?"} else row["siteid"] or row["nickname"]


def _queue(line: int, row: dict[str, str]) -> Queue:
    if row["status"] not in _STATUS:
        raise _bad(line, f"the status {row['status']!r} is none of {', '.join(filter(None, _STATUS))}")
    described = {
        "status": _STATUS[row["status"]],
        "type": "analysis" if row["nickname"].startswith(_ANALYSIS_PREFIX) else "unified",
        "memory_mb": row["memory"] or "0",
        "walltime_s": row["maxtime"] or "0",
        "releases": [word for word in row["releases"].split("|") if word],
        "platforms": [row["cmtconfig"]] if row["cmtconfig"] else [],
    }
    try:
        return msgspec.convert(described, Queue, strict=False)
    except msgspec.ValidationError as error:
        raise _bad(line, str(error)) from None


def _bad(line: int, message: str) -> ClientFault:
    return ClientFault("bad_catalogue", f"line {line}: {message}")
