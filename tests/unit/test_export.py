"""An export of a month is whole, durable and its owner's, or it is not there; a drop is held against what it has."""

import gzip
import json
import os
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from culm.errors import CulmError
from culm.wire import ArchiveAnswer, ArchivePartition, ArchiveRequest, ExportAnswer, ExportRequest, ShardArchiveAnswer
from ops.cli import culm, exits
from tests.golden.samples import BY_NAME

MONTH = "p202610"


class Archives:
    """What a router knows of the archives: by shard, the ids of its jobs."""

    def __init__(self, **jobs: list[int]) -> None:
        self.jobs = jobs
        self.refused: dict[str, str] = {}
        self.asked: list[ArchiveRequest] = []
        self.behind: Callable[[], None] = lambda: None
        """What happens once a page was read."""

    async def post(self, _path: str, request: msgspec.Struct, answer: type[Any], timeout_s: float) -> Any:
        assert timeout_s > 60.0
        if isinstance(request, ExportRequest):
            assert answer is ExportAnswer
            page = [one for one in self.jobs[request.shard] if one > request.after][:2]
            self.behind()
            job = BY_NAME["JobView"]
            views = [msgspec.structs.replace(job, job=msgspec.structs.replace(job.job, id=one)) for one in page]
            return ExportAnswer(jobs=views, next=page[-1] if len(page) == 2 else None)
        assert isinstance(request, ArchiveRequest)
        self.asked.append(request)
        shards = [
            ShardArchiveAnswer(
                shard=name,
                n_dropped=len(ids) if request.drop else 0,
                partitions=[
                    ArchivePartition(name=MONTH, before="2026-11-01", n_jobs=len(ids), n_rows_estimated=0, n_bytes=0)
                ],
            )
            for name, ids in self.jobs.items()
            if name not in self.refused
        ]
        return ArchiveAnswer(shards=shards, missing_shards=list(self.refused), why_missing=self.refused)


@pytest.fixture
def archives(monkeypatch: pytest.MonkeyPatch) -> Archives:
    """Two shards with five jobs."""
    made = Archives(us1=[1, 2, 3], eu1=[7, 8])

    @asynccontextmanager
    async def router(*_place: object, **_authority: object) -> AsyncIterator[Archives]:
        yield made

    monkeypatch.setattr("ops.cli.db.router", router)
    return made


def run(*words: str) -> tuple[int, str]:
    """Exit code, and what was printed, the error too."""
    done = CliRunner().invoke(culm, ["db", *words])
    if isinstance(done.exception, CulmError):
        return exits.of(done.exception), f"{done.output}{done.exception}"
    return done.exit_code, done.output


def test_it_is_durable_its_owners_and_written_beside_under_a_name_of_its_own(
    archives: Archives, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, other = tmp_path / "month.jsonl.gz", tmp_path / "month.jsonl.gz.part"
    other.write_text("another export's")
    synced: list[tuple[bool, bool]] = []

    def fsync(number: int) -> None:
        synced.append((stat.S_ISDIR(os.fstat(number).st_mode), file.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    assert run("export", MONTH, "--to", str(file)) == (0, f"{file}: 5 jobs of {MONTH}\n")
    with gzip.open(file, "rt") as lines:
        assert [(line["shard"], line["job"]["job"]["id"]) for line in map(json.loads, lines)] == [
            ("eu1", 7), ("eu1", 8), ("us1", 1), ("us1", 2), ("us1", 3),
        ]  # fmt: skip
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    # The file before it has its name, the folder after.
    assert synced == [(False, False), (True, True)]
    assert {path.name for path in tmp_path.iterdir()} == {file.name, other.name}
    assert other.read_text() == "another export's"


@pytest.mark.parametrize("late", [2, 9])
def test_a_month_that_grew_meanwhile_is_not_called_whole(archives: Archives, tmp_path: Path, late: int) -> None:
    """A job with an id that was passed already, and one that was still to come."""
    archives.jobs["us1"] = [1, 3]

    def grow() -> None:
        archives.jobs["us1"] = sorted({*archives.jobs["us1"], late})

    archives.jobs["eu1"], archives.jobs["zz1"] = [], [11, 12]
    n_pages = 0

    def behind() -> None:
        nonlocal n_pages
        n_pages += 1
        if n_pages == 3:
            grow()

    archives.behind = behind
    code, told = run("export", MONTH, "--to", str(tmp_path / "file"))
    assert code != 0
    assert "archive_changed" in told
    assert list(tmp_path.iterdir()) == []


def test_a_drop_is_told_what_an_export_has(archives: Archives, tmp_path: Path) -> None:
    file = tmp_path / "month.jsonl.gz"
    run("export", MONTH, "--to", str(file))
    code, told = run("drop", MONTH, "--exported", str(file), "--yes")
    assert (code, told.splitlines()) == (0, [f"us1: dropped {MONTH} with 3 jobs", f"eu1: dropped {MONTH} with 2 jobs"])
    assert archives.asked[-1] == ArchiveRequest(drop=MONTH, exported={"eu1": 2, "us1": 3})
    run("drop", MONTH, "--yes")
    assert archives.asked[-1] == ArchiveRequest(drop=MONTH)


@pytest.mark.parametrize("spoil", [lambda data: data[:-9], lambda _: b"text", lambda _: gzip.compress(b"{}\n")])
def test_a_file_that_is_no_whole_export_drops_nothing(
    archives: Archives, tmp_path: Path, spoil: Callable[[bytes], bytes]
) -> None:
    file = tmp_path / "month.jsonl.gz"
    run("export", MONTH, "--to", str(file))
    file.write_bytes(spoil(file.read_bytes()))
    n_asked = len(archives.asked)
    code, told = run("drop", MONTH, "--exported", str(file), "--yes")
    assert (code, "bad_export" in told, len(archives.asked)) == (2, True, n_asked)


def test_why_a_shard_did_not_drop_it_is_said(archives: Archives) -> None:
    archives.refused = {"eu1": "partition_in_use: job 7 is not archived"}
    code, told = run("drop", MONTH, "--yes")
    assert code != 0
    assert f"us1: dropped {MONTH} with 3 jobs" in told
    assert "eu1 (partition_in_use: job 7 is not archived)" in told
