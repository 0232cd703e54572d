"""bin/culm alone, in a checkout of its own: it makes its environment, or says in one line what this machine lacks.

The checkout holds the real front door and, for speed, empty lock files and a command that only says where it runs.
"""

import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import servers
from tests.cluster import ROOT

pytestmark = pytest.mark.system
DEADLINE_S = 120.0
TOOLS = ("sh", "dirname", "readlink", "cat", "cksum", "id", "mkdir", "flock", "env")
NOBODY = 65534
SAYS_WHERE = "import sys\nprint('ran', sys.prefix, *sys.argv[1:])\n"
UNKNOWN_PACKAGE = "no-such-package-of-anybody==1.0 --hash=sha256:" + "0" * 64 + "\n"


@pytest.fixture
def checkout() -> Iterator[Path]:
    """A checkout that anybody may read, in a path with a space."""
    with servers.folder() as name:
        Path(name).chmod(0o755)
        root = Path(name) / "a checkout"
        (root / "bin").mkdir(parents=True)
        shutil.copy(ROOT / "bin" / "culm", root / "bin" / "culm")
        (root / "ops").mkdir()
        (root / "ops" / "__init__.py").touch()
        (root / "ops" / "__main__.py").write_text(SAYS_WHERE, encoding="utf-8")
        for lock in ("requirements.lock", "requirements-load.lock", "requirements-test.lock"):
            (root / lock).touch()
        yield root


@pytest.fixture
def machine(checkout: Path) -> Path:
    """A folder to be the whole PATH, with the tools that every machine has; a test adds its python3."""
    tools = checkout.parent / "tools"
    tools.mkdir()
    for name in TOOLS:
        found = shutil.which(name)
        assert found, name
        (tools / name).symlink_to(found)
    return tools


def front_door(
    checkout: Path, *words: str, path: Path | None = None, user: int | None = None, **environment: str
) -> "subprocess.CompletedProcess[str]":
    """Run it to its end."""
    values = {"PATH": str(path) if path else os.environ["PATH"], "PIP_NO_INDEX": "1"} | environment
    return subprocess.run(
        [str(checkout / "bin" / "culm"), *words],
        env=values,
        cwd="/",
        user=user,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


def script(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    path.write_text("#!/bin/sh\n" + text, encoding="utf-8")
    path.chmod(0o755)


def ran_in(done: "subprocess.CompletedProcess[str]", environment: Path, *words: str) -> bool:
    return done.stdout.strip() == " ".join(["ran", str(environment), *words])


def test_the_first_run_installs_and_the_second_does_not(checkout: Path) -> None:
    first = front_door(checkout, "two words", "x")
    assert ran_in(first, checkout / ".venv", "two words", "x"), first.stderr
    assert "installing requirements.lock" in first.stderr
    second = front_door(checkout)
    assert (ran_in(second, checkout / ".venv"), second.stderr) == (True, "")
    # The load tests need more, the tests still more; after them no command needs anything.
    assert "installing requirements-load.lock" in front_door(checkout, "load", "list").stderr
    assert "installing requirements-test.lock" in front_door(checkout, "test").stderr
    assert front_door(checkout).stderr == ""
    assert front_door(checkout, "load", "list").stderr == ""


def test_a_changed_lock_file_is_installed(checkout: Path) -> None:
    front_door(checkout)
    (checkout / "requirements.lock").write_text("# changed\n", encoding="utf-8")
    again = front_door(checkout)
    assert ran_in(again, checkout / ".venv")
    assert "installing requirements.lock" in again.stderr


def test_an_installation_killed_before_pip_was_there_is_done_again(checkout: Path) -> None:
    venv.create(checkout / ".venv", with_pip=False, symlinks=True)
    done = front_door(checkout)
    assert ran_in(done, checkout / ".venv"), done.stderr


def test_an_environment_whose_python_is_gone_is_made_anew(checkout: Path) -> None:
    front_door(checkout)
    python = checkout / ".venv" / "bin" / "python"
    python.unlink()
    python.symlink_to("/nowhere/python3")
    done = front_door(checkout)
    assert ran_in(done, checkout / ".venv"), done.stderr


def test_two_first_runs_at_once_both_work(checkout: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "PIP_NO_INDEX": "1"}
    both = [
        subprocess.Popen(
            [checkout / "bin" / "culm"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        for _ in range(2)
    ]
    said = [one.communicate(timeout=DEADLINE_S)[0].decode().strip() for one in both]
    assert said == [f"ran {checkout / '.venv'}"] * 2


def test_a_failed_installation_says_so_and_is_tried_again(checkout: Path) -> None:
    (checkout / "requirements.lock").write_text(UNKNOWN_PACKAGE, encoding="utf-8")
    for _ in range(2):
        done = front_door(checkout)
        assert done.returncode == 2
        assert "could not install requirements.lock" in done.stderr
        assert "network" in done.stderr
    (checkout / "requirements.lock").write_text("", encoding="utf-8")
    assert ran_in(front_door(checkout), checkout / ".venv")


def test_a_python_that_is_too_old_is_refused_with_what_to_install(checkout: Path, machine: Path) -> None:
    script(machine / "python3", "exit 1\n")
    done = front_door(checkout, path=machine)
    assert done.returncode == 2
    assert "python3 >= 3.11 is needed" in done.stderr
    assert "apt install python3 python3-venv" in done.stderr


def test_a_newer_python_beside_an_old_one_is_taken(checkout: Path, machine: Path) -> None:
    script(machine / "python3", "exit 1\n")
    script(machine / "python3.11", f'exec {sys.executable} "$@"\n')
    done = front_door(checkout, path=machine)
    assert ran_in(done, checkout / ".venv"), done.stderr


def without_venv(machine: Path, user: int) -> None:
    """A python3 whose venv comes with the file `installed`, and this user."""
    lacks = f'case "$2" in *ensurepip*) [ -e "{machine}/installed" ] || exit 1 ;; esac\n'
    script(machine / "python3", lacks + f'exec {sys.executable} "$@"\n')
    script(machine / "id", f"echo {user}\n")


def test_without_the_venv_module_a_user_is_told_the_package(checkout: Path, machine: Path) -> None:
    without_venv(machine, 1000)
    done = front_door(checkout, path=machine)
    assert done.returncode == 2
    assert done.stderr == "culm: python's venv module is missing: sudo apt install python3-venv\n"


def test_without_the_venv_module_root_installs_it(checkout: Path, machine: Path) -> None:
    without_venv(machine, 0)
    script(machine / "apt-get", f'[ "$1" = update ] || echo "$@" >"{machine}/installed"\n')
    done = front_door(checkout, path=machine)
    assert ran_in(done, checkout / ".venv"), done.stderr
    assert (machine / "installed").read_text(encoding="utf-8").endswith("python3-venv\n")


def test_a_package_manager_that_fails_is_said(checkout: Path, machine: Path) -> None:
    without_venv(machine, 0)
    script(machine / "apt-get", "echo E: no route to the archive >&2\nexit 100\n")
    done = front_door(checkout, path=machine)
    assert done.returncode == 2
    assert "no route to the archive" in done.stderr
    assert "could not install python3-venv" in done.stderr


def strangers(checkout: Path) -> int | None:
    """Make the checkout one that the caller cannot write; whom to run as."""
    if os.getuid() == 0:
        return NOBODY
    checkout.chmod(0o555)
    return None


def test_a_checkout_that_cannot_be_written_has_its_environment_in_the_cache(checkout: Path) -> None:
    user = strangers(checkout)
    cache = checkout.parent / "cache"
    cache.mkdir()
    cache.chmod(0o777)
    done = front_door(checkout, user=user, XDG_CACHE_HOME=str(cache))
    assert ran_in(done, cache / "culm" / "venv"), done.stderr
    assert not (checkout / ".venv").exists()
    checkout.chmod(0o755)


def test_where_nothing_can_be_written_it_says_what_to_set(checkout: Path) -> None:
    user = strangers(checkout)
    done = front_door(checkout, user=user, XDG_CACHE_HOME="/proc/nowhere")
    assert done.returncode == 2
    assert "XDG_CACHE_HOME" in done.stderr
    checkout.chmod(0o755)


def test_an_environment_of_another_user_that_is_current_is_used_as_it_is(checkout: Path) -> None:
    # A python that the other user may run too.
    everybodys = os.pathsep.join(
        folder for folder in os.environ["PATH"].split(os.pathsep) if not Path(folder).is_relative_to(Path.home())
    )
    front_door(checkout, PATH=everybodys)
    done = front_door(checkout, user=strangers(checkout), PATH=everybodys, XDG_CACHE_HOME="/proc/nowhere")
    assert (ran_in(done, checkout / ".venv"), done.stderr) == (True, "")
    checkout.chmod(0o755)
