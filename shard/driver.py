"""The two drivers behind one seam: connections, and the table that maps their errors to ours.

The only module that imports a driver. aiomysql is the ordinary one; asyncmy, which is compiled, serves the shard's own
pools, where the driver's time counts (docs/performance.md). Both speak the same interface, and every statement runs on
either.
"""

import asyncio
import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol

import aiomysql
import asyncmy
import asyncmy.errors
import pymysql.err

from culm.errors import Bug, ClientFault, CulmError, Unavailable
from culm.settings import DatabaseSettings

LOCK_WAIT: Final = 1205
RETRIED: Final = frozenset({1020, LOCK_WAIT, 1213, 1412})
"""Snapshot conflict, lock wait timeout, deadlock, a table altered since the snapshot: run the transaction again."""
LOST: Final = frozenset(
    {0, 1040, 1047, 1053, 1129, 1159, 1160, 1161, 1290, 1317, 1836, 1927, 2002, 2003, 2006, 2013, 2014, 2055} | {4031}
)
"""Server gone, going, read-only or without quorum, or the statement was killed there: reconnect, 503."""
SLOW: Final = frozenset({1969, 3024})
"""The server ended a statement that took longer than it may."""
FULL: Final = frozenset({1021, 1026, 1041, 1114, 3675})
"""Disk or table full."""
TOO_LARGE: Final = frozenset({1153, 2020})
"""A statement or an answer larger than the server's max_allowed_packet: it cuts the connection, but it is not gone."""
DUPLICATE: Final = 1062
EXISTS: Final = frozenset({1050, 1060, 1061})
"""The table, column or key that is to be made is there."""
_SESSION: Final = (
    "SET SESSION time_zone = '+00:00', SESSION innodb_lock_wait_timeout = 3, SESSION sql_notes = 0, "
    "SESSION sql_mode = 'STRICT_ALL_TABLES,NO_ZERO_DATE,ERROR_FOR_DIVISION_BY_ZERO'"
)
_ISOLATION: Final = "SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED"
"""A statement of its own: the name of the variable differs between MariaDB 10.11 and MySQL 9."""

DRIVER_ERRORS: Final = (pymysql.err.MySQLError, asyncmy.errors.MySQLError)
"""What either driver raises."""

log = logging.getLogger("shard.database")

# MySQL warns of VALUES(col) in an upsert; its successor is not known to MariaDB. One driver warns, the other one logs.
warnings.filterwarnings("ignore", message="'VALUES function' is deprecated")
logging.getLogger("asyncmy").setLevel(logging.ERROR)


class DuplicateKeyError(Exception):
    """A unique key was hit: another transaction was first. Never leaves the shard."""


class Cursor(Protocol):
    """What we use of a driver's cursor."""

    rowcount: int
    description: Any

    async def execute(self, query: str, args: Sequence[Any] | None = None) -> int:
        """Send a statement, or several; the first one's number of rows."""
        ...

    def mogrify(self, query: str, args: Sequence[Any] | None = None) -> str:
        """The text that would be sent."""
        ...

    async def nextset(self) -> bool | None:
        """On to the next statement's result; None after the last one."""
        ...

    async def fetchall(self) -> Sequence[tuple[Any, ...]]:
        """The rows of this result."""
        ...

    async def fetchone(self) -> tuple[Any, ...] | None:
        """The next row of this result."""
        ...

    async def __aenter__(self) -> "Cursor": ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Connection(Protocol):
    """What we use of a driver's connection."""

    def cursor(self) -> Cursor:
        """A new cursor."""
        ...

    async def query(self, sql: str) -> object:
        """Send a statement whose rows nobody wants."""
        ...

    async def commit(self) -> None:
        """Commit."""
        ...

    async def rollback(self) -> None:
        """Roll back."""
        ...

    def close(self) -> None:
        """Close at once."""
        ...

    def get_server_info(self) -> str:
        """The server's version."""
        ...


async def connect(
    settings: DatabaseSettings,
    *,
    autocommit: bool,
    database: str | None = None,
    limited: bool = False,
    fast: bool = False,
) -> Connection:
    """One connection with our session variables.

    Args:
        settings: where the database is.
        autocommit: every statement stands for itself.
        database: the schema, where it is not the settings'; "" for none.
        limited: the server itself ends its slow statements.
        fast: by the compiled driver.

    Raises Unavailable(database_down). Safe to retry: yes.
    """
    password = _password(settings)
    try:
        async with asyncio.timeout(settings.connect_timeout_s):
            driver = asyncmy if fast else aiomysql
            made: Any = await driver.connect(
                unix_socket=settings.socket or None,
                host=settings.host or "localhost",
                port=settings.port,
                user=settings.user,
                password=password,
                db=settings.name if database is None else database,
                charset="utf8mb4",
                init_command=_SESSION,
                autocommit=autocommit,
                # rowcount is the rows found, not only those changed: guards count what they matched.
                client_flag=2,
            )
            connection: Connection = made
            try:
                await connection.query(_ISOLATION)
                if limited:
                    await connection.query(_limit(connection.get_server_info(), settings.statement_timeout_s))
            except BaseException:
                connection.close()
                raise
            return connection
    except (*DRIVER_ERRORS, OSError, TimeoutError) as error:
        told = str(error) or type(error).__name__
        raise Unavailable("database_down", f"the partition's database is not reachable: {told}") from None


def _limit(server: str, limit_s: float) -> str:
    """MariaDB takes seconds, MySQL milliseconds, each under a name of its own."""
    if "MariaDB" in server:
        return f"SET SESSION max_statement_time = {limit_s:.3f}"
    return f"SET SESSION max_execution_time = {max(1, int(limit_s * 1000))}"


@contextlib.contextmanager
def translated(*, done: frozenset[int] = frozenset()) -> Iterator[None]:
    """Driver errors inside become ours, for connections outside of the pools; those in `done` are none.

    Raises Unavailable, Bug, DuplicateKeyError.
    """
    try:
        yield
    except DRIVER_ERRORS as error:
        if errno(error) not in done:
            raise mapped(error) from error
    except (OSError, EOFError):
        raise broken() from None


def mapped(error: Exception) -> CulmError | DuplicateKeyError:
    """Our error for one of DRIVER_ERRORS."""
    number = errno(error)
    if number == DUPLICATE:
        return DuplicateKeyError()
    if number in LOST:
        return Unavailable("database_down", "the partition's database does not answer")
    if number in SLOW:
        return Unavailable("database_slow", "the partition's database did not answer in time")
    if number in TOO_LARGE:
        return too_large()
    if number in FULL:
        full = Unavailable("storage_full", "the partition's database has no space left", retry_after_s=10.0)
        full.http_status = 507
        return full
    log.error("database error %s", number, exc_info=error)
    return Bug(f"database error {number}")


def is_closed(connection: Connection) -> bool:
    """Whether it is known to be closed; a server that is gone may not have been noticed yet."""
    closed = getattr(connection, "closed", None)
    return not getattr(connection, "connected", False) if closed is None else bool(closed)


def broken() -> Unavailable:
    """The error for a connection that is gone."""
    return Unavailable("database_down", "the connection to the partition's database broke")


def too_large() -> ClientFault:
    """The error for what does not fit into a packet of the server: it would not the next time either."""
    return ClientFault(
        "too_large", "more than one packet of the partition's database holds (max_allowed_packet)", http_status=413
    )


def _password(settings: DatabaseSettings) -> str:
    if not settings.password_file:
        return ""
    try:
        return Path(settings.password_file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        told = f"password_file {settings.password_file} cannot be read: {error}"
        raise Unavailable("database_down", told) from None


def errno(error: BaseException) -> int:
    """The server's number of one of DRIVER_ERRORS, 0 if it has none."""
    number = error.args[0] if error.args else 0
    return number if isinstance(number, int) else 0
