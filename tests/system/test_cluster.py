"""up, down, status, logs: exactly what was started is ended, a killed one blocks nothing, two do not meet."""

import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import jwt
import pytest

from culm.errors import CulmError
from ops.cluster import control
from ops.cluster.layout import Layout
from tests import servers
from tests.cluster import CULM, Cluster, cluster, culm, decoded, processes_of
from tests.waiting import eventually_sync

pytestmark = pytest.mark.system
DEADLINE_S = 60.0
PROCESSES = {
    *("us1-db", "us1-valkey", "us1", "eu1-db", "eu1-valkey", "eu1", "cern1-db", "cern1-valkey", "cern1"),
    *("router", "monitor", "CERN-router", "CERN-monitor"),
}


def _phase(folder: Path) -> str:
    told = control.status(folder)
    return told.phase if told is not None else ""


def _begun(*words: str, folder: Path, **environment: str) -> "subprocess.Popen[str]":
    """A command that is not waited for."""
    return subprocess.Popen(
        [CULM, *words],
        env=os.environ | {"CULM_DIR": str(folder)} | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextlib.contextmanager
def _held_templates(cache: Path) -> Iterator[None]:
    """A supervisor with this cache waits, as it does while another cluster of this user makes the template."""
    templates = cache / "culm" / "templates"
    templates.mkdir(parents=True)
    with (templates / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _up(folder: Path, port: int) -> "subprocess.CompletedProcess[str]":
    return culm("up", "--port", str(port), folder=folder, timeout_s=120.0)


def test_up_and_down_and_up_again_keep_the_data(own: Path) -> None:
    port = servers.free_ports(4)
    assert _up(own, port).returncode == 0
    status = decoded(culm("status", "-o", "json", folder=own))
    parts = status["authorities"]
    assert {name: (part["phase"], part["port"]) for name, part in parts.items()} == {
        "central": ("up", port),
        "CERN": ("up", port + 2),
    }
    assert {process["name"] for process in status["processes"]} == PROCESSES
    assert {process["state"] for process in status["processes"]} == {"up"}
    urls = (parts["CERN"]["router"], parts["CERN"]["monitor"])
    assert (status["phase"], urls) == ("up", (f"http://127.0.0.1:{port + 2}", f"http://127.0.0.1:{port + 3}"))
    ages_s = [*(part["age_s"] for part in parts.values()), *(process["for_s"] for process in status["processes"])]
    assert all(0.0 <= age_s < DEADLINE_S for age_s in ages_s), ages_s
    shown = culm("status", folder=own).stdout
    assert f"router http://127.0.0.1:{port}, monitor http://127.0.0.1:{port + 1}" in shown
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


def test_an_up_during_a_down_waits_for_its_end_and_starts_anew(own: Path) -> None:
    port = servers.free_ports(4)
    assert _up(own, port).returncode == 0
    before = control.status(own)
    assert before is not None
    [database] = [process.pid for process in before.processes if process.name == "us1-db"]
    # The end cannot come before this one goes on.
    os.kill(database, signal.SIGSTOP)
    try:
        leaving = _begun("down", folder=own)
        eventually_sync(lambda: _phase(own) == "stopping", DEADLINE_S, what="it is told that it is stopping")
        coming = _begun("up", "--port", str(port), folder=own)
    finally:
        os.kill(database, signal.SIGCONT)
    leaving.communicate(timeout=DEADLINE_S)
    assert leaving.returncode == 0
    told = coming.communicate(timeout=120)[1]
    assert coming.returncode == 0, told
    after = control.status(own)
    assert after is not None
    assert (after.phase, after.pid == before.pid) == ("up", False)
    assert culm("down", folder=own).returncode == 0


def test_ctrl_c_in_up_ends_what_it_has_begun(own: Path) -> None:
    starting = _begun("up", "--port", str(servers.free_ports(4)), folder=own)
    eventually_sync(lambda: _phase(own) == "starting", DEADLINE_S, what="it has begun")
    starting.send_signal(signal.SIGINT)
    told = starting.communicate(timeout=DEADLINE_S)[1]
    assert starting.returncode == 130
    assert "what had been begun is ended" in told
    assert "Traceback" not in told
    assert processes_of(own) == []


def test_ctrl_c_in_an_up_that_waits_for_another_one_leaves_that_alone(own: Path, tmp_path: Path) -> None:
    words = ("up", "--port", str(servers.free_ports(4)))
    with _held_templates(tmp_path):
        first = _begun(*words, folder=own, XDG_CACHE_HOME=str(tmp_path))
        eventually_sync(lambda: _phase(own) == "starting", DEADLINE_S, what="the first has begun")
        known = control.status(own)
        assert known is not None

        def interrupted(_progress: str) -> None:
            raise KeyboardInterrupt

        with pytest.raises(CulmError, match="goes on: culm down"):
            control.up([Layout(own, known.port)], interrupted)
        assert _phase(own) == "starting"
        assert culm("down", folder=own).returncode == 0
        first.communicate(timeout=DEADLINE_S)


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
    with _held_templates(tmp_path):
        words = ("up", "--port", str(servers.free_ports(4)))
        starting = _begun(*words, folder=own, XDG_CACHE_HOME=str(tmp_path))
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
    # A reader that has seen enough is no error to tell.
    environment = os.environ | {"CULM_DIR": str(running.layout.folder)}
    cut = subprocess.run(
        ["sh", "-c", '"$0" logs | head -n 1', str(CULM)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert cut.stderr == ""
    unknown = running.culm("logs", "nobody")
    assert (unknown.returncode, "nobody" in unknown.stderr) == (3, True)


def test_the_doctor_finds_a_running_cluster_well(running: Cluster) -> None:
    told = decoded(running.culm("doctor", "-o", "json"))
    levels = {check["name"]: check["level"] for check in told["checks"]}
    # How fast this disk is, and how full, is not the cluster's doing.
    del levels["fdatasync"], levels["disk space"]
    assert (told["ok"], set(levels.values())) == (True, {"ok"})
    assert {f"database of {shard}" for shard in ("us1", "eu1", "cern1")} <= levels.keys()
    texts = [check["text"] for check in told["checks"]]
    assert {f"held by this cluster's {name}" for name in ("router", "monitor", "CERN-router", "CERN-monitor")} <= set(
        texts
    )
    assert texts.count("innodb_flush_log_at_trx_commit=1") == 3
    assert "what to do" in running.culm("doctor").stdout


def test_the_doctor_names_a_process_that_does_not_come_up(running: Cluster) -> None:
    config = running.layout.configs / "monitor.toml"
    good = config.read_text(encoding="utf-8")
    config.write_text("nonsense = 1", encoding="utf-8")
    try:
        n_before = running.one("monitor").restarts
        killed = running.kill("monitor")
        # Once for the kill, once for the settings.
        eventually_sync(lambda: running.one("monitor").restarts >= n_before + 2, DEADLINE_S)
        done = running.culm("doctor", "-o", "json")
        assert done.returncode == 1
        bad = [check for check in json.loads(done.stdout)["checks"] if check["level"] == "bad"]
        assert [check["name"] for check in bad] == [f"port {running.layout.port + 1}", "processes of central"]
        assert re.fullmatch(r"monitor is (starting|restarting \(ended with \d\)), \d+ restarts", bad[1]["text"])
        assert "culm logs" in bad[1]["advice"]
    finally:
        config.write_text(good, encoding="utf-8")
        running.wait_back("monitor", killed)


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
