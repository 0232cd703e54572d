"""Rotation of logs: bounded in size and number, whatever the disk says."""

import shutil
from pathlib import Path

import pytest

from ops.cluster.logs import rotate


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_short_log_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "us1.log"
    path.write_bytes(b"0123456789")
    rotate([path], max_bytes=10)
    assert (path.read_bytes(), _names(tmp_path)) == (b"0123456789", {"us1.log"})


def test_older_ones_move_up_and_the_oldest_goes(tmp_path: Path) -> None:
    path = tmp_path / "us1.log"
    for number in range(4):
        path.write_bytes(b"%d" % number * 20)
        rotate([path], max_bytes=10, n_kept=2)
    assert _names(tmp_path) == {"us1.log", "us1.log.1", "us1.log.2"}
    assert path.read_bytes() == b""
    assert (tmp_path / "us1.log.1").read_bytes() == b"3" * 20
    assert (tmp_path / "us1.log.2").read_bytes() == b"2" * 20


def test_without_room_for_a_copy_a_log_is_cut_when_it_is_twice_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    long, twice = tmp_path / "a.log", tmp_path / "b.log"
    long.write_bytes(b"x" * 20)
    twice.write_bytes(b"x" * 21)
    rotate([tmp_path / "gone.log", long, twice], max_bytes=10)
    assert (long.stat().st_size, twice.stat().st_size) == (20, 0)
    assert _names(tmp_path) == {"a.log", "b.log"}
