"""Which shards live in a home: those that have joined and those that are about to, never what was refused."""

from pathlib import Path

import pytest

from culm import topology_store
from culm.topology import Placement, Region, Section, Shard
from ops.cluster.layout import Layout, is_shard_name


@pytest.fixture
def home(tmp_path: Path) -> Layout:
    """A centre that asia1 has joined and far1, which runs elsewhere; what was refused has left folders."""
    layout = Layout(tmp_path)
    topology_store.create(
        layout.topology,
        Section(
            authority="central",
            epoch=1,
            shards={
                "us1": Shard(link="unix:/us1"),
                "eu1": Shard(link="unix:/eu1"),
                "asia1": Shard(link="unix:/asia1"),
                "far1": Shard(link="tls:far1.example.org:25090"),
            },
            regions={"US": Region(slot=0, shards=["us1"])},
            placement={0: Placement("us1", 1)},
        ),
    )
    for name in ("us1", "eu1", "asia1", "far1", "monitor", "refused1"):
        layout.data(name).mkdir(parents=True)
    return layout


def test_what_was_refused_is_not_started_again(home: Layout) -> None:
    assert home.shards == ["us1", "eu1", "asia1"]


def test_what_is_about_to_join_is_started(home: Layout) -> None:
    home.joining("refused1").touch()
    assert home.shards == ["us1", "eu1", "asia1", "refused1"]


def test_a_broken_section_keeps_no_shard_from_its_start(home: Layout) -> None:
    (home.topology / "central.json").write_bytes(b"{")
    assert home.shards == ["us1", "eu1", "asia1", "far1", "refused1"]


@pytest.mark.parametrize(
    ("name", "good"),
    [
        ("us1", True),
        ("asia-2", True),
        ("monitor2", True),
        ("", False),
        ("Us1", False),
        ("../x", False),
        ("a" * 32, False),
        ("router", False),
        ("monitor", False),
        ("supervisor", False),
        ("pilot", False),
        ("pilot-1", False),
        ("us1-db", False),
        ("us1-valkey", False),
        ("cern-router", False),
    ],
)
def test_no_shard_has_the_name_of_another_process(name: str, good: bool) -> None:
    assert is_shard_name(name) == good
