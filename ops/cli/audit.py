"""`culm audit`: what must always be true, checked on the stored data."""

import asyncio
import sys
from pathlib import Path

import click
import msgspec
from rich.table import Table

from culm import settings, topology_store
from culm.errors import ClientFault
from culm.topology import Topology
from culm.words import counted
from ops import audit as auditing
from ops.cli import exits
from ops.cli.options import DIR, OUTPUT, console, require_whole
from ops.cli.text import say
from ops.cluster.layout import Layout


@click.command()
@DIR
@OUTPUT
@click.option(
    "--config",
    "configs",
    multiple=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="A shard's settings; repeat it for each.  [default: the shards of --dir]",
)
def audit(folder: Path, output: str, configs: tuple[Path, ...]) -> None:
    """Check the stored data of all shards: nothing lost, nothing twice, every count right. Reads only.

    Exit code 6 if anything was found, 4 if a shard's database could not be read: of that one nothing is proved. It may
    run beside live traffic.

    \b
    Examples:
      culm audit
      culm audit -o json
    """
    report = run(folder, configs)
    if output == "json":
        click.echo(msgspec.json.encode(report))
    else:
        out = console()
        states = ", ".join(f"{n} {state}" for state, n in report.states.items()) or "no jobs"
        out.print(f"{counted(report.n_jobs, 'job')} on {', '.join(report.shards)}: {states}")
        if report.findings:
            table = Table("invariant", "rule", "shard", "job or slot", "what")
            for one in report.findings:
                table.add_row(one.invariant, one.rule, one.shard, str(one.subject), one.text)
            out.print(table)
        n_findings = len(report.findings)
        out.print("audit: nothing found" if not n_findings else f"audit: {counted(n_findings, 'finding')}")
    for name, why in report.missing_shards.items():
        say(f"{name} was not audited: {why}", err=True)
    if report.findings:
        sys.exit(exits.FINDINGS)
    require_whole(report.missing_shards)


def run(folder: Path, configs: tuple[Path, ...] = ()) -> auditing.AuditReport:
    """Audit the cluster in a folder. Raises ClientFault(no_cluster), Unavailable."""
    shards = [_shard(path) for path in configs] or [
        _shard(home.configs / f"{name}.toml")
        for home in Layout(folder).homes
        if home.topology.is_dir()
        for name in topology_store.load_section(home.topology, home.authority).shards
    ]
    if not shards:
        raise ClientFault("no_cluster", f"{folder} holds no cluster", http_status=404)
    # Of each authority the original: another's folder has a copy that may be older.
    originals = {one.authority: topology_store.load_section(Path(one.topology_dir), one.authority) for one in shards}
    copies = topology_store.load(Path(shards[0].topology_dir), shards[0].authority).sections
    return asyncio.run(auditing.audit(shards, Topology((copies | originals).values(), shards[0].authority)))


def _shard(path: Path) -> settings.ShardSettings:
    return settings.load(path, settings.ShardSettings, prefix="CULM_SHARD_")
