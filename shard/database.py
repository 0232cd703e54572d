"""The partition's database: pools of connections, transactions, and the table that maps driver errors to ours.

The only module that imports the driver. Every statement has a deadline; a connection whose statement was cut off
(deadline, cancellation, lost server) is closed, never reused. Each writing connection has a number, the `writer` of
the tally tables, so that no two open transactions share a tally row.
"""

import asyncio
import contextlib
import logging
import re
import warnings
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import aiomysql
from prometheus_client import Counter, Gauge
from pymysql.err import MySQLError

from culm.clock import Clock, SystemClock
from culm.errors import Bug, CulmError, Unavailable
from culm.settings import DatabaseSettings
from culm.wire import Happening
from shard.statements import STATEMENTS, Statement, expand, flatten

Pool = Literal["claim", "write", "read", "user"]
"""`read` is the shard's own, `user` that of people and the monitor: however slow, they hold up nobody else."""
Row = tuple[Any, ...]
T = TypeVar("T")

RETRIED: Final = frozenset({1020, 1205, 1213})
"""Snapshot conflict, lock wait timeout, deadlock: the transaction was rolled back, run it again."""
LOST: Final = frozenset(
    {0, 1040, 1047, 1053, 1129, 1159, 1160, 1161, 1290, 1317, 1836, 1927, 2002, 2003, 2006, 2013, 2014, 2055} | {4031}
)
"""Server gone, going, read-only or without quorum, or the statement was killed there: reconnect, 503."""
SLOW: Final = frozenset({1969, 3024})
"""The server ended a statement that took longer than it may."""
FULL: Final = frozenset({1021, 1026, 1041, 1114, 3675})
"""Disk or table full."""
DUPLICATE: Final = 1062
EXISTS: Final = frozenset({1050, 1060, 1061})
"""The table, column or key that is to be made is there."""
MAX_TRIES: Final = 6
_SESSION: Final = (
    "SET SESSION time_zone = '+00:00', SESSION innodb_lock_wait_timeout = 3, SESSION sql_notes = 0, "
    "SESSION sql_mode = 'STRICT_ALL_TABLES,NO_ZERO_DATE,ERROR_FOR_DIVISION_BY_ZERO'"
)
_WORD: Final = re.compile(r"[\w-]{1,32}")
_ISOLATION: Final = "SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED"
"""A statement of its own: the name of the variable differs between MariaDB 10.11 and MySQL 9."""
_UPTIME: Final = "SHOW GLOBAL STATUS LIKE 'Uptime'"
RESTART_S: Final = 2.0
"""Two looks at a server's start differ by less, for it counts whole seconds."""

_IN_USE: Final = Gauge("culm_db_pool_in_use", "Connections in use", ["pool"])
_RETRIES: Final = Counter("culm_db_retries_total", "Transactions run again", ["errno"])

log = logging.getLogger("shard.database")

# MySQL warns of VALUES(col) in an upsert; its successor is not known to MariaDB.
warnings.filterwarnings("ignore", message="'VALUES function' is deprecated")


class DuplicateKeyError(Exception):
    """A unique key was hit: another transaction was first. Never leaves the shard."""


class ChangedUnderfootError(Exception):
    """What was read is not what is there any more: run the transaction again. Never leaves the shard."""


class Transaction:
    """Statements by name on one connection. Made by Database; see `Database.run`."""

    def __init__(self, connection: "aiomysql.Connection", writer: int, statement_timeout_s: float) -> None:
        self.writer = writer
        self.happened: list[Happening] = []
        """To be told when this is committed."""
        self.n_done = 0
        """Statements that were answered."""
        self._connection = connection
        self._timeout_s = statement_timeout_s
        self._statements = STATEMENTS

    def use(self, statements: dict[str, Statement]) -> None:
        """Speak another file's statements (the audit's)."""
        self._statements = statements

    async def fetch(self, name: str, *arguments: Any) -> list[Row]:
        """All rows of a statement."""
        return (await self._run(self._statements[name].head, arguments))[1]

    async def fetch_rows(self, name: str, rows: Sequence[Sequence[Any]]) -> list[Row]:
        """All rows of a statement whose repeated part takes one row of arguments each; none for no rows."""
        if not rows:
            return []
        return (await self._run(self._statements[name].for_rows(len(rows)), flatten(rows)))[1]

    async def execute(self, name: str, *arguments: Any) -> int:
        """Run a statement; the number of rows it found or changed."""
        return (await self._run(self._statements[name].head, arguments))[0]

    async def execute_rows(self, name: str, rows: Sequence[Sequence[Any]]) -> int:
        """Run a statement with a repeated part for all rows at once; nothing for no rows."""
        if not rows:
            return 0
        return (await self._run(self._statements[name].for_rows(len(rows)), flatten(rows)))[0]

    async def alter(self, name: str, /, **words: str) -> None:
        """Run a statement whose `:word`s are identifiers or dates, which cannot be parameters. It commits by itself.

        Raises Bug for a word that is more than letters, digits, _ and -.
        """
        text = self._statements[name].head
        for key, word in words.items():
            if not _WORD.fullmatch(word):
                raise Bug(f"{word!r} cannot be a part of {name}")
            text = text.replace(f":{key}", word)
        await self._run(text, ())

    async def _run(self, sql: str, arguments: Sequence[Any]) -> tuple[int, list[Row]]:
        async with asyncio.timeout(self._timeout_s), self._connection.cursor() as cursor:
            text, flat = expand(sql, arguments)
            n_rows = await cursor.execute(text, flat or None)
            rows = list(await cursor.fetchall()) if cursor.description else []
            self.n_done += 1
            return n_rows, rows


class _StaleError(Exception):
    """A connection that had been idle was dead when it was used: nothing was done, a new one will do."""


class Database:
    """The pools.

    `connected_since` is the monotonic time since which the server has been there without a break: it was not reachable
    before, or it has been started anew. A single connection that breaks is no break.
    """

    def __init__(self, settings: DatabaseSettings, *, clock: Clock | None = None) -> None:
        self.settings = settings
        self.clock: Clock = clock or SystemClock()
        self.connected_since = self.clock.monotonic()
        self.reachable = False
        self.on_commit: Callable[[list[Happening]], None] = lambda _happened: None
        """Called with what a transaction says has happened, right after its commit."""
        self.on_doubt: Callable[[], None] = lambda: None
        """Called where it is not known whether such a transaction was committed."""
        self.generation = 0
        """Of connections; one that was lost makes those of before suspect, and they are made anew."""
        self._server_began: float | None = None
        n_claim, n_write = settings.claim_connections, settings.write_connections
        self._pools: dict[Pool, _Pool] = {
            "claim": _Pool(self, "claim", range(n_claim)),
            "write": _Pool(self, "write", range(n_claim, n_claim + n_write)),
            "read": _Pool(self, "read", range(settings.read_connections)),
            "user": _Pool(self, "user", range(settings.user_connections)),
        }

    async def run(self, pool: Pool, work: Callable[[Transaction], Awaitable[T]]) -> T:
        """Run `work` in one transaction and commit; again, from the start, on deadlocks and the like.

        `work` must have no effect but its statements. On the reading pools every statement stands for itself.

        Raises:
            Unavailable: database_down, database_slow, database_busy, storage_full; after a commit that was cut off
                the outcome is unknown.
            DuplicateKeyError: a unique key was hit; nothing was changed.
            CulmError: whatever `work` raises; nothing was changed.

        Safe to retry: as the use case is.
        """
        for attempt in range(1, MAX_TRIES + 1):
            try:
                async with self._pools[pool].transaction() as transaction:
                    return await work(transaction)
            except ChangedUnderfootError:
                _RETRIES.labels("changed").inc()
            except _StaleError:
                _RETRIES.labels("stale").inc()
                continue
            except MySQLError as error:
                number = _errno(error)
                if number not in RETRIED:
                    raise self._mapped(error) from error
                _RETRIES.labels(str(number)).inc()
            if attempt < MAX_TRIES:
                # Linear: the rival needs a few milliseconds, and MAX_TRIES bounds it.
                await asyncio.sleep(0.002 * attempt)
        raise Unavailable("contended", "the rows are busy", retry_after_s=0.5)

    async def close(self) -> None:
        """Close every connection."""
        for pool in self._pools.values():
            pool.close()

    def mark(self, *, reachable: bool, uptime_s: float | None = None) -> None:
        """Keep `reachable` and `connected_since`; `uptime_s` is what a new connection was told by its server."""
        now = self.clock.monotonic()
        if reachable and not self.reachable:
            self.connected_since = now
        self.reachable = reachable
        if uptime_s is not None:
            began = now - uptime_s
            if self._server_began is not None and began > self._server_began + RESTART_S:
                self.connected_since = now
            self._server_began = began if self._server_began is None else max(began, self._server_began)

    def _mapped(self, error: MySQLError) -> CulmError | DuplicateKeyError:
        return _mapped(error)


class _Pool:
    """Connections made when needed, at most one per writer number."""

    def __init__(self, database: Database, name: Pool, writers: Sequence[int]) -> None:
        self.database = database
        self.name: Pool = name
        self._free: deque[tuple[int, aiomysql.Connection | None, int]] = deque((writer, None, 0) for writer in writers)
        self._slots = asyncio.Semaphore(len(writers))
        self._gauge = _IN_USE.labels(name)

    @contextlib.asynccontextmanager
    async def transaction(self) -> AsyncIterator[Transaction]:
        settings = self.database.settings
        try:
            async with asyncio.timeout(settings.acquire_timeout_s):
                await self._slots.acquire()
        except TimeoutError:
            raise Unavailable("database_busy", f"no {self.name} connection became free in time") from None
        # The most recently used one first: idle ones stay idle.
        writer, connection, generation = self._free.pop()
        keep, used = False, True
        transaction: Transaction | None = None
        self._gauge.inc()
        try:
            if connection is not None and generation != self.database.generation:
                connection.close()
            if connection is None or connection.closed:
                generation, used = self.database.generation, False
                connection = await self._connect()
            transaction = Transaction(connection, writer, settings.statement_timeout_s)
            yield transaction
            try:
                async with asyncio.timeout(settings.statement_timeout_s):
                    await connection.commit()
            except BaseException:
                if transaction.happened:
                    self.database.on_doubt()
                raise
            keep = True
            if transaction.happened:
                self.database.on_commit(transaction.happened)
        except TimeoutError:
            raise Unavailable("database_slow", "the partition's database did not answer in time") from None
        except (OSError, EOFError):
            self._lost(transaction, used=used)
            raise _broken() from None
        except (CulmError, ChangedUnderfootError, MySQLError) as error:
            if isinstance(error, MySQLError) and _errno(error) in LOST:
                self._lost(transaction, used=used)
            keep = await self._rolled_back(connection, error)
            raise
        finally:
            if not keep and connection is not None:
                connection.close()
            self._free.append((writer, connection if keep else None, generation))
            self._gauge.dec()
            self._slots.release()

    def _lost(self, transaction: Transaction | None, *, used: bool) -> None:
        """Note a connection that is gone. Raises _StaleError if it was gone before it was used: nothing was done."""
        self.database.generation += 1
        if used and transaction is not None and transaction.n_done == 0:
            raise _StaleError from None
        self.database.mark(reachable=False)

    async def _rolled_back(self, connection: "aiomysql.Connection | None", error: BaseException) -> bool:
        if connection is None or (isinstance(error, MySQLError) and _errno(error) in LOST):
            return False
        try:
            async with asyncio.timeout(self.database.settings.statement_timeout_s):
                await connection.rollback()
        except (MySQLError, TimeoutError, OSError):
            return False
        return True

    async def _connect(self) -> "aiomysql.Connection":
        try:
            connection = await connect(
                self.database.settings, autocommit=self.name in ("read", "user"), limited=self.name == "user"
            )
        except CulmError:
            self.database.mark(reachable=False)
            raise
        try:
            async with asyncio.timeout(self.database.settings.connect_timeout_s), connection.cursor() as cursor:
                await cursor.execute(_UPTIME)
                uptime = await cursor.fetchone()
        except BaseException:
            connection.close()
            raise
        self.database.mark(reachable=True, uptime_s=float(uptime[1]))
        return connection

    def close(self) -> None:
        for _, connection, _ in self._free:
            if connection is not None:
                connection.close()


async def connect(
    settings: DatabaseSettings, *, autocommit: bool, database: str | None = None, limited: bool = False
) -> "aiomysql.Connection":
    """One connection with our session variables; the server itself ends the slow statements of a `limited` one.

    Raises Unavailable(database_down). Safe to retry: yes.
    """
    password = _password(settings)
    try:
        async with asyncio.timeout(settings.connect_timeout_s):
            connection = await aiomysql.connect(
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
            try:
                await connection.query(_ISOLATION)
                if limited:
                    await connection.query(_limit(connection.get_server_info(), settings.statement_timeout_s))
            except BaseException:
                connection.close()
                raise
            return connection
    except (MySQLError, OSError, TimeoutError) as error:
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
    except MySQLError as error:
        if _errno(error) not in done:
            raise _mapped(error) from error
    except (OSError, EOFError):
        raise _broken() from None


def _mapped(error: MySQLError) -> CulmError | DuplicateKeyError:
    number = _errno(error)
    if number == DUPLICATE:
        return DuplicateKeyError()
    if number in LOST:
        return Unavailable("database_down", "the partition's database does not answer")
    if number in SLOW:
        return Unavailable("database_slow", "the partition's database did not answer in time")
    if number in FULL:
        full = Unavailable("storage_full", "the partition's database has no space left", retry_after_s=10.0)
        full.http_status = 507
        return full
    log.error("database error %s", number, exc_info=error)
    return Bug(f"database error {number}")


def _broken() -> Unavailable:
    return Unavailable("database_down", "the connection to the partition's database broke")


def _password(settings: DatabaseSettings) -> str:
    if not settings.password_file:
        return ""
    try:
        return Path(settings.password_file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        told = f"password_file {settings.password_file} cannot be read: {error}"
        raise Unavailable("database_down", told) from None


def _errno(error: BaseException) -> int:
    number = error.args[0] if error.args else 0
    return number if isinstance(number, int) else 0
