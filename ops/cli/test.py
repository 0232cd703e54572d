"""`culm test`: the tests, by the front door, which has installed what they need."""

import os
import sys
from pathlib import Path

import click

from ops.cluster.layout import Layout, default_folder

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
    command = [sys.executable, "-m", "pytest", *_caches(), *arguments]
    os.execv(sys.executable, command)  # noqa: S606  # no shell: the arguments are passed as they are


def _caches() -> list[str]:
    """Where the checkout cannot be written, what the test tools keep between runs goes to the user's cache."""
    if os.access(ROOT, os.W_OK):
        return []
    cache = Layout(default_folder()).cache / "tests"
    os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(cache / "hypothesis")
    return ["-o", f"cache_dir={cache / 'pytest'}"]
