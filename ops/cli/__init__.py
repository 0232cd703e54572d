"""The command `culm`. A command's module is imported when it is used, so that `--help` is quick."""

import contextlib
import errno
import os
import re
import sys
from typing import Any, Final

import click

from culm import __version__
from culm.errors import ClientFault, CulmError, Unavailable
from ops.cli import exits
from ops.cli.lazy import LazyGroup, Place
from ops.cli.text import say

_COMMANDS: Final = {
    "up": Place("ops.cli.cluster", "up", "start a cluster on this machine"),
    "down": Place("ops.cli.cluster", "down", "stop it"),
    "status": Place("ops.cli.cluster", "status", "its processes"),
    "logs": Place("ops.cli.cluster", "logs", "what its processes said"),
    "demo": Place("ops.cli.demo", "demo", "a cluster, 60 jobs, pilots that run them"),
    "test": Place("ops.cli.test", "test", "run the tests"),
    "router": Place("ops.cli.run", "router", "run a router"),
    "shard": Place("ops.cli.run", "shard", "run, list, show, add"),
    "monitor": Place("ops.cli.run", "monitor", "run a monitor"),
    "job": Place("ops.cli.job", "job", "submit, list, show, why, history, watch, kill, retry"),
    "jobset": Place("ops.cli.jobset", "jobset", "show, kill, retry"),
    "site": Place("ops.cli.site", "site", "sites and computing queues"),
    "vo": Place("ops.cli.vo", "vo", "set, list, show: time-outs and defaults of a VO's jobs"),
    "topology": Place("ops.cli.topology", "topology", "which slot lives on which shard, and who changed it"),
    "user": Place("ops.cli.user", "user", "ban, unban, list"),
    "token": Place("ops.cli.token", "token", "signed tokens"),
    "counts": Place("ops.cli.counts", "counts", "the merged counts of all shards"),
    "errors": Place("ops.cli.errors", "errors", "what jobs failed of, by code and site"),
    "pile-ups": Place("ops.cli.pile_ups", "pile_ups", "which state grows where, and why"),
    "top": Place("ops.cli.top", "top", "states, rates and shards, live"),
    "replay": Place("ops.cli.replay", "replay", "a slice of a real grid's log through the cluster"),
    "bench": Place("ops.cli.bench", "bench", "what a getJob costs, against an echo and a naive build"),
    "load": Place("ops.cli.load", "load", "load tests with Locust: run, list, compare, report"),
    "audit": Place("ops.cli.audit", "audit", "check the stored data: nothing lost, nothing twice"),
    "db": Place("ops.cli.db", "db", "the archives: partitions, archive, export, drop"),
    "doctor": Place("ops.cli.doctor", "doctor", "what this machine and this cluster lack"),
    "pilot": Place("ops.cli.pilot", "pilot", "run a pilot, build its zipapp, list who asked"),
    "completion": Place("ops.cli.about", "completion", "a shell's completion of commands and options"),
    "version": Place("ops.cli.about", "version", "which version this is"),
}


_HALF: Final = re.compile("[\ud800-\udfff]")
"""What the system's bytes become that are not UTF-8."""


class _Culm(LazyGroup):
    def invoke(self, context: click.Context) -> Any:
        """Ctrl-C is one of our errors, with an exit code of its own."""
        try:
            return super().invoke(context)
        except KeyboardInterrupt:
            raise CulmError("interrupted", "interrupted") from None

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        """Raises ClientFault(bad_argument) for one that is no text: what JSON and our files can hold is UTF-8."""
        for one in args:
            if _HALF.search(one):
                raise ClientFault("bad_argument", f"the argument {one[:80]!r} is not UTF-8")
        return super().parse_args(context, args)


@click.group(cls=_Culm, places=_COMMANDS, context_settings={"help_option_names": ["-h", "--help"]}, epilog=exits.EPILOG)
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
        say(f"culm: {error.message} ({error.code}){hint}", err=True)
        return exits.of(error)
    return 0
