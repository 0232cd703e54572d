"""The Standard Workload Format: the real log's first jobs, and lines that are not of it."""

import gzip
import itertools
from pathlib import Path

import pytest

from culm.errors import ClientFault
from loadtest.workload_log import LoggedJob, read, region_of

REAL = Path(__file__).parents[3] / "shared" / "data" / "LCG-2005-1.swf.gz"
needs_data = pytest.mark.skipif(not REAL.exists(), reason="the real log is not beside the checkout")
HEAD = ("; Version: 2.2", "; Partition: 1 lxgate13.cern.ch", ";    Partition: 7 pnpi.nw.ru (remark)")


def _line(job: int, at: str = "0", run: str = "10", user: int = 3, group: int = 4, site: int = 7) -> str:
    return f"{job} {at} -1 {run} 1 -1 -1 1 -1 -1 1 {user} {group} -1 -1 {site} -1 -1"


def _write(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "log.swf"
    path.write_text("\n".join(lines) + "\n", encoding="latin-1")
    return path


def test_a_line_becomes_a_job(tmp_path: Path) -> None:
    assert read(_write(tmp_path, *HEAD, _line(1, at="100", run="60")), 10) == [
        LoggedJob(at_s=0.0, run_s=60.0, user="user-3", group="group-4", site="pnpi.nw.ru")
    ]


def test_times_count_from_the_first_and_jobs_come_in_their_order(tmp_path: Path) -> None:
    path = _write(tmp_path, *HEAD, _line(1, at="50"), _line(2, at="20"), "", _line(3, at="90"))
    assert [job.at_s for job in read(path, 10)] == [0.0, 30.0, 70.0]


def test_only_so_many_are_read(tmp_path: Path) -> None:
    path = _write(tmp_path, *HEAD, *(_line(n, at=str(n)) for n in range(9)), "this is never looked at")
    assert len(read(path, 9)) == 9


def test_an_unknown_run_time_is_none_at_all(tmp_path: Path) -> None:
    assert read(_write(tmp_path, *HEAD, _line(1, run="-1")), 1)[0].run_s == 0.0


def test_a_site_without_a_name_has_its_number(tmp_path: Path) -> None:
    assert read(_write(tmp_path, *HEAD, _line(1, site=99)), 1)[0].site == "site-99"


@pytest.mark.parametrize(
    ("line", "message"),
    [("1 2 3", "line 4 has 3 fields"), (_line(1, at="soon"), "line 4: 'soon'"), (_line(1, run="x"), "line 4")],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(ClientFault) as told:
        read(_write(tmp_path, *HEAD, line), 10)
    assert (told.value.code, message in told.value.message) == ("bad_log", True)


def test_a_log_without_jobs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ClientFault, match="holds no job"):
        read(_write(tmp_path, *HEAD), 10)


def test_a_file_that_is_cut_off_or_no_archive_is_refused(tmp_path: Path) -> None:
    whole = gzip.compress("\n".join((*HEAD, *(_line(n) for n in range(5000)))).encode())
    for name, data in (("cut.swf.gz", whole[: len(whole) // 2]), ("none.swf.gz", b"rubbish")):
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(ClientFault, match="bad_log"):
            read(path, 5000)


@pytest.mark.parametrize(
    ("site", "region"),
    [
        ("lxgate13.cern.ch", "CERN"),
        ("cscs.ch", "Switzerland"),
        ("pnpi.nw.ru", "Russia"),
        ("cmslcgce.fnal.gov", "US"),
        ("rl.ac.uk", "UK"),
        ("somewhere.example", "International"),
        ("site-12", "International"),
    ],
)
def test_a_sites_region_follows_its_domain(site: str, region: str) -> None:
    assert region_of(site) == region


@needs_data
def test_the_first_5000_jobs_of_the_real_log() -> None:
    jobs = read(REAL, 5000)
    assert len(jobs) == 5000
    assert jobs[0].at_s == 0.0
    assert all(a.at_s <= b.at_s for a, b in itertools.pairwise(jobs))
    assert len({job.site for job in jobs}) > 100
    assert not [job.site for job in jobs if job.site.startswith("site-")]
    assert "CERN" in {region_of(job.site) for job in jobs}
