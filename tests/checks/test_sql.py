"""SQL: portable between MariaDB and MySQL, in .sql files only, in named blocks that are all used."""

import re
from pathlib import Path

import pytest

from shard import statements
from tests.checks.repository import at, files, sources, strings, text, tree

BANNED = {
    "RETURNING": r"\bRETURNING\b",
    "FOR SHARE (write LOCK IN SHARE MODE)": r"\bFOR\s+SHARE\b",
    "FOR UPDATE OF": r"\bFOR\s+UPDATE\s+OF\b",
    "upsert alias (write VALUES(column))": r"\)\s*AS\s+\w+\s+ON\s+DUPLICATE\b",
    "->> (write JSON_UNQUOTE(JSON_EXTRACT()))": r"->>?",
    "functional index": r"\b(?:KEY|INDEX)\s*\w*\s*\(\s*\(",
    "utf8mb4_0900 collation": r"utf8mb4_0900",
    "VALUES ROW()": r"\bVALUES\s+ROW\s*\(",
    "an engine that is not InnoDB": r"\bENGINE\s*=\s*(?!InnoDB\b)\w+",
}
VERB = re.compile(
    r"\b(?:SELECT\b.+\bFROM|INSERT\s+(?:IGNORE\s+)?INTO|REPLACE\s+INTO|UPDATE\s+\w+\s+SET|DELETE\s+FROM"
    r"|(?:CREATE|ALTER|DROP|TRUNCATE)\s+TABLE)\b",
    re.IGNORECASE | re.DOTALL,
)
SQL = files(".sql")
MIGRATIONS = [path for path in SQL if "migrations" in path.parts]
NAMED = [path for path in SQL if "migrations" not in path.parts]
_NAME = re.compile(r"^-- name: (\w+)$", re.MULTILINE)


def _without_comments(sql: str) -> str:
    return re.sub(r"--[^\n]*|/\*.*?\*/", "", sql, flags=re.DOTALL)


def _found(sql: str) -> list[str]:
    return [name for name, pattern in BANNED.items() if re.search(pattern, _without_comments(sql), re.IGNORECASE)]


@pytest.mark.parametrize("path", SQL, ids=str)
def test_only_what_both_engines_understand(path: Path) -> None:
    assert _found(text(path)) == []


@pytest.mark.parametrize(
    ("sql", "n_found"),
    [
        ("DELETE FROM ready WHERE id = 1 RETURNING id", 1),
        ("SELECT 1 FROM slot FOR  SHARE", 1),
        ("SELECT 1 FROM slot LOCK IN SHARE MODE", 0),
        ("SELECT 1 FROM a JOIN b FOR UPDATE OF a", 1),
        ("SELECT 1 FROM a FOR UPDATE SKIP LOCKED", 0),
        ("INSERT INTO t (a) VALUES (1) AS new ON DUPLICATE KEY UPDATE a = new.a", 1),
        ("INSERT INTO t (a) VALUES (1) ON DUPLICATE KEY UPDATE a = VALUES(a)", 0),
        ("SELECT body->>'$.a' FROM t", 1),
        ("CREATE TABLE t (a INT, KEY by_a ((a + 1)))", 1),
        ("CREATE TABLE t (a INT, KEY by_a (a))", 0),
        ("CREATE TABLE t (a INT) COLLATE utf8mb4_0900_ai_ci", 1),
        ("VALUES ROW(1), ROW(2)", 1),
        ("CREATE TABLE t (a INT) ENGINE = MEMORY", 1),
        ("-- RETURNING is not portable", 0),
    ],
)
def test_the_banned_forms_are_recognised(sql: str, n_found: int) -> None:
    assert len(_found(sql)) == n_found


def test_no_sql_outside_sql_files() -> None:
    found = [at(path, s) for path in sources() for s in strings(tree(path)) if VERB.search(str(s.value))]
    assert found == []


@pytest.mark.parametrize("path", NAMED, ids=str)
def test_every_statement_stands_in_a_named_block(path: Path) -> None:
    before = _NAME.split(text(path))[0]
    assert _without_comments(before).strip() == ""
    for name, statement in statements.parse(text(path)).items():
        body = _without_comments(statement.head + statement.part + statement.tail).strip()
        assert body, f"{name} is empty"
        assert ";" not in body, f"{name} holds more than one statement"


def test_every_named_block_is_used() -> None:
    names = {name for path in NAMED for name in _NAME.findall(text(path))}
    used = {s.value for path in sources() for s in strings(tree(path))}
    assert sorted(names - used) == []


@pytest.mark.parametrize("path", MIGRATIONS, ids=str)
def test_migrations_are_numbered_without_gaps_and_say_their_engine(path: Path) -> None:
    numbers = sorted(int(other.name[:4]) for other in MIGRATIONS if other.parent == path.parent)
    assert numbers == list(range(1, len(numbers) + 1))
    sql = _without_comments(text(path))
    assert len(re.findall(r"\bCREATE\s+TABLE\b", sql)) == len(re.findall(r"\bENGINE\s*=\s*InnoDB\b", sql))
