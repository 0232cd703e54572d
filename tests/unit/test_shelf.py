"""The shelf: bounded, and never in the way."""

from shard.shelf import ROW_BYTES, Row, Shelf

SPEC = b"s" * 500


def _row(identifier: int, spec: bytes = SPEC) -> Row:
    return (identifier, *range(15), spec)


def _shelf(n_rows: int) -> Shelf:
    return Shelf(n_rows * (ROW_BYTES + len(SPEC)))


def test_a_row_that_is_taken_is_gone() -> None:
    shelf = _shelf(3)
    shelf.put([_row(1), _row(2)])
    assert shelf.take(1) == _row(1)
    assert shelf.take(1) is None
    assert shelf.lacks([1, 2, 3]) == [1, 3]


def test_the_longest_there_go_first() -> None:
    shelf = _shelf(3)
    shelf.put([_row(n) for n in (1, 2, 3, 4, 5)])
    assert shelf.lacks([1, 2, 3, 4, 5]) == [1, 2]


def test_where_there_is_no_room_nothing_goes_for_what_only_might_come_next() -> None:
    shelf = _shelf(3)
    shelf.put([_row(1), _row(2)])
    shelf.put_if_room([_row(3), _row(4)])
    assert shelf.lacks([1, 2, 3, 4]) == [4]


def test_the_same_job_twice_is_there_once_and_counts_once() -> None:
    shelf = _shelf(2)
    shelf.put([_row(1), _row(1), _row(2), _row(2)])
    assert len(shelf) == 2
    assert shelf.lacks([1, 2]) == []


def test_what_was_dropped_leaves_its_room() -> None:
    shelf = _shelf(2)
    shelf.put([_row(1), _row(2)])
    shelf.drop([1, 7])
    shelf.put_if_room([_row(3)])
    assert shelf.lacks([1, 2, 3]) == [1]


def test_a_shelf_without_room_holds_nothing() -> None:
    shelf = Shelf(0)
    shelf.put([_row(1)])
    shelf.put_if_room([_row(2)])
    assert len(shelf) == 0
