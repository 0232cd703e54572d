"""The repository as the checks see it: what git tracks or would, parsed once."""

import ast
import functools
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("culm", "router", "shard", "pilot", "monitor_api", "loadtest", "ops")
_SKIPPED = {".git", ".venv", ".culm", ".local", "__pycache__"}


@functools.cache
def files(*endings: str) -> tuple[Path, ...]:
    """The files of the project with one of these endings (all without any), by path from its root."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode == 0:
        found = [Path(line) for line in listed.stdout.splitlines() if (ROOT / line).is_file()]
    else:  # an unpacked archive
        found = [path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file()]
        found = [path for path in found if not _SKIPPED & set(path.parts)]
    return tuple(sorted(path for path in found if not endings or path.suffix in endings))


def sources() -> tuple[Path, ...]:
    """The Python modules of the product."""
    return tuple(path for path in files(".py") if path.parts[0] in PACKAGES)


def modules_of_tests() -> tuple[Path, ...]:
    """The Python modules of the tests."""
    return tuple(path for path in files(".py") if path.parts[0] == "tests")


@functools.cache
def text(path: Path) -> str:
    """A file's text."""
    return (ROOT / path).read_text(encoding="utf-8")


@functools.cache
def tree(path: Path) -> ast.Module:
    """A module's syntax tree."""
    return ast.parse(text(path), filename=str(path))


def strings(module: ast.Module) -> Iterator[ast.Constant]:
    """Every string of a module that is not a docstring, also the pieces of f-strings."""
    bare = {id(node.value) for node in ast.walk(module) if isinstance(node, ast.Expr)}
    for node in ast.walk(module):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in bare:
            yield node


def at(path: Path, node: ast.expr | ast.stmt) -> str:
    """Where something stands, for people and editors."""
    return f"{path}:{node.lineno}"
