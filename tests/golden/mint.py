"""Mint golden bytes: `python -m tests.golden.mint` (from the repository's folder).

A golden file is `<Message>.<n>.msgpack`; n counts the shapes that a message has had. This recipe writes the next
number where the newest file differs from what is sent today, and says so. It never overwrites and never deletes:
old shapes must stay readable, and `tests/unit/test_golden.py` reads every one of them.
"""

import re
import sys
from pathlib import Path

import msgspec

from tests.golden.samples import BY_NAME

FOLDER = Path(__file__).parent
_FILE = re.compile(r"(\w+)\.(\d+)\.msgpack")


def minted(name: str) -> list[Path]:
    """The golden files of a message, oldest first."""
    numbered = []
    for path in FOLDER.glob(f"{name}.*.msgpack"):
        match = _FILE.fullmatch(path.name)
        if match is not None and match[1] == name:
            numbered.append((int(match[2]), path))
    return [path for _, path in sorted(numbered)]


def mint() -> list[Path]:
    """Write what is missing; the new files. Safe to retry: yes, a second run writes nothing."""
    written = []
    for name, sample in sorted(BY_NAME.items()):
        data = msgspec.msgpack.encode(sample)
        known = minted(name)
        if known and known[-1].read_bytes() == data:
            continue
        path = FOLDER / f"{name}.{len(known) + 1}.msgpack"
        with path.open("xb") as file:  # "x": an existing file is an error, never replaced
            file.write(data)
        written.append(path)
    return written


if __name__ == "__main__":
    for new in mint():
        sys.stdout.write(f"new: {new.name}\n")
