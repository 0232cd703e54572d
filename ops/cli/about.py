"""`culm version`, `culm completion`."""

import json
import platform

import click
from click.shell_completion import get_completion_class

from culm import __version__
from ops.cli.options import OUTPUT


@click.command()
@OUTPUT
def version(output: str) -> None:
    """Print the version of culm and of the Python that runs it.

    \b
    Examples:
      culm version
      culm version -o json
    """
    python = platform.python_version()
    click.echo(
        json.dumps({"culm": __version__, "python": python})
        if output == "json"
        else f"culm {__version__}, Python {python}"
    )


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh"]))
def completion(shell: str) -> None:
    """Print the completion script of a shell, for a `culm` that it finds by its PATH.

    \b
    Examples:
      culm completion bash > ~/.local/share/bash-completion/completions/culm
      culm completion zsh > ~/.zfunc/_culm
    """
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(click.get_current_context().find_root().command, {}, "culm", "_CULM_COMPLETE").source())
