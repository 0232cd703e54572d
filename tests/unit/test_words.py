"""Numbers in sentences."""

import pytest

from culm.words import counted


@pytest.mark.parametrize(
    ("n", "one", "more", "told"),
    [
        (0, "job", "", "0 jobs"),
        (1, "job", "", "1 job"),
        (2, "job", "", "2 jobs"),
        (1, "job ranks", "jobs rank", "1 job ranks"),
        (2, "job ranks", "jobs rank", "2 jobs rank"),
    ],
)
def test_one_is_not_many(n: int, one: str, more: str, told: str) -> None:
    assert counted(n, one, more) == told
