"""The command `culm`. A command's module is imported when it is used, so that `--help` is quick."""

import contextlib
import errno
import importlib
import os
import sys
from typing import Any, Final

import click

from culm import __version__
from culm.errors import CulmError, Unavailable
from ops.cli import exits

_COMMANDS: Final = {
    "up": ("ops.cli.cluster", "start a cluster on this machine"),
    "down": ("ops.cli.cluster", "stop it"),
    "status": ("ops.cli.cluster", "its processes"),
    "logs": ("ops.cli.cluster", "what its processes said"),
    "demo": ("ops.cli.demo", "a cluster, 60 jobs, pilots that run them"),
    "test": ("ops.cli.test", "run the tests"),
    "router": ("ops.cli.run", "run a router"),
    "shard": ("ops.cli.run", "run a shard"),
    "monitor": ("ops.cli.run", "run a monitor"),
    "job": ("ops.cli.job", "submit, list, show, kill"),
    "site": ("ops.cli.site", "sites and computing queues"),
    "topology": ("ops.cli.site", "which slot lives on which shard"),
    "token": ("ops.cli.token", "signed tokens"),
    "counts": ("ops.cli.counts", "the merged counts of all shards"),
    "replay": ("ops.cli.replay", "a slice of a real grid's log through the cluster"),
    "audit": ("ops.cli.audit", "check the stored data: nothing lost, nothing twice"),
    "doctor": ("ops.cli.doctor", "what this machine and this cluster lack"),
    "pilot": ("ops.cli.pilot", "run a pilot, build its zipapp"),
    "completion": ("ops.cli.about", "a shell's completion of commands and options"),
    "version": ("ops.cli.about", "which version this is"),
}


class _Lazy(click.Group):
    def list_commands(self, _context: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, _context: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        command: Any = getattr(importlib.import_module(_COMMANDS[name][0]), name)
        assert isinstance(command, click.Command)
        return command

    def invoke(self, context: click.Context) -> Any:
        """Ctrl-C is one of our errors, with an exit code of its own."""
        try:
            return super().invoke(context)
        except KeyboardInterrupt:
            raise CulmError("interrupted", "interrupted") from None

    def format_commands(self, _context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]}, epilog=exits.EPILOG)
@click.version_option(__version__, prog_name="culm")
def culm() -> None:
    """A workload management system cut into independent partitions by region and site."""


def main() -> None:
    """Run the command line; every error of ours, and of the system, becomes one line and an exit code."""
    try:
        code = _exit_code()
        sys.stdout.flush()
    except OSError as error:
        code = exits.FAILED
        # What is left in the buffer would fail once more at the interpreter's end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno != errno.EPIPE:
            with contextlib.suppress(OSError):
                click.echo(f"culm: {error.filename or 'the output cannot be written'}: {error.strerror}", err=True)
    sys.exit(code)


def _exit_code() -> int:
    try:
        culm(prog_name="culm")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except CulmError as error:
        hint = "; try again later" if isinstance(error, Unavailable) and error.code != "not_running" else ""
        click.echo(f"culm: {error.message} ({error.code}){hint}", err=True)
        return exits.of(error)
    return 0
