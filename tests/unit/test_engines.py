"""Package lists: those that are there are tried first, new ones once, and the error that is told is the useful one."""

import pytest

from culm.errors import ClientFault
from ops.engines import innodb


class Apt:
    """What was asked for, and what fails: the names of the steps that do."""

    def __init__(self, *failing: str) -> None:
        self.failing = set(failing)
        self.steps: list[str] = []

    def install(self) -> None:
        """Install by the lists that are there."""
        self._step("install again" if "update" in self.steps else "install")

    def update(self) -> None:
        """Get new lists."""
        self._step("update")

    def run(self) -> list[str]:
        """All of it; the steps in their order."""
        innodb._with_fresh_lists(self.install, self.update)
        return self.steps

    def _step(self, name: str) -> None:
        self.steps.append(name)
        if name in self.failing:
            raise ClientFault("no_engine", f"{name} failed")


def test_lists_that_are_there_are_enough() -> None:
    assert Apt().run() == ["install"]


def test_missing_or_old_lists_are_renewed_once() -> None:
    assert Apt("install").run() == ["install", "update", "install again"]


def test_one_broken_source_does_not_keep_us_from_the_others() -> None:
    assert Apt("install", "update").run() == ["install", "update", "install again"]


@pytest.mark.parametrize(
    ("failing", "told"),
    [(("install", "install again"), "install again"), (("install", "update", "install again"), "update")],
)
def test_the_first_cause_is_told(failing: tuple[str, ...], told: str) -> None:
    with pytest.raises(ClientFault, match=f"{told} failed"):
        Apt(*failing).run()
