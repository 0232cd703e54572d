"""The schema: made once, in order, under a lock; a changed file is refused; half a migration is not taken for whole."""

import asyncio
import secrets
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from culm.errors import Bug, Unavailable
from culm.settings import DatabaseSettings
from shard import migrate as migrations
from shard.driver import connect
from shard.migrate import migrate
from tests import servers

COLUMNS = (
    "SELECT table_name, column_name, column_type FROM information_schema.columns"
    " WHERE table_schema = DATABASE() ORDER BY 1, 2"
)
N_VERSIONS = len(migrations._migrations())


@pytest.fixture
async def settings(mariadb: servers.Server) -> AsyncIterator[DatabaseSettings]:
    """A schema that does not exist yet."""
    made = DatabaseSettings(socket=str(mariadb.socket), name=f"m_{secrets.token_hex(4)}")
    yield made
    await _ask(msgspec.structs.replace(made, name=""), f"DROP DATABASE IF EXISTS {made.name}")


async def _ask(settings: DatabaseSettings, text: str) -> list[tuple[Any, ...]]:
    connection = await connect(settings, autocommit=True)
    try:
        async with connection.cursor() as cursor:
            await cursor.execute(text)
            return list(await cursor.fetchall()) if cursor.description else []
    finally:
        connection.close()


async def _tables(settings: DatabaseSettings) -> set[str]:
    return {row[0] for row in await _ask(settings, "SHOW TABLES")}


async def test_a_fresh_server_gets_the_whole_schema(settings: DatabaseSettings) -> None:
    assert await migrate(settings) == N_VERSIONS
    assert {"slot", "job", "spec", "ready", "lease", "job_event", "report", "submission", "tally"} <= await _tables(
        settings
    )
    assert [row[0] for row in await _ask(settings, "SELECT version FROM schema_version ORDER BY version")] == list(
        range(1, N_VERSIONS + 1)
    )


async def test_twice_is_once(settings: DatabaseSettings) -> None:
    await migrate(settings)
    before = await _ask(settings, "SELECT * FROM schema_version")
    assert await migrate(settings) == N_VERSIONS
    assert await _ask(settings, "SELECT * FROM schema_version") == before


async def test_six_at_once_are_one(settings: DatabaseSettings) -> None:
    assert await asyncio.gather(*(migrate(settings) for _ in range(6))) == [N_VERSIONS] * 6
    assert len(await _ask(settings, "SELECT version FROM schema_version")) == N_VERSIONS


async def test_every_table_is_innodb_and_compares_byte_by_byte(settings: DatabaseSettings) -> None:
    await migrate(settings)
    rows = await _ask(
        settings,
        "SELECT engine, table_collation FROM information_schema.tables WHERE table_schema = DATABASE()",
    )
    assert set(rows) == {("InnoDB", "utf8mb4_bin")}


async def test_a_migration_that_was_changed_after_it_was_applied_is_refused(settings: DatabaseSettings) -> None:
    await migrate(settings)
    await _ask(settings, "UPDATE schema_version SET checksum = REPEAT('0', 64) WHERE version = 1")
    with pytest.raises(Bug, match="migration 1 is not the one"):
        await migrate(settings)


async def test_an_older_schema_gets_what_it_lacks(settings: DatabaseSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    files = migrations._migrations()
    more = (N_VERSIONS + 1, "-- One more.\nCREATE TABLE newer (id INT PRIMARY KEY);\nALTER TABLE newer ADD n INT;\n")
    await migrate(settings)
    monkeypatch.setattr(migrations, "_migrations", lambda: [*files, more])
    assert await migrate(settings) == N_VERSIONS + 1
    assert "newer" in await _tables(settings)


async def test_a_migration_that_fails_is_not_noted_as_applied(
    settings: DatabaseSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = migrations._migrations()
    broken = (N_VERSIONS + 1, "CREATE TABLE newer (id INT PRIMARY KEY);\nCREATE TABLE job (id INT, FOREIGN)\n")
    await migrate(settings)
    monkeypatch.setattr(migrations, "_migrations", lambda: [*files, broken])
    with pytest.raises(Bug, match="1064"):
        await migrate(settings)
    assert len(await _ask(settings, "SELECT version FROM schema_version")) == N_VERSIONS


@pytest.mark.parametrize("n_done", [1, 3, 99])
async def test_a_migration_that_was_cut_off_is_completed(settings: DatabaseSettings, n_done: int) -> None:
    """DDL is not rolled back: a server or a shard that was killed in the middle left some of the tables."""
    await migrate(settings)
    whole = await _ask(settings, COLUMNS)
    await _ask(msgspec.structs.replace(settings, name=""), f"DROP DATABASE {settings.name}")
    await _ask(msgspec.structs.replace(settings, name=""), f"CREATE DATABASE {settings.name} COLLATE utf8mb4_bin")
    for statement in list(migrations._statements(migrations._migrations()[0][1]))[:n_done]:
        await _ask(settings, statement)
    assert await migrate(settings) == N_VERSIONS
    assert await _ask(settings, COLUMNS) == whole


async def test_while_another_holds_the_lock_it_waits_and_then_says_busy(
    settings: DatabaseSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrations, "LOCK_TIMEOUT_S", 0)
    holder = await connect(settings, autocommit=True, database="")
    async with holder.cursor() as cursor:
        await cursor.execute(f"SELECT GET_LOCK('culm.migrate.{settings.name}', 0)")
    with pytest.raises(Unavailable) as told:
        await migrate(settings)
    assert told.value.code == "migration_busy"
    holder.close()


@pytest.mark.parametrize("name", ["", "a b", "x`; DROP DATABASE mysql; --", "a-b", "x" * 65])
async def test_a_name_that_is_none_is_refused(settings: DatabaseSettings, name: str) -> None:
    with pytest.raises(Bug, match="cannot be the name"):
        await migrate(msgspec.structs.replace(settings, name=name))


async def test_a_server_that_is_away_is_told_as_such() -> None:
    with pytest.raises(Unavailable) as told:
        await migrate(DatabaseSettings(socket="/nowhere/db.sock", name="x"))
    assert told.value.code == "database_down"


def test_the_files_are_numbered_without_gaps() -> None:
    assert [version for version, _ in migrations._migrations()] == list(range(1, N_VERSIONS + 1))


def test_a_file_is_cut_into_its_statements() -> None:
    text = "-- A comment; with a semicolon.\nCREATE TABLE a (\n  b INT -- c\n);\n\nALTER TABLE a ADD c INT;\n"
    assert [part.strip() for part in migrations._statements(text)] == [
        "CREATE TABLE a (\n  b INT -- c\n)",
        "ALTER TABLE a ADD c INT",
    ]


async def test_owners_of_before_become_accounts_of_the_authority_of_their_slots(settings: DatabaseSettings) -> None:
    await migrate(settings)
    cern = 12_290
    job = "({id}, {slot}, 1, 'activated', 1, 0, 0, 3, 1000, 7, NULL, 0, '{owner}', '', '', 'user', '', '', '', '', 0"
    rows = ", ".join(
        job.format(id=(slot << 39) + 1, slot=slot, owner=owner)
        + ", UTC_TIMESTAMP(6), UTC_TIMESTAMP(6), NULL, NULL, NULL)"
        for slot, owner in ((3, "ann"), (cern, "ann"), (4, "central:bob"))
    )
    for text in (
        f"INSERT INTO job VALUES {rows}",
        "INSERT INTO submission VALUES (3, 'ann', 'k', REPEAT('x', 16), 1, 1, UTC_TIMESTAMP(6), NULL)",
        f"INSERT INTO slot (slot, state, epoch, changed_at) VALUES ({cern}, 'open', 1, UTC_TIMESTAMP(6))",
        "INSERT INTO owner_tally VALUES ('ann', 1, 2)",
        # As a shard of before left it, or one that was cut off in the middle: bob is done already.
        "DELETE FROM schema_version WHERE version = 3",
    ):
        await _ask(settings, text)
    await migrate(settings)
    owners = await _ask(settings, "SELECT slot, owner FROM job ORDER BY slot")
    assert owners == [(3, "central:ann"), (4, "central:bob"), (cern, "CERN:ann")]
    assert await _ask(settings, "SELECT owner FROM submission") == [("central:ann",)]
    assert await _ask(settings, "SELECT owner FROM owner_tally") == [("CERN:ann",)]
