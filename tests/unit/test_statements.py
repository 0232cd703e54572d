"""Named SQL blocks: parsing, repeated parts, tuples spread over IN lists."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shard.statements import STATEMENTS, Statement, expand, flatten, parse

FILE = """-- The file's own comment; a semicolon here is no end.

-- name: one
SELECT a FROM t WHERE id IN %s

-- What the next one is for.
-- name: many
INSERT INTO t (a, b)
VALUES {, |(%s, %s)} ON DUPLICATE KEY UPDATE a = a;
"""


def test_a_block_is_its_text_with_its_name_in_front() -> None:
    blocks = parse(FILE)
    assert list(blocks) == ["one", "many"]
    assert blocks["one"].head == "/* culm one */ SELECT a FROM t WHERE id IN %s"
    assert blocks["one"].part == ""


def test_a_repeated_part_is_written_once_for_each_row() -> None:
    many = parse(FILE)["many"]
    assert many.for_rows(1).endswith("VALUES (%s, %s) ON DUPLICATE KEY UPDATE a = a")
    assert many.for_rows(3).endswith("VALUES (%s, %s), (%s, %s), (%s, %s) ON DUPLICATE KEY UPDATE a = a")


def test_comments_between_blocks_are_not_sent() -> None:
    text = parse(FILE)["one"].head + parse(FILE)["many"].for_rows(1)
    assert "--" not in text
    assert "What the next one" not in text


def test_a_name_that_stands_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="one stands twice"):
        parse(FILE + "\n-- name: one\nSELECT 1\n")


def test_a_tuple_is_spread_over_its_place() -> None:
    text, flat = expand("WHERE a = %s AND id IN %s AND b = %s", [1, (7, 8, 9), "x"])
    assert text == "WHERE a = %s AND id IN (%s, %s, %s) AND b = %s"
    assert flat == [1, 7, 8, 9, "x"]


def test_an_empty_tuple_equals_nothing() -> None:
    assert expand("id IN %s", [()]) == ("id IN (NULL)", [])


def test_without_a_tuple_the_text_is_sent_as_it_is() -> None:
    assert expand("a = %s", ["%s"]) == ("a = %s", ["%s"])


@pytest.mark.parametrize("arguments", [[(1,)], [(1,), 2, 3]])
def test_arguments_that_do_not_fit_the_text_are_refused(arguments: list[object]) -> None:
    with pytest.raises(ValueError, match="arguments for 2 places"):
        expand("a IN %s AND b = %s", arguments)


@given(st.lists(st.lists(st.integers(), min_size=2, max_size=2), min_size=1, max_size=20))
def test_rows_and_places_are_as_many(rows: list[list[int]]) -> None:
    text = parse(FILE)["many"].for_rows(len(rows))
    assert text.count("%s") == len(flatten(rows))
    assert flatten(rows) == [value for row in rows for value in row]


@given(st.lists(st.one_of(st.integers(), st.text(), st.lists(st.text(), max_size=5).map(tuple)), max_size=8))
def test_every_argument_has_its_place_whatever_it_holds(arguments: list[object]) -> None:
    text, flat = expand(" , ".join(["%s"] * len(arguments)), arguments)
    assert text.count("%s") == len(flat)
    assert flat == [v for argument in arguments for v in (argument if isinstance(argument, tuple) else (argument,))]


@pytest.mark.parametrize("statement", STATEMENTS.values(), ids=STATEMENTS.keys())
def test_every_block_of_the_shard_is_one_whole_statement(statement: Statement) -> None:
    text = statement.for_rows(2)
    assert text.startswith(f"/* culm {statement.name} */ ")
    assert not re.search(r"[{}|;]", text.removeprefix(f"/* culm {statement.name} */ "))
    assert text.count("(") == text.count(")")


def test_a_list_is_spread_without_brackets() -> None:
    assert expand("FIELD(id, %s) IN %s AND %s", [[1, 2], (3, 4), 5]) == (
        "FIELD(id, %s, %s) IN (%s, %s) AND %s",
        [1, 2, 3, 4, 5],
    )
