"""`culm db partitions|archive|export|drop`."""

import asyncio
import contextlib
import gzip
import os
import re
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

import click
import msgspec
from rich.console import Console
from rich.table import Table

from culm.errors import ClientFault, Unavailable
from culm.wire import ArchiveAnswer, ArchiveRequest, ExportAnswer, ExportRequest, JobView
from ops.cli.options import AUTHORITY, DIR, OUTPUT, console, router

_AGE: Final = re.compile(r"(\d+)([smhd])")
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
TIMEOUT_S: Final = 90.0


@click.group()
def db() -> None:
    """The shards' archives: months of jobs that ended."""


@db.command()
@DIR
@AUTHORITY
@OUTPUT
def partitions(folder: Path, authority: str, output: str) -> None:
    """List the months of every shard's archive.

    \b
    Examples:
      culm db partitions
      culm db partitions -o json
    """
    answer = asyncio.run(_ask(folder, authority, ArchiveRequest()))
    if output == "json":
        click.echo(msgspec.json.encode(answer))
    else:
        _show(answer)
    _require_all(answer)


@db.command()
@DIR
@AUTHORITY
@OUTPUT
@click.option("--older", default="3d", show_default=True, help="What ended longer ago: 90s, 30m, 12h, 3d.")
def archive(folder: Path, authority: str, output: str, older: str) -> None:
    """Move now what ended longer ago, until nothing is left. The shards do it by themselves too (archive.after_s).

    \b
    Examples:
      culm db archive
      culm db archive --older 12h
    """
    older_s = _seconds(older)

    async def move() -> tuple[int, ArchiveAnswer]:
        n_moved, n_idle = 0, 0
        with Console(stderr=True).status("moving") as spinner:
            while True:
                answer = await _ask(folder, authority, ArchiveRequest(older_s=older_s))
                n_now = sum(one.n_moved for one in answer.shards)
                n_moved += n_now
                spinner.update(f"moved {n_moved} jobs")
                # A look goes through a stretch of a slot's jobs: several in a row without a find are the end.
                n_idle = 0 if n_now else n_idle + 1
                if n_idle >= IDLE_LOOKS:
                    return n_moved, answer

    n_moved, answer = asyncio.run(move())
    if output == "json":
        click.echo(msgspec.json.encode({"n_moved": n_moved, "missing_shards": answer.missing_shards}))
    else:
        click.echo(f"moved {n_moved} jobs")
        _show(answer)
    _require_all(answer)


IDLE_LOOKS: Final = 3


@db.command()
@DIR
@AUTHORITY
@OUTPUT
@click.option("--to", "path", required=True, type=click.Path(dir_okay=False, path_type=Path), help="FILE.jsonl.gz")
@click.option("--shard", default="", help="Of this shard only.  [default: of all of the authority]")
@click.option("--force", is_flag=True, help="Replace the file.")
@click.argument("name")
def export(folder: Path, authority: str, output: str, path: Path, *, shard: str, force: bool, name: str) -> None:
    """Write the partition NAME of the archive into a file: one JSON object a line, a job with its whole history.

    The file is there when it is whole: as many jobs as the shards have counted in that month, before and after.

    \b
    Examples:
      culm db export p202610 --to p202610.jsonl.gz
    """
    if path.exists() and not force:
        raise ClientFault("file_exists", f"{path} is there: choose another name, or --force")
    n_jobs = asyncio.run(_export(folder, authority, name, shard, path))
    if output == "json":
        click.echo(msgspec.json.encode({"file": str(path), "partition": name, "n_jobs": n_jobs}))
    else:
        click.echo(f"{path}: {n_jobs} jobs of {name}")


async def _export(folder: Path, authority: str, name: str, shard: str, path: Path) -> int:
    counted = await _counted(folder, authority, name, shard)
    written: Counter[str] = Counter()
    with _durable(path) as raw, gzip.open(raw, "wb") as file, Console(stderr=True).status("exporting") as spinner:
        async with router(folder, "admin", authority=authority) as client:
            for one in sorted(counted):
                after: int | None = 0
                while after is not None:
                    asked = ExportRequest(shard=one, name=name, after=after)
                    page = await client.post("export", asked, ExportAnswer, timeout_s=TIMEOUT_S)
                    for job in page.jobs:
                        file.write(msgspec.json.encode(_Line(one, job)) + b"\n")
                    written[one] += len(page.jobs)
                    after = page.next
                    spinner.update(f"{written.total()} of {sum(counted.values())} jobs")
        # Again: what came meanwhile, with an id that was passed already, was not read.
        now = await _counted(folder, authority, name, shard)
        if any(written[one] != n for one, n in now.items()):
            raise Unavailable(
                "archive_changed", f"{written.total()} jobs were read, {sum(now.values())} are counted: repeat it"
            )
    return written.total()


async def _counted(folder: Path, authority: str, name: str, shard: str) -> dict[str, int]:
    """Jobs of a partition by shard."""
    answer = await _ask(folder, authority, ArchiveRequest(shard=shard))
    _require_all(answer)
    counted = {one.shard: part.n_jobs for one in answer.shards for part in one.partitions if part.name == name}
    if not counted:
        raise ClientFault("unknown_partition", f"there is no partition {name[:40]!r}", http_status=404)
    return counted


@contextlib.contextmanager
def _durable(path: Path) -> Iterator[BinaryIO]:
    """A file for its owner only that is there, and on the disk, when all of this went well; else nothing is."""
    number, name = tempfile.mkstemp(prefix=".culm-export-", suffix=".part", dir=path.parent)
    beside = Path(name)
    try:
        with os.fdopen(number, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class _Line(msgspec.Struct):
    shard: str
    job: JobView


@db.command()
@DIR
@AUTHORITY
@OUTPUT
@click.option("--shard", default="", help="On this shard only.  [default: on all of the authority]")
@click.option("--yes", is_flag=True, help="Needed: what is dropped is gone.")
@click.option(
    *("--exported", "file"),
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Only where a shard has as many jobs of it as this export.",
)
@click.argument("name")
def drop(folder: Path, authority: str, output: str, *, shard: str, yes: bool, file: Path | None, name: str) -> None:
    """Drop the partition NAME of the archive with all its jobs.

    It must be over, and all that ended in it archived. One that was cut off is ended by the same command.

    \b
    Examples:
      culm db drop p202611 --exported p202611.jsonl.gz --yes
      culm db drop p202611 --shard us1 --yes
    """
    if not yes:
        raise ClientFault("not_confirmed", f"the jobs of {name} would be gone for good: repeat it with --yes")
    exported = None if file is None else _counted_in(file)
    answer = asyncio.run(_ask(folder, authority, ArchiveRequest(drop=name, shard=shard, exported=exported)))
    if output == "json":
        click.echo(msgspec.json.encode(answer))
    else:
        for one in answer.shards:
            click.echo(f"{one.shard}: dropped {name} with {one.n_dropped} jobs")
    _require_all(answer)


def _counted_in(path: Path) -> dict[str, int]:
    """Jobs in an export, by shard. Raises ClientFault(bad_export)."""
    found: Counter[str] = Counter()
    try:
        with gzip.open(path) as lines:
            for line in lines:
                found[_OF_SHARD.decode(line).shard] += 1
    except (OSError, EOFError, zlib.error, msgspec.MsgspecError) as error:
        raise ClientFault("bad_export", f"{path} is no whole export: {error}") from None
    return dict(found)


class _OfShard(msgspec.Struct):
    shard: str


_OF_SHARD: Final = msgspec.json.Decoder(_OfShard)


async def _ask(folder: Path, authority: str, request: ArchiveRequest) -> ArchiveAnswer:
    async with router(folder, "admin", authority=authority) as client:
        return await client.post("archive", request, ArchiveAnswer, timeout_s=TIMEOUT_S)


def _show(answer: ArchiveAnswer) -> None:
    table = Table("shard", "partition", "ended before", "jobs", "MiB")
    for one in answer.shards:
        for part in one.partitions:
            table.add_row(one.shard, part.name, part.before, str(part.n_jobs), f"{part.n_bytes / (1 << 20):.1f}")
    console().print(table)


def _require_all(answer: ArchiveAnswer) -> None:
    if answer.missing_shards:
        why = (f"{one} ({answer.why_missing.get(one, 'no answer')})" for one in answer.missing_shards)
        raise Unavailable("missing_shards", f"not done by {', '.join(why)}; repeat")


def _seconds(text: str) -> float:
    found = _AGE.fullmatch(text)
    if found is None:
        raise ClientFault("bad_age", f"{text!r} is no age: 90s, 30m, 12h, 3d")
    return float(int(found[1]) * _SECONDS[found[2]])
