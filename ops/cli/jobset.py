"""`culm jobset show|kill|retry`."""

import asyncio
from collections import Counter
from pathlib import Path

import click
import msgspec

from culm.errors import ClientFault
from culm.wire import JobRow, JobsQuery
from culm.words import counted
from ops.cli.job import ID
from ops.cli.job import kill as kill_jobs
from ops.cli.job import retry as retry_jobs
from ops.cli.options import AUTHORITY, DIR, OUTPUT, WHO, require_whole, router


@click.group()
def jobset() -> None:
    """Jobsets, which may span shards: show, kill, retry."""


@jobset.command()
@DIR
@AUTHORITY
@WHO
@OUTPUT
@click.argument("number", type=ID)
def show(folder: Path, authority: str, output: str, number: int) -> None:
    """Count the jobs of a jobset by state. Exit code 4 if a shard gave no answer: its jobs are not counted.

    \b
    Examples:
      culm jobset show 204711
      culm jobset show 204711 -o json
    """

    async def ask() -> tuple[list[JobRow], list[str]]:
        async with router(folder, authority=authority) as client:
            return await client.all_jobs(JobsQuery(jobset=number, limit=1000))

    rows, missing = asyncio.run(ask())
    if not rows and not missing:
        raise ClientFault("unknown_jobset", f"no job of jobset {number} is known", http_status=404)
    states = Counter(row.state.value for row in rows)
    if output == "json":
        as_json = {"jobset": number, "n_jobs": len(rows), "states": states, "missing_shards": missing}
        click.echo(msgspec.json.encode(as_json))
    else:
        told = ", ".join(f"{n} {state}" for state, n in sorted(states.items())) or "none"
        click.echo(f"jobset {number}, {counted(len(rows), 'job')}: {told}")
    require_whole(missing)


@jobset.command()
@DIR
@AUTHORITY
@WHO
@OUTPUT
@click.argument("number", type=ID)
@click.pass_context
def kill(context: click.Context, *, folder: Path, authority: str, output: str, number: int) -> None:
    """End all jobs of a jobset, as culm job kill --jobset does.

    \b
    Examples:
      culm jobset kill 204711
    """
    context.invoke(kill_jobs, folder=folder, authority=authority, output=output, jobset=number, ids=())


@jobset.command()
@DIR
@AUTHORITY
@WHO
@OUTPUT
@click.argument("number", type=ID)
@click.pass_context
def retry(context: click.Context, *, folder: Path, authority: str, output: str, number: int) -> None:
    """Submit again what failed or was ended of a jobset, as culm job retry --jobset does.

    \b
    Examples:
      culm jobset retry 204711
    """
    context.invoke(retry_jobs, folder=folder, authority=authority, output=output, jobset=number, ids=())
