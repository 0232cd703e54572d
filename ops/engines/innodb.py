"""An InnoDB server for a shard: found or fetched, its data directory copied from a template, its command line.

Order (design section 7): CULM_MYSQLD, `mariadbd` or `mysqld` on this machine, Debian's packages by apt when root, the
same packages unpacked into a private prefix otherwise.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from culm.errors import ClientFault

PACKAGES: Final = ("mariadb-server-core", "mariadb-client-core")
INSTALL_TIMEOUT_S: Final = 300
_FOLDERS: Final = ("/usr/sbin", "/usr/local/sbin", "/usr/libexec", "/usr/bin")
_BINARY: Final = "usr/sbin/mariadbd"
_VERSION: Final = re.compile(r"Ver (\d+\.\d+\.\d+)")


@dataclass(frozen=True)
class Engine:
    """A server's binary. `prefix` is the root of a private unpacking, None for an installed one."""

    kind: Literal["mariadb", "mysql"]
    binary: Path
    version: str
    prefix: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def share(self) -> Path:
        """Where the server's messages and system tables' SQL are."""
        root = (self.prefix or Path("/")) / "usr/share"
        # Debian 12's MariaDB 10.11 keeps them under the old name.
        return next(
            (root / name for name in ("mariadb", "mysql") if (root / name / "english").is_dir()), root / "mysql"
        )


def find(cache: Path) -> Engine:
    """The engine of this machine, fetched if need be. Raises ClientFault(no_engine) with what to install."""
    known = present(cache)
    if known is not None:
        return known
    if shutil.which("apt-get") is None:
        raise _missing("there is no apt to fetch one")
    if os.getuid() == 0:
        _install()
        installed = _installed()
        if installed is None:
            raise _missing("apt installed none")
        return installed
    return _unpacked(cache / "engines")


def present(cache: Path) -> Engine | None:
    """The engine that is on this machine; None if it would have to be fetched.

    Raises ClientFault(no_engine) for one that does not run.
    """
    named = os.environ.get("CULM_MYSQLD")
    if named:
        return _identify(Path(named), None)
    installed = _installed()
    if installed is not None:
        return installed
    prefix = cache / "engines" / "mariadb"
    return _identify(prefix / _BINARY, prefix) if (prefix / _BINARY).exists() else None


def prepare(engine: Engine, datadir: Path, cache: Path) -> None:
    """Make a data directory, a copy of the engine's template, unless it is there. Safe to retry: yes."""
    if (datadir / "mysql").is_dir():
        return
    template = _template(engine, cache)
    beside = datadir.with_name(datadir.name + ".new")
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(template, beside)
    (beside / "auto.cnf").unlink(missing_ok=True)
    beside.rename(datadir)


def argv(engine: Engine, datadir: Path, socket: Path, *, buffer_pool_mb: int = 64) -> list[str]:
    """The command line: unix socket only, durable commits, log on stderr."""
    return [
        *_base(engine, datadir),
        f"--socket={socket}",
        f"--pid-file={datadir / 'server.pid'}",
        "--skip-networking",
        "--skip-log-bin",
        "--innodb-flush-log-at-trx-commit=1",
        "--innodb-doublewrite=1",
        f"--innodb-buffer-pool-size={buffer_pool_mb}M",
        "--transaction-isolation=READ-COMMITTED",
        "--character-set-server=utf8mb4",
        "--collation-server=utf8mb4_bin",
        "--performance-schema=OFF",
        "--max-connections=100",
        # A job alone may need 16 (the doctor checks that), several that move together half of it.
        "--max-allowed-packet=64M",
        *(["--mysqlx=0"] if engine.kind == "mysql" else []),
    ]


def _base(engine: Engine, datadir: Path) -> list[str]:
    private = [f"--basedir={engine.prefix / 'usr'}", f"--lc-messages-dir={engine.share}"] if engine.prefix else []
    user = ["--user=root"] if os.getuid() == 0 else []
    return [str(engine.binary), "--no-defaults", *user, f"--datadir={datadir}", *private]


def _template(engine: Engine, cache: Path) -> Path:
    """The template data directory of this binary and version; made once, by whoever is first."""
    mark = hashlib.blake2b(f"{engine.binary}{engine.version}".encode(), digest_size=6).hexdigest()
    template = cache / "templates" / f"{engine.kind}-{engine.version}-{mark}"
    with _alone(template.parent):
        if template.is_dir():
            return template
        beside = template.with_name(template.name + ".new")
        shutil.rmtree(beside, ignore_errors=True)
        environment = os.environ | dict(engine.environment)
        if engine.kind == "mysql":
            _run([*_base(engine, beside), "--initialize-insecure"], environment)
        else:
            beside.mkdir()
            _bootstrap(engine, beside, environment)
        beside.rename(template)
    return template


def _bootstrap(engine: Engine, datadir: Path, environment: Mapping[str, str]) -> None:
    """What mariadb-install-db does, without its script: root without password, over the socket only."""
    names = ("mariadb_system_tables.sql", "mysql_system_tables.sql")
    tables = next((engine.share / name for name in names if (engine.share / name).exists()), None)
    data = [engine.share / f"{stem}_system_tables_data.sql" for stem in ("mariadb", "mysql")]
    filled = next((path for path in data if path.exists()), None)
    if tables is None or filled is None:
        raise _missing(f"{engine.share} lacks the SQL of the system tables")
    preamble = "create database if not exists mysql;\nuse mysql;\nSET @auth_root_socket=NULL;\n"
    script = preamble + tables.read_text(encoding="utf-8") + filled.read_text(encoding="utf-8")
    command = [*_base(engine, datadir), "--bootstrap", "--silent", "--skip-networking", "--max-allowed-packet=8M"]
    done = subprocess.run(
        command, input=script, env=dict(environment), capture_output=True, text=True, timeout=120, check=False
    )
    if done.returncode != 0 or not (datadir / "mysql").is_dir():
        raise ClientFault("engine_failed", f"{engine.binary} could not make a data directory: {done.stderr[-800:]}")


def _installed() -> Engine | None:
    path = os.pathsep.join([os.environ.get("PATH", ""), *_FOLDERS])
    for name in ("mariadbd", "mysqld"):
        found = shutil.which(name, path=path)
        if found:
            return _identify(Path(found), None)
    return None


def _identify(binary: Path, prefix: Path | None) -> Engine:
    environment = {}
    if prefix is not None:
        folders = sorted({str(path.parent) for path in prefix.glob("**/lib*.so*")})
        environment = {"LD_LIBRARY_PATH": os.pathsep.join(folders)}
    try:
        told = subprocess.run(
            [str(binary), "--version"],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise _missing(f"{binary} does not run: {error}") from None
    version = _VERSION.search(told)
    kind: Literal["mariadb", "mysql"] = "mariadb" if "mariadb" in told.lower() else "mysql"
    return Engine(kind, binary, version[1] if version else "0.0.0", prefix, environment)


def _install() -> None:
    environment = os.environ | {"RUNLEVEL": "1", "DEBIAN_FRONTEND": "noninteractive"}
    # A machine that was just set up may still be updating itself.
    apt = ["apt-get", "-o", "DPkg::Lock::Timeout=120"]
    _with_fresh_lists(
        lambda: _run([*apt, "install", "-qy", "--no-install-recommends", *PACKAGES], environment),
        lambda: _run([*apt, "update", "-q"], environment),
    )


def _unpacked(folder: Path) -> Engine:
    """Debian's packages and those they need that are not installed, unpacked where this user may write."""
    prefix = folder / "mariadb"
    binary = prefix / _BINARY
    with _alone(folder):
        if not binary.exists():
            downloads = folder / "downloads"
            _download(downloads, folder / "apt")
            beside = folder / "mariadb.new"
            shutil.rmtree(beside, ignore_errors=True)
            for package in sorted(downloads.glob("*.deb")):
                _run(["dpkg", "-x", str(package), str(beside)], os.environ)
            beside.rename(prefix)
            shutil.rmtree(downloads)
    return _identify(binary, prefix)


def _download(downloads: Path, own: Path) -> None:
    """The packages, by this machine's lists; where those are missing or old, by lists of our own under `own`."""
    options: list[str] = []

    def fetch() -> None:
        shutil.rmtree(downloads, ignore_errors=True)
        downloads.mkdir(parents=True)
        simulated = _run(
            ["apt-get", *options, "install", "-qq", "-s", "--no-install-recommends", *PACKAGES], os.environ
        )
        names = [line.split()[1] for line in simulated.splitlines() if line.startswith("Inst ")]
        _run(["apt-get", *options, "download", "-q", *names], os.environ, folder=downloads)

    def update() -> None:
        for name in ("lists/partial", "cache/archives/partial"):
            (own / name).mkdir(parents=True, exist_ok=True)
        options.extend(["-o", f"Dir::State::Lists={own / 'lists'}", "-o", f"Dir::Cache={own / 'cache'}"])
        _run(["apt-get", *options, "update", "-q"], os.environ)

    _with_fresh_lists(fetch, update)


def _with_fresh_lists(act: Callable[[], object], update: Callable[[], object]) -> None:
    """Do it with the package lists that are there; when that fails, once more with new ones."""
    with contextlib.suppress(ClientFault):
        act()
        return
    why: ClientFault | None = None
    try:
        update()
    except ClientFault as error:
        # One source of several may be broken and what we need be in the others.
        why = error
    try:
        act()
    except ClientFault as error:
        raise (why or error) from None


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process of this user at a time; the kernel gives the lock of a killed one back."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _run(command: list[str], environment: Mapping[str, str], *, folder: Path | None = None) -> str:
    try:
        done = subprocess.run(
            command,
            env=dict(environment),
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=INSTALL_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _missing(f"{command[0]}: {error}") from None
    if done.returncode != 0:
        raise _missing(f"`{' '.join(command[:4])} ..` failed: {(done.stderr or done.stdout).strip()[-600:]}")
    return done.stdout


def _missing(why: str) -> ClientFault:
    return ClientFault(
        "no_engine",
        f"no InnoDB server: {why}. Install one (Debian, Ubuntu: apt install {' '.join(PACKAGES)}) or name a mysqld in "
        "CULM_MYSQLD",
    )
