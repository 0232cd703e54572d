"""What must never be in the repository: machine paths, registry hosts, secrets in logs, state literals, bare sleeps."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from culm.states import State
from tests.checks.repository import at, files, modules_of_tests, sources, text, tree

# Written in pieces, so that this file does not find itself.
MACHINE = re.compile("/wo" r"rk/|/home/[a-z]\w*/|/ro" r"ot/[\w.]")
REGISTRY = re.compile(
    r"py" r"pi\.(?:org|python)|python" r"hosted|registry\.np" r"mjs|index-" r"url|extra-" r"index|find-" r"links"
    r"|proxy\.go" r"lang",
    re.IGNORECASE,
)  # fmt: skip
SECRET = re.compile(
    r"(?:^|_)(?:tokens?|secrets?|passwords?|jwt|authorization|credentials?|private_key)$", re.IGNORECASE
)
LOG_METHODS = {"debug", "info", "warning", "error", "exception", "critical", "log"}
STATES = {str(state) for state in State}
SERVICES = ("router", "shard", "monitor_api")


def _texts() -> Iterator[tuple[Path, int, str]]:
    for path in files():
        try:
            lines = text(path).splitlines()
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(lines, 1):
            yield path, number, line


@pytest.mark.parametrize("pattern", [MACHINE, REGISTRY], ids=["machine paths", "registry hosts"])
def test_nothing_of_one_machine_or_one_registry(pattern: re.Pattern[str]) -> None:
    assert [f"{path}:{number}" for path, number, line in _texts() if pattern.search(line)] == []


# --- logs ------------------------------------------------------------------------------------------------------------


def _logged_secrets(module: ast.Module) -> Iterator[ast.expr]:
    for call in ast.walk(module):
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and _is_log(call.func)):
            continue
        for argument in [*call.args, *(keyword.value for keyword in call.keywords)]:
            for node in ast.walk(argument):
                name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
                if SECRET.search(name):
                    yield call
                    break


def _is_log(function: ast.Attribute) -> bool:
    owner = function.value
    name = owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else ""
    return function.attr in LOG_METHODS and name.strip("_") in {"log", "logger", "logging"}


def test_no_secret_is_given_to_a_logger() -> None:
    assert [at(path, node) for path in sources() for node in _logged_secrets(tree(path))] == []


@pytest.mark.parametrize(
    ("code", "n_found"),
    [
        ("log.info('x %s', request.lease_token)", 1),
        ("log.info('x %s', token)", 1),
        ("self.log.warning(f'x {password}')", 1),
        ("logging.error('x', extra={'jwt': jwt})", 1),
        ("log.info('token of %s', subject)", 0),
        ("log.info('%d tokens', n_tokens_seen)", 0),
        ("math.log(token)", 0),
    ],
)
def test_logged_secrets_are_recognised(code: str, n_found: int) -> None:
    assert len(list(_logged_secrets(ast.parse(code)))) == n_found


# --- states ----------------------------------------------------------------------------------------------------------


def _state_literals(module: ast.Module) -> Iterator[ast.expr]:
    for node in ast.walk(module):
        if isinstance(node, ast.Compare):
            compared: list[ast.expr] = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            compared = [node.value]
        else:
            continue
        for side in compared:
            values = side.elts if isinstance(side, ast.Tuple | ast.Set | ast.List) else [side]
            if any(isinstance(value, ast.Constant) and value.value in STATES for value in values):
                yield side


def test_no_job_state_is_compared_as_a_literal() -> None:
    """Write State.RUNNING: the one table of states is culm/states.py."""
    services = [path for path in sources() if path.parts[0] in SERVICES]
    assert [at(path, node) for path in services for node in _state_literals(tree(path))] == []


@pytest.mark.parametrize(
    ("code", "n_found"),
    [
        ("state == 'running'", 1),
        ("'failed' != state", 1),
        ("state in ('sent', 'starting')", 1),
        ("match state:\n case 'finished':\n  pass", 1),
        ("state is State.RUNNING", 0),
        ("status == 'online'", 0),
        ("row = {'state': 'running'}", 0),
    ],
)
def test_compared_state_literals_are_recognised(code: str, n_found: int) -> None:
    assert len(list(_state_literals(ast.parse(code)))) == n_found


# --- waiting ---------------------------------------------------------------------------------------------------------


def _sleeps(module: ast.Module) -> Iterator[ast.Call]:
    for node in ast.walk(module):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id="time"), attr="sleep")):
                yield node
            case ast.Call(func=ast.Attribute(value=ast.Name(id="asyncio"), attr="sleep"), args=[argument]):
                if not (isinstance(argument, ast.Constant) and argument.value == 0):
                    yield node
            case ast.Call(func=ast.Name(id="sleep")):
                yield node


def test_tests_wait_for_a_condition_never_for_a_time() -> None:
    """Write `await eventually(condition, deadline_s)` of tests/waiting.py."""
    others = [path for path in modules_of_tests() if path.name != "waiting.py" and path.parent.name != "measure"]
    assert [at(path, node) for path in others for node in _sleeps(tree(path))] == []


@pytest.mark.parametrize(
    ("code", "n_found"),
    [("time.sleep(1)", 1), ("asyncio.sleep(0.1)", 1), ("asyncio.sleep(pause)", 1), ("sleep(2)", 1),
     ("asyncio.sleep(0)", 0), ("eventually(lambda: True, 5)", 0)],
)  # fmt: skip
def test_sleeps_are_recognised(code: str, n_found: int) -> None:
    assert len(list(_sleeps(ast.parse(code)))) == n_found
