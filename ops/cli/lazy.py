"""A group whose commands are imported when they are used: help is quick, and a service imports nothing but its own."""

import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import click


class Place(NamedTuple):
    """Where a command is, and the line that its group's help has for it."""

    module: str
    name: str
    text: str


class LazyGroup(click.Group):
    """A group over a table of places, by command."""

    def __init__(self, *arguments: Any, places: Mapping[str, Place], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._places = places

    def list_commands(self, _context: click.Context) -> list[str]:
        """The names, in the table's order."""
        return list(self._places)

    def get_command(self, _context: click.Context, name: str) -> click.Command | None:
        """Import one; None if there is none of this name."""
        place = self._places.get(name)
        if place is None:
            return None
        command: Any = getattr(importlib.import_module(place.module), place.name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, _context: click.Context, formatter: click.HelpFormatter) -> None:
        """From the table, without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, place.text) for name, place in self._places.items()])
