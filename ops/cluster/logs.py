"""Logs of bounded size: rotated while the processes that write them run.

A log is copied and then cut to nothing, for its writer holds it open, in append mode, for as long as it lives. Lines
written between the two, a few milliseconds, are lost, and the last line of a copy may be cut.
"""

import contextlib
import itertools
import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Final

MAX_BYTES: Final = 50 << 20
N_KEPT: Final = 2
"""Older logs of one process, `NAME.log.1` the newest of them."""

log = logging.getLogger("culm.logs")


def rotate(paths: Iterable[Path], *, max_bytes: int = MAX_BYTES, n_kept: int = N_KEPT) -> None:
    """Rotate those of the logs that are longer than `max_bytes`. Never raises OSError. Safe to retry: yes.

    Where there is no room for the copy, a log is left alone until it is twice too long, then cut without one.
    """
    for path in paths:
        try:
            size_bytes = path.stat().st_size
            if size_bytes > max_bytes:
                _keep(path, n_kept, must=size_bytes <= 2 * max_bytes)
                os.truncate(path, 0)
        except OSError as error:
            log.warning("%s is not rotated: %s", path, error)


def _keep(path: Path, n_kept: int, *, must: bool) -> None:
    """Copy a log to the newest of the kept ones. Raises OSError if it `must` be kept and cannot."""
    kept = [path.with_name(f"{path.name}.{number}") for number in range(n_kept, 0, -1)]
    copy = path.with_name(f"{path.name}.new")
    try:
        shutil.copyfile(path, copy)
        for older, newer in itertools.pairwise(kept):
            with contextlib.suppress(FileNotFoundError):
                newer.replace(older)
        copy.replace(kept[-1])
    except OSError as error:
        copy.unlink(missing_ok=True)
        if must:
            raise
        log.warning("%s is cut without a copy: %s", path, error)
