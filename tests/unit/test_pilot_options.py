"""The pilot's command line: what it accepts, and that its help tells the exit codes."""

import re
from pathlib import Path

import pytest

from pilot import agent, main, runner

NEEDED = ["--server", "http://localhost:1", "--queue", "q", "--token-file", "t"]


def test_the_defaults_are_those_of_a_real_site() -> None:
    options = main._parser().parse_args(NEEDED)
    plan = main._plan(options, Path("/work-dir"))
    assert (plan.wait_s, plan.max_jobs, plan.idle_exit_s, plan.heartbeat_s) == (20.0, 0, 0.0, 0.0)
    assert (plan.patience_s, plan.report_patience_s) == (60.0, 3600.0)
    assert 1 <= len(plan.name) <= 128


@pytest.mark.parametrize(
    "wrong",
    [
        ["--server", "localhost:25080"],
        ["--server", "ftp://localhost"],
        ["--server", "http://"],
        ["--wait", "61"],
        ["--wait", "-1"],
        ["--wait", "nan"],
        ["--idle-exit", "soon"],
        ["--patience", "inf"],
        ["--max-jobs", "-1"],
        ["--max-jobs", "1.5"],
        ["--unknown"],
    ],
)
def test_wrong_use_ends_with_2(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main.main([*NEEDED, *wrong])
    assert caught.value.code == 2
    assert wrong[0] in capsys.readouterr().err


def test_every_exit_code_is_in_the_help_and_on_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main.main(["--help"])
    told = capsys.readouterr().out
    page = (Path(main.__file__).parents[1] / "docs" / "pilot.md").read_text(encoding="utf-8")
    codes = {agent.DONE, main.USAGE, agent.UNREACHABLE, agent.REFUSED, agent.UNUSABLE, agent.STOPPED}
    assert {int(code) for code in re.findall(r"\b(\d+) (?=idle|wrong|the|it|stopped)", told)} == codes
    assert {int(code) for code in re.findall(r"^\| (\d{1,3}) \|", page, re.MULTILINE)} == codes


def test_every_error_code_and_option_is_on_the_page() -> None:
    page = (Path(main.__file__).parents[1] / "docs" / "pilot.md").read_text(encoding="utf-8")
    codes = {*runner.CODES.values(), runner.CANNOT_RUN, runner.MISSING_OUTPUT, runner.KILLED}
    assert {int(code) for code in re.findall(r"^\| (\d{4}) \|", page, re.MULTILINE)} == codes
    options = {action.option_strings[-1] for action in main._parser()._actions} - {"--help"}
    assert options == set(re.findall(r"^\| `(--[a-z-]+)", page, re.MULTILINE))


@pytest.mark.parametrize("text", ["plain", "\udcff", "ü" * 5000])
def test_the_text_of_an_error_fits_any_message(text: str) -> None:
    error = runner.failure(1110, text)
    assert error["text"].encode("utf-8")
    assert len(error["text"]) <= 1000
