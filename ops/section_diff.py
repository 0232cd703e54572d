"""What differs between two versions of a section, as lines that a person reads."""

from collections.abc import Iterator
from typing import Any

import msgspec

from culm.topology import Section


def lines(before: Section, after: Section) -> list[str]:
    """`+ path: value` for what is new, `- path: value` for what is gone, `~ path: old -> new` for what has changed.

    In the order of the paths; the epoch is left out. A value is JSON.
    """
    old, new = dict(_leaves(_plain(before))), dict(_leaves(_plain(after)))
    found = []
    for path in sorted(old.keys() | new.keys()):
        if path not in old:
            found.append(f"+ {path}: {_text(new[path])}")
        elif path not in new:
            found.append(f"- {path}: {_text(old[path])}")
        elif old[path] != new[path]:
            found.append(f"~ {path}: {_text(old[path])} -> {_text(new[path])}")
    return found


def _plain(section: Section) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.to_builtins(section, str_keys=True)
    del plain["epoch"]
    return plain


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is no map, with its path; an empty map is one, else a region without fields would not show."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else key)
    elif path:
        yield path, value


def _text(value: Any) -> str:
    return msgspec.json.encode(value).decode()
