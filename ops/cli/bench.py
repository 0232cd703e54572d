"""`culm bench`: what a getJob costs, against an echo, a naive build, and itself under other circumstances."""

import asyncio
import contextlib
import dataclasses
import json
import platform
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.table import Table

from culm.errors import ClientFault
from loadtest.bench import cells, rounds
from loadtest.bench.beds import QUICK, Sizes
from loadtest.bench.figures import FIGURES, GIVES, LONG
from loadtest.bench.rounds import Told
from ops.bench_bed import Beds
from ops.cli import exits
from ops.cli.options import OUTPUT, console

DEFAULT_PORT = 27080
QUICK_ROUNDS = 2


@click.command()
@OUTPUT
@click.option("--only", help="Figures by id, with commas between them.  [default: all but the very long ones]")
@click.option("--quick", is_flag=True, help=f"{QUICK_ROUNDS} rounds of few jobs: a look, not a figure to be told.")
@click.option("--rounds", "n_rounds", type=click.IntRange(1, 50), default=5, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="After the table, the same as one JSON object on the last line.")
@click.option("--list", "list_only", is_flag=True, help="Show the figures and their targets, measure nothing.")
@click.option("--port", type=click.IntRange(1024, 65000), default=DEFAULT_PORT, show_default=True, help="And up.")
@click.option("--dir", "folder", type=click.Path(file_okay=False, path_type=Path), help="Where to keep data and logs.")
@click.option("--verbose", "-v", is_flag=True, help="Show every sample.")
def bench(only: str | None, folder: Path | None, output: str, **how: bool | int) -> None:
    """Measure the getJob path on servers of its own, and compare.

    Every figure is a ratio inside one run: the median of interleaved rounds, with the smallest and the largest. The
    answers are checked: no job twice, every one committed. Exit code 1 if a figure misses its target.

    \b
    Examples:
      culm bench --quick --only cpu_vs_echo_c64,empty_vs_hit
      culm bench --json
    """
    if how["list_only"]:
        if output == "json":
            click.echo(json.dumps({one.id: dataclasses.asdict(one) for one in FIGURES.values()}))
        else:
            _print({})
        return
    ids = _wanted(only)
    temporary = folder is None
    root = Path(tempfile.mkdtemp(prefix="culm-bench-")) if folder is None else folder.absolute()
    root.mkdir(parents=True, exist_ok=True)
    try:
        told = asyncio.run(_run(root, ids, how))
    finally:
        if temporary:
            shutil.rmtree(root, ignore_errors=True)
    if output == "table":
        _print(told)
        if how["quick"]:
            click.echo(f"quick: {QUICK_ROUNDS} rounds of few jobs, a look and no more")
    if how["as_json"] or output == "json":
        click.echo(msgspec.json.encode(told))
    if not all(one.met for one in told.values()):
        sys.exit(exits.FAILED)


def _wanted(only: str | None) -> list[str]:
    known = [identifier for given in GIVES.values() for identifier in given]
    if only is None:
        return [identifier for identifier in known if identifier not in LONG]
    ids = [word.strip() for word in only.split(",") if word.strip()]
    for identifier in ids:
        if identifier not in known:
            raise ClientFault("unknown_figure", f"{identifier!r} cannot be measured; culm bench --list shows what can")
    return ids


async def _run(folder: Path, ids: list[str], how: Mapping[str, bool | int]) -> dict[str, Told]:
    sizes = QUICK if how["quick"] else Sizes()
    n_rounds = QUICK_ROUNDS if how["quick"] else int(how["n_rounds"])
    told: dict[str, Told] = {}
    out = Console(stderr=True, highlight=False)
    async with contextlib.AsyncExitStack() as stack:
        beds = Beds(folder, int(how["port"]), stack)
        with out.status("starting") as status:

            def progress(text: str) -> None:
                status.update(text)
                if how["verbose"]:
                    out.print(text)

            for name in cells.names_for(ids):
                progress(f"{name}: starting what it needs")
                try:
                    cell = await cells.of(name, beds, sizes, progress)
                    # Those that take very long are their own warm-up, and are run once.
                    found = await rounds.run(cell, 1 if LONG & set(cell.ids) else n_rounds, progress)
                finally:
                    await beds.leave()
                told |= {identifier: one for identifier, one in found.items() if identifier in ids}
    return told


def _print(told: Mapping[str, Told]) -> None:
    table = Table("figure", "what", "target", "value", "spread", "rounds", "")
    for identifier, figure in FIGURES.items():
        if told and identifier not in told:
            continue
        one = told.get(identifier)
        sign = "<=" if figure.at_most else ">="
        target = f"{sign} {figure.target:.3g}{figure.unit}"
        if one is None:
            table.add_row(identifier, figure.text, target, "", "", "", "by hand: --only" if identifier in LONG else "")
            continue
        spread = f"{one.spread[0]:.3g} .. {one.spread[1]:.3g}"
        verdict = one.note or ("" if one.met else "missed")
        table.add_row(
            identifier, figure.text, target, f"{one.value:.3g}{figure.unit}", spread, str(one.rounds), verdict
        )
    out = console()
    out.print(table)
    out.print(f"{platform.platform()}, Python {platform.python_version()}")
