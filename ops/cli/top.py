"""`culm top`: the monitor's counts and shards, shown again every few seconds. It reads, and changes nothing."""

import asyncio
import time
from pathlib import Path

import click
import msgspec
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from culm.client import Client
from culm.errors import Unavailable
from culm.states import State
from culm.wire import CountsAnswer, ShardsAnswer
from culm.words import counted
from ops.cli.counts import archived
from ops.cli.options import AUTHORITY, DIR, OUTPUT, console, monitor, require_whole, utc


class Seen(msgspec.Struct, frozen=True):
    """What is shown at a time, seconds since the epoch."""

    at: float
    counts: CountsAnswer
    shards: ShardsAnswer


@click.command()
@DIR
@AUTHORITY
@OUTPUT
@click.option("--interval", type=click.FloatRange(0.5, 3600), default=2.0, show_default=True, help="Seconds.")
@click.option("--once", is_flag=True, help="Show it once and end.")
def top(folder: Path, *, authority: str, output: str, interval: float, once: bool) -> None:
    """Show states by region, the dispatch rate, and the shards with their health, until Ctrl-C.

    With --once exit code 4 if a shard gave no answer.

    \b
    Examples:
      culm top
      culm top --interval 5
      culm top --once -o json
    """
    asyncio.run(_once(folder, authority, output) if once else _follow(folder, authority, output, interval))


async def _once(folder: Path, authority: str, output: str) -> None:
    async with monitor(folder, authority) as client:
        seen = await _look(client)
    if output == "json":
        click.echo(msgspec.json.encode(seen))
    else:
        console().print(page(seen))
    require_whole(_missing(seen))


async def _follow(folder: Path, authority: str, output: str, interval: float) -> None:
    """For ever; a monitor that is away for a while is said, and asked again."""
    where = console()
    live = Live(console=where, screen=True, auto_refresh=False) if where.is_terminal and output == "table" else None
    seen: Seen | None = None
    async with monitor(folder, authority, patience_s=0.0) as client:
        if live is not None:
            live.start()
        try:
            while True:
                away = ""
                try:
                    seen = await _look(client)
                except Unavailable as error:
                    away = f"the monitor does not answer: {error.message}"
                if live is not None:
                    live.update(page(seen, away), refresh=True)
                elif output == "json":
                    click.echo(msgspec.json.encode(seen) if not away else msgspec.json.encode({"away": away}))
                else:
                    where.print(page(seen, away))
                await asyncio.sleep(interval)
        finally:
            if live is not None:
                live.stop()


async def _look(client: Client) -> Seen:
    counts, shards = await asyncio.gather(client.counts(), client.shards())
    return Seen(time.time(), counts, shards)


def page(seen: Seen | None, away: str = "") -> RenderableType:
    """What is shown: as last seen, and what is missing."""
    told: list[RenderableType] = []
    if seen is not None:
        told += [_head(seen), _regions(seen.counts)]
        told += [Text(archived(seen.counts))] if seen.counts.archived else []
        told.append(_shards(seen.shards))
        missing = _missing(seen)
        if missing:
            told.append(Text(f"no answer from {', '.join(missing)}: shown as last heard", style="bold red"))
    if away:
        told.append(Text(away, style="bold red"))
    return Group(*told)


def _missing(seen: Seen) -> list[str]:
    return sorted({*seen.counts.missing_shards, *(row.name for row in seen.shards.shards if not row.answers)})


def _head(seen: Seen) -> Text:
    rates = [row.dispatched_per_s for row in seen.shards.shards if row.answers and row.dispatched_per_s is not None]
    rate = f"{sum(rates):.2f} jobs/s dispatched (mean of the last minutes)" if rates else "dispatch rate not known"
    return Text(f"culm top, {utc(seen.at)}; {counted(sum(seen.counts.total.values()), 'job')}, {rate}")


def _regions(counts: CountsAnswer) -> Table:
    states = [state.value for state in State if counts.total.get(state)]
    table = Table("region", *states)
    for name, row in counts.by_region.items():
        table.add_row(name, *(str(row.get(state, 0)) for state in states))
    table.add_row("all", *(str(counts.total[state]) for state in states))
    return table


def _shards(shards: ShardsAnswer) -> Table:
    table = Table("shard", "authority", "answers", "jobs not final", "dispatched/s", "age s")
    for row in shards.shards:
        known = "" if row.n_active is None else str(row.n_active)
        rate = "" if row.dispatched_per_s is None else f"{row.dispatched_per_s:.2f}"
        age = "never heard" if row.age_s is None else f"{row.age_s:.1f}"
        answers = Text("yes") if row.answers else Text("NO", style="bold red")
        table.add_row(row.name, row.authority, answers, known, rate, age)
    return table
