"""What others have written, for a terminal: shown as it is, and obeyed nowhere."""

import re
from itertools import chain
from typing import Any, Final

import click
from rich.console import Console, Group
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

_UNSAFE: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but tab and newline, those that turn the direction of writing, halves of characters."""
_ANY_WIDTH: Final = 1_000_000


def visible(text: str) -> str:
    r"""A text whose control characters are written out (`\x1b`): a payload's output gives a terminal no orders."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text.replace("\r\n", "\n"))


def say(text: str, *, err: bool = False) -> None:
    """Print a line that may hold what others have written."""
    click.echo(visible(text), err=err)


class Plain(Console):
    """A console for which `[red]`, `:fire:` and control characters in a text are just that text."""

    def __init__(self, width: int | None = None) -> None:
        super().__init__(width=width, markup=False, emoji=False, highlight=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """As of Console, of the visible text."""
        return super().render_str(visible(text), **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """As of Console; where there is no room for a table, sentences are folded, and the terminal wraps the rest.

        An id that was cut off would be of no use.
        """
        parts = chain.from_iterable(one.renderables if isinstance(one, Group) else [one] for one in objects)
        for one in parts:
            if isinstance(one, Table):
                for column in one.columns:
                    column.no_wrap = not any(isinstance(cell, str) and " " in cell for cell in column.cells)
                    column.overflow = "fold"
                needed = Measurement.get(self, self.options.update(max_width=_ANY_WIDTH), one).minimum
                self.width = max(self.width, needed)
        super().print(*objects, **options)
