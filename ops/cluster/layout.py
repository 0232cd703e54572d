"""Where a cluster keeps what: everything under one folder, but sockets, whose paths must be short."""

import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from culm.errors import ClientFault

DEFAULT_PORT: Final = 25080
REGIONS: Final = {"us1": "US", "eu1": "EU", "cern1": "CERN"}
"""The shards of a cluster on one machine, each with the region that is placed on it."""
AUTHORITIES: Final = {"us1": "central", "eu1": "central", "cern1": "CERN"}


@dataclass(frozen=True)
class Layout:
    """The paths of the cluster in `folder` with its router at `port` and its monitor at the next one."""

    folder: Path
    port: int = DEFAULT_PORT

    @property
    def configs(self) -> Path:
        """Settings, one file per process."""
        return self.folder / "config"

    @property
    def logs(self) -> Path:
        """Logs, one file per process."""
        return self.folder / "logs"

    @property
    def topology(self) -> Path:
        """The sections of the topology."""
        return self.folder / "topology"

    @property
    def keys(self) -> Path:
        """Signing keys, one folder per authority."""
        return self.folder / "keys"

    @property
    def trusted(self) -> Path:
        """Public keys of every authority."""
        return self.folder / "trusted"

    @property
    def tokens(self) -> Path:
        """The tokens that the command line uses, one file per role and authority."""
        return self.folder / "tokens"

    @property
    def status(self) -> Path:
        """What the supervisor says of its processes."""
        return self.folder / "status.json"

    @property
    def cache(self) -> Path:
        """Engines and templates, shared by the clusters of this user."""
        base = os.environ.get("XDG_CACHE_HOME")
        return (Path(base) if base else Path.home() / ".cache") / "culm"

    @property
    def sockets(self) -> Path:
        """A short folder of this cluster, mode 0700: a unix socket's path holds 107 bytes at most."""
        mark = hashlib.blake2b(str(self.folder).encode(), digest_size=5).hexdigest()
        return Path(tempfile.gettempdir()) / f"culm-{os.getuid()}-{mark}"

    @property
    def router_url(self) -> str:
        """Where the router is."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def monitor_url(self) -> str:
        """Where the monitor is."""
        return f"http://127.0.0.1:{self.port + 1}"

    def data(self, shard: str) -> Path:
        """The shard's database."""
        return self.folder / "data" / shard

    def socket(self, shard: str, what: str) -> Path:
        """A socket of a shard: db, valkey, link or http."""
        return self.sockets / f"{shard}.{what}"


def default_folder() -> Path:
    """CULM_DIR, else ~/.culm/demo."""
    named = os.environ.get("CULM_DIR")
    return Path(named).absolute() if named else Path.home() / ".culm" / "demo"


def make_private(folder: Path) -> None:
    """A folder that is ours alone. Raises ClientFault(foreign_folder) if somebody else was there first."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    info = folder.lstat()
    if info.st_uid != os.getuid() or info.st_mode & 0o077 or folder.is_symlink():
        raise ClientFault("foreign_folder", f"{folder} must belong to this user with mode 0700")
