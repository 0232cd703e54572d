"""The partition's database: pools of connections and transactions.

Every statement has a deadline; a connection whose statement was cut off (deadline, cancellation, lost server) is
closed, never reused. Each writing connection has a number, the `writer` of the tally tables, so that no two open
transactions share a tally row.
"""

import asyncio
import contextlib
import re
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeVar

from culm.clock import Clock, SystemClock
from culm.errors import Bug, CulmError, Unavailable
from culm.settings import DatabaseSettings
from culm.wire import Happening, JobError
from shard.counted import QUERY_TIMES, committed
from shard.driver import (
    DRIVER_ERRORS,
    LOCK_WAIT,
    LOST,
    RETRIED,
    Connection,
    Cursor,
    broken,
    connect,
    errno,
    is_closed,
    mapped,
    too_large,
)
from shard.metrics import POOL_IN_USE, POOL_WAIT, RETRIES
from shard.statements import STATEMENTS, Statement, expand, flatten

Pool = Literal["claim", "write", "read", "user"]
"""`read` is the shard's own, `user` that of people and the monitor: however slow, they hold up nobody else."""
Row = tuple[Any, ...]
T = TypeVar("T")

MAX_TRIES: Final = 6
_WORD: Final = re.compile(r"[\w-]{1,32}")
_UPTIME: Final = "SHOW GLOBAL STATUS LIKE 'Uptime'"
_MAX_PACKET: Final = "SELECT @@max_allowed_packet"
RESTART_S: Final = 2.0
"""Two looks at a server's start differ by less, for it counts whole seconds."""


@dataclass(frozen=True, slots=True)
class Step:
    """One statement of several that are sent together.

    `arguments` are those of all its rows where the statement has a repeated part, and `n_rows` their number.
    """

    name: str
    arguments: Sequence[Any]
    n_rows: int = 0
    must_find: int | None = None
    """So many rows it must find or change, or nothing was as the caller believed."""


def for_rows(name: str, rows: Sequence[Sequence[Any]], *, must_find: int | None = None) -> Step:
    """A step of a statement whose repeated part takes one row of arguments each."""
    return Step(name, flatten(rows), len(rows), must_find)


class ChangedUnderfootError(Exception):
    """What was read is not what is there any more: run the transaction again. Never leaves the shard."""


class Transaction:
    """Statements by name on one connection. Made by Database; see `Database.run`."""

    def __init__(self, connection: Connection, writer: int, statement_timeout_s: float, max_packet_bytes: int) -> None:
        self.writer = writer
        self.happened: list[Happening] = []
        """To be told when this is committed."""
        self.failed: list[JobError | None] = []
        """Why jobs failed in it, one each; None: nobody said."""
        self.n_done = 0
        """Statements that were answered."""
        self._connection = connection
        self._timeout_s = statement_timeout_s
        self._max_packet_bytes = max_packet_bytes
        self._statements = STATEMENTS

    def use(self, statements: dict[str, Statement]) -> None:
        """Speak another file's statements (the audit's)."""
        self._statements = statements

    async def fetch(self, name: str, *arguments: Any) -> list[Row]:
        """All rows of a statement."""
        return (await self._run(name, self._statements[name].head, arguments))[1]

    async def fetch_rows(self, name: str, rows: Sequence[Sequence[Any]]) -> list[Row]:
        """All rows of a statement whose repeated part takes one row of arguments each; none for no rows."""
        if not rows:
            return []
        return (await self._run(name, self._statements[name].for_rows(len(rows)), flatten(rows)))[1]

    async def execute(self, name: str, *arguments: Any) -> int:
        """Run a statement; the number of rows it found or changed."""
        return (await self._run(name, self._statements[name].head, arguments))[0]

    async def execute_rows(self, name: str, rows: Sequence[Sequence[Any]]) -> int:
        """Run a statement with a repeated part for all rows at once; nothing for no rows."""
        if not rows:
            return 0
        return (await self._run(name, self._statements[name].for_rows(len(rows)), flatten(rows)))[0]

    async def together(self, steps: Sequence[Step]) -> list[list[Row]]:
        """Several statements in one packet, in their order; the rows of each, none of a write.

        Raises ChangedUnderfootError if one found another number of rows than it must.
        """
        if not steps:
            return []
        texts, flat = [], list[Any]()
        for step in steps:
            statement = self._statements[step.name]
            text, arguments = expand(statement.for_rows(step.n_rows) if step.n_rows else statement.head, step.arguments)
            texts.append(text)
            flat += arguments
        answers: list[list[Row]] = []
        wrong = False
        began = time.perf_counter()
        async with asyncio.timeout(self._timeout_s), self._connection.cursor() as cursor:
            try:
                n_rows = await cursor.execute(";\n".join(texts), flat or None)
                for step in steps:
                    if answers:
                        await cursor.nextset()
                        n_rows = cursor.rowcount
                    wrong = wrong or step.must_find not in (None, n_rows)
                    answers.append(list(await cursor.fetchall()) if cursor.description else [])
            except DRIVER_ERRORS as error:
                # What followed from the first surprise is no news.
                if not wrong:
                    self._require_packet(cursor, (";\n".join(texts), flat), error)
                    raise
            except (OSError, EOFError) as error:
                self._require_packet(cursor, (";\n".join(texts), flat), error)
                raise
            finally:
                QUERY_TIMES[steps[0].name].observe(time.perf_counter() - began)
            self.n_done += len(steps)
        if wrong:
            raise ChangedUnderfootError
        return answers

    async def alter(self, name: str, timeout_s: float, /, **words: str) -> None:
        """Run a statement whose `:word`s are identifiers or dates, which cannot be parameters. It commits by itself.

        It waits a second for those who use the table, no longer: all who come after it wait behind it.
        Raises Unavailable(table_busy), Bug for a word that is more than letters, digits, _ and -.
        """
        text = self._statements[name].head
        for key, word in words.items():
            if not _WORD.fullmatch(word):
                raise Bug(f"{word!r} cannot be a part of {name}")
            text = text.replace(f":{key}", word)
        await self.execute("wait_a_second")
        try:
            await self._run(name, text, (), timeout_s)
        except DRIVER_ERRORS as error:
            if errno(error) not in LOST:
                await self.execute("wait_as_ever")
            if errno(error) == LOCK_WAIT:
                busy = "somebody reads this table for long (an audit, a dump)"
                raise Unavailable("table_busy", busy, retry_after_s=10.0) from None
            raise
        await self.execute("wait_as_ever")

    async def _run(
        self, name: str, sql: str, arguments: Sequence[Any], timeout_s: float | None = None
    ) -> tuple[int, list[Row]]:
        began = time.perf_counter()
        async with asyncio.timeout(timeout_s or self._timeout_s), self._connection.cursor() as cursor:
            text, flat = expand(sql, arguments)
            try:
                n_rows = await cursor.execute(text, flat or None)
                rows = list(await cursor.fetchall()) if cursor.description else []
            except (*DRIVER_ERRORS, OSError, EOFError) as error:
                self._require_packet(cursor, (text, flat), error)
                raise
            finally:
                QUERY_TIMES[name].observe(time.perf_counter() - began)
            self.n_done += 1
            return n_rows, rows

    def _require_packet(self, cursor: Cursor, sent: tuple[str, Sequence[Any]], error: Exception) -> None:
        """Raises ClientFault(too_large) for a failed statement that is larger than the server takes.

        It cuts the connection in the middle of one, which then looks as if the server were gone.
        """
        if isinstance(error, DRIVER_ERRORS) and errno(error) not in LOST:
            return
        text, arguments = sent
        if len(cursor.mogrify(text, arguments or None).encode("utf-8", "surrogateescape")) >= self._max_packet_bytes:
            raise too_large() from error


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
        self.max_packet_bytes = 0
        """What the server takes in one packet, as the newest connection was told."""
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
                RETRIES.labels("changed").inc()
            except _StaleError:
                RETRIES.labels("stale").inc()
                continue
            except DRIVER_ERRORS as error:
                number = errno(error)
                if number not in RETRIED:
                    raise mapped(error) from error
                RETRIES.labels(str(number)).inc()
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


class _Pool:
    """Connections made when needed, at most one per writer number."""

    def __init__(self, database: Database, name: Pool, writers: Sequence[int]) -> None:
        self.database = database
        self.name: Pool = name
        self._free: deque[tuple[int, Connection | None, int]] = deque((writer, None, 0) for writer in writers)
        self._slots = asyncio.Semaphore(len(writers))
        self._gauge = POOL_IN_USE.labels(name)
        self._wait = POOL_WAIT.labels(name)

    @contextlib.asynccontextmanager
    async def transaction(self) -> AsyncIterator[Transaction]:
        settings = self.database.settings
        await self._acquire()
        # The most recently used one first: idle ones stay idle.
        writer, connection, generation = self._free.pop()
        keep, used = False, True
        transaction: Transaction | None = None
        self._gauge.inc()
        try:
            if connection is not None and generation != self.database.generation:
                connection.close()
            if connection is None or is_closed(connection):
                generation, used = self.database.generation, False
                connection = await self._connect()
            transaction = Transaction(connection, writer, settings.statement_timeout_s, self.database.max_packet_bytes)
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
                committed(transaction.happened, transaction.failed)
                self.database.on_commit(transaction.happened)
        except TimeoutError:
            raise Unavailable("database_slow", "the partition's database did not answer in time") from None
        except (OSError, EOFError):
            self._lost(transaction, used=used)
            raise broken() from None
        except (CulmError, ChangedUnderfootError, *DRIVER_ERRORS) as error:
            if isinstance(error, DRIVER_ERRORS) and errno(error) in LOST:
                self._lost(transaction, used=used)
            keep = await self._rolled_back(connection, error)
            raise
        finally:
            if not keep and connection is not None:
                connection.close()
            self._free.append((writer, connection if keep else None, generation))
            self._gauge.dec()
            self._slots.release()

    async def _acquire(self) -> None:
        began = time.perf_counter()
        try:
            async with asyncio.timeout(self.database.settings.acquire_timeout_s):
                await self._slots.acquire()
        except TimeoutError:
            raise Unavailable("database_busy", f"no {self.name} connection became free in time") from None
        finally:
            self._wait.observe(time.perf_counter() - began)

    def _lost(self, transaction: Transaction | None, *, used: bool) -> None:
        """Note a connection that is gone. Raises _StaleError if it was gone before it was used: nothing was done."""
        self.database.generation += 1
        if used and transaction is not None and transaction.n_done == 0:
            raise _StaleError from None
        self.database.mark(reachable=False)

    async def _rolled_back(self, connection: Connection | None, error: BaseException) -> bool:
        if connection is None or (isinstance(error, DRIVER_ERRORS) and errno(error) in LOST):
            return False
        try:
            async with asyncio.timeout(self.database.settings.statement_timeout_s):
                await connection.rollback()
        except (*DRIVER_ERRORS, TimeoutError, OSError):
            return False
        return True

    async def _connect(self) -> Connection:
        try:
            connection = await connect(
                self.database.settings,
                autocommit=self.name in ("read", "user"),
                limited=self.name == "user",
                fast=self.name != "user",
            )
        except CulmError:
            self.database.mark(reachable=False)
            raise
        try:
            async with asyncio.timeout(self.database.settings.connect_timeout_s), connection.cursor() as cursor:
                await cursor.execute(_UPTIME)
                [uptime] = await cursor.fetchall()
                await cursor.execute(_MAX_PACKET)
                [[max_packet_bytes]] = await cursor.fetchall()
        except BaseException:
            connection.close()
            raise
        self.database.max_packet_bytes = int(max_packet_bytes)
        self.database.mark(reachable=True, uptime_s=float(uptime[1]))
        return connection

    def close(self) -> None:
        for _, connection, _ in self._free:
            if connection is not None:
                connection.close()
