"""What others have written is shown as it is, is whole, and gives a terminal no orders."""

from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Group
from rich.table import Table

from culm.errors import ClientFault
from ops.cli import culm, exits
from ops.cli.text import Plain, visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b]0;title\x07", r"\x1b[31mred\x1b]0;title\x07"),
        ("line\r\nnext\tcell\n", "line\nnext\tcell\n"),
        ("over\rwritten", r"over\rwritten"),
        ("\x9b2J\x7f", r"\x9b2J\x7f"),
        ("abc\u202edef", r"abc\u202edef"),
        ("a\udcffb", r"a\udcffb"),
        ("[red]:fire: ü 漢", "[red]:fire: ü 漢"),
    ],
)
def test_what_would_be_obeyed_is_written_out(text: str, shown: str) -> None:
    assert visible(text) == shown


def _printed(*objects: object, width: int) -> str:
    out = Plain(width)
    with out.capture() as captured:
        out.print(*objects)
    return captured.get()


def test_a_table_shows_names_as_they_are_and_obeys_none() -> None:
    table = Table("account")
    table.add_row("a:b:c [red]x[/] :fire: \x1b[31m")
    told = _printed(table, ":x: [bold]", width=200)
    assert "a:b:c [red]x[/] :fire: \\x1b[31m" in told
    assert ":x: [bold]" in told
    assert "\x1b" not in told


@pytest.mark.parametrize("width", [20, 40, 80])
@pytest.mark.parametrize("grouped", [False, True])
def test_an_id_is_whole_however_narrow_the_terminal_is(width: int, *, grouped: bool) -> None:
    table = Table("id", "state", "owner", "text")
    identifiers = [str(1_099_511_627_787 + n) for n in range(3)]
    for identifier in identifiers:
        table.add_row(identifier, "transferring", "central:somebody", "words that may be on several lines " * 3)
    told = _printed(Group("a heading", table) if grouped else table, width=width)
    assert all(identifier in told for identifier in identifiers)
    assert "transferring" in told
    assert "…" not in told


@pytest.mark.parametrize(
    "words",
    [
        ("job", "submit", "--site", "BNL", "--", "sh", "-c", "echo \udcff"),
        ("job", "list", "--owner", "\udcff"),
        ("user", "ban", "central:\udcff", "--reason", "x"),
        ("token", "issue", "user", "\udcff"),
        ("pilot", "run", "--queue", "\udcff"),
        ("\udcff",),
    ],
    ids=lambda words: " ".join(words[:2]).encode("unicode_escape").decode(),
)
def test_an_argument_that_is_not_utf_8_is_refused(words: tuple[str, ...], tmp_path: Path) -> None:
    told = CliRunner().invoke(culm, list(words), env={"CULM_DIR": str(tmp_path)})
    assert isinstance(told.exception, ClientFault), told.exception
    assert (told.exception.code, exits.of(told.exception)) == ("bad_argument", exits.USAGE)
    assert "is not UTF-8" in told.exception.message
