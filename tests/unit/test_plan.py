"""What a home is made of: settings and tokens are whole or not there, and what an operator changed stays."""

import stat
import time
from pathlib import Path

import pytest

from culm.tokens import Verifier
from culm.wire import Principal
from ops.cluster import plan
from ops.cluster.layout import Layout


@pytest.fixture
def home(tmp_path: Path) -> Layout:
    """An empty home."""
    layout = Layout(tmp_path)
    for folder in (layout.configs, layout.tokens, layout.keys):
        folder.mkdir()
    return layout


def test_settings_are_written_once_but_for_the_port(home: Layout) -> None:
    path = plan._write(home, "router", {"name": "router", "port": 1})
    assert path.read_text(encoding="utf-8") == 'name = "router"\nport = 1\n'
    path.write_text('name = "mine"\nport = 1\n', encoding="utf-8")
    plan._write(home, "router", {"name": "router", "port": 2})
    assert path.read_text(encoding="utf-8") == 'name = "mine"\nport = 2\n'


def test_settings_that_are_as_they_should_be_are_not_touched(home: Layout) -> None:
    path = plan._write(home, "router", {"name": "router", "port": 1})
    before = path.stat()
    plan._write(home, "router", {"name": "router", "port": 1})
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_settings_that_cannot_be_written_stay_as_they_were(home: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    path = plan._write(home, "router", {"name": "router", "port": 1})

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(plan.os, "fsync", full)
        plan._write(home, "router", {"name": "router", "port": 2})
    assert path.read_text(encoding="utf-8") == 'name = "router"\nport = 1\n'
    plan._write(home, "router", {"name": "router", "port": 2})
    assert "port = 2" in path.read_text(encoding="utf-8")


def test_settings_that_a_kill_left_empty_are_written(home: Layout) -> None:
    (home.configs / "us1.toml").touch()
    assert "us1" in plan._write(home, "us1", {"name": "us1"}).read_text(encoding="utf-8")


def _admin(home: Layout) -> Path:
    return home.tokens / "central.admin"


def _left_s(home: Layout) -> float:
    text = _admin(home).read_text(encoding="utf-8")
    return Verifier(home.trusted).expires_at(f"Bearer {text}") - time.time()


@pytest.mark.parametrize("valid_s", [None, -60.0, plan.RENEW_S - 60], ids=["empty", "ended", "ends soon"])
def test_a_token_that_is_spent_is_made_anew(home: Layout, valid_s: float | None) -> None:
    principal = Principal(role="admin", subject="operator", authority="central")
    home.ring.ensure()
    _admin(home).write_text("" if valid_s is None else home.ring.issue(principal, valid_s), encoding="utf-8")
    plan._tokens(home)
    assert _left_s(home) > plan.RENEW_S
    assert stat.S_IMODE(_admin(home).stat().st_mode) == 0o600


def test_a_good_token_and_one_of_elsewhere_stay(home: Layout) -> None:
    plan._tokens(home)
    before = _admin(home).read_bytes()
    (home.tokens / "central.peer").write_bytes(b"from.another.place")
    plan._tokens(home)
    assert _admin(home).read_bytes() == before
    assert (home.tokens / "central.peer").read_bytes() == b"from.another.place"
