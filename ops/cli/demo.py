"""`culm demo`: a cluster, 60 shell jobs over three regions, pilots that run them."""

import asyncio
import contextlib
import secrets
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Final

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from culm.errors import Unavailable
from culm.states import FINAL, State
from culm.wire import JobSpec, JobsQuery, SubmitRequest
from ops.cli import exits
from ops.cli.cluster import start
from ops.cli.options import DIR, PORT, console, router
from ops.cluster import control
from ops.cluster.layout import FIRST_SHARDS, Layout, default_folder
from ops.cluster.plan import DEMO_SITES

REGIONS: Final = {region: authority for authority, shards in FIRST_SHARDS.items() for region in shards.values()}
"""Each region with the authority that it belongs to."""
JOBS_PER_REGION: Final = 20
N_JOBS: Final = JOBS_PER_REGION * len(REGIONS)
PILOTS_PER_REGION: Final = 2
DEADLINE_S: Final = 110.0
POLL_S: Final = 0.25


@click.command()
@DIR
@PORT
def demo(folder: Path, port: int | None) -> None:
    """Start a cluster, submit 60 shell jobs over three regions, run them with pilots; leave the cluster up.

    \b
    Examples:
      culm demo
      culm demo --dir /tmp/second --port 26080
    """
    layout = start(folder, port)
    try:
        _demonstrate(layout)
    except KeyboardInterrupt:
        click.echo(f"interrupted; the cluster stays up: {_command(folder, 'down')}", err=True)
        sys.exit(exits.INTERRUPTED)


def _demonstrate(layout: Layout) -> None:
    began = time.monotonic()
    pilots = [_pilot(layout, region, number) for region in REGIONS for number in range(PILOTS_PER_REGION)]
    try:
        states = asyncio.run(_run_while_up(layout))
    finally:
        for pilot in pilots:
            pilot.terminate()
        for pilot in pilots:
            with contextlib.suppress(subprocess.TimeoutExpired):
                pilot.wait(10)
    _summary(layout, states, time.monotonic() - began)
    if states[State.FINISHED] != N_JOBS:
        sys.exit(exits.FAILED)


async def _run_while_up(layout: Layout) -> Counter[State]:
    """`_run`, unless the cluster is stopped meanwhile. Raises Unavailable(not_running)."""
    running = asyncio.create_task(_run(layout))
    try:
        while not running.done() and not control.is_leaving(layout.folder):
            await asyncio.wait({running}, timeout=POLL_S)
        if control.is_leaving(layout.folder) and not (running.done() and running.exception() is None):
            again = _command(layout.folder, "demo")
            raise Unavailable("not_running", f"the cluster was stopped in the middle of the demo: {again}")
        return await running
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def _run(layout: Layout) -> Counter[State]:
    """Submit, then watch until all are final or the time is up; how many are in which state."""
    ids: list[int] = []
    jobsets = []
    async with router(layout.folder) as client:
        for region in REGIONS:
            specs = [
                JobSpec(  # noqa: S604  # the payload of a job, run by its pilot
                    region=region if n % 2 else "",
                    site="" if n % 2 else DEMO_SITES[region],
                    name=f"demo-{region}-{n}",
                    shell=f"echo job {n} of {region}; sleep 0.{n % 5}",
                    walltime_s=60,
                )
                for n in range(JOBS_PER_REGION)
            ]
            answer = await client.submit(SubmitRequest(idempotency_key=f"demo-{secrets.token_hex(8)}", jobs=specs))
            ids += [identifier for identifier in answer.ids if identifier is not None]
            jobsets.append(answer.jobset)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        with Progress(*columns, console=Console(stderr=True)) as progress:
            bar = progress.add_task("jobs final", total=len(ids))
            deadline = time.monotonic() + DEADLINE_S
            while True:
                states: Counter[State] = Counter()
                for jobset in jobsets:
                    page = await client.jobs(JobsQuery(jobset=jobset, limit=1000))
                    states.update(row.state for row in page.jobs)
                n_final = sum(n for state, n in states.items() if state in FINAL)
                progress.update(bar, completed=n_final)
                if n_final >= len(ids) or time.monotonic() > deadline:
                    return states
                await asyncio.sleep(POLL_S)


def _pilot(layout: Layout, region: str, number: int) -> "subprocess.Popen[bytes]":
    home = layout.home(REGIONS[region])
    log = (home.logs / f"pilot-{region}-{number}.log").open("ab")
    with log:
        return subprocess.Popen(
            [
                *(sys.executable, "-P", "-m", "pilot", "--server", home.router_url),
                *("--queue", f"{DEMO_SITES[region]}-q", "--wait", "5"),
                *("--token-file", str(home.tokens / f"{home.authority}.pilot")),
                *("--name", f"demo-{region}-{number}", "--work-dir", str(layout.folder / "pilots")),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


def _command(folder: Path, words: str, arguments: str = "") -> str:
    """A command as the user can type it, from where the README says."""
    where = "" if folder == default_folder() else f"--dir {folder}"
    return " ".join(filter(None, ("bin/culm", words, where, arguments)))


def told(states: Counter[State]) -> str:
    """What became of the jobs that were submitted: of those whose shard gave no answer too."""
    counted = [f"{n} {state.value}" for state, n in sorted(states.items())]
    n_silent = N_JOBS - states.total()
    return f"{N_JOBS} jobs: " + ", ".join(
        [*counted, *([f"{n_silent} whose shard gives no answer"] if n_silent else [])]
    )


def _summary(layout: Layout, states: Counter[State], took_s: float) -> None:
    out = console()
    out.print(f"{told(states)}, in {took_s:.1f} s")
    out.print(
        f"router  {layout.router_url}\nmonitor {layout.monitor_url}, for a browser with a token (culm token issue)"
    )
    out.print(
        "Try next:",
        _command(layout.folder, "job list"),
        _command(layout.folder, "counts --by site"),
        _command(layout.folder, "job submit", "--site BNL -- hostname"),
        sep="\n  ",
    )
