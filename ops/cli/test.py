"""`culm test`: the tests, by the front door, which has installed what they need."""

import os
import sys
from pathlib import Path

import click

ROOT = Path(__file__).parents[2]


@click.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def test(arguments: tuple[str, ...]) -> None:
    """Run the tests: unit, integration, system. Extra ARGUMENTS go to pytest.

    \b
    Examples:
      culm test
      culm test tests/unit -x
    """
    os.chdir(ROOT)
    # Where the checkout cannot be written pytest's cache, whose failure is a warning and so an error, stays out of it.
    no_cache = [] if os.access(ROOT, os.W_OK) else ["-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *no_cache, *arguments]
    os.execv(sys.executable, command)  # noqa: S606  # no shell: the arguments are passed as they are
