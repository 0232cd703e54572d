"""`culm counts`: what the monitor's /v1/counts says."""

import asyncio
from pathlib import Path
from typing import Final

import click
import msgspec
from rich.table import Table

from culm.states import State
from culm.wire import CountsAnswer
from ops.cli.options import AUTHORITY, DIR, OUTPUT, console, monitor, require_whole

_BY: Final = (
    'What the rows are. The job of a region stays one of "any site of" it, wherever it runs; job list shows it there.'
)


@click.command()
@DIR
@AUTHORITY
@OUTPUT
@click.option("--by", type=click.Choice(["region", "site", "vo"]), default="region", show_default=True, help=_BY)
def counts(folder: Path, authority: str, output: str, by: str) -> None:
    """Show the merged counts of all shards by state.

    Exit code 4 if a shard gave no answer: it is named, and shown as last heard.

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
    else:
        _show(answer, by)
    require_whole(answer.missing_shards)


def _show(answer: CountsAnswer, by: str) -> None:
    states = [state.value for state in State if answer.total.get(state)]
    table = Table(by, *states)
    rows = {"region": answer.by_region, "site": answer.by_site, "vo": answer.by_vo}[by]
    for name, row in rows.items():
        table.add_row(name, *(str(row.get(state, 0)) for state in states))
    table.add_row("all", *(str(answer.total[state]) for state in states))
    console().print(table)
    if answer.archived:
        click.echo(archived(answer))
    for shard in answer.missing_shards:
        age = answer.shards.get(shard)
        told = "never heard" if age is None else f"shown as {age:.0f} s ago"
        click.echo(f"{shard} gives no answer; {told}", err=True)


def archived(answer: CountsAnswer) -> str:
    """What has left the tables for the archive, which the other numbers are without."""
    states = ", ".join(f"{answer.archived[state]} {state.value}" for state in State if answer.archived.get(state))
    return f"and in the archive {sum(answer.archived.values())} jobs: {states}"
