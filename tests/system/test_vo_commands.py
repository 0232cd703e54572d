"""`culm vo` and what a submit is told: time-outs, defaults and warnings, on a running cluster."""

import pytest

from tests.cluster import Cluster, decoded
from tests.waiting import eventually_sync

pytestmark = pytest.mark.system
DEADLINE_S = 20.0


def test_a_policy_is_set_shown_obeyed_and_taken_back(running: Cluster) -> None:
    assert running.culm("vo", "show", "demo").returncode == 3
    said = running.culm("vo", "set", "demo", "default_memory_mb=1234", "heartbeat_s=600.5", "--reason", "a test")
    assert said.returncode == 0, said.stderr
    try:
        assert decoded(running.culm("vo", "list", "-o", "json"))["central"] == {
            "demo": {"default_memory_mb": 1234, "heartbeat_s": 600.5}
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


def test_a_submit_that_nobody_can_run_prints_its_ids_and_beside_them_why(running: Cluster) -> None:
    done = running.culm("job", "submit", "--site", "BNL", "--cores", "4096", "--count", "3", "--", "true")
    ids = done.stdout.split()
    running.culm("job", "kill", *ids)
    assert (done.returncode, len(ids)) == (0, 3)
    jobset, warning, reason = done.stderr.splitlines()
    assert jobset.startswith("jobset ")
    assert warning == f"warning: nobody can run job {ids[0]} and 2 more like it as things are:"
    assert reason.startswith("  too_few_cores: ")
