"""The pages: every command line in them parses, every link leads somewhere."""

import re
import shlex
from pathlib import Path

import click
import pytest

from ops.cli import culm
from tests.checks.repository import ROOT

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
_BLOCK = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"(?<!`)`(culm [^`\n]+)`")
_LINK = re.compile(r"\]\(([^)#\s]+)(#[^)]*)?\)")
_PLACEHOLDER = re.compile(r"\|| \[|\.\.$")
"""Shorthand for people: `culm up|down`, `culm topology diff [BEFORE]`."""


def commands(text: str) -> list[str]:
    """The lines that call culm: in blocks after an optional prompt, and in the running text."""
    found = list(_INLINE.findall(text))
    for block in _BLOCK.findall(text):
        for typed in block.splitlines():
            line = typed.removeprefix("$ ").removeprefix("bin/")
            if line.startswith("culm "):
                found.append(re.split(r"\s{2,}#|\s#\s", line)[0].strip())
    return [line.replace("bin/culm", "culm") for line in found if not _PLACEHOLDER.search(line)]


def test_there_are_commands_to_check() -> None:
    assert sum(len(commands(path.read_text(encoding="utf-8"))) for path in PAGES) > 30


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_in_a_page_is_one(path: Path) -> None:
    for line in commands(path.read_text(encoding="utf-8")):
        words = shlex.split(line)[1:]
        command: click.Command = culm
        context = click.Context(culm, info_name="culm")
        while isinstance(command, click.Group) and words and not words[0].startswith("-"):
            found = command.get_command(context, words[0])
            assert found is not None, f"{line}: there is no {words[0]!r}"
            command, words = found, words[1:]
            context = click.Context(command, info_name=words[0] if words else "", parent=context)
        options = {name for one in command.params for name in (*one.opts, *one.secondary_opts)} | {"--help", "-h"}
        if isinstance(command, click.Group):
            options |= {"--version"}
        named = [word.partition("=")[0] for word in (words[: words.index("--")] if "--" in words else words)]
        if command.context_settings.get("ignore_unknown_options"):
            continue
        for word in named:
            assert not word.startswith("-") or word in options, f"{line}: there is no option {word}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(path: Path) -> None:
    for target, _ in _LINK.findall(path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name}: {target}"
