"""`culm errors`: what the monitor's /v1/errors says."""

import asyncio
from pathlib import Path

import click
import msgspec
from rich.table import Table

from culm.wire import ErrorsAnswer
from ops.cli.options import AUTHORITY, DIR, OUTPUT, console, monitor, require_whole, utc


@click.command()
@DIR
@AUTHORITY
@OUTPUT
@click.option("--hours", type=click.IntRange(1, 720), default=24, show_default=True, help="The last so many.")
def errors(folder: Path, authority: str, output: str, hours: int) -> None:
    """Show what jobs failed of, by plane, code and site, the most frequent first.

    \b
    Examples:
      culm errors
      culm errors --hours 1 -o json
    """

    async def ask() -> ErrorsAnswer:
        async with monitor(folder, authority) as client:
            return await client.errors(hours)

    answer = asyncio.run(ask())
    if output == "json":
        click.echo(msgspec.json.encode(answer))
        require_whole(answer.missing_shards)
        return
    if answer.errors:
        table = Table("plane", "code", "site", "region", "jobs", "last in the hour of", "example")
        for row in answer.errors:
            what = (row.plane or "(none told)", str(row.code), row.site, row.region)
            table.add_row(*what, str(row.n_jobs), utc(row.last_at), str(row.example))
        console().print(table)
    else:
        click.echo(f"no job failed in the last {hours} hours")
    require_whole(answer.missing_shards)
