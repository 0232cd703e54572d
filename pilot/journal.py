"""What a pilot had in its hands, on disk: so that the next one on this host can finish what a killed one had begun.

    <work>/gate                   held while a folder comes or is taken over
    <work>/<job id>.<attempt>/    one attempt: journal.json, lock, stdout, stderr, payload/
    <work>/ask.<request id>/      a get_job whose answer is not in a journal yet: journal.json, lock

A journal is replaced as a whole and synced. The lock of a folder is held by a live pilot, and dies with it.
"""

import fcntl
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from pilot import processes

JOURNAL = "journal.json"
LOCK = "lock"
GATE = "gate"
GATE_S = 20.0
"""It is held for milliseconds; a holder that was stopped must not stop all others of its host for ever."""
GATE_POLL_S = 0.02
QUESTION_S = 86_400.0
"""After so long the lease that an answer might have given has ended everywhere."""
_ATTEMPT = re.compile(r"\d+\.\d+")
_QUESTION = re.compile(r"ask\.\w+")


class Entry:
    """One folder, locked: `record` is what its journal says; `payload` is where the payload of an attempt runs."""

    def __init__(self, folder: Path, lock: "IO[str]", record: dict[str, Any]) -> None:
        self.folder = folder
        self.record = record
        self._lock = lock

    @property
    def payload(self) -> Path:
        """The payload's work directory."""
        return self.folder / "payload"

    def note(self, **fields: Any) -> None:
        """Add to the record, durably. Raises OSError: the record on disk is the one before."""
        self.record.update(fields)
        beside = self.folder / (JOURNAL + ".new")
        with beside.open("w", encoding="utf-8") as file:
            json.dump(self.record, file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self.folder / JOURNAL)

    def close(self) -> None:
        """Done with: the folder goes. The lock goes last, so that a pilot killed here leaves nothing unowned."""
        _remove_below(self.folder, but={JOURNAL, LOCK})
        for name in (JOURNAL, LOCK):
            with suppress(OSError):
                (self.folder / name).unlink()
        with suppress(OSError):
            self.folder.rmdir()
        self._lock.close()

    def leave(self) -> None:
        """Keep it on disk for a later look, ours or the next pilot's."""
        self._lock.close()


def begin(work: Path, grant: dict[str, Any]) -> Entry:
    """The folder for a granted job. Raises OSError."""
    known = {name: grant[name] for name in ("id", "attempt", "lease_token")}
    entry = _make(work, f"{grant['id']}.{grant['attempt']}", known)
    _remove_below(entry.folder, but={JOURNAL, LOCK})
    entry.payload.mkdir(mode=0o700)
    return entry


def question(work: Path, queue: str) -> Entry:
    """A request id for a get_job, on disk before it is used; one that a dead pilot asked with, if there is one.

    The router gives the same id the same job, so an answer that was lost with its pilot is not lost. Raises OSError.
    """
    for entry in _dead(work, _QUESTION):
        if entry.record.get("queue") == queue:
            return entry
        if _age_s(entry.folder) > QUESTION_S:
            entry.close()
        else:
            entry.leave()
    request_id = secrets.token_hex(12)
    return _make(work, f"ask.{request_id}", {"request_id": request_id, "queue": queue})


def left_behind(work: Path) -> Iterator[Entry]:
    """The attempts that dead pilots have left here, with no process of theirs running; never a live pilot's."""
    for entry in _dead(work, _ATTEMPT):
        pid, started = entry.record.get("pid"), entry.record.get("started")
        processes.end_left(entry.folder, pid if isinstance(pid, int) else 0, started if isinstance(started, int) else 0)
        if entry.record.keys() >= {"id", "attempt", "lease_token"}:
            yield entry
        else:
            # Nothing is known of it: its lease's end tells the shard.
            entry.close()


def _dead(work: Path, kind: re.Pattern[str]) -> Iterator[Entry]:
    for folder in sorted(work.iterdir()) if work.is_dir() else []:
        if not kind.fullmatch(folder.name):
            continue
        with _gate(work):
            lock = _lock(folder)
            if lock is None:
                # Without a lock nobody is in it: a pilot was killed while it made or removed it.
                with suppress(OSError):
                    folder.rmdir()
                continue
            record = _read(folder)
        if kind is _QUESTION and not record:
            Entry(folder, lock, record).close()
        else:
            yield Entry(folder, lock, record)


def _make(work: Path, name: str, record: dict[str, Any]) -> Entry:
    folder = work / name
    with _gate(work):
        folder.mkdir(mode=0o700, exist_ok=True)
        (folder / LOCK).touch(mode=0o600)
        lock = _lock(folder)
        if lock is None:
            raise BlockingIOError(f"{folder} is in another pilot's hands")
        entry = Entry(folder, lock, record)
        entry.note()
    return entry


@contextmanager
def _gate(work: Path) -> Iterator[None]:
    """One pilot at a time makes folders or takes them over: between making one and locking it, it looks dead.

    Raises TimeoutError after `GATE_S`: who holds it is stopped, or his disk hangs; an OSError like any other here.
    """
    with (work / GATE).open("a+", encoding="utf-8") as file:
        deadline = time.monotonic() + GATE_S
        while not _try_lock(file):
            if time.monotonic() > deadline:
                file.seek(0)
                holder = file.read(20).strip() or "unknown"
                raise TimeoutError(
                    f"{work / GATE} has been held for {GATE_S:.0f} s by process {holder}, which may be stopped"
                )
            time.sleep(GATE_POLL_S)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _try_lock(file: "IO[str]") -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _lock(folder: Path) -> "IO[str] | None":
    """None if it is held, or there is none."""
    try:
        file = (folder / LOCK).open("r+", encoding="utf-8")
    except OSError:
        return None
    if not _try_lock(file):
        file.close()
        return None
    return file


def _read(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / JOURNAL).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _age_s(folder: Path) -> float:
    try:
        return time.time() - (folder / JOURNAL).stat().st_mtime
    except OSError:
        return 0.0


def _remove_below(folder: Path, but: set[str]) -> None:
    """Remove what is in a folder, also where a payload forbade it; what cannot be removed stays."""
    for root, names, _ in os.walk(folder):
        for name in names:
            path = Path(root) / name
            if not path.is_symlink():
                with suppress(OSError):
                    path.chmod(0o700)
    for path in folder.iterdir() if folder.is_dir() else []:
        if path.name in but:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()
