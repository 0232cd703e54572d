"""`culm vo` and what a submit is told: time-outs, defaults and warnings, on a running cluster."""

import pytest

from tests.cluster import Cluster, decoded
from tests.waiting import eventually_sync

pytestmark = pytest.mark.system
DEADLINE_S = 20.0


def test_a_policy_is_set_shown_obeyed_and_taken_back(running: Cluster) -> None:
    assert running.culm("vo", "show", "demo").returncode == 3
    said = running.culm("vo", "set", "demo", "default_memory_mb=1234", "heartbeat_s=0.5", "--reason", "a test")
    assert said.returncode == 0, said.stderr
    try:
        assert decoded(running.culm("vo", "list", "-o", "json"))["central"] == {
            "demo": {"default_memory_mb": 1234, "heartbeat_s": 0.5}
        }
        told = running.culm("vo", "show", "demo").stdout
        assert "1234" in told
        assert "holding_s" in told
        assert decoded(running.culm("vo", "show", "demo", "-o", "json"))["central"]["holding_s"] == 0
        assert "a test" in running.culm("topology", "history").stdout
        late = running.culm("vo", "set", "demo", "heartbeat_s=9", "--epoch", "1")
        assert "epoch_changed" in late.stderr

        def obeyed() -> bool:
            job = running.culm("job", "submit", "--site", "BNL", "--", "true").stdout.strip()
            spec = decoded(running.culm("job", "show", job, "-o", "json"))["spec"]
            running.culm("job", "kill", job)
            return bool(spec.get("memory_mb") == 1234)

        eventually_sync(obeyed, DEADLINE_S, what="a submit gets the VO's default")
    finally:
        assert running.culm("vo", "set", "demo", "default_memory_mb=0", "heartbeat_s=0").returncode == 0
    assert decoded(running.culm("vo", "list", "-o", "json"))["central"] == {}


def test_a_known_site_added_again_keeps_what_its_computing_queue_was(running: Cluster) -> None:
    def queue() -> dict[str, object]:
        shown: dict[str, object] = decoded(running.culm("site", "show", "DESY", "-o", "json"))["queues"]["DESY-q"]
        return shown

    assert running.culm("site", "set", "DESY-q", "heartbeat_s=1800", "default_memory_mb=2000").returncode == 0
    eventually_sync(lambda: queue()["heartbeat_s"] == 1800, DEADLINE_S, what="it is shown")
    before = queue()
    try:
        for words, changed in ((), {}), (("cores=16",), {"cores": 16}), (("cores=8",), {}):
            done = running.culm("site", "add", "DESY", "--region", "EU", *words)
            assert done.returncode == 0, done.stderr
            eventually_sync(lambda: queue() == before | changed, DEADLINE_S, what=f"what {words} leaves")  # noqa: B023
    finally:
        assert running.culm("site", "set", "DESY-q", "heartbeat_s=0", "default_memory_mb=0").returncode == 0


def test_a_submit_that_nobody_can_run_prints_its_ids_and_beside_them_why(running: Cluster) -> None:
    done = running.culm("job", "submit", "--site", "BNL", "--cores", "4096", "--count", "3", "--", "true")
    ids = done.stdout.split()
    running.culm("job", "kill", *ids)
    assert (done.returncode, len(ids)) == (0, 3)
    assert f"warning: nobody can run job {ids[0]} and 2 more like it as things are: too_few_cores" in done.stderr
