"""The two front doors: the demo on a fresh folder, and the command line on what it leaves."""

import contextlib
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from tests import servers
from tests.cluster import CULM, ROOT, culm, decoded, processes_of, remove_sockets
from tests.waiting import eventually_sync

pytestmark = pytest.mark.system
CATALOGUE = ROOT.parent / "shared" / "data" / "schedconfig-2009.csv"
LOG = ROOT.parent / "shared" / "data" / "LCG-2005-1.swf.gz"
needs_data = pytest.mark.skipif(
    not LOG.exists(), reason="the real queues and the grid's log are not beside the checkout"
)


def test_the_demo_runs_sixty_jobs_and_leaves_a_clean_cluster(folder: Path) -> None:
    port = servers.free_ports(4)
    try:
        shown = culm("demo", "--port", str(port), folder=folder, timeout_s=180.0, cwd="/")
        assert shown.returncode == 0, shown.stderr
        assert "60 finished" in shown.stdout
        assert f"http://127.0.0.1:{port}" in shown.stdout
        assert len(re.findall(r"^  bin/culm ", shown.stdout, re.MULTILINE)) == 3
        counts = decoded(culm("counts", "-o", "json", folder=folder))
        assert counts["total"] == {"finished": 60}
        assert {region: row["finished"] for region, row in counts["by_region"].items()} == {
            "US": 20, "EU": 20, "CERN": 20,
        }  # fmt: skip
        assert counts["missing_shards"] == []
        # No job was taken back from a pilot that was alive.
        assert {row["attempt"] for row in decoded(culm("job", "list", "-o", "json", folder=folder))["jobs"]} == {1}
        assert decoded(culm("audit", "-o", "json", folder=folder))["findings"] == []
        again = culm("demo", folder=folder, timeout_s=180.0)
        assert again.returncode == 0, again.stderr
        assert decoded(culm("counts", "-o", "json", folder=folder))["total"] == {"finished": 120}
    finally:
        culm("down", folder=folder)
        remove_sockets(folder)
    assert processes_of(folder) == []


def test_ctrl_c_in_the_demo_ends_its_pilots_and_leaves_the_cluster_consistent(folder: Path) -> None:
    port = servers.free_ports(4)
    try:
        shown = subprocess.Popen(
            [CULM, "demo", "--port", str(port)],
            env=os.environ | {"CULM_DIR": str(folder)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
            text=True,
        )
        eventually_sync(lambda: _some_run(folder), 120.0, what="the first jobs run")
        # A terminal sends it to all processes in its foreground: the demo and its pilots.
        os.killpg(shown.pid, signal.SIGINT)
        told = shown.communicate(timeout=60)[1]
        assert shown.returncode not in {0, None}
        assert "Traceback" not in told
        assert [path for path in map(_words, processes_of(folder)) if b"pilot" in path] == []
        assert decoded(culm("status", "-o", "json", folder=folder))["phase"] == "up"
        # What its pilots had has been given back or reported: nothing waits for a lease to run out.
        assert set(decoded(culm("counts", "-o", "json", folder=folder))["total"]) <= {"activated", "finished"}
        assert decoded(culm("audit", "-o", "json", folder=folder))["findings"] == []
        again = culm("demo", folder=folder, timeout_s=180.0)
        assert again.returncode == 0, again.stderr
    finally:
        culm("down", folder=folder)
        remove_sockets(folder)
    assert processes_of(folder) == []


def test_a_cluster_that_is_stopped_in_the_middle_of_the_demo_is_said_clearly(folder: Path) -> None:
    try:
        shown = subprocess.Popen(
            [CULM, "demo", "--port", str(servers.free_ports(2))],
            env=os.environ | {"CULM_DIR": str(folder)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        eventually_sync(lambda: _some_run(folder), 120.0, what="the first jobs run")
        assert culm("down", folder=folder).returncode == 0
        told = shown.communicate(timeout=60)[1]
        assert shown.returncode == 4
        assert "the cluster was stopped in the middle of the demo" in told
        assert "Cannot connect" not in told
        assert "Traceback" not in told
    finally:
        culm("down", folder=folder)
        remove_sockets(folder)
    assert processes_of(folder) == []


def _some_run(folder: Path) -> bool:
    return any((folder / "pilots").glob("*/payload"))


def _words(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


@needs_data
def test_real_queues_and_a_slice_of_a_real_log_go_through(folder: Path) -> None:
    try:
        assert culm("up", "--port", str(servers.free_ports(4)), folder=folder, timeout_s=120.0).returncode == 0
        imported = culm("site", "import", str(CATALOGUE), "--reason", "test", folder=folder)
        assert imported.returncode == 0, imported.stderr
        assert sum(map(int, re.findall(r"(\d+) computing queues", imported.stdout))) == 965
        sites = decoded(culm("site", "list", "-o", "json", folder=folder))
        assert sum(len(site["queues"]) for site in sites.values()) == 965 + 3
        repeated = culm("site", "import", str(CATALOGUE), folder=folder)
        assert "(0 new)" in repeated.stdout
        words = ("replay", str(LOG), "--jobs", "400", "--speed", "200000", "--pilots", "60", "-o", "json")
        report = decoded(culm(*words, folder=folder, timeout_s=180.0))
        assert report["submitted"] == report["finished"] == 400
        assert (report["lost"], report["twice"], report["unfinished"]) == (0, 0, 0)
        assert decoded(culm("audit", "-o", "json", folder=folder))["findings"] == []
    finally:
        culm("down", folder=folder)
        remove_sockets(folder)


def test_the_front_door_works_through_a_link_from_anywhere(folder: Path) -> None:
    folder.mkdir()
    link = folder / "somewhere else"
    link.symlink_to(ROOT / "bin" / "culm")
    done = subprocess.run([str(link), "--version"], cwd="/", env=os.environ, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("culm")
