"""`culm db`: what an operator does with the archive of a running cluster."""

import gzip
import json
from pathlib import Path

import pytest

from tests.cluster import Cluster, decoded

pytestmark = pytest.mark.system


def test_what_ended_is_moved_listed_exported_and_the_audit_is_clean(running: Cluster, tmp_path: Path) -> None:
    ids = running.culm("job", "submit", "--site", "BNL", "--count", "5", "--", "true").stdout.split()
    done = running.culm("pilot", "run", "--queue", "BNL-q", "--max-jobs", "5", "--idle-exit", "20")
    assert done.returncode == 0, done.stderr
    moved = decoded(running.culm("db", "archive", "--older", "0s", "-o", "json"))
    assert moved["n_moved"] >= 5
    assert moved["missing_shards"] == []
    for job in ids:
        assert decoded(running.culm("job", "show", job, "-o", "json"))["job"]["state"] == "finished"
    listed = decoded(running.culm("job", "list", "--limit", "1000", "-o", "json"))
    assert set(map(int, ids)) <= {row["id"] for row in listed["jobs"]}
    parts = decoded(running.culm("db", "partitions", "-o", "json"))["shards"]
    assert {one["shard"] for one in parts} == {"us1", "eu1"}
    present = next(
        part["name"] for one in parts if one["shard"] == "us1" for part in one["partitions"] if part["n_jobs"]
    )
    n_jobs = sum(p["n_jobs"] for one in parts for p in one["partitions"] if p["name"] == present)
    file = tmp_path / "month.jsonl.gz"
    told = running.culm("db", "export", present, "--to", str(file))
    assert told.returncode == 0, told.stderr
    with gzip.open(file, "rt") as lines:
        exported = [json.loads(line) for line in lines]
    assert len(exported) == n_jobs
    ours = {line["job"]["job"]["id"]: line for line in exported if line["job"]["job"]["id"] in set(map(int, ids))}
    assert len(ours) == 5
    for line in ours.values():
        assert line["shard"] == "us1"
        assert line["job"]["history"][-1]["event"] == "finish"
        assert line["job"]["reports"]
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    for words, code in (
        (("db", "export", present, "--to", str(file)), 2),
        (("db", "export", "p190001", "--to", str(tmp_path / "other")), 3),
        (("db", "drop", present), 2),
        (("db", "drop", present, "--yes"), 2),
        (("db", "drop", present, "--yes", "--shard", "us1"), 2),
        (("db", "drop", "p190001", "--yes", "--shard", "us1"), 3),
        (("db", "archive", "--older", "soon"), 2),
    ):
        refused = running.culm(*words)
        assert refused.returncode == code, (words, refused.stderr)
    assert decoded(running.culm("counts", "-o", "json"))["archived"]["finished"] >= 5
    assert running.audit() == []
