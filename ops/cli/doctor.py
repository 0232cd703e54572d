"""`culm doctor`: what this machine and this cluster lack."""

import sys
from pathlib import Path

import click
import msgspec
from rich.table import Table

from ops import doctor as doctors
from ops.cli import exits
from ops.cli.cluster import homes_at
from ops.cli.options import DIR, OUTPUT, PORT, console


@click.command()
@DIR
@PORT
@OUTPUT
@click.option(
    "--config",
    "configs",
    multiple=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="A shard's settings; repeat it for each.  [default: the shards of --dir]",
)
def doctor(folder: Path, port: int | None, output: str, configs: tuple[Path, ...]) -> None:
    """Check versions, disk, ports, topology, keys and the databases' settings; say what to do.

    Changes and fetches nothing. Works without a cluster, then it looks at less. Exit code 1 if anything is bad.

    \b
    Examples:
      culm doctor
      culm doctor -o json
      culm doctor --config /etc/culm/us1.toml
    """
    found = doctors.examine(homes_at(folder, port, None), configs)
    n_bad = sum(check.level == "bad" for check in found)
    if output == "json":
        click.echo(msgspec.json.encode({"ok": not n_bad, "checks": found}))
    else:
        table = Table("", "what", "found", "what to do")
        for check in found:
            table.add_row(check.level, check.name, check.text, check.advice)
        console().print(table)
    if n_bad:
        sys.exit(exits.FAILED)
