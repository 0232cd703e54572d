"""The database module against real servers: mapped errors, real deadlocks, cut-off statements, kill -9 and SIGSTOP."""

import asyncio
import contextlib
import os
import secrets
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import msgspec
import pytest

from culm.clock import SystemClock
from culm.errors import Bug, ClientFault, Conflict, CulmError, Unavailable
from culm.settings import DatabaseSettings
from culm.states import FINAL
from ops.audit import audit
from ops.engines import innodb
from shard.database import MAX_TRIES, ChangedUnderfootError, Database, Pool, Row, Step, Transaction, for_rows
from shard.driver import RETRIED, DuplicateKeyError, connect
from shard.migrate import migrate
from shard.statements import STATEMENTS, parse
from tests import servers
from tests.partition import Partition, Servers, job, partition, patiently
from tests.waiting import eventually

# MySQL 9 has deprecated the process list that MariaDB has, by either name.
pytestmark = pytest.mark.filterwarnings("ignore:'INFORMATION_SCHEMA.PROCESSLIST' is deprecated")

T = TypeVar("T")

DEADLINE_S = 30.0
SLOT = 5
SNAPSHOT = """
-- name: isolation
SET TRANSACTION ISOLATION LEVEL REPEATABLE READ
-- name: begin
START TRANSACTION WITH CONSISTENT SNAPSHOT, READ ONLY
"""
POOLS: tuple[Pool, ...] = ("claim", "write", "read", "user")


class Hands(SystemClock):
    """The system's clock, and what it is put forward by."""

    moved_s = 0.0

    def monotonic(self) -> float:
        return super().monotonic() + self.moved_s


@pytest.fixture
async def settings(mariadb: servers.Server) -> AsyncIterator[DatabaseSettings]:
    """A schema with a slot that is not open, on the shared server; short time-outs."""
    made = DatabaseSettings(
        socket=str(mariadb.socket),
        name=f"d_{secrets.token_hex(4)}",
        write_connections=2,
        statement_timeout_s=5.0,
        acquire_timeout_s=0.2,
    )
    await migrate(made)
    yield made


@pytest.fixture
async def database(settings: DatabaseSettings) -> AsyncIterator[Database]:
    """The pools over it."""
    made = Database(settings)
    yield made
    await made.close()


async def _insert(tx: Transaction, slot: int = SLOT) -> int:
    return await tx.execute("open_slot", slot, 1)


async def _slots(database: Database) -> set[int]:
    return {row[0] for row in await database.run("read", lambda tx: tx.fetch("read_slots"))}


# --- errors ----------------------------------------------------------------------------------------------------------


async def _version(database: Database) -> str:
    connection = await connect(database.settings, autocommit=True)
    try:
        return connection.get_server_info()
    finally:
        connection.close()


async def test_a_table_that_was_altered_under_a_snapshot_is_read_again(database: Database) -> None:
    tries = 0

    async def read(tx: Transaction) -> list[Row]:
        nonlocal tries
        tries += 1
        tx.use(parse(SNAPSHOT) | STATEMENTS)
        await tx.execute("isolation")
        await tx.execute("begin")
        if tries == 1:
            add = ("add_partition", DEADLINE_S)
            await database.run("claim", lambda other: other.alter(*add, name="p202001", bound="2020-02-01"))
        return await tx.fetch("read_depths", (1,), (1,))

    assert await database.run("write", read) == []
    # MariaDB refuses the table as it was, MySQL has it still.
    assert tries == 2 - ("MariaDB" not in await _version(database))


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("n_mib", [65, 100])
async def test_a_packet_that_is_too_large_is_refused_and_the_server_is_not_taken_for_lost(
    database: Database, pool: Pool, n_mib: int
) -> None:
    """The server cuts the connection in the middle of one; what a driver makes of that depends on when."""
    await _slots(database)
    since, generation = database.connected_since, database.generation
    with pytest.raises(ClientFault, match="too_large"):
        await database.run(pool, lambda tx: tx.fetch("read_spec", b"x" * (n_mib << 20)))
    assert (database.reachable, database.connected_since, database.generation) == (True, since, generation)
    assert await database.run(pool, lambda tx: tx.fetch("read_spec", 1)) == []


def _raising(number: int) -> str:
    return f"SIGNAL SQLSTATE 'HY000' SET MYSQL_ERRNO = {number}, MESSAGE_TEXT = 'as asked'"


@pytest.mark.parametrize(
    ("number", "code", "status"),
    [
        *((number, "database_down", 503) for number in (1040, 1047, 1053, 1290, 1317, 1836, 2013)),
        *((number, "storage_full", 507) for number in (1021, 1114)),
        *((number, "database_slow", 503) for number in (1969, 3024)),
        (1054, "internal", 500),
        (1146, "internal", 500),
    ],
)
async def test_every_error_of_the_server_has_its_code(database: Database, number: int, code: str, status: int) -> None:
    async def work(tx: Transaction) -> None:
        await _insert(tx)
        await tx._run("x", _raising(number), ())

    with pytest.raises(CulmError) as told:
        await database.run("write", work)
    assert (told.value.code, told.value.http_status) == (code, status)
    assert told.value.retryable == (status != 500)
    assert await _slots(database) == set()


async def test_a_unique_key_is_told_apart_and_nothing_is_changed(database: Database) -> None:
    async def work(tx: Transaction) -> None:
        await _insert(tx)
        await tx._run("x", "INSERT INTO slot_sequence (slot, next_seq) VALUES (1, 1), (1, 1)", ())

    with pytest.raises(DuplicateKeyError):
        await database.run("write", work)
    assert await _slots(database) == set()


@pytest.mark.parametrize("number", sorted(RETRIED))
async def test_what_the_server_rolled_back_is_run_again_a_bounded_number_of_times(
    database: Database, number: int
) -> None:
    tries = 0

    async def work(tx: Transaction) -> None:
        nonlocal tries
        tries += 1
        await tx._run("x", _raising(number), ())

    with pytest.raises(Unavailable) as told:
        await database.run("write", work)
    assert (told.value.code, tries) == ("contended", MAX_TRIES)


async def test_a_transaction_that_is_run_again_leaves_only_its_last_try(database: Database) -> None:
    tries = 0

    async def work(tx: Transaction) -> int:
        nonlocal tries
        tries += 1
        await _insert(tx, tries)
        if tries < 3:
            raise ChangedUnderfootError
        return tries

    assert await database.run("write", work) == 3
    assert await _slots(database) == {3}


async def test_what_the_work_raises_is_raised_and_nothing_is_changed(database: Database) -> None:
    async def work(tx: Transaction) -> None:
        await _insert(tx)
        raise Conflict("bad_transition", "no")

    with pytest.raises(Conflict):
        await database.run("write", work)
    assert await _slots(database) == set()


async def test_an_error_of_our_own_closes_the_connection_and_frees_its_place(database: Database) -> None:
    async def work(tx: Transaction) -> None:
        await _insert(tx)
        raise ZeroDivisionError

    for _ in range(5):
        with pytest.raises(ZeroDivisionError):
            await database.run("write", work)
    assert await database.run("write", _insert) == 1


async def test_two_that_lock_crosswise_both_end_well(database: Database) -> None:
    """A real deadlock: the server rolls one back, and it is run again."""
    for slot in (1, 2):
        await database.run("write", lambda tx, slot=slot: tx.execute("begin_sequence", slot))
    met = asyncio.Barrier(2)
    tries = 0

    async def both(tx: Transaction, first: int, second: int) -> None:
        nonlocal tries
        tries += 1
        await tx.execute("advance_sequence", 10, first)
        if tries <= 2:
            await met.wait()
        await tx.execute("advance_sequence", 10, second)

    async with asyncio.timeout(DEADLINE_S):
        await asyncio.gather(
            database.run("write", lambda tx: both(tx, 1, 2)), database.run("write", lambda tx: both(tx, 2, 1))
        )
    assert tries == 3
    rows = await database.run("write", lambda tx: tx.fetch("lock_sequence", 1))
    rows += await database.run("write", lambda tx: tx.fetch("lock_sequence", 2))
    assert rows == [(21,), (21,)]


# --- connections -----------------------------------------------------------------------------------------------------


async def test_a_full_pool_is_busy_and_free_again(database: Database) -> None:
    begun, go = asyncio.Semaphore(0), asyncio.Event()

    async def hold(tx: Transaction) -> int:
        begun.release()
        await go.wait()
        return tx.writer

    held = [asyncio.create_task(database.run("write", hold)) for _ in range(2)]
    for _ in held:
        await begun.acquire()
    with pytest.raises(Unavailable) as told:
        await database.run("write", _insert)
    assert told.value.code == "database_busy"
    go.set()
    assert len(set(await asyncio.gather(*held))) == 2
    assert await database.run("write", _insert) == 1


async def test_cancelled_transactions_change_nothing_and_use_up_no_connection(database: Database) -> None:
    async def work(tx: Transaction) -> None:
        await _insert(tx)
        await tx._run("x", SLEEP, ())

    for _ in range(6):
        task = asyncio.create_task(database.run("write", work))
        await eventually(lambda: _sleeping(database), DEADLINE_S)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await _kill_sleeping(database)
    assert await _slots(database) == set()
    assert await database.run("write", _insert) == 1


SLEEP = "SELECT SLEEP(30)"


async def _sleeping(database: Database) -> list[int]:
    """Connections of this schema that sleep; SHOW, for MySQL has deprecated the table that MariaDB has."""
    connection = await connect(database.settings, autocommit=True)
    async with connection.cursor() as cursor:
        await cursor.execute("SHOW FULL PROCESSLIST")
        found = [row[0] for row in await cursor.fetchall() if (row[3], row[7]) == (database.settings.name, SLEEP)]
    connection.close()
    return found


async def _kill_sleeping(database: Database) -> None:
    """The server does not notice by itself that nobody waits for a statement that sleeps."""
    connection = await connect(database.settings, autocommit=True)
    async with connection.cursor() as cursor:
        for number in await _sleeping(database):
            await cursor.execute(f"KILL {number}")
    connection.close()


async def test_a_statement_that_takes_too_long_is_cut_off(settings: DatabaseSettings) -> None:
    database = Database(msgspec.structs.replace(settings, statement_timeout_s=0.1, write_connections=1))
    with pytest.raises(Unavailable) as told:
        await database.run("write", lambda tx: tx._run("x", SLEEP, ()))
    assert told.value.code == "database_slow"
    # Its connection is not used again: this would read the other's answer.
    assert await database.run("write", _insert) == 1
    await _kill_sleeping(database)
    await database.close()


async def test_a_commit_that_was_cut_off_is_a_503_and_the_next_one_works(database: Database) -> None:
    async def work(tx: Transaction) -> None:
        await _insert(tx)
        [(number,)] = (await tx._run("x", "SELECT CONNECTION_ID()", ()))[1]
        killer = await connect(database.settings, autocommit=True)
        async with killer.cursor() as cursor:
            await cursor.execute(f"KILL {number}")
        killer.close()

    with pytest.raises(Unavailable) as told:
        await database.run("write", work)
    assert told.value.code == "database_down"
    assert await _slots(database) == set()
    assert await database.run("write", _insert) == 1


async def test_each_open_transaction_is_a_writer_of_its_own(settings: DatabaseSettings) -> None:
    wide = msgspec.structs.replace(settings, write_connections=6, claim_connections=3)
    database = Database(wide)
    met = asyncio.Barrier(9)

    async def writer(tx: Transaction) -> int:
        await met.wait()
        return tx.writer

    async with asyncio.timeout(DEADLINE_S):
        writers = await asyncio.gather(
            *(database.run("write", writer) for _ in range(6)), *(database.run("claim", writer) for _ in range(3))
        )
    assert len(set(writers)) == 9
    await database.close()


async def test_a_server_that_was_never_there(settings: DatabaseSettings) -> None:
    database = Database(msgspec.structs.replace(settings, socket="/nowhere/db.sock"))
    with pytest.raises(Unavailable) as told:
        await database.run("read", lambda tx: tx.fetch("read_slots"))
    assert told.value.code == "database_down"
    assert not database.reachable


async def test_a_password_file_that_is_wrong_is_told(settings: DatabaseSettings, tmp_path: Path) -> None:
    secret = tmp_path / "password"
    secret.write_text("wrong\n")
    database = Database(msgspec.structs.replace(settings, user="nobody-of-that-name", password_file=str(secret)))
    with pytest.raises(Unavailable, match="not reachable"):
        await database.run("read", lambda tx: tx.fetch("read_slots"))


# --- faults ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def own() -> Iterator[servers.Server]:
    """A server that may be hurt."""
    with servers.database(innodb.find(servers.cache())) as server:
        yield server


def _signal(server: servers.Server, number: int) -> None:
    assert server._process is not None
    os.kill(server._process.pid, number)


async def test_a_stopped_server_is_a_503_in_bounded_time_and_then_goes_on(own: servers.Server) -> None:
    settings = DatabaseSettings(
        socket=str(own.socket), name="d", statement_timeout_s=0.3, connect_timeout_s=0.3, acquire_timeout_s=0.3
    )
    await migrate(settings)
    database = Database(settings)
    await database.run("write", _insert)
    since = database.connected_since
    loop = asyncio.get_running_loop()
    _signal(own, signal.SIGSTOP)
    try:
        started = loop.time()
        answers = await asyncio.gather(
            *(database.run("write", lambda tx, n=n: _insert(tx, 100 + n)) for n in range(20)), return_exceptions=True
        )
        assert {type(answer) for answer in answers} == {Unavailable}
        assert loop.time() - started < 5.0
        with pytest.raises(Unavailable):
            await database.run("write", _insert)
        assert not database.reachable
    finally:
        _signal(own, signal.SIGCONT)

    async def back() -> bool:
        with contextlib.suppress(Unavailable):
            return await database.run("write", lambda tx: _insert(tx, 200)) > 0
        return False

    await eventually(back, DEADLINE_S)
    assert database.reachable
    # The reaper's grace period begins anew: no heartbeat could come.
    assert database.connected_since > since
    await database.close()


class _Traffic:
    """Clients that submit, run and report, and repeat what gave them a 503; they keep what was acknowledged."""

    def __init__(self, shard: Partition) -> None:
        self.shard = shard
        self.accepted: list[int] = []
        self.reported: list[int] = []
        self.refused: set[str] = set()
        self.stopping = False

    async def _retried(self, call: Callable[[], Awaitable[T]]) -> T:
        return await patiently(call, DEADLINE_S, self.refused)

    async def submitter(self) -> None:
        while not self.stopping:
            key = secrets.token_hex(8)
            self.accepted += await self._retried(lambda key=key: self.shard.submit(job(), job(cores=2), key=key))

    async def pilot(self) -> None:
        while not self.stopping or len(self.reported) < len(self.accepted):
            name = secrets.token_hex(8)
            for grant in await self._retried(lambda name=name: self.shard.get(request_id=name, n_jobs=2, wait_s=0.1)):
                await self._retried(lambda grant=grant: self.shard.report(grant))
                self.reported.append(grant.id)


async def test_a_killed_server_loses_nothing_that_was_acknowledged(own: servers.Server, valkey: servers.Server) -> None:
    async with partition(Servers(own, valkey)) as shard:
        traffic = _Traffic(shard)
        async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as group:
            for _ in range(3):
                group.create_task(traffic.submitter())
                group.create_task(traffic.pilot())
            for _ in range(2):
                n_before = len(traffic.reported)
                await eventually(lambda n=n_before: len(traffic.reported) > n + 20, DEADLINE_S)
                await asyncio.to_thread(own.kill)
                await eventually(lambda: "database_down" in traffic.refused, DEADLINE_S)
                await asyncio.to_thread(own.start)
            n_before = len(traffic.reported)
            await eventually(lambda: len(traffic.reported) > n_before + 20, DEADLINE_S)
            traffic.stopping = True
        assert sorted(traffic.reported) == sorted(traffic.accepted)
        rows = await shard.rows("SELECT id, state FROM job")
        assert sorted(row[0] for row in rows) == sorted(traffic.accepted)
        assert {row[1] for row in rows} == {"finished"}
        report = await audit([shard.settings], shard.topology)
        assert report.findings == []
        assert set(report.states) <= {str(state) for state in FINAL}


async def test_with_the_server_gone_every_verb_is_a_503(own: servers.Server, valkey: servers.Server) -> None:
    async with partition(Servers(own, valkey)) as shard:
        await shard.submit(job(), job())
        [grant] = await shard.get()
        await asyncio.to_thread(own.kill)
        calls = [
            shard.submit(job()),
            shard.get(),
            shard.heartbeat(grant),
            shard.report(grant),
            shard.cancel(grant.id),
            shard.job(grant.id),
            shard.jobs(),
        ]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert [(type(a), a.http_status) for a in answers if isinstance(a, CulmError)] == [(Unavailable, 503)] * 7
        assert not any(isinstance(answer, Bug) for answer in answers)
        await asyncio.to_thread(own.start)

        async def reported() -> bool:
            with contextlib.suppress(Unavailable):
                return (await shard.report(grant)).state in FINAL
            return False

        await eventually(reported, DEADLINE_S)
        assert len(await shard.get()) == 1


# --- idle connections -------------------------------------------------------------------------------------------------


async def test_a_restart_costs_no_request_and_is_noticed(settings: DatabaseSettings) -> None:
    clock = Hands()
    with servers.database(innodb.find(servers.cache())) as own:
        mine = msgspec.structs.replace(settings, socket=str(own.socket))
        await migrate(mine)
        database = Database(mine, clock=clock)
        for pool in POOLS:
            await database.run(pool, lambda tx: tx.fetch("read_slots"))
        began = database.connected_since
        # Longer than the seconds that a server counts its life in.
        clock.moved_s = 10.0
        await asyncio.to_thread(own.stop)
        await asyncio.to_thread(own.start)
        for pool in POOLS:
            await database.run(pool, lambda tx: tx.fetch("read_slots"))
        assert database.reachable
        assert database.connected_since > began
        await database.close()


async def test_one_idle_connection_that_is_gone_is_replaced_and_no_reason_for_grace(database: Database) -> None:
    for pool in POOLS:
        [(number,)] = (await database.run(pool, lambda tx: tx._run("x", "SELECT CONNECTION_ID()", ())))[1]
        began = database.connected_since
        killer = await connect(database.settings, autocommit=True)
        async with killer.cursor() as cursor:
            await cursor.execute(f"KILL {number}")
        killer.close()
        await database.run(pool, lambda tx: tx.fetch("read_slots"))
        assert database.connected_since == began
        assert database.reachable


# --- several statements in one packet -----------------------------------------------------------------------------


@pytest.mark.parametrize("pool", POOLS)
async def test_statements_that_are_sent_together_answer_in_their_order(database: Database, pool: Pool) -> None:
    async def work(tx: Transaction) -> list[list[Row]]:
        return await tx.together(
            [
                Step("open_slot", [SLOT, 3], must_find=1),
                Step("lock_open_slots", [(SLOT, SLOT + 1)], must_find=1),
                for_rows("insert_specs", [(1, b"it's; \\ %s"), (2, b"\x00\xff")], must_find=2),
                Step("read_spec", [1]),
                Step("read_spec", [3]),
            ]
        )

    assert await database.run(pool, work) == [[], [(SLOT, 3)], [], [(b"it's; \\ %s",)], []]


@pytest.mark.parametrize("pool", ["claim", "write"])
async def test_what_finds_another_number_than_it_must_undoes_all_of_them(database: Database, pool: Pool) -> None:
    tries = 0

    async def work(tx: Transaction) -> None:
        nonlocal tries
        tries += 1
        if tries == 1:
            # The second is wrong, and the third would hit a unique key because of it.
            await tx.together(
                [
                    Step("open_slot", [SLOT, 3]),
                    Step("delete_leases", [(1, 2)], must_find=2),
                    for_rows("insert_specs", [(1, b""), (1, b"")]),
                ]
            )

    await database.run(pool, work)
    assert (tries, await _slots(database)) == (2, set())


@pytest.mark.parametrize("pool", ["claim", "write"])
async def test_an_error_among_them_undoes_all_and_the_connection_stays_good(database: Database, pool: Pool) -> None:
    async def work(tx: Transaction) -> None:
        await tx.together([Step("open_slot", [SLOT, 3]), for_rows("insert_specs", [(1, b""), (1, b"")])])

    with pytest.raises(DuplicateKeyError):
        await database.run(pool, work)
    assert await database.run(pool, lambda tx: tx.fetch("read_slots")) == []


async def test_no_statement_at_all_is_nothing_to_send(database: Database) -> None:
    assert await database.run("write", lambda tx: tx.together([])) == []
