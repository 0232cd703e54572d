"""The named SQL blocks of `shard/sql/queries.sql`.

A block begins with `-- name: NAME` and ends before the next one; comments between blocks belong to the file's reader.
`{sep|part}` marks a part that is repeated once per row, joined by `sep`. Every statement is sent with
`/* culm NAME */` in front, so that a database administrator sees the caller in the process list.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Final

_NAME: Final = re.compile(r"^-- name: (\w+)$", re.MULTILINE)
_REPEATED: Final = re.compile(r"\{([^|{}]*)\|([^{}]*)\}", re.DOTALL)


@dataclass(frozen=True)
class Statement:
    """One block: its name, and its text split around the repeated part (empty `part`: nothing repeats)."""

    name: str
    head: str
    separator: str = ""
    part: str = ""
    tail: str = ""

    def for_rows(self, n_rows: int) -> str:
        """The text for so many rows."""
        return f"{self.head}{self.separator.join([self.part] * n_rows)}{self.tail}"


def parse(text: str) -> dict[str, Statement]:
    """The blocks of a file of SQL. Raises ValueError on a name that stands twice."""
    pieces = _NAME.split(text)
    blocks: dict[str, Statement] = {}
    for name, body in zip(pieces[1::2], pieces[2::2], strict=True):
        if name in blocks:
            raise ValueError(f"the statement {name} stands twice")
        lines = [line for line in body.splitlines() if line.strip() and not line.lstrip().startswith("--")]
        sql = f"/* culm {name} */ " + "\n".join(lines).rstrip().rstrip(";")
        repeated = _REPEATED.search(sql)
        if repeated is None:
            blocks[name] = Statement(name, sql)
        else:
            head, tail = sql[: repeated.start()], sql[repeated.end() :]
            blocks[name] = Statement(name, head, repeated[1], repeated[2], tail)
    return blocks


def flatten(rows: Sequence[Sequence[Any]]) -> list[Any]:
    """The arguments of all rows in one list."""
    return [value for row in rows for value in row]


def expand(sql: str, arguments: Sequence[Any]) -> tuple[str, list[Any]]:
    """The text and arguments with every tuple and list spread; drivers do not agree on them.

    `IN %s` becomes `IN (%s, %s)` with a tuple, `FIELD(id, %s)` becomes `FIELD(id, %s, %s)` with a list. An empty tuple
    becomes (NULL), which nothing equals. Raises ValueError if text and arguments do not fit.
    """
    if not any(isinstance(argument, (tuple, list)) for argument in arguments):
        return sql, list(arguments)
    pieces = sql.split("%s")
    if len(pieces) != len(arguments) + 1:
        raise ValueError(f"{len(arguments)} arguments for {len(pieces) - 1} places")
    text, flat = [pieces[0]], list[Any]()
    for argument, piece in zip(arguments, pieces[1:], strict=True):
        if isinstance(argument, (tuple, list)):
            places = ", ".join(["%s"] * len(argument)) or "NULL"
            text.append(f"({places})" if isinstance(argument, tuple) else places)
            flat += argument
        else:
            text.append("%s")
            flat.append(argument)
        text.append(piece)
    return "".join(text), flat


STATEMENTS: Final = parse(resources.files("shard").joinpath("sql/queries.sql").read_text(encoding="utf-8"))
