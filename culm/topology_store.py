"""The topology on disk: one file per authority, `<folder>/<authority>.json`, replaced as a whole.

Every authority has a folder of its own. In it its own section is the original, and those of the others are copies: the
last good ones, brought up to date while those authorities can be reached (`adopt`).

A change is made under a lock, against the epoch that its author saw, with a copy of what was before and of what is now
in `history/` (the newest `KEPT` of each authority stay) and one line in `audit.jsonl`, which stays for good. Readers
hold their last good copy: a file that is missing or broken for a moment changes nothing for them.

An epoch is one content, and epochs only grow. A section that is lost is put back by `restore`, never by laying
an older file over it: what steps back, or says another thing at the same epoch, is not believed.
"""

import contextlib
import fcntl
import itertools
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec

from culm import telemetry
from culm.errors import ClientFault, Conflict
from culm.put_back import Copy, put_back
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
    """A row of the audit: whose section was changed between which epochs, by whom, why, and when (unix time).

    `from_epoch` is 0 for the first section, and the copy's for one that was put back. `last_slot` is the highest slot
    number that was handed out by then; -1 in rows that do not say it.
    """

    authority: str
    from_epoch: int
    to_epoch: int
    actor: str
    reason: str
    at: float
    last_slot: int = -1


class Restored(msgspec.Struct, frozen=True):
    """What `restore` did or would do: the section that was in force (None: no good one), the copy, what holds now.

    `after` is `before` where there is nothing to put back.
    """

    before: Section | None
    kept: Copy
    after: Section


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
    return list(itertools.islice(_rows(folder, authority), limit))


def forerunner(folder: Path, authority: str, epoch: int) -> int:
    """The epoch that a section was made from; 0 for the first one, or where nothing of it is kept.

    Raises ClientFault(bad_topology).
    """
    for row in _rows(folder, authority):
        if row.to_epoch == epoch:
            return row.from_epoch
    return epoch - 1 if (folder / HISTORY / f"{authority}-{epoch - 1}.json").exists() else 0


def read_copy(path: Path, authority: str) -> Section:
    """A section from any file. Raises ClientFault (bad_topology, other_authority)."""
    section = _decode(path)
    if section.authority != authority:
        raise ClientFault("other_authority", f"{path} holds the section of {section.authority}, not of {authority}")
    validate(section)
    return section


def copies(folder: Path, authority: str) -> list[Copy]:
    """Every good copy of an authority's section in a folder: the present one, and those of the history."""
    found = []
    for path in [folder / f"{authority}.json", *sorted((folder / HISTORY).glob(f"{authority}-*.json"))]:
        with contextlib.suppress(ClientFault):
            found.append(Copy(str(path), read_copy(path, authority)))
    return found


def known_epoch(folder: Path, authority: str) -> int:
    """The highest epoch that anything in a folder tells of an authority's section; 0 for none.

    Raises ClientFault(bad_topology) for an audit that cannot be read.
    """
    told = [row.to_epoch for row in _rows(folder, authority)]
    return max([*told, *_history(folder / HISTORY, authority), *_epochs(copies(folder, authority))], default=0)


def create(folder: Path, section: Section, who: Who | None = None) -> None:
    """Write a section for the first time, with a row in the audit where its author is named.

    Raises:
        Conflict: section_exists, or section_lost where there was one before: a new one would give out its slots again.
        ClientFault: bad_topology.
    """
    validate(section)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _locked(folder):
        path = folder / f"{section.authority}.json"
        if path.exists():
            raise Conflict("section_exists", f"{path.name} exists")
        if known_epoch(folder, section.authority):
            raise Conflict("section_lost", f"{path} is gone, but its history is there: culm topology restore")
        _publish(folder, section, None if who is None else _row(0, section, who))


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
        Conflict: epoch_changed, stepped_back where a later epoch is known, or name_taken for a name that another
            authority has given already.
        ClientFault: unknown_authority, bad_topology, and what `edit` raises.

    Safe to retry: as the edit is.
    """
    with _locked(folder):
        before = load_section(folder, authority)
        if expected is not None and before.epoch != expected:
            raise Conflict("epoch_changed", f"section {authority} is at epoch {before.epoch}, not at {expected}")
        newest = next(_rows(folder, authority), None)
        if newest is not None and newest.to_epoch > before.epoch:
            raise Conflict(
                "stepped_back",
                f"section {authority} is at epoch {before.epoch}, but was at {newest.to_epoch}: culm topology restore",
            )
        after = edit(before)
        if after is before:
            return before
        if after.epoch != before.epoch + 1:
            raise ClientFault("bad_topology", f"the epoch must grow by one, from {before.epoch}")
        require_free_names(folder, before, after)
        kept = folder / HISTORY / f"{authority}-{before.epoch}.json"
        if not kept.exists():
            kept.parent.mkdir(mode=0o700, exist_ok=True)
            _replace(kept, before)
        _publish(folder, after, _row(before.epoch, after, who))
        return after


def require_free_names(folder: Path, before: Section, after: Section) -> None:
    """Refuse a change that gives a name which another authority has given already. Raises Conflict(name_taken).

    Clashes that came about while the authorities could not see each other are no reason to refuse other changes, and
    neither is a copy of another section that cannot be read.
    """
    others = []
    for path in sorted(folder.glob("*.json")):
        if path.stem != after.authority:
            with contextlib.suppress(ClientFault):
                others.append(read_copy(path, path.stem))
    known = Topology([*others, before], after.authority).clashes
    for clash in Topology([*others, after], after.authority).clashes:
        if clash not in known:
            raise Conflict("name_taken", clash)


def restore(
    folder: Path,
    authority: str,
    who: Who,
    *,
    kept: Copy | None = None,
    others: Sequence[Copy] = (),
    last_slot: int | None = None,
    only_plan: bool = False,
) -> Restored:
    """Put a copy of a section back, as `culm.put_back` says: at an epoch past all that are known.

    Args:
        folder: of the topology; made if it is gone.
        authority: whose section; `folder` is that of its own home.
        who: the author, for the audit.
        kept: what to put back; None for the newest copy there is, unless the section itself is that.
        others: copies that were found elsewhere: none of their epochs and slots is given out again.
        last_slot: the highest slot number that may have been handed out, where nothing that is left says it.
        only_plan: change nothing.

    Raises:
        Conflict: copies_differ, or slots_unknown where the newest epoch is known by its number only.
        ClientFault: no_copy, bad_topology.

    Safe to retry: yes, each time is an epoch more.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _locked(folder):
        path = folder / f"{authority}.json"
        here = copies(folder, authority)
        before = next((copy.section for copy in here if copy.where == str(path)), None)
        found = [*here, *others]
        newest = max(found, key=lambda copy: copy.section.epoch, default=kept)
        chosen = kept or newest
        if chosen is None:
            raise ClientFault("no_copy", f"no good copy of the section {authority} was found in {folder}")
        rows = list(_rows(folder, authority))
        told = [row.to_epoch for row in rows]
        epoch = max([*told, *_history(folder / HISTORY, authority), *_epochs([*found, chosen])])
        if before is not None and chosen.section == before and before.epoch == epoch:
            return Restored(before, chosen, before)
        slots = max((row.last_slot for row in rows), default=-1)
        seen = epoch in _epochs([*found, chosen]) or any(row.to_epoch == epoch and row.last_slot >= 0 for row in rows)
        if not seen and last_slot is None:
            raise Conflict(
                "slots_unknown",
                f"no copy of epoch {epoch} of {authority} is left: bring one (--from), or say the highest slot number "
                "that may have been handed out (--last-slot)",
            )
        after = put_back(chosen, found, epoch=epoch, last_slot=max(slots, -1 if last_slot is None else last_slot))
        if not only_plan:
            if before is None and path.exists():
                # It may hold more than any copy: for whoever looks into what happened.
                path.replace(path.with_suffix(".broken"))
            _publish(folder, after, _row(chosen.section.epoch, after, who))
        return Restored(before, chosen, after)


def adopt(folder: Path, section: Section, first: Callable[[], object] = lambda: None) -> bool:
    """Keep a copy of another authority's section, if it is newer than the one here; whether it was.

    Args:
        folder: of the topology.
        section: what that authority says.
        first: done before it is kept, under the same lock, unless the section is refused: for what comes with it.

    Raises:
        Conflict: stepped_back for an older epoch than the one here, epoch_differs for other content at the same epoch.
        ClientFault: bad_topology for a section that does not hold together.

    Safe to retry: yes.
    """
    validate(section)
    with _locked(folder):
        path = folder / f"{section.authority}.json"
        known = None
        if path.exists():
            with contextlib.suppress(ClientFault):
                known = load_section(folder, section.authority)
        if known is not None:
            require_order(known, section)
        first()
        if known is not None and known.epoch == section.epoch:
            return False
        _replace(path, section)
        return True


def require_order(known: Section, section: Section) -> None:
    """A section never steps back, and an epoch is one content. Raises Conflict (stepped_back, epoch_differs)."""
    if section.epoch < known.epoch:
        raise Conflict(
            "stepped_back", f"section {section.authority} steps back from epoch {known.epoch} to {section.epoch}"
        )
    if section.epoch == known.epoch and section != known:
        raise Conflict("epoch_differs", f"section {section.authority} at epoch {known.epoch} is not what it was")


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

        The last good copy of a section stays where its file is missing or broken, steps back to an older epoch or has
        other content at the same one; the others move on.
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
                known = self.current.sections.get(section.authority)
                if known is not None:
                    require_order(known, section)
            except Conflict as error:
                telemetry.TOPOLOGY_REFUSED.labels(path.stem).inc()
                log.error("the section %s stays at epoch %d: %s", path.stem, self.current.epochs[path.stem], error)  # noqa: TRY400
            except ClientFault as error:
                log.warning("the section %s stays as it was: %s", path.stem, error)
            else:
                sections[section.authority] = section
                # There from the start, as 0.
                telemetry.TOPOLOGY_REFUSED.labels(section.authority)
        return sections


def _rows(folder: Path, authority: str) -> Iterator[Change]:
    """The audit of one authority, newest row first. Raises ClientFault(bad_topology)."""
    try:
        rows = (folder / AUDIT).read_bytes().splitlines()
    except FileNotFoundError:
        return
    except OSError as error:
        raise ClientFault("bad_topology", f"{folder / AUDIT}: {error.strerror}") from None
    for row in reversed(rows):
        # The last line may be half written, by one that was killed or whose disk was full.
        with contextlib.suppress(msgspec.DecodeError):
            one = msgspec.json.decode(row, type=Change)
            if one.authority == authority:
                yield one


def _epochs(found: Sequence[Copy]) -> list[int]:
    return [copy.section.epoch for copy in found]


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


def _publish(folder: Path, section: Section, row: Change | None) -> None:
    """Let a section hold from now on.

    Its copy in the history comes first: whatever happens to the section's own file, what it said is known. One that
    never came to hold is overwritten by the next change.
    """
    history = folder / HISTORY
    history.mkdir(mode=0o700, exist_ok=True)
    _replace(history / f"{section.authority}-{section.epoch}.json", section)
    _replace(folder / f"{section.authority}.json", section)
    if row is not None:
        _append_audit(folder, row)
    _prune(history, section.authority)


def _history(history: Path, authority: str) -> dict[int, Path]:
    """The files of an authority in the history, by epoch, whatever is in them."""
    name = re.compile(rf"{re.escape(authority)}-(\d+)\.json")
    paths = history.iterdir() if history.is_dir() else ()
    return {int(found[1]): path for path in paths if (found := name.fullmatch(path.name))}


def _prune(history: Path, authority: str) -> None:
    """Drop all but the newest. What cannot be dropped stays: the change itself is made."""
    by_epoch = _history(history, authority)
    for epoch in sorted(by_epoch)[:-KEPT]:
        try:
            by_epoch[epoch].unlink()
        except OSError as error:
            log.warning("the history keeps %s: %s", by_epoch[epoch], error)


def _row(from_epoch: int, after: Section, who: Who) -> Change:
    return Change(
        authority=after.authority,
        from_epoch=from_epoch,
        to_epoch=after.epoch,
        actor=who.actor,
        reason=who.reason,
        at=who.at,
        last_slot=max(after.last_slot, *after.placement, -1),
    )


def _append_audit(folder: Path, row: Change) -> None:
    with (folder / AUDIT).open("a+b") as file:
        # What was cut off in the middle of a line must not take this row with it.
        if file.tell():
            file.seek(-1, os.SEEK_END)
        torn = file.read(1) not in {b"", b"\n"}
        file.write(b"\n" * torn + msgspec.json.encode(row) + b"\n")
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    if not folder.is_dir():
        raise ClientFault("bad_topology", f"{folder} is no folder")
    with (folder / ".lock").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
