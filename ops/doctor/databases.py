"""A partition's database: whether what it acknowledges is kept, whether its clock is ours."""

import os
import time
from collections.abc import Iterator, Mapping
from importlib import resources
from typing import Final

from culm.errors import CulmError
from culm.settings import ShardSettings
from ops.doctor.check import Check
from shard.database import Database, Transaction
from shard.statements import parse

SKEW_S: Final = 1.0
VARIABLES: Final = (
    *("version", "innodb_flush_log_at_trx_commit", "innodb_doublewrite", "innodb_flush_method", "log_bin"),
    *("sync_binlog", "innodb_buffer_pool_size", "transaction_isolation", "tx_isolation", "max_allowed_packet"),
)
MIN_PACKET_BYTES: Final = 16 << 20
"""The largest job with the reports of all its attempts, escaped, and half as much again."""
_STATEMENTS: Final = parse(resources.files("ops").joinpath("sql/doctor.sql").read_text(encoding="utf-8"))


async def examine(settings: ShardSettings, *, expected: bool) -> list[Check]:
    """Ask a shard's database; one that is not reachable is bad only where it is `expected` to be."""
    name = f"database of {settings.name}"
    secret = settings.database.password_file
    if secret and not os.access(secret, os.R_OK):
        advice = "correct database.password_file"
        return [Check(name=name, level="bad", text=f"{secret} cannot be read", advice=advice)]
    database = Database(settings.database)
    try:
        variables, n_bytes, skew_s = await database.run("read", _ask)
    except CulmError as error:
        if expected:
            return [Check(name=name, level="bad", text=error.message, advice=f"culm logs {settings.name}-db")]
        return [Check(name=name, level="warn", text="not looked at, it does not run", advice="culm up, then again")]
    finally:
        await database.close()
    return [
        Check(name=name, text=f"version {variables.get('version', '?')}"),
        *durability(name, variables),
        packet(name, int(variables.get("max_allowed_packet", 0))),
        memory(name, int(variables.get("innodb_buffer_pool_size", 0)), n_bytes),
        clock(name, skew_s),
    ]


async def _ask(tx: Transaction) -> tuple[dict[str, str], int, float]:
    """The variables, the bytes of the schema, and how far the server's clock is ahead of ours in seconds."""
    tx.use(_STATEMENTS)
    rows = await tx.fetch("server_variables", VARIABLES)
    [[n_bytes]] = await tx.fetch("schema_bytes")
    before = time.time()
    [[there]] = await tx.fetch("server_clock")
    return {str(name).lower(): str(value) for name, value in rows}, int(n_bytes), float(there) - before


def durability(name: str, variables: Mapping[str, str]) -> Iterator[Check]:
    """Judge what decides whether an acknowledged job outlives a crash, and the isolation. Pure."""
    lost = "a crash may lose acknowledged jobs"
    flush = variables.get("innodb_flush_log_at_trx_commit", "")
    # 3 is MariaDB's: one more flush than 1.
    yield _setting(
        name, "innodb_flush_log_at_trx_commit", flush, good=flush in {"1", "3"}, advice=f"{lost}: set it to 1"
    )
    double = variables.get("innodb_doublewrite", "")
    is_on = double.upper() not in {"", "OFF", "0", "FALSE", "DETECT_ONLY"}
    yield _setting(name, "innodb_doublewrite", double, good=is_on, advice="a torn page is beyond repair: set it to ON")
    method = variables.get("innodb_flush_method", "")
    if method.lower() == "nosync":
        yield _setting(name, "innodb_flush_method", method, good=False, advice=f"{lost}: set it to O_DIRECT")
    binlog, sync = variables.get("log_bin", "OFF"), variables.get("sync_binlog", "")
    if binlog.upper() in {"ON", "1"}:
        yield _setting(name, "sync_binlog", sync, good=sync == "1", advice=f"{lost}, with log_bin=ON: set it to 1")
    else:
        yield Check(name=name, text="log_bin=OFF")
    isolation = variables.get("transaction_isolation") or variables.get("tx_isolation", "?")
    yield Check(name=name, text=f"isolation {isolation}; every connection of a shard sets READ COMMITTED")


def memory(name: str, pool_bytes: int, schema_bytes: int) -> Check:
    """Judge the buffer pool against what is stored. Pure."""
    told = f"buffer pool {pool_bytes >> 20} MiB, data {schema_bytes >> 20} MiB"
    if schema_bytes > pool_bytes:
        return Check(name=name, level="warn", text=told, advice="enlarge innodb_buffer_pool_size: reads go to the disk")
    return Check(name=name, text=told)


def packet(name: str, max_bytes: int) -> Check:
    """Judge the largest statement that the server takes. Pure."""
    advice = "large jobs are refused or never reach the archive: set it to 64M"
    is_good = max_bytes >= MIN_PACKET_BYTES
    return _setting(name, "max_allowed_packet", str(max_bytes), good=is_good, advice=advice)


def clock(name: str, skew_s: float) -> Check:
    """Judge how far the database's clock is ahead of this machine's. Pure."""
    told = f"clock {skew_s:+.3f} s against this machine"
    if abs(skew_s) > SKEW_S:
        advice = "leases end by the database's clock, tokens by the routers': run NTP on both"
        return Check(name=name, level="warn", text=told, advice=advice)
    return Check(name=name, text=told)


def _setting(name: str, key: str, value: str, *, good: bool, advice: str) -> Check:
    return Check(name=name, level="ok" if good else "bad", text=f"{key}={value}", advice="" if good else advice)
