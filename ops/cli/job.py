"""`culm job submit|list|show|why|history|watch|kill|retry`."""

import asyncio
import secrets
import sys
import time
from pathlib import Path
from typing import Any, Final

import click
import msgspec
from rich.table import Table

from culm.client import Client
from culm.errors import ClientFault, Unavailable
from culm.moments import moment
from culm.states import FINAL, State
from culm.wire import CancelAnswer, CancelRequest, JobRow, JobSpec, JobsQuery, SubmitRequest, SubmitWarning
from ops.cli import exits
from ops.cli.options import AUTHORITY, DIR, OUTPUT, console, require_whole, router, utc

WATCH_S: Final = 1.0


@click.group()
def job() -> None:
    """Jobs: submit, list, show, why, history, watch, kill, retry."""


@job.command(context_settings={"ignore_unknown_options": True})
@DIR
@AUTHORITY
@OUTPUT
@click.option("--region", default="", help="Any site of this region.")
@click.option("--site", default="", help="This site.")
@click.option("--queue", default="", help="This computing queue.")
@click.option("--name", default="")
@click.option("--label", default="user", show_default=True)
@click.option("--cores", type=int, default=None, help="What is not said is as the computing queue's or VO's policy is.")
@click.option("--memory-mb", type=int, default=0)
@click.option("--disk-mb", type=int, default=0)
@click.option("--walltime", "walltime_s", type=int, default=0, help="Seconds.")
@click.option("--priority", type=int, default=None)
@click.option("--max-attempts", type=int, default=None)
@click.option("--count", type=click.IntRange(1, 2000), default=1, show_default=True, help="So many copies of it.")
@click.option("--key", default="", help="Idempotency key: the same key and jobs give the same ids.")
@click.argument("argv", nargs=-1, required=True, type=click.UNPROCESSED)
def submit(
    folder: Path, *, authority: str, output: str, count: int, key: str, argv: tuple[str, ...], **fields: Any
) -> None:
    """Submit a job that runs ARGV; the ids are printed.

    \b
    Examples:
      culm job submit --site BNL -- echo hi
      culm job submit --region EU --memory-mb 2000 --walltime 60 --count 10 -- sh -c 'hostname; sleep 1'
    """
    given = {name: value for name, value in fields.items() if value is not None}
    try:
        spec = msgspec.convert(given | {"argv": list(argv)}, JobSpec)
    except msgspec.ValidationError as error:
        raise ClientFault("bad_job", str(error)) from None
    request = SubmitRequest(idempotency_key=key or secrets.token_hex(12), jobs=[spec] * count)

    async def ask() -> Any:
        async with router(folder, authority=authority) as client:
            return await client.submit(request)

    answer = asyncio.run(ask())
    if output == "json":
        click.echo(msgspec.json.encode(answer))
    else:
        click.echo("\n".join(map(str, answer.ids)))
        for warning in answer.warnings:
            _warn(warning, answer.ids)


def _warn(warning: SubmitWarning, ids: list[int | None]) -> None:
    """Say beside the ids which job waits for what; `culm job why` says it again when it is asked."""
    others = f" and {warning.n_jobs - 1} more like it" if warning.n_jobs > 1 else ""
    for reason in warning.reasons:
        told = f"warning: nobody can run job {ids[warning.index]}{others} as things are: {reason.code}: {reason.text}"
        click.echo(told, err=True)


@job.command("list")
@DIR
@AUTHORITY
@OUTPUT
@click.option("--region", default="")
@click.option("--site", default="")
@click.option("--state", type=click.Choice([state.value for state in State]), default=None)
@click.option("--owner", default="")
@click.option("--jobset", type=int, default=None)
@click.option("--since", default="", help="Submitted since: 15m, 2h, 3d (ago) or 2026-11-25T13:00 (UTC).")
@click.option("--until", default="", help="Submitted before; written like --since.")
@click.option("--limit", type=click.IntRange(1, 1000), default=100, show_default=True)
@click.option("--order", type=click.Choice(["newest", "id"]), default=None, help="[default: newest; of a jobset: id]")
@click.option("--before", default="", help="In the order newest: where the page before ended.")
@click.option("--after", type=int, default=0, help="In the order of the id: the last id of the page before.")
def list_jobs(folder: Path, authority: str, output: str, state: str | None, **filters: Any) -> None:
    """List jobs over all shards, the newest first; shards that gave no answer are named.

    \b
    Examples:
      culm job list --state running --limit 20
      culm job list --site BNL --since 2h -o json
    """
    now = time.time()
    span = {name: moment(filters[name], now) if filters[name] else None for name in ("since", "until")}
    order = filters["order"] or ("id" if filters["after"] or filters["jobset"] is not None else "newest")
    query = JobsQuery(state=State(state) if state else None, **(filters | span | {"order": order}))

    async def ask() -> Any:
        async with router(folder, authority=authority) as client:
            return await client.jobs(query)

    page = asyncio.run(ask())
    if output == "json":
        click.echo(msgspec.json.encode(page))
        require_whole(page.missing_shards)
        return
    if not page.jobs:
        click.echo("no jobs" + ("" if not page.missing_shards else " on the shards that answered"))
    else:
        console().print(_table(page.jobs))
    if page.next is not None:
        click.echo(f"more: --after {page.next}", err=True)
    if page.before is not None:
        click.echo(f"more: --before {page.before}", err=True)
    require_whole(page.missing_shards)


@job.command()
@DIR
@AUTHORITY
@OUTPUT
@click.argument("job_id", type=int)
def show(folder: Path, authority: str, output: str, job_id: int) -> None:
    """Show one job with its history and reports.

    \b
    Examples:
      culm job show 1
      culm job show 1 -o json
    """

    async def ask() -> Any:
        async with router(folder, authority=authority) as client:
            return await client.job(job_id)

    view = asyncio.run(ask())
    if output == "json":
        click.echo(msgspec.json.encode(view))
        return
    out = console()
    out.print(_table([view.job]))
    if view.events_left_out or view.reports_left_out:
        out.print(f"not shown: {view.events_left_out} older events, {view.reports_left_out} older reports")
    table = Table("n", "event", "from", "to", "attempt", "by", "detail")
    for event in view.history:
        source = event.source.value if event.source else ""
        table.add_row(
            str(event.n), event.event.value, source, event.target.value, str(event.attempt), event.actor, event.detail
        )
    out.print(table)
    for report in view.reports:
        out.print(f"attempt {report.attempt}: {report.state.value}, exit code {report.exit_code}")
        if report.error:
            out.print(f"  {report.error.plane} {report.error.code}: {report.error.text}")
        for name, text in (("stdout", report.stdout_tail), ("stderr", report.stderr_tail)):
            if text:
                out.print(f"  {name}:\n{text.rstrip()}")


@job.command()
@DIR
@AUTHORITY
@OUTPUT
@click.argument("job_id", type=int)
def why(folder: Path, authority: str, output: str, job_id: int) -> None:
    """Say why a job is not running, or what it does: the code that dispatches explains.

    \b
    Examples:
      culm job why 1
      culm job why 1 -o json
    """

    async def ask() -> Any:
        async with router(folder, authority=authority) as client:
            return await client.why(job_id)

    answer = asyncio.run(ask())
    if output == "json":
        click.echo(msgspec.json.encode(answer))
        return
    click.echo(f"job {job_id} is {answer.state.value if answer.state else 'where it was last seen'}")
    for reason in answer.reasons:
        click.echo(f"  {reason.code}: {reason.text}" + (f" (last {utc(reason.since)})" if reason.since else ""))


@job.command()
@DIR
@AUTHORITY
@OUTPUT
@click.argument("job_id", type=int)
def history(folder: Path, authority: str, output: str, job_id: int) -> None:
    """Show every transition of a job: when, by whom, and what was said.

    \b
    Examples:
      culm job history 1
      culm job history 1 -o json
    """

    async def ask() -> Any:
        async with router(folder, authority=authority) as client:
            return await client.job(job_id)

    view = asyncio.run(ask())
    if output == "json":
        click.echo(msgspec.json.encode(view.history))
        return
    table = Table("n", "when", "event", "state", "attempt", "by", "detail")
    for event in view.history:
        who = (str(event.attempt), event.actor, event.detail)
        table.add_row(str(event.n), utc(event.at), event.event.value, event.target.value, *who)
    console().print(table)
    if view.events_left_out:
        click.echo(f"not shown: {view.events_left_out} older events")


@job.command()
@DIR
@AUTHORITY
@OUTPUT
@click.option("--jobset", type=int, default=None, help="All jobs of it.")
@click.option("--timeout", "timeout_s", type=float, default=0.0, help="Give up after so many seconds; 0: never.")
@click.argument("ids", nargs=-1, type=int)
def watch(
    folder: Path, *, authority: str, output: str, jobset: int | None, timeout_s: float, ids: tuple[int, ...]
) -> None:
    """Follow jobs until all are final, a line per change. Exit code 0 if all finished, 1 if not, 4 after --timeout.

    \b
    Examples:
      culm job watch 1 2
      culm job watch --jobset 204711 --timeout 600
    """
    if bool(ids) == (jobset is not None):
        raise ClientFault("bad_watch", "either ids or --jobset is needed")

    async def follow() -> dict[int, JobRow]:
        deadline = time.monotonic() + timeout_s if timeout_s else None
        seen: dict[int, JobRow] = {}
        async with router(folder, authority=authority) as client:
            while True:
                rows = await _rows(client, ids, jobset)
                for row in rows:
                    before = seen.get(row.id)
                    if before is None or before.state is not row.state:
                        line = f"{utc(row.modified_at)} {row.id} {row.state.value} {row.host}".rstrip()
                        click.echo(msgspec.json.encode(row) if output == "json" else line)
                    seen[row.id] = row
                if all(row.state in FINAL for row in seen.values()):
                    return seen
                if deadline is not None and time.monotonic() > deadline:
                    raise Unavailable("not_final", f"not all are final after {timeout_s:g} s: culm job why ID says why")
                await asyncio.sleep(WATCH_S)

    ended = asyncio.run(follow())
    if any(row.state is not State.FINISHED for row in ended.values()):
        sys.exit(exits.FAILED)


async def _rows(client: Client, ids: tuple[int, ...], jobset: int | None) -> list[JobRow]:
    """Raises ClientFault(unknown_jobset) for one without jobs, Unavailable(missing_shards)."""
    if jobset is None:
        return [(await client.job(identifier)).job for identifier in ids]
    rows, missing = await client.all_jobs(JobsQuery(jobset=jobset, limit=1000))
    if missing:
        raise Unavailable("missing_shards", f"no answer from: {', '.join(missing)}")
    if not rows:
        raise ClientFault("unknown_jobset", f"no job of jobset {jobset} is known", http_status=404)
    return rows


@job.command()
@DIR
@AUTHORITY
@OUTPUT
@click.option("--jobset", type=int, default=None, help="All jobs of it that failed or were ended.")
@click.argument("ids", nargs=-1, type=int)
def retry(folder: Path, *, authority: str, output: str, jobset: int | None, ids: tuple[int, ...]) -> None:
    """Submit jobs again that failed, were cancelled or closed: a new job each, in the same jobset; the ids are printed.

    May be repeated: one job is retried once, its retry can be retried again.

    \b
    Examples:
      culm job retry 1 2
      culm job retry --jobset 204711
    """
    if bool(ids) == (jobset is not None):
        raise ClientFault("bad_retry", "either ids or --jobset is needed")

    async def ask() -> dict[int, int]:
        made: dict[int, int] = {}
        async with router(folder, authority=authority) as client:
            for row in await _rows(client, ids, jobset):
                if row.state in FINAL - {State.FINISHED}:
                    made[row.id] = await _retry(client, row.id)
                elif jobset is None:
                    raise ClientFault("not_failed", f"job {row.id} is {row.state.value}: there is nothing to retry")
        return made

    made = asyncio.run(ask())
    if output == "json":
        click.echo(msgspec.json.encode({str(old): new for old, new in made.items()}))
    elif made:
        click.echo("\n".join(f"{old} -> {new}" for old, new in made.items()))
    else:
        click.echo("nothing to retry")


async def _retry(client: Client, identifier: int) -> int:
    view = await client.job(identifier)
    request = SubmitRequest(idempotency_key=f"retry-{identifier}", jobs=[view.spec], jobset=view.job.jobset)
    [new] = (await client.submit(request)).ids
    assert new is not None
    return new


@job.command()
@DIR
@AUTHORITY
@OUTPUT
@click.option("--jobset", type=int, default=None, help="All jobs of it.")
@click.argument("ids", nargs=-1, type=int)
def kill(folder: Path, *, authority: str, output: str, jobset: int | None, ids: tuple[int, ...]) -> None:
    """End jobs by id, or a whole jobset. Running payloads end at their next heartbeat.

    \b
    Examples:
      culm job kill 1 2
      culm job kill --jobset 204711
    """

    if bool(ids) == (jobset is not None):
        raise ClientFault("bad_cancel", "exactly one is needed: ids or --jobset")

    async def ask() -> CancelAnswer:
        async with router(folder, authority=authority) as client:
            if jobset is not None:
                return await client.cancel_jobset(jobset)
            return await client.cancel(CancelRequest(ids=list(ids)))

    answer = asyncio.run(ask())
    if output == "json":
        click.echo(msgspec.json.encode(answer))
    else:
        for one in answer.jobs:
            click.echo(f"{one.id} {one.outcome}")
    _require_all_ended(answer, jobset)


def _require_all_ended(answer: CancelAnswer, jobset: int | None) -> None:
    """Raises ClientFault where a job is as it was: the exit code must say so."""
    if answer.missing_shards:
        raise ClientFault(
            "missing_shards", f"no answer from: {', '.join(answer.missing_shards)}; repeat", http_status=503
        )
    if jobset is not None and not answer.jobs:
        raise ClientFault("unknown_jobset", f"no job of jobset {jobset} is known", http_status=404)
    for outcome, status in (("forbidden", 403), ("not_found", 404)):
        ids = [str(one.id) for one in answer.jobs if one.outcome == outcome]
        if ids:
            told = f"{len(ids)} of {len(answer.jobs)} jobs could not be ended: {', '.join(ids[:10])}"
            raise ClientFault(outcome, told, http_status=status)


def _table(rows: list[JobRow]) -> Table:
    table = Table("id", "state", "site", "queue", "owner", "priority", "attempt", "lost", "host")
    for row in rows:
        numbers = (str(row.priority), str(row.attempt), f"{row.lost} of {row.max_attempts}")
        table.add_row(str(row.id), row.state.value, row.site, row.queue, row.owner, *numbers, row.host)
    return table
