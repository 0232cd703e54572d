"""Where the workers of one process group keep their metrics, so that a scrape of any gives the sum of all.

prometheus_client decides at its import: `prepare` must come before whatever defines a metric is imported.
"""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Final

from culm.errors import ClientFault

VARIABLE: Final = "PROMETHEUS_MULTIPROC_DIR"


def prepare(host: str, port: int) -> None:
    """An empty folder for the workers behind an address. Raises ClientFault(foreign_folder) if it is not ours alone.

    Only one process group may have the address, and what one left that was killed is of no use to the next.
    """
    folder = Path(tempfile.gettempdir()) / f"culm-{os.getuid()}-metrics-{host.replace(':', '_')}-{port}"
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        info = folder.lstat()
        if info.st_uid != os.getuid() or info.st_mode & 0o077 or folder.is_symlink():
            raise ClientFault("foreign_folder", f"{folder} must belong to this user with mode 0700") from None
        for path in folder.iterdir():
            path.unlink()
    os.environ[VARIABLE] = str(folder)


def remove() -> None:
    """The group has ended."""
    folder = os.environ.pop(VARIABLE, None)
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
