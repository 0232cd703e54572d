"""The schema of a partition: numbered files, applied once each, in order, under a lock.

`schema_version` keeps number and checksum; a file that was changed after it was applied is refused. One that was cut
off in the middle is run again from its start: what it had made is passed over, so every statement must bear that.
"""

import hashlib
import logging
import re
from collections.abc import Iterable
from importlib import resources
from typing import Any, Final

from culm.errors import Bug, Unavailable
from culm.settings import DatabaseSettings
from shard.driver import EXISTS, connect, translated
from shard.statements import STATEMENTS

LOCK_TIMEOUT_S: Final = 30

_NAME: Final = re.compile(r"^(\d{4})_\w+\.sql$")
_DATABASE_NAME: Final = re.compile(r"^\w{1,64}$")

log = logging.getLogger("shard.migrate")


async def migrate(settings: DatabaseSettings) -> int:
    """Make the database if it is missing and bring its schema up to date; the version it has now.

    Raises Unavailable(database_down, migration_busy), Bug for a changed migration. Safe to retry: yes.
    """
    if not _DATABASE_NAME.match(settings.name):
        raise Bug(f"{settings.name!r} cannot be the name of a database")
    connection = await connect(settings, autocommit=True, database="")
    try:
        with translated():
            async with connection.cursor() as cursor:
                return await _migrate(cursor, settings.name)
    finally:
        connection.close()


async def _migrate(cursor: Any, name: str) -> int:
    await cursor.execute(STATEMENTS["create_database"].head.replace(":name", name))
    await cursor.execute(f"USE `{name}`")
    await cursor.execute(STATEMENTS["migration_lock"].head, (f"culm.migrate.{name}", LOCK_TIMEOUT_S))
    if (await cursor.fetchone())[0] != 1:
        raise Unavailable("migration_busy", "another process migrates this database")
    await cursor.execute(STATEMENTS["make_schema_version"].head)
    await cursor.execute(STATEMENTS["read_schema_version"].head)
    applied = dict(await cursor.fetchall())
    for version, text in _migrations():
        checksum = hashlib.sha256(text.encode()).hexdigest()
        if version not in applied:
            for statement in _statements(text):
                with translated(done=EXISTS):
                    await cursor.execute(statement)
            await cursor.execute(STATEMENTS["insert_schema_version"].head, (version, checksum))
            log.info("schema version %d applied to %s", version, name)
        elif applied[version] != checksum:
            raise Bug(f"migration {version} is not the one that was applied to {name}")
    return max((version for version, _ in _migrations()), default=0)


def _migrations() -> list[tuple[int, str]]:
    folder = resources.files("shard").joinpath("sql/migrations")
    found = [(match, file) for file in folder.iterdir() if (match := _NAME.match(file.name))]
    return sorted((int(match[1]), file.read_text(encoding="utf-8")) for match, file in found)


def _statements(text: str) -> Iterable[str]:
    """The statements of a file; comments are whole lines, a semicolon ends a statement at the end of a line."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("--")]
    return [part for part in re.split(r";\s*$", "\n".join(lines), flags=re.MULTILINE) if part.strip()]
