"""The machine: versions of what is installed, the disk, the ports."""

import contextlib
import importlib.metadata
import os
import platform
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from culm import __version__
from culm.errors import CulmError
from ops.cluster.control import Status
from ops.cluster.layout import Layout
from ops.doctor.check import Check
from ops.engines import innodb, valkey

LOCK: Final = Path(__file__).parents[2] / "requirements.lock"
OLDEST: Final = {"mariadb": (10, 6), "mysql": (8, 0)}
"""SKIP LOCKED came with these."""
N_SYNCS: Final = 31
SYNC_BYTES: Final = 4096
SYNC_LIMIT_S: Final = 5.0
SLOW_MS: Final = 10.0
NO_DISK_MS: Final = 0.01
"""Faster than any device: the memory of a tmpfs, or a disk that does not wait."""
SCARCE_BYTES: Final = 5 << 30
FULL_BYTES: Final = 1 << 30
_PINNED: Final = re.compile(r"^([\w.-]+)==([^\s;]+)( ;)?", re.MULTILINE)


def versions(cache: Path) -> Iterator[Check]:
    """Python, the packages against their lock file, the engine, Valkey. Fetches nothing."""
    yield Check(name="culm", text=f"{__version__}, Python {platform.python_version()}")
    yield packages(LOCK.read_text(encoding="utf-8") if LOCK.is_file() else "")
    yield _engine(cache)
    try:
        told = subprocess.run(
            [str(valkey.binary()), "--version"], capture_output=True, text=True, timeout=10, check=True
        ).stdout
    except (CulmError, OSError, subprocess.SubprocessError) as error:
        advice = "install one and name it in the shards' `redis`"
        yield Check(name="valkey", level="warn", text=f"the package's does not run: {error}", advice=advice)
    else:
        yield Check(name="valkey", text=" ".join(word for word in told.split() if word.startswith("v=")))


def packages(lock: str) -> Check:
    """What is installed against the text of a lock file."""
    if not lock:
        return Check(name="packages", level="warn", text="there is no lock file to compare with")
    pinned = _PINNED.findall(lock)
    wrong = []
    for name, wanted, conditional in pinned:
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if not conditional:
                wrong.append(f"{name} is missing")
        else:
            if installed != wanted:
                wrong.append(f"{name} is {installed}, not {wanted}")
    if wrong:
        told = "; ".join(wrong[:5]) + ("; .." if len(wrong) > 5 else "")
        return Check(name="packages", level="warn", text=told, advice="bin/culm installs by requirements.lock")
    return Check(name="packages", text=f"{len(pinned)} as in requirements.lock")


def _engine(cache: Path) -> Check:
    try:
        engine = innodb.present(cache)
    except CulmError as error:
        return Check(name="engine", level="bad", text=error.message, advice="correct CULM_MYSQLD")
    if engine is None:
        return Check(name="engine", level="warn", text="none is installed", advice="culm up fetches one")
    told = f"{engine.kind} {engine.version}, {engine.binary}"
    oldest = OLDEST[engine.kind]
    if tuple(map(int, engine.version.split(".")))[:2] < oldest:
        return Check(name="engine", level="bad", text=told, advice=f"{'.'.join(map(str, oldest))} or newer is needed")
    return Check(name="engine", text=told)


# --- the disk --------------------------------------------------------------------------------------------------------


def storage(layout: Layout) -> Iterator[Check]:
    """Free space, and how long a commit must wait for the disk that the databases are or will be on."""
    data = layout.folder / "data"
    folder = next(path for path in (data, *data.parents) if path.is_dir())
    try:
        usage = shutil.disk_usage(folder)
        yield space(folder, usage.free)
        yield sync_time(folder, sync_ms(folder))
    except OSError as error:
        yield Check(name="disk", level="bad", text=f"{folder}: {error.strerror}", advice="--dir names another folder")


def space(folder: Path, free_bytes: int) -> Check:
    """Judge the free space."""
    told = f"{free_bytes / (1 << 30):.1f} GiB free at {folder}"
    if free_bytes >= SCARCE_BYTES:
        return Check(name="disk space", text=told)
    advice = "make space: a full disk stops submits"
    return Check(name="disk space", level="bad" if free_bytes < FULL_BYTES else "warn", text=told, advice=advice)


def sync_time(folder: Path, median_ms: float) -> Check:
    """Judge the median time of an fdatasync."""
    told = f"{median_ms:.3g} ms (median) at {folder}"
    if median_ms < NO_DISK_MS:
        advice = "nothing that was acknowledged outlives this machine: choose a folder on a disk"
        return Check(name="fdatasync", level="warn", text=told, advice=advice)
    if median_ms > SLOW_MS:
        advice = "every commit waits for it: a faster disk gives more jobs per second"
        return Check(name="fdatasync", level="warn", text=told, advice=advice)
    return Check(name="fdatasync", text=told)


def sync_ms(folder: Path) -> float:
    """The median time of an fdatasync there, in milliseconds. Raises OSError."""
    times: list[float] = []
    block = os.urandom(SYNC_BYTES)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        end = time.monotonic() + SYNC_LIMIT_S
        while len(times) < N_SYNCS and time.monotonic() < end:
            file.write(block)
            began = time.perf_counter()
            os.fdatasync(file.fileno())
            times.append((time.perf_counter() - began) * 1000)
    return statistics.median(times)


# --- the ports -------------------------------------------------------------------------------------------------------


def ports(layout: Layout, alive: Status | None) -> Iterator[Check]:
    """Whether the ports are free, or held by this cluster."""
    for port, name in ((layout.port, layout.router), (layout.port + 1, layout.monitor)):
        inodes = _listening(port)
        holders = _holders(inodes)
        ours = {one.pid for one in alive.processes if one.name == name} if alive is not None else set()
        if not inodes:
            free = Check(name=f"port {port}", text=f"free, for the {name}")
            down = Check(
                name=f"port {port}", level="bad", text=f"the {name} does not listen", advice="culm logs " + name
            )
            yield down if alive is not None and alive.phase == "up" else free
        elif any(_session(pid) in ours for pid in holders):
            yield Check(name=f"port {port}", text=f"held by this cluster's {name}")
        else:
            who = ", ".join(f"{_command(pid)} ({pid})" for pid in holders) or "a process of another user"
            advice = f"end it, or choose another with --port: the {name} needs it"
            yield Check(name=f"port {port}", level="bad", text=f"held by {who}", advice=advice)


def _listening(port: int) -> set[str]:
    """The inodes of the sockets that listen at a port."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for row in _lines(Path(table)):
            # sl, local address, remote address, state, queues, timer, retransmits, uid, timeout, inode (proc(5))
            fields = row.split()
            if len(fields) > 9 and fields[3] == "0A" and fields[1].endswith(f":{port:04X}"):
                found.add(fields[9])
    return found


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _holders(inodes: Iterable[str]) -> list[int]:
    """The processes that hold one of these sockets, as far as this user may see."""
    wanted = {f"socket:[{inode}]" for inode in inodes}
    found = []
    for folder in Path("/proc").glob("[0-9]*") if wanted else ():
        # A process of somebody else's, or one that has just ended.
        with contextlib.suppress(OSError):
            if wanted & {_target(path) for path in (folder / "fd").iterdir()}:
                found.append(int(folder.name))
    return sorted(found)


def _target(path: Path) -> str:
    """What a link of /proc leads to, "" for one that was closed meanwhile."""
    try:
        return str(path.readlink())
    except OSError:
        return ""


def _session(pid: int) -> int:
    """Every process of a cluster leads a session of its own; its workers are in it."""
    try:
        return os.getsid(pid)
    except OSError:
        return 0


def _command(pid: int) -> str:
    return "".join(_lines(Path(f"/proc/{pid}/comm"))) or "?"
