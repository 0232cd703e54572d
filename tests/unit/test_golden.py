"""The bytes on the wire are what they were: golden files, read by us and by another implementation of MessagePack."""

from pathlib import Path
from typing import Any

import msgpack
import msgspec
import pytest

from culm import frames
from tests.golden import mint
from tests.golden.samples import BY_NAME, message_types, plain

FILES = sorted(mint.FOLDER.glob("*.msgpack"))


def test_every_message_has_a_sample_and_golden_bytes() -> None:
    assert message_types() <= BY_NAME.keys()
    assert {path.name.partition(".")[0] for path in FILES} == BY_NAME.keys()


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_what_is_sent_today_is_pinned(name: str) -> None:
    """A difference is a change of the protocol: read the head of culm/wire.py, then `python -m tests.golden.mint`."""
    assert msgspec.msgpack.encode(BY_NAME[name]) == mint.minted(name)[-1].read_bytes()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_shape_there_ever_was_is_still_read(path: Path) -> None:
    sample = BY_NAME[path.name.partition(".")[0]]
    then = msgspec.msgpack.decode(path.read_bytes())
    assert _holds(then, plain(msgspec.msgpack.decode(path.read_bytes(), type=type(sample))))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_another_implementation_reads_the_same(path: Path) -> None:
    data = path.read_bytes()
    assert msgpack.unpackb(data, strict_map_key=False) == msgspec.msgpack.decode(data)


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_what_another_implementation_writes_is_read_by_ours(name: str) -> None:
    sample = BY_NAME[name]
    data = msgpack.packb(msgpack.unpackb(msgspec.msgpack.encode(sample), strict_map_key=False))
    assert plain(msgspec.msgpack.decode(data, type=type(sample))) == plain(sample)


def test_a_frame_is_a_length_and_an_array() -> None:
    data = frames.encode_frame(frames.Frame(frames.Kind.CALL, 9, "get_job", 10_000, b"\x80"))
    assert data == bytes.fromhex("00000011950009a7" + b"get_job".hex() + "cd2710c40180")
    size = int.from_bytes(data[:4], "big")
    assert msgpack.unpackb(data[4 : 4 + size]) == [0, 9, "get_job", 10_000, b"\x80"]


def test_minting_writes_nothing_when_nothing_changed() -> None:
    before = {path: path.stat().st_mtime_ns for path in FILES}
    assert mint.mint() == []
    assert {path: path.stat().st_mtime_ns for path in FILES} == before


def test_minting_a_changed_message_keeps_the_old_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mint, "FOLDER", tmp_path)
    first = mint.mint()
    assert len(first) == len(BY_NAME)
    old = tmp_path / "Usage.1.msgpack"
    old.write_bytes(b"\x80")
    assert [path.name for path in mint.mint()] == ["Usage.2.msgpack"]
    assert old.read_bytes() == b"\x80"


def _holds(then: Any, now: Any) -> bool:
    """Whether everything that was said then is understood now; fields added since may have appeared."""
    if isinstance(then, dict):
        return all(key in now and _holds(value, now[key]) for key, value in then.items())
    if isinstance(then, list):
        return len(then) <= len(now) and all(_holds(a, b) for a, b in zip(then, now, strict=False))
    return bool(then == now)
