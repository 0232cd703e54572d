"""The house rules that a program can check: sizes, locks, imports of the pilot, docs, equal checks everywhere."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from ops import docs
from tests.checks.repository import ROOT, at, sources, text, tree

MAX_MODULE_LINES = 500
MAX_FUNCTION_LINES = 60
MAY_BE_LONGER = frozenset({"culm/wire.py"})
"""Modules and functions (`path` or `path:name`) that were argued for. wire.py: one page holds the whole contract."""
LOCKS = [Path("requirements.lock"), Path("requirements-load.lock"), Path("requirements-test.lock")]
"""Each holds what the one before it holds: the product, with the load tests, with the tests."""
_PINNED = re.compile(r"^([a-z0-9][a-z0-9-]*)==(\S+)", re.MULTILINE | re.IGNORECASE)


# --- sizes -----------------------------------------------------------------------------------------------------------


def _functions(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{path}:{node.name}", (node.end_lineno or node.lineno) - node.lineno + 1


def test_no_module_is_too_long() -> None:
    sizes = {str(path): len(text(path).splitlines()) for path in sources()}
    assert {path: n for path, n in sizes.items() if n > MAX_MODULE_LINES and path not in MAY_BE_LONGER} == {}


def test_no_function_is_too_long() -> None:
    sizes = {name: n for path in sources() for name, n in _functions(path)}
    assert {name: n for name, n in sizes.items() if n > MAX_FUNCTION_LINES and name not in MAY_BE_LONGER} == {}


# --- the locks -------------------------------------------------------------------------------------------------------


def _pins(path: Path) -> dict[str, str]:
    return {name.lower(): version for name, version in _PINNED.findall(text(path))}


@pytest.mark.parametrize("path", LOCKS, ids=str)
def test_a_lock_names_no_host_and_hashes_everything(path: Path) -> None:
    assert "://" not in text(path)
    assert not [line for line in text(path).splitlines() if line.startswith("-")]
    blocks = re.split(r"\n(?=[a-z0-9])", text(path), flags=re.IGNORECASE)
    pinned = [block for block in blocks if _PINNED.match(block)]
    assert pinned
    assert [block.split()[0] for block in pinned if "--hash=sha256:" not in block] == []


def test_the_locks_agree() -> None:
    for smaller, larger in pairwise(map(_pins, LOCKS)):
        assert smaller.items() <= larger.items()


def test_the_locks_hold_what_the_project_asks_for() -> None:
    project = tomllib.loads(text(Path("pyproject.toml")))["project"]
    extras = project["optional-dependencies"]
    for path, wanted in zip(LOCKS, (project["dependencies"], extras["load"], extras["test"]), strict=True):
        names = {re.split(r"[<>=\[ ]", requirement)[0].lower() for requirement in wanted}
        assert names - _pins(path).keys() == set()


# --- imports ---------------------------------------------------------------------------------------------------------


def _imported(module: ast.Module) -> Iterator[tuple[ast.stmt, str]]:
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node, node.module or ""


def test_the_pilot_needs_nothing_but_python() -> None:
    allowed = sys.stdlib_module_names | {"pilot"}
    foreign = [
        f"{at(path, node)} {name}"
        for path in sources()
        if path.parts[0] == "pilot"
        for node, name in _imported(tree(path))
        if name.partition(".")[0] not in allowed
    ]
    assert foreign == []


def test_nothing_is_ever_unpickled() -> None:
    banned = {"pickle", "marshal", "shelve", "dill", "cloudpickle"}
    found = [at(path, node) for path in sources() for node, name in _imported(tree(path)) if name in banned]
    assert found == []


# --- documentation ---------------------------------------------------------------------------------------------------


def test_generated_pages_are_up_to_date() -> None:
    """Else: python -m ops.docs --write."""
    assert docs.outdated() == []


def test_every_setting_state_and_event_has_a_meaning() -> None:
    for path, page in docs.pages().items():
        assert [line for line in page.splitlines() if re.search(r"\|\s*\|$", line)] == [], path


def test_an_outdated_page_is_noticed(tmp_path: Path) -> None:
    assert docs.outdated(tmp_path) == list(docs.pages())
    for path, page in docs.pages().items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(page, encoding="utf-8")
    assert docs.outdated(tmp_path) == []
    (tmp_path / "docs" / "states.md").write_text("old", encoding="utf-8")
    assert docs.outdated(tmp_path) == ["docs/states.md"]


def test_links_between_pages_lead_somewhere() -> None:
    broken = []
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
            if "://" not in target and not (path.parent / target).exists():
                broken.append(f"{path.relative_to(ROOT)}: {target}")
    assert broken == []


# --- the same checks everywhere --------------------------------------------------------------------------------------


def test_pre_commit_runs_the_checks_of_continuous_integration() -> None:
    steps = re.findall(r'^check "[^"]+" (.+)$', text(Path(".ci/checks")), re.MULTILINE)
    hooks = re.findall(r"^\s+entry: (.+)$", text(Path(".pre-commit-config.yaml")), re.MULTILINE)
    assert steps
    assert hooks == steps
