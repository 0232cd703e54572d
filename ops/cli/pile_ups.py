"""`culm pile-ups`: what the monitor's /v1/pile-ups says."""

import asyncio
from pathlib import Path

import click
import msgspec
from rich.table import Table

from culm.wire import PileUpsAnswer
from ops.cli.options import AUTHORITY, DIR, OUTPUT, console, monitor, require_whole


@click.command("pile-ups")
@DIR
@AUTHORITY
@OUTPUT
@click.option("--hours", type=click.IntRange(1, 720), default=6, show_default=True, help="Against so many.")
def pile_ups(folder: Path, authority: str, output: str, hours: int) -> None:
    """Show which state grows where against the last hours, with the likely cause, the most jobs first.

    \b
    Examples:
      culm pile-ups
      culm pile-ups --hours 24 -o json
    """

    async def ask() -> PileUpsAnswer:
        async with monitor(folder, authority) as client:
            return await client.pile_ups(hours)

    answer = asyncio.run(ask())
    if output == "json":
        click.echo(msgspec.json.encode(answer))
        require_whole(answer.missing_shards)
        return
    if answer.pile_ups:
        table = Table("site", "region", "state", "jobs", "usual", "an hour ago", "likely cause", "example")
        for row in answer.pile_ups:
            numbers = (str(row.n_jobs), str(row.n_usual), str(row.n_before))
            example = str(row.example) if row.example is not None else ""
            table.add_row(row.site, row.region, row.state, *numbers, f"{row.cause}: {row.text}", example)
        console().print(table)
    else:
        click.echo(f"no state grows against the last {hours} hours")
    for shard, n_samples in answer.n_samples.items():
        if not n_samples:
            click.echo(f"{shard} has no sample of an hour before this one yet: it cannot say", err=True)
    require_whole(answer.missing_shards)
