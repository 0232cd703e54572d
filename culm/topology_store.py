"""The topology on disk: one file per authority, `<folder>/<authority>.json`, replaced as a whole.

Every authority has a folder of its own. In it its own section is the original, and those of the others are copies: the
last good ones, brought up to date while those authorities can be reached (`adopt`).

A change is made under a lock, against the epoch that its author saw, with a copy of what was before in `history/` (the
newest `KEPT` of each authority stay) and one line in `audit.jsonl`, which stays for good. Readers hold their last good
copy: a file that is missing or broken for a moment changes nothing for them.
"""

import contextlib
import fcntl
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import msgspec

from culm.errors import ClientFault, Conflict
from culm.topology import Section, Topology, validate

AUDIT: Final = "audit.jsonl"
HISTORY: Final = "history"
KEPT: Final = 200
"""Sections of the past, per authority."""

log = logging.getLogger("culm.topology")


class Who(msgspec.Struct, frozen=True, kw_only=True):
    """The author of a change, for the audit: who, why, and when in seconds since the epoch."""

    actor: str
    reason: str
    at: float


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """A row of the audit: whose section was changed between which epochs, by whom, why, and when (unix time)."""

    authority: str
    from_epoch: int
    to_epoch: int
    actor: str
    reason: str
    at: float


def load(folder: Path, home: str | None = None) -> Topology:
    """Read every section; `home` as in Topology. Raises ClientFault(bad_topology) if one is broken or none is there."""
    files = sorted(folder.glob("*.json"))
    if not files:
        raise ClientFault("bad_topology", f"{folder} holds no section of a topology")
    return Topology((_read(path) for path in files), home)


def load_section(folder: Path, authority: str) -> Section:
    """Read one section. Raises ClientFault (unknown_authority, bad_topology)."""
    path = folder / f"{authority}.json"
    if not path.is_file():
        raise ClientFault("unknown_authority", f"{folder} holds no section of {authority!r}", http_status=404)
    return _read(path)


def load_epoch(folder: Path, authority: str, epoch: int) -> Section:
    """An authority's section as it was at an epoch: the newest `KEPT` are there.

    Raises ClientFault (unknown_authority, unknown_epoch, bad_topology).
    """
    now = load_section(folder, authority)
    if epoch == now.epoch:
        return now
    path = folder / HISTORY / f"{authority}-{epoch}.json"
    if not path.exists():
        raise ClientFault(
            "unknown_epoch", f"epoch {epoch} of {authority} is not kept (it is at {now.epoch})", http_status=404
        )
    return _decode(path)


def changes(folder: Path, authority: str, limit: int) -> list[Change]:
    """The newest so many changes of an authority's section, newest first. Raises ClientFault(bad_topology)."""
    try:
        rows = (folder / AUDIT).read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ClientFault("bad_topology", f"{folder / AUDIT}: {error.strerror}") from None
    found: list[Change] = []
    for row in reversed(rows):
        # The last line may be half written, by one that was killed or whose disk was full.
        with contextlib.suppress(msgspec.DecodeError):
            one = msgspec.json.decode(row, type=Change)
            if one.authority == authority:
                found.append(one)
        if len(found) == limit:
            break
    return found


def create(folder: Path, section: Section) -> None:
    """Write a section for the first time. Raises Conflict(section_exists), ClientFault(bad_topology)."""
    validate(section)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _locked(folder):
        path = folder / f"{section.authority}.json"
        if path.exists():
            raise Conflict("section_exists", f"{path.name} exists")
        _replace(path, section)


def change(
    folder: Path, authority: str, edit: Callable[[Section], Section], who: Who, *, expected: int | None = None
) -> Section:
    """Change one section: `edit` is pure and sees the newest one; its result is validated against all others.

    Args:
        folder: of the topology.
        authority: whose section.
        edit: returns the same section if there is nothing to change.
        who: the author, for the audit.
        expected: the epoch that the author saw; None to build on whatever is there.

    Raises:
        Conflict: epoch_changed, or name_taken for a name that another authority has given already.
        ClientFault: unknown_authority, bad_topology, and what `edit` raises.

    Safe to retry: as the edit is.
    """
    with _locked(folder):
        before = load_section(folder, authority)
        if expected is not None and before.epoch != expected:
            raise Conflict("epoch_changed", f"section {authority} is at epoch {before.epoch}, not at {expected}")
        after = edit(before)
        if after is before:
            return before
        if after.epoch != before.epoch + 1:
            raise ClientFault("bad_topology", f"the epoch must grow by one, from {before.epoch}")
        others = [section for name, section in load(folder, authority).sections.items() if name != authority]
        # Clashes that came about while the authorities could not see each other are no reason to refuse other changes.
        known = Topology([*others, before], authority).clashes
        for clash in Topology([*others, after], authority).clashes:
            if clash not in known:
                raise Conflict("name_taken", clash)
        history = folder / HISTORY
        history.mkdir(mode=0o700, exist_ok=True)
        _replace(history / f"{authority}-{before.epoch}.json", before)
        _replace(folder / f"{authority}.json", after)
        _append_audit(folder, authority, (before.epoch, after.epoch), who)
        _prune(history, authority)
        return after


def adopt(folder: Path, section: Section) -> bool:
    """Keep a copy of another authority's section, if it is newer than the one here; whether it was.

    Raises ClientFault(bad_topology) for a section that does not hold together. Safe to retry: yes.
    """
    validate(section)
    with _locked(folder):
        path = folder / f"{section.authority}.json"
        if path.exists():
            with contextlib.suppress(ClientFault):
                if load_section(folder, section.authority).epoch >= section.epoch:
                    return False
        _replace(path, section)
        return True


class TopologyCache:
    """The topology as last read well; a look for a newer one costs a few stat calls. `home` as in Topology."""

    def __init__(self, folder: str | Path, home: str | None = None) -> None:
        self._folder = Path(folder)
        self._home = home
        self._seen: tuple[tuple[str, int, int], ...] = ()
        self.current = Topology([], home)
        self.refresh_if_changed()

    def refresh_if_changed(self) -> bool:
        """Read again if a file has changed; whether there is something new. Never raises.

        The last good copy of a section stays where its file is missing or broken, and the others move on.
        """
        try:
            seen = tuple(
                (path.name, info.st_mtime_ns, info.st_ino)
                for path in sorted(self._folder.glob("*.json"))
                for info in [path.stat()]
            )
            if seen == self._seen:
                return False
            self.current = Topology((self.current.sections | self._good_sections()).values(), self._home)
        except (ClientFault, OSError) as error:
            log.warning("the topology stays at %s: %s", self.current.epochs, error)
            return False
        self._seen = seen
        for clash in self.current.clashes:
            log.warning("passed over: %s", clash)
        return True

    def _good_sections(self) -> dict[str, Section]:
        sections = {}
        for path in sorted(self._folder.glob("*.json")):
            try:
                section = _read(path)
                validate(section)
            except ClientFault as error:
                log.warning("the section %s stays as it was: %s", path.stem, error)
            else:
                sections[section.authority] = section
        return sections


def _decode(path: Path) -> Section:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Section)
    except (msgspec.DecodeError, UnicodeDecodeError, OSError) as error:
        raise ClientFault("bad_topology", f"{path}: {error}") from None


def _read(path: Path) -> Section:
    section = _decode(path)
    if section.authority != path.stem:
        raise ClientFault("bad_topology", f"{path} holds the section of {section.authority}")
    return section


def _replace(path: Path, section: Section) -> None:
    """Atomic and durable: written beside, synced, renamed, the folder synced."""
    beside = path.with_suffix(".new")
    with beside.open("wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(section), indent=1))
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _prune(history: Path, authority: str) -> None:
    """Drop all but the newest. What cannot be dropped stays: the change itself is made."""
    name = re.compile(rf"{re.escape(authority)}-(\d+)\.json")
    by_epoch = {int(found[1]): path for path in history.iterdir() if (found := name.fullmatch(path.name))}
    for epoch in sorted(by_epoch)[:-KEPT]:
        try:
            by_epoch[epoch].unlink()
        except OSError as error:
            log.warning("the history keeps %s: %s", by_epoch[epoch], error)


def _append_audit(folder: Path, authority: str, epochs: tuple[int, int], who: Who) -> None:
    row = Change(
        authority=authority, from_epoch=epochs[0], to_epoch=epochs[1], actor=who.actor, reason=who.reason, at=who.at
    )
    with (folder / AUDIT).open("ab") as file:
        file.write(msgspec.json.encode(row) + b"\n")
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    if not folder.is_dir():
        raise ClientFault("bad_topology", f"{folder} is no folder")
    with (folder / ".lock").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
