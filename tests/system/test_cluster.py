"""up, down, status, logs: exactly what was started is ended, a killed one blocks nothing, two do not meet."""

import fcntl
import os
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import jwt
import pytest

from ops.cluster import control
from ops.cluster.layout import Layout
from tests import servers
from tests.cluster import CULM, Cluster, cluster, culm, decoded, processes_of, remove_sockets
from tests.waiting import eventually_sync

pytestmark = pytest.mark.system
DEADLINE_S = 60.0
PROCESSES = {
    *("us1-db", "us1-valkey", "us1", "eu1-db", "eu1-valkey", "eu1", "cern1-db", "cern1-valkey", "cern1"),
    *("router", "monitor", "CERN-router", "CERN-monitor"),
}


@pytest.fixture
def own(folder: Path) -> Iterator[Path]:
    """A folder for a cluster that `culm up` starts: whatever a test leaves running there is ended."""
    yield folder
    for home in Layout(folder).homes:
        told = control.status(home.folder)
        if told is not None and told.alive:
            os.kill(told.pid, signal.SIGTERM)
            eventually_sync(lambda told=told: not told.alive, DEADLINE_S)  # type: ignore[misc]
    remove_sockets(folder)


def _up(folder: Path, port: int) -> "subprocess.CompletedProcess[str]":
    return culm("up", "--port", str(port), folder=folder, timeout_s=120.0)


def test_up_and_down_and_up_again_keep_the_data(own: Path) -> None:
    port = servers.free_ports(4)
    assert _up(own, port).returncode == 0
    status = decoded(culm("status", "-o", "json", folder=own))
    assert (status["phase"], status["ports"]) == ("up", {"central": port, "CERN": port + 2})
    assert {process["name"] for process in status["processes"]} == PROCESSES
    assert {process["state"] for process in status["processes"]} == {"up"}
    submitted = culm("job", "submit", "--site", "BNL", "--", "true", folder=own).stdout.split()
    # A second up finds it up and changes nothing.
    assert _up(own, port).returncode == 0
    assert decoded(culm("status", "-o", "json", folder=own))["processes"][0]["pid"] == status["processes"][0]["pid"]
    assert culm("down", folder=own).returncode == 0
    assert processes_of(own) == []
    assert not [home for home in Layout(own).homes if home.sockets.exists()]
    assert culm("status", folder=own).returncode == 4
    down_again = culm("down", folder=own)
    assert (down_again.returncode, "nothing runs" in down_again.stderr) == (0, True)
    # Without --port it comes back where it was.
    assert culm("up", folder=own, timeout_s=120.0).returncode == 0
    jobs = decoded(culm("job", "list", "-o", "json", folder=own))["jobs"]
    assert [str(job["id"]) for job in jobs] == submitted
    assert culm("down", folder=own).returncode == 0


def test_a_killed_supervisor_takes_all_with_it_and_blocks_nothing(own: Path) -> None:
    port = servers.free_ports(4)
    assert _up(own, port).returncode == 0
    for home in Layout(own).homes:
        told = control.status(home.folder)
        assert told is not None
        os.kill(told.pid, signal.SIGKILL)
    eventually_sync(lambda: processes_of(own) == [], DEADLINE_S, what="its children died with it")
    assert culm("status", folder=own).returncode == 4
    assert _up(own, port).returncode == 0
    assert culm("down", folder=own).returncode == 0
    assert processes_of(own) == []


def test_an_up_that_is_killed_while_it_starts_blocks_nothing(own: Path) -> None:
    port = servers.free_ports(4)
    starting = subprocess.Popen(
        [CULM, "up", "--port", str(port), "--foreground"],
        env=os.environ | {"CULM_DIR": str(own)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    eventually_sync((own / "data").exists, DEADLINE_S, what="it has begun")
    starting.kill()
    starting.wait()
    eventually_sync(lambda: processes_of(own) == [], DEADLINE_S, what="its children died with it")
    assert _up(own, port).returncode == 0
    assert culm("down", folder=own).returncode == 0


def test_two_ups_at_once_start_one_cluster(own: Path) -> None:
    port = servers.free_ports(4)
    both = [
        subprocess.Popen(
            [CULM, "up", "--port", str(port)],
            env=os.environ | {"CULM_DIR": str(own)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]
    said = [one.communicate(timeout=120)[1].decode() for one in both]
    assert [one.returncode for one in both] == [0, 0], said
    assert {process["state"] for process in decoded(culm("status", "-o", "json", folder=own))["processes"]} == {"up"}
    assert culm("down", folder=own).returncode == 0
    assert processes_of(own) == []


def test_a_cluster_that_is_being_prepared_is_found_and_ended(own: Path, tmp_path: Path) -> None:
    # The supervisor waits for the lock that another cluster of this user holds while it makes the template.
    templates = tmp_path / "culm" / "templates"
    templates.mkdir(parents=True)
    with (templates / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        starting = subprocess.Popen(
            [CULM, "up", "--port", str(servers.free_ports(4))],
            env=os.environ | {"CULM_DIR": str(own), "XDG_CACHE_HOME": str(tmp_path)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        eventually_sync((own / "data").exists, DEADLINE_S, what="it prepares")
        assert decoded(culm("status", "-o", "json", folder=own))["phase"] == "starting"
        assert "stopped" in culm("down", folder=own).stderr
        told = starting.communicate(timeout=DEADLINE_S)[1]
    assert starting.returncode != 0
    assert "Traceback" not in told
    assert processes_of(own) == []


def test_ctrl_c_ends_a_cluster_in_the_foreground(folder: Path) -> None:
    with cluster(folder) as running:
        pids = [process.pid for process in running.processes]
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(DEADLINE_S) == 0
        assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
        assert not [home for home in running.layout.homes if home.sockets.exists()]


def test_a_port_that_is_in_use_is_said_clearly(running: Cluster, own: Path) -> None:
    refused = _up(own, running.layout.port)
    assert refused.returncode == 5
    assert "port_busy" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_another_port_for_a_cluster_that_is_up_is_refused(running: Cluster) -> None:
    refused = running.culm("up", "--port", str(servers.free_ports(4)))
    assert refused.returncode == 5
    assert "runs_elsewhere" in refused.stderr


def test_a_second_cluster_does_not_disturb_the_first(running: Cluster, own: Path) -> None:
    before = {process.name: process.pid for process in running.processes}
    assert _up(own, servers.free_ports(4)).returncode == 0
    mine = culm("job", "submit", "--site", "BNL", "--", "true", folder=own).stdout.split()
    shown = running.culm("job", "show", mine[0])
    assert shown.returncode in {0, 3}
    assert culm("down", folder=own).returncode == 0
    assert {process.name: process.pid for process in running.processes} == before
    assert decoded(running.culm("status", "-o", "json"))["phase"] == "up"


def test_a_process_that_dies_is_started_again_and_counted(running: Cluster) -> None:
    before = running.one("monitor")
    running.wait_back("monitor", running.kill("monitor"))
    after = running.one("monitor")
    assert after.restarts == before.restarts + 1


def test_the_logs_of_a_process_are_shown_and_followed(running: Cluster) -> None:
    shown = running.culm("logs", "us1")
    assert shown.returncode == 0
    assert "serves" in shown.stdout
    unknown = running.culm("logs", "nobody")
    assert (unknown.returncode, "nobody" in unknown.stderr) == (3, True)


def test_a_key_is_rotated_without_a_restart_and_old_tokens_stay_good(running: Cluster) -> None:
    before = {process.name: process.pid for process in running.processes}
    made = running.culm("token", "rotate").stdout.strip()
    assert made in decoded(running.culm("token", "list", "-o", "json"))["keys"]
    issued = running.culm("token", "issue", "user", "new-user", "--vo", "atlas").stdout.strip()
    assert jwt.get_unverified_header(issued)["kid"] == made
    for token in (issued, (running.layout.tokens / "central.user").read_text(encoding="utf-8")):
        request = urllib.request.Request(
            f"{running.layout.router_url}/v1/jobs", headers={"Authorization": f"Bearer {token}"}
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            assert answer.status == 200
    assert {process.name: process.pid for process in running.processes} == before


def test_commands_without_a_cluster_say_so(folder: Path) -> None:
    for words in (("job", "list"), ("site", "list"), ("counts",), ("topology", "show"), ("replay", "/dev/null")):
        told = culm(*words, folder=folder)
        assert told.returncode != 0, words
        assert "Traceback" not in told.stderr, words
        assert "culm up" in told.stderr or "holds no job" in told.stderr, words
