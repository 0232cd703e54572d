"""A whole cluster of real processes for system tests: router workers, three shards with their servers, the monitor."""

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from culm.client import Client
from culm.wire import Principal
from ops.cli import audit
from ops.cluster import control
from ops.cluster.layout import Layout
from tests import servers
from tests.waiting import eventually_sync

ROOT = Path(__file__).parents[1]
CULM = str(ROOT / "bin" / "culm")
START_S = 90.0
SCALED = {
    "CULM_SHARD_TIMEOUTS__FIRST_LEASE_S": "3",
    "CULM_SHARD_TIMEOUTS__HEARTBEAT_S": "3",
    "CULM_SHARD_TIMEOUTS__GRACE_S": "1",
    "CULM_SHARD_DISPATCH__REAP_INTERVAL_S": "0.2",
    "CULM_SHARD_DISPATCH__SWEEP_INTERVAL_S": "0.5",
}
"""PanDA's time-outs, scaled from hours to seconds."""
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


class Cluster:
    """One running cluster; its supervisor is a child of the test run and dies with it."""

    def __init__(self, layout: Layout, process: "subprocess.Popen[bytes]") -> None:
        self.layout = layout
        self.process = process

    @property
    def processes(self) -> list[control.ProcessStatus]:
        """All processes of all authorities, as their supervisors last said."""
        told = [control.status(home.folder) for home in self.layout.homes]
        return [process for one in told if one is not None for process in one.processes]

    def one(self, name: str) -> control.ProcessStatus:
        """One process of it."""
        return next(process for process in self.processes if process.name == name)

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> int:
        """Send a signal to one of its processes; the pid that it had."""
        pid = self.one(name).pid
        os.kill(pid, number)
        return pid

    def wait_back(self, name: str, killed: int) -> None:
        """Wait until a killed process runs again under another pid."""

        def back() -> bool:
            now = self.one(name)
            return now.pid != killed and now.state == "up"

        eventually_sync(back, START_S, what=f"{name} is back")

    def workers(self) -> list[int]:
        """The router's worker processes."""
        pid = self.one("router").pid
        return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()))

    def token(self, principal: Principal, valid_s: float = 3600.0) -> str:
        """A token of the principal's authority."""
        return self.layout.home(principal.authority).ring.issue(principal, valid_s)

    def client(self, principal: Principal, **options: Any) -> Client:
        """A client of the central router; use it as a context manager."""
        return Client(self.layout.router_url, self.token(principal), **options)

    def audit(self) -> list[str]:
        """What the audit finds, a line each."""
        report = audit.run(self.layout.folder)
        assert not report.missing_shards, report.missing_shards
        return [f"{one.invariant} {one.rule} {one.subject} {one.text}" for one in report.findings]

    def culm(self, *words: str, timeout_s: float = 60.0) -> "subprocess.CompletedProcess[str]":
        """Run the command line on this cluster; `--dir` is added after the words that name the command."""
        return culm(*words, folder=self.layout.folder, timeout_s=timeout_s)


def culm(*words: str, folder: Path, timeout_s: float = 60.0, **options: Any) -> "subprocess.CompletedProcess[str]":
    """Run `bin/culm`; the folder goes by CULM_DIR."""
    environment = os.environ | {"CULM_DIR": str(folder), "COLUMNS": "200"} | options.pop("environment", {})
    return subprocess.run(
        [CULM, *words], env=environment, capture_output=True, text=True, timeout=timeout_s, check=False, **options
    )


@contextmanager
def cluster(folder: Path, environment: dict[str, str] | None = None) -> Iterator[Cluster]:
    """Start a cluster in a folder that need not exist, with scaled time-outs; ends it and all its processes."""
    layout = Layout(folder, servers.free_ports(4))
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "ops", "up", "--foreground", "--dir", str(folder), "--port", str(layout.port)],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | SCALED | (environment or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=die_with_parent,  # noqa: PLW1509  # one call, no Python state
    )
    try:
        eventually_sync(lambda: _is_up(folder, process), START_S, what="the cluster is up")
        yield Cluster(layout, process)
    finally:
        process.terminate()
        try:
            process.wait(30)
        finally:
            process.kill()
            process.wait()


def die_with_parent() -> None:
    """For `preexec_fn`: a child that the test run's death ends."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def pilot(running: Cluster, queue: str, work: Path, *options: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A real pilot process; killed at the end if it still runs."""
    home = running.layout.home("CERN" if queue.startswith("CERN") else "central")
    process = subprocess.Popen(
        [
            *(sys.executable, "-P", "-m", "pilot", "--server", home.router_url, "--queue", queue),
            *("--token-file", str(home.tokens / f"{home.authority}.pilot"), "--work-dir", str(work)),
            *options,
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        preexec_fn=die_with_parent,  # noqa: PLW1509  # one call, no Python state
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def processes_of(folder: Path) -> list[int]:
    """Every process that has the folder, or the folder of its sockets, in its command line."""
    marks = [str(folder).encode(), *(str(home.sockets).encode() for home in Layout(folder).homes)]
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes()
            if any(mark in words for mark in marks) and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
    return found


def remove_sockets(folder: Path) -> None:
    """What a killed cluster leaves outside of its folder."""
    for home in Layout(folder).homes:
        shutil.rmtree(home.sockets, ignore_errors=True)


def decoded(done: "subprocess.CompletedProcess[str]") -> Any:
    """The JSON that a command printed."""
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _is_up(folder: Path, process: "subprocess.Popen[bytes]") -> bool:
    told = [control.status(home.folder) for home in Layout(folder).homes]
    failures = [one.failure for one in told if one is not None]
    assert process.poll() is None, f"the supervisors ended with {process.returncode}: {failures}"
    return all(one is not None and one.alive and one.phase == "up" for one in told)
