"""`culm counts`: what the monitor's /v1/counts says."""

import asyncio
import sys
from pathlib import Path

import click
import msgspec
from rich.table import Table

from culm.wire import CountsAnswer
from ops.cli.options import AUTHORITY, DIR, OUTPUT, console, monitor, require_whole


@click.command()
@DIR
@AUTHORITY
@OUTPUT
@click.option("--by", type=click.Choice(["region", "site", "vo"]), default="region", show_default=True)
def counts(folder: Path, authority: str, output: str, by: str) -> None:
    """Show the merged counts of all shards by state; shards that gave no answer are named.

    \b
    Examples:
      culm counts --by site
      culm counts -o json
    """

    async def ask() -> CountsAnswer:
        async with monitor(folder, authority) as client:
            return await client.counts()

    answer = asyncio.run(ask())
    if output == "json":
        click.echo(msgspec.json.encode(answer))
        require_whole(answer.missing_shards)
        return
    states = sorted(answer.total)
    table = Table(by, *states)
    rows = {"region": answer.by_region, "site": answer.by_site, "vo": answer.by_vo}[by]
    for name, row in rows.items():
        table.add_row(name, *(str(row.get(state, 0)) for state in states))
    table.add_row("all", *(str(answer.total[state]) for state in states))
    console().print(table)
    for shard in answer.missing_shards:
        age = answer.shards.get(shard)
        sys.stderr.write(f"{shard}: " + ("never heard\n" if age is None else f"shown as {age:.0f} s ago\n"))
    require_whole(answer.missing_shards)
