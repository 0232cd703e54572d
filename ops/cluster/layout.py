"""Where a cluster keeps what: everything under one folder, but sockets, whose paths must be short.

Every authority has a home of its own: its section of the topology, its keys, its shards' data, its router, monitor and
supervisor. The centre's is the cluster's folder itself, another's is a folder in it. One runs without the other.
"""

import hashlib
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from culm import topology_store
from culm.errors import ClientFault
from culm.tokens import KeyRing
from culm.topology import CENTRAL

DEFAULT_PORT: Final = 25080
PORTS: Final = 2
"""Of one authority: its router's, then its monitor's."""
_NAME: Final = re.compile(r"[a-z][a-z0-9-]{0,30}")
"""Of a shard: it becomes the name of processes, files, folders and sockets."""
_NO_SHARD: Final = re.compile(r"router|monitor|supervisor|pilot.*|.*-(router|monitor|db|valkey)")
"""Names of the processes that are no shard, and of those that each shard has."""
FIRST_SHARDS: Final = {CENTRAL: {"us1": "US", "eu1": "EU"}, "CERN": {"cern1": "CERN"}}
"""By authority, the shards of a new cluster, each with the region that is placed on it."""


@dataclass(frozen=True)
class Layout:
    """The paths of one authority's home in `folder`, with its router at `port` and its monitor at the next one."""

    folder: Path
    port: int = DEFAULT_PORT
    authority: str = CENTRAL

    def home(self, authority: str) -> "Layout":
        """The home of an authority of the same cluster."""
        root = self.folder if self.authority == CENTRAL else self.folder.parent
        names = list(FIRST_SHARDS)
        port = self.port + PORTS * (names.index(authority) - names.index(self.authority))
        return Layout(root if authority == CENTRAL else root / authority, port, authority)

    @property
    def homes(self) -> list["Layout"]:
        """The homes of all authorities, the centre's first."""
        return [self.home(authority) for authority in FIRST_SHARDS]

    @property
    def shards(self) -> list[str]:
        """The shards that live here: those of a new cluster, those that have joined, those that are about to, by name.

        What was refused, or did not come to join, has a folder in `data` but is none of them.
        """
        first = list(FIRST_SHARDS[self.authority])
        data = self.folder / "data"
        there = sorted(path.name for path in data.iterdir()) if data.is_dir() else []
        try:
            joined = topology_store.load_section(self.topology, self.authority).shards
        except ClientFault:
            # What cannot be read says nothing against a shard that has data.
            return [*first, *(name for name in there if name not in first and is_shard_name(name))]
        added = [
            name
            for name in there
            if (name in joined and joined[name].link.startswith("unix:")) or self.joining(name).exists()
        ]
        return [*first, *(name for name in added if name not in first)]

    @property
    def router(self) -> str:
        """The name of its router process."""
        return "router" if self.authority == CENTRAL else f"{self.authority}-router"

    @property
    def monitor(self) -> str:
        """The name of its monitor process."""
        return "monitor" if self.authority == CENTRAL else f"{self.authority}-monitor"

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
        """The topology: the original of this authority's section, and copies of the others'."""
        return self.folder / "topology"

    @property
    def keys(self) -> Path:
        """The signing keys of this authority."""
        return self.folder / "keys"

    @property
    def trusted(self) -> Path:
        """Public keys of every authority."""
        return self.folder / "trusted"

    @property
    def ring(self) -> KeyRing:
        """The key ring of this authority."""
        return KeyRing(self.keys, self.trusted, self.authority)

    @property
    def tokens(self) -> Path:
        """The tokens that the command line uses, one file per role."""
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

    def joining(self, shard: str) -> Path:
        """A mark: the shard is started to join, and is not in the section yet."""
        return self.data(shard) / "joining"

    def socket(self, shard: str, what: str) -> Path:
        """A socket of a shard: db, valkey, link or http."""
        return self.sockets / f"{shard}.{what}"


def is_shard_name(name: str) -> bool:
    """Whether a shard may have that name: no other process of a cluster has it."""
    return _NAME.fullmatch(name) is not None and _NO_SHARD.fullmatch(name) is None


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
