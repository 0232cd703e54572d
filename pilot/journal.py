"""What a pilot had in its hands, on disk: so that the next one on this host can finish what a killed one had begun.

`<work>/<job id>.<attempt>/journal.json` is replaced as a whole and synced; the folder's lock is held by a live pilot.
"""

import fcntl
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

JOURNAL = "journal.json"
LOCK = "lock"


class Entry:
    """The folder of one attempt: `record` is what is known of it; `payload` is where the payload runs."""

    def __init__(self, folder: Path, lock: "IO[str]", record: dict[str, Any]) -> None:
        self.folder = folder
        self.record = record
        self._lock = lock

    @property
    def payload(self) -> Path:
        """The payload's work directory."""
        return self.folder / "payload"

    def note(self, **fields: Any) -> None:
        """Add to the record, durably."""
        self.record.update(fields)
        beside = self.folder / (JOURNAL + ".new")
        with beside.open("w", encoding="utf-8") as file:
            json.dump(self.record, file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self.folder / JOURNAL)

    def close(self) -> None:
        """Done with: the folder goes."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()


def begin(work: Path, grant: dict[str, Any]) -> Entry:
    """The folder for a granted job. Raises OSError."""
    folder = work / f"{grant['id']}.{grant['attempt']}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = _lock(folder)
    if lock is None:
        raise OSError(f"{folder} is in another pilot's hands")
    known = {"id": grant["id"], "attempt": grant["attempt"], "lease_token": grant["lease_token"]}
    entry = Entry(folder, lock, known)
    shutil.rmtree(entry.payload, ignore_errors=True)
    entry.payload.mkdir(mode=0o700)
    entry.note()
    return entry


def left_behind(work: Path) -> Iterator[Entry]:
    """What dead pilots have left here; never what a live one holds."""
    for folder in sorted(work.iterdir()) if work.is_dir() else []:
        if not (folder / LOCK).exists():
            continue
        lock = _lock(folder)
        if lock is None:
            continue
        try:
            record = json.loads((folder / JOURNAL).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            record = {}
        yield Entry(folder, lock, record if isinstance(record, dict) else {})


def end_group(record: dict[str, Any]) -> None:
    """Kill the payload that a dead pilot left running; a pid that meanwhile means another process is left alone."""
    pid = record.get("pid")
    if isinstance(pid, int) and pid > 1 and start_time(pid) == record.get("started") != 0:
        try:
            os.killpg(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            return


def start_time(pid: int) -> int:
    """When a process began, in the kernel's ticks; 0 if there is none."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return 0


def _lock(folder: Path) -> "IO[str] | None":
    file = (folder / LOCK).open("w", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file
