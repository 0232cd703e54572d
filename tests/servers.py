"""Real servers for tests: MariaDB (or MySQL) and Valkey, each test run with its own, on unix sockets only."""

import ctypes
import os
import random
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ops.engines import innodb, valkey
from tests.waiting import eventually_sync

START_S = 60.0
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


def cache() -> Path:
    """Where engines and template data directories are kept between runs, as the product does."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "culm"


class Server:
    """A server process that dies with the test run; `kill` and `start` as often as a test likes."""

    def __init__(self, argv: list[str], socket_path: Path, environment: Mapping[str, str] | None = None) -> None:
        self.socket = socket_path
        self._argv = argv
        self._environment = os.environ | dict(environment or {})
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Its process; 0 while it does not run."""
        return self._process.pid if self._process is not None else 0

    def start(self) -> None:
        """Start it and wait until it answers."""
        self.socket.unlink(missing_ok=True)
        self._process = subprocess.Popen(
            self._argv,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=lambda: _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),  # noqa: PLW1509  # one call, no Python state
        )
        eventually_sync(self._answers, START_S, what=f"{self._argv[0]} answers")

    def kill(self) -> None:
        """kill -9."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """End it politely; its data stays."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(30)
            self._process = None

    def _answers(self) -> bool:
        assert self._process is not None and self._process.poll() is None, f"{self._argv} ended at once"
        with socket.socket(socket.AF_UNIX) as client:
            try:
                client.connect(str(self.socket))
            except OSError:
                return False
        return True


def free_ports(n_ports: int) -> int:
    """The first of `n_ports` consecutive ports of loopback that nobody uses; below the kernel's ephemeral range."""
    for _ in range(1000):
        first = random.randrange(20_000, 32_000)
        if all(map(_is_free, range(first, first + n_ports))):
            return first
    raise AssertionError("no free ports")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def folder() -> "tempfile.TemporaryDirectory[str]":
    """A short path: a unix socket's holds 107 bytes at most."""
    return tempfile.TemporaryDirectory(prefix="culm-t-", dir="/tmp")


@contextmanager
def database(engine: innodb.Engine) -> Iterator[Server]:
    """A private database server of an engine."""
    with folder() as name:
        data, at = Path(name) / "db", Path(name) / "db.sock"
        innodb.prepare(engine, data, cache())
        server = Server(innodb.argv(engine, data, at), at, engine.environment)
        server.start()
        try:
            yield server
        finally:
            server.kill()


@contextmanager
def cache_server() -> Iterator[Server]:
    """A private Valkey."""
    with folder() as name:
        at = Path(name) / "valkey.sock"
        server = Server(valkey.argv(at, Path(name)), at)
        server.start()
        try:
            yield server
        finally:
            server.kill()
