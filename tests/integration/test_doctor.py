"""The doctor on a real database and on real ports."""

import os
import socket
from pathlib import Path

import msgspec
import pytest

from ops.cluster.layout import Layout
from ops.doctor import databases, examine, machine
from ops.doctor.check import Check
from tests import servers
from tests.partition import Partition

pytestmark = pytest.mark.integration


async def _look(shard: Partition) -> list[Check]:
    return await databases.examine(shard.settings, expected=True)


async def test_our_own_database_is_well(shard: Partition) -> None:
    found = await _look(shard)
    assert {check.level for check in found} == {"ok"}
    told = "\n".join(check.text for check in found)
    for what in ("version ", "innodb_flush_log_at_trx_commit=1", "innodb_doublewrite=", "isolation READ-COMMITTED"):
        assert what in told
    assert "buffer pool 64 MiB" in told
    assert f"max_allowed_packet={64 << 20}" in told


async def test_a_database_that_does_not_flush_is_found(shard: Partition) -> None:
    await shard.sql("SET GLOBAL innodb_flush_log_at_trx_commit = 2")
    try:
        found = await _look(shard)
    finally:
        await shard.sql("SET GLOBAL innodb_flush_log_at_trx_commit = 1")
    [bad] = [check for check in found if check.level == "bad"]
    assert bad.text == "innodb_flush_log_at_trx_commit=2"


@pytest.mark.parametrize(("expected", "level"), [(True, "bad"), (False, "warn")])
async def test_a_database_that_is_not_there_is_bad_where_it_should_be(
    shard: Partition, expected: bool, level: str
) -> None:
    database = msgspec.structs.replace(shard.settings.database, socket="/nowhere.sock")
    settings = msgspec.structs.replace(shard.settings, database=database)
    [found] = await databases.examine(settings, expected=expected)
    assert (found.level, bool(found.advice)) == (level, True)


async def test_a_password_file_that_is_not_there_is_named(shard: Partition) -> None:
    database = msgspec.structs.replace(shard.settings.database, password_file="/nowhere.password")
    settings = msgspec.structs.replace(shard.settings, database=database)
    [found] = await databases.examine(settings, expected=True)
    assert (found.level, "/nowhere.password" in found.text) == ("bad", True)


def test_who_holds_a_port_is_said(tmp_path: Path) -> None:
    layout = Layout(tmp_path, servers.free_ports(2))
    assert {check.level for check in machine.ports(layout, None)} == {"ok"}
    with socket.create_server(("127.0.0.1", layout.port + 1)):
        router, monitor = machine.ports(layout, None)
    assert (router.level, monitor.level) == ("ok", "bad")
    assert f"({os.getpid()})" in monitor.text
    assert "--port" in monitor.advice


def test_the_disk_is_measured(tmp_path: Path) -> None:
    names = [check.name for check in examine(Layout(tmp_path, servers.free_ports(4)).homes)]
    assert {"disk space", "fdatasync"} <= set(names)
    assert list(tmp_path.iterdir()) == []
