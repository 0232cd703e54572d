"""The pilot as a real process against a router, a shard and a real database: what becomes of its jobs."""

import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from culm.states import Event, State
from culm.wire import AttemptReport, JobView
from tests.cable import cable
from tests.front import front
from tests.node import DEADLINE_S, Node, kill_all_below, running_below
from tests.partition import Partition, job
from tests.waiting import eventually

pytestmark = pytest.mark.integration
ONE = ("--max-jobs", "1")


@pytest.fixture
async def node(shard: Partition, tmp_path: Path) -> AsyncIterator[Node]:
    """A worker node with an empty work directory."""
    async with front(shard) as router, cable(router.url) as way:
        yield Node(shard, router, way, tmp_path / "work", router.token_file())
        kill_all_below(tmp_path)


async def _run(node: Node, **spec: object) -> AttemptReport:
    """Submit a job and run it with one pilot; its only report."""
    [identifier] = await node.shard.submit(job(**({"argv": []} | spec)))
    assert await node.run(*ONE) == 0
    [report] = (await node.shard.job(identifier)).reports
    assert node.folders() == []
    return report


def _code(report: AttemptReport) -> tuple[str, int]:
    assert report.error is not None
    return report.error.plane, report.error.code


def _events(view: JobView) -> list[Event]:
    return [event.event for event in view.history]


# --- ends of payloads


async def test_a_job_is_run_and_its_output_reported(node: Node) -> None:
    report = await _run(node, shell='echo "out $GREETING"; echo err >&2', environment={"GREETING": "hello"})
    assert report.state is State.FINISHED
    assert (report.exit_code, report.error) == (0, None)
    assert (report.stdout_tail, report.stderr_tail) == ("out hello\n", "err\n")
    assert report.usage is not None and report.usage.rss_mb > 0


async def test_a_payload_knows_which_job_it_is(node: Node) -> None:
    [identifier] = await node.shard.submit(job(argv=[], shell='echo "$CULM_JOB_ID $CULM_ATTEMPT"'))
    assert await node.run(*ONE) == 0
    assert (await node.shard.job(identifier)).reports[0].stdout_tail == f"{identifier} 1\n"


async def test_a_failed_job_says_its_exit_code_and_its_last_words(node: Node) -> None:
    report = await _run(node, shell="echo begun; echo broken >&2; exit 7")
    assert (report.state, report.exit_code, _code(report)) == (State.FAILED, 7, ("trans", 7))
    assert (report.stdout_tail, report.stderr_tail) == ("begun\n", "broken\n")


async def test_a_payload_over_its_walltime_is_ended(node: Node) -> None:
    report = await _run(node, shell="echo begun; sleep 600", walltime_s=1)
    assert (report.state, _code(report), report.stdout_tail) == (State.FAILED, ("pilot", 1213), "begun\n")


async def test_a_process_cannot_have_more_memory_than_its_job(node: Node) -> None:
    report = await _run(node, argv=[sys.executable, "-c", "bytearray(500 << 20)"], memory_mb=200)
    assert (report.state, _code(report)) == (State.FAILED, ("trans", 1))
    assert "MemoryError" in report.stderr_tail


async def test_the_processes_of_a_payload_cannot_have_more_memory_together(node: Node) -> None:
    hold = f"{sys.executable} -c 'import time; kept = b\"x\" * (80 << 20); time.sleep(600)' &"
    report = await _run(node, shell=f"{hold} {hold} {hold} wait", memory_mb=180)
    assert (report.state, _code(report)) == (State.FAILED, ("pilot", 1212))


@pytest.mark.parametrize("target", ["big", "/dev/stdout"])
async def test_a_payload_over_its_disk_is_ended(node: Node, target: str) -> None:
    report = await _run(node, shell=f"head -c 30000000 /dev/urandom > {target}; sleep 600", disk_mb=10)
    assert (report.state, _code(report)) == (State.FAILED, ("pilot", 1104))
    assert len(report.stdout_tail) <= 8192


async def test_a_payload_that_cannot_be_run_says_why(node: Node) -> None:
    report = await _run(node, argv=["no-such-program", "x"])
    assert (report.state, _code(report)) == (State.FAILED, ("pilot", 1110))
    assert report.error is not None
    assert report.error.text == "the payload cannot be run: no-such-program: No such file or directory"


async def test_a_promised_output_that_is_missing_fails_the_job(node: Node) -> None:
    report = await _run(node, shell="echo x > a.root; mkdir c.root", outputs=["a.root", "b.root", "c.root"])
    assert (report.state, report.exit_code, _code(report)) == (State.FAILED, 0, ("pilot", 1165))
    assert report.error is not None
    assert report.error.text.endswith("b.root, c.root")


async def test_promised_outputs_that_are_there_finish_it(node: Node) -> None:
    assert (await _run(node, shell="echo x > a.root", outputs=["a.root"])).state is State.FINISHED


async def test_any_bytes_on_stdout_can_be_reported(node: Node) -> None:
    report = await _run(node, shell=r"printf 'a\000b\377\303(c\n'")
    assert report.state is State.FINISHED
    assert report.stdout_tail == "a\x00b\ufffd\ufffd(c\n"


async def test_a_daemon_does_not_outlive_its_job(node: Node) -> None:
    """Out of the group and the session, and orphaned: it is found and ended before the job is reported."""
    daemon = "import os, time\nif os.fork(): os._exit(0)\nos.setsid()\nif os.fork(): os._exit(0)\ntime.sleep(600)"
    [identifier] = await node.shard.submit(job(argv=[], shell=f"{sys.executable} -c '{daemon}'; sleep 0.3; echo done"))
    with node.pilot():
        view = await node.reaches(identifier, State.FINISHED)
        assert running_below(node.work) == []
    assert view.reports[0].stdout_tail == "done\n"


# --- cancelled, lost


async def test_a_cancelled_job_ends_its_payload(node: Node) -> None:
    [identifier] = await node.shard.submit(job(argv=[], shell="trap '' TERM; echo begun; while :; do sleep 0.1; done"))
    with node.pilot():
        await node.reaches(identifier, State.RUNNING)
        await node.shard.cancel(identifier)
        [report] = (await node.reaches(identifier, State.CANCELLED)).reports
        assert running_below(node.work) == []
    assert _code(report) == ("pilot", 1144)
    assert report.stdout_tail == "begun\n"


async def test_a_job_cancelled_on_its_way_is_not_begun(node: Node) -> None:
    [identifier] = await node.shard.submit(job(argv=[], shell="touch begun; cp begun ../../../mark"))
    node.cable.cut = {"heartbeat"}
    with node.pilot():
        await eventually(lambda: node.cable.refused, DEADLINE_S, what="it wants to start")
        await node.shard.cancel(identifier)
        node.cable.cut = set()
        await node.reaches(identifier, State.CANCELLED)
    assert not (node.work.parent / "mark").exists()


async def test_a_payload_whose_lease_is_lost_is_ended(node: Node) -> None:
    [identifier] = await node.shard.submit(job(argv=[], shell="sleep 600"))
    with node.pilot() as pilot:
        await node.reaches(identifier, State.RUNNING)
        await node.shard.sql(f"UPDATE `{node.shard.settings.database.name}`.lease SET token = 'another'")
        await eventually(lambda: "lease_lost" in pilot.said, DEADLINE_S, what="it is told")
        assert running_below(node.work) == []
        # It reports nothing, and goes on.
        [other] = await node.shard.submit(job())
        await node.reaches(other, State.FINISHED)
    assert await node.shard.state(identifier) is State.RUNNING


# --- told to go


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
async def test_a_pilot_told_to_go_gives_its_job_back_at_once(node: Node, number: int) -> None:
    [identifier] = await node.shard.submit(job(argv=[], shell="trap '' TERM; while :; do sleep 0.1; done"))
    with node.pilot() as pilot:
        await node.reaches(identifier, State.RUNNING)
        pilot.process.send_signal(number)
        assert await pilot.ends() == 143
        assert running_below(node.work) == []
    view = await node.shard.job(identifier)
    assert (view.job.state, view.history[-1].event) == (State.ACTIVATED, Event.RELEASE)
    # No attempt is used up.
    table = f"`{node.shard.settings.database.name}`.job"
    assert await node.shard.rows(f"SELECT lost FROM {table} WHERE id = {identifier}") == [(0,)]
    assert node.folders() == []


async def test_a_pilot_told_to_go_while_it_waits_for_work_takes_none(node: Node) -> None:
    with node.pilot("--wait", "60") as pilot:
        await eventually(lambda: node.cable.asked, DEADLINE_S, what="it asks")
        assert await pilot.stopped() == 143
    [identifier] = await node.shard.submit(job())
    assert await node.shard.state(identifier) is State.ACTIVATED
    assert [event.event for event in (await node.shard.job(identifier)).history] == [Event.SUBMIT_READY]
    assert node.folders() == []


async def test_a_job_whose_grant_was_on_its_way_to_a_pilot_told_to_go_is_given_back(node: Node) -> None:
    [identifier] = await node.shard.submit(job())
    node.cable.swallow = {"get_job"}
    with node.pilot() as pilot:
        await eventually(lambda: node.cable.passed, DEADLINE_S, what="the answer is lost")
        node.cable.swallow = set()
        assert await pilot.stopped() == 143
    view = await node.shard.job(identifier)
    assert _events(view) == [Event.SUBMIT_READY, Event.CLAIM, Event.RELEASE]
    assert node.folders() == []


async def test_a_job_given_back_twice_is_given_back_once(node: Node) -> None:
    [identifier] = await node.shard.submit(job(argv=[], shell="sleep 600"))
    with node.pilot() as pilot:
        await node.reaches(identifier, State.RUNNING)
        node.cable.swallow = {"report"}
        pilot.process.send_signal(signal.SIGTERM)
        await eventually(lambda: len(node.cable.requests("report")) >= 2, DEADLINE_S, what="it gives back twice")
        # The next one has it before the first knows that it was heard.
        [grant] = await node.shard.get()
        node.cable.swallow = set()
        assert await pilot.ends() == 143
    view = await node.shard.job(identifier)
    assert (view.job.state, view.job.attempt, grant.attempt) == (State.SENT, 2, 2)
    assert node.folders() == []


async def test_told_to_go_while_it_reports_it_reports_once_more(node: Node) -> None:
    [identifier] = await node.shard.submit(job())
    node.cable.cut = {"report"}
    with node.pilot() as pilot:
        await eventually(lambda: node.cable.refused, DEADLINE_S, what="it tries to report")
        node.cable.cut = set()
        assert await pilot.stopped() == 143
    assert await node.shard.state(identifier) is State.FINISHED
    assert node.folders() == []


# --- lost answers


async def test_a_lost_answer_to_get_job_is_asked_for_again(node: Node) -> None:
    [identifier] = await node.shard.submit(job())
    node.cable.swallow = {"get_job"}
    with node.pilot():
        await eventually(lambda: len(node.cable.passed) >= 2, DEADLINE_S, what="it asks twice")
        node.cable.swallow = set()
        view = await node.reaches(identifier, State.FINISHED)
    asked = node.cable.requests("get_job")
    assert asked[0]["request_id"] == asked[1]["request_id"]
    assert _events(view).count(Event.CLAIM) == 1


async def test_a_lost_answer_of_a_killed_pilot_is_asked_for_by_the_next(node: Node) -> None:
    """The first lease is 10 minutes: without the request id nobody would have the job for so long."""
    [identifier] = await node.shard.submit(job())
    node.cable.swallow = {"get_job"}
    with node.pilot() as first:
        await eventually(lambda: node.cable.passed, DEADLINE_S, what="the answer is lost")
        await first.killed()
    node.cable.swallow = set()
    assert await node.run(*ONE) == 0
    view = await node.shard.job(identifier)
    assert (view.job.state, view.job.attempt) == (State.FINISHED, 1)
    assert node.folders() == []


async def test_a_lost_answer_to_a_report_is_asked_for_again(node: Node) -> None:
    [identifier] = await node.shard.submit(job())
    node.cable.swallow = {"report"}
    with node.pilot(*ONE) as pilot:
        await eventually(lambda: len(node.cable.requests("report")) >= 2, DEADLINE_S, what="it reports twice")
        node.cable.swallow = set()
        assert await pilot.ends() == 0
    view = await node.shard.job(identifier)
    assert (view.job.state, len(view.reports)) == (State.FINISHED, 1)
    assert _events(view).count(Event.FINISH) == 1


# --- killed


async def test_a_job_that_kills_its_pilots_fails_after_its_attempts_and_others_run_on(node: Node) -> None:
    [poison] = await node.shard.submit(job(argv=[], shell="kill -9 $PPID; sleep 600", max_attempts=2))
    [harmless] = await node.shard.submit(job())
    codes = [await node.run(*ONE) for _ in range(2)]
    assert codes == [-9, -9]
    assert await node.run(*ONE) == 0
    view = await node.shard.job(poison)
    assert (view.job.state, view.job.attempt) == (State.FAILED, 2)
    assert [event for event in _events(view) if event in (Event.EXPIRE, Event.LOSE, Event.RELEASE)] == [
        Event.EXPIRE,
        Event.LOSE,
    ]
    assert view.job.error is not None
    assert (view.job.error.plane, view.job.error.code) == ("pilot", 1200)
    assert (await node.shard.job(harmless)).job.state is State.FINISHED
    assert running_below(node.work) == []


async def test_the_next_pilot_ends_what_a_killed_one_left_and_tells_of_the_lost_attempt(node: Node) -> None:
    """A child in the session, and one that left it without our mark being wiped."""
    shell = "test -e ../../../again && exit 0; sleep 600 & setsid sleep 601 & wait"
    [identifier] = await node.shard.submit(job(argv=[], shell=shell))
    with node.pilot() as first:
        await node.reaches(identifier, State.RUNNING)
        await eventually(lambda: len(running_below(node.work)) == 3, DEADLINE_S, what="the payload has its children")
        await first.killed()
        assert len(running_below(node.work)) >= 2
        (node.work.parent / "again").touch()
        assert await node.run(*ONE) == 0
        assert running_below(node.work) == []
    view = await node.shard.job(identifier)
    assert (view.job.state, view.job.attempt) == (State.FINISHED, 2)
    assert Event.EXPIRE in _events(view)
    assert node.folders() == []


async def test_the_next_pilot_reports_what_a_killed_one_had_finished_exactly_once(node: Node) -> None:
    [identifier] = await node.shard.submit(job(argv=[], shell="echo once >> ../../../runs; echo done"))
    node.cable.cut = {"report"}
    with node.pilot() as first:
        await eventually(lambda: node.cable.refused, DEADLINE_S, what="it tries to report")
        await first.killed()
    node.cable.cut = set()
    assert await node.run("--idle-exit", "0.2") == 0
    view = await node.shard.job(identifier)
    assert (view.job.state, view.job.attempt) == (State.FINISHED, 1)
    assert [report.stdout_tail for report in view.reports] == ["done\n"]
    assert (node.work.parent / "runs").read_text(encoding="utf-8") == "once\n"
    assert node.folders() == []


async def test_what_a_killed_pilot_had_reported_already_changes_nothing(node: Node) -> None:
    [identifier] = await node.shard.submit(job())
    node.cable.swallow = {"report"}
    with node.pilot() as first:
        await eventually(lambda: node.cable.requests("report"), DEADLINE_S, what="its report is accepted")
        await first.killed()
    node.cable.swallow = set()
    assert await node.run("--idle-exit", "0.2") == 0
    view = await node.shard.job(identifier)
    assert (view.job.state, len(view.reports)) == (State.FINISHED, 1)
    assert node.folders() == []


async def test_an_outcome_that_nobody_wants_any_more_does_not_hold_up_the_next_pilot(node: Node) -> None:
    [identifier] = await node.shard.submit(job())
    node.cable.cut = {"report"}
    with node.pilot() as first:
        await eventually(lambda: node.cable.refused, DEADLINE_S, what="it tries to report")
        await first.killed()
    node.cable.cut = set()
    await node.shard.sql(f"UPDATE `{node.shard.settings.database.name}`.lease SET token = 'another'")
    [other] = await node.shard.submit(job())
    assert await node.run(*ONE) == 0
    assert await node.shard.state(other) is State.FINISHED
    assert await node.shard.state(identifier) in {State.STARTING, State.RUNNING}
    assert node.folders() == []


async def test_leftovers_that_cannot_be_reported_now_are_kept_and_hold_nobody_up(node: Node) -> None:
    ids = await node.shard.submit(job(), job())
    folders = sorted(f"{identifier}.1" for identifier in ids)
    node.cable.cut = {"report"}
    with node.pilot() as a, node.pilot() as b:
        await eventually(lambda: all(map(node.has_outcome, folders)), DEADLINE_S, what="both payloads have ended")
        await a.killed()
        await b.killed()
    node.token_file.write_text("rubbish", encoding="utf-8")
    node.cable.cut = set()
    assert await node.run() == 5
    assert set(folders) <= set(node.folders())
    node.router.token_file()
    assert await node.run("--idle-exit", "0.1") == 0
    assert [await node.shard.state(identifier) for identifier in ids] == [State.FINISHED, State.FINISHED]
    assert node.folders() == []


async def test_an_outcome_that_no_router_understands_is_reported_without_its_trimmings(node: Node) -> None:
    [identifier] = await node.shard.submit(job())
    node.cable.cut = {"report"}
    with node.pilot() as first:
        await eventually(lambda: node.cable.refused, DEADLINE_S, what="it tries to report")
        await first.killed()
    node.cable.cut = set()
    path = node.work / f"{identifier}.1" / "journal.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    record["outcome"]["of_a_newer_pilot"] = True
    path.write_text(json.dumps(record), encoding="utf-8")
    assert await node.run("--idle-exit", "0.1") == 0
    [report] = (await node.shard.job(identifier)).reports
    assert (report.state, report.exit_code) == (State.FINISHED, 0)
    assert node.folders() == []


async def test_a_live_pilots_folder_is_left_alone(node: Node) -> None:
    [held] = await node.shard.submit(job(argv=[], shell="until test -e ../../../go; do sleep 0.05; done; cat mine"))
    with node.pilot(*ONE) as first:
        await node.reaches(held, State.RUNNING)
        (node.work / f"{held}.1" / "payload" / "mine").write_text("untouched", encoding="utf-8")
        [other] = await node.shard.submit(job())
        assert await node.run(*ONE) == 0
        assert await node.shard.state(other) is State.FINISHED
        assert await node.shard.state(held) is State.RUNNING
        (node.work.parent / "go").touch()
        assert await first.ends() == 0
    view = await node.shard.job(held)
    assert (view.job.state, view.job.attempt) == (State.FINISHED, 1)
    assert view.reports[0].stdout_tail == "untouched"


async def test_many_pilots_share_a_work_directory(node: Node) -> None:
    ids = await node.shard.submit(*[job(argv=[], shell="sleep 0.05") for _ in range(12)])
    with (
        node.pilot("--idle-exit", "1") as a,
        node.pilot("--idle-exit", "1") as b,
        node.pilot("--idle-exit", "1") as c,
    ):
        assert [await pilot.ends() for pilot in (a, b, c)] == [0, 0, 0]
    views = [await node.shard.job(identifier) for identifier in ids]
    assert {(view.job.state, view.job.attempt) for view in views} == {(State.FINISHED, 1)}
    assert node.folders() == []


# --- bad luck


async def test_a_report_that_finds_no_router_is_left_for_the_next_pilot(node: Node) -> None:
    [identifier] = await node.shard.submit(job())
    node.cable.cut = {"report"}
    assert await node.run("--report-patience", "0.5") == 4
    assert node.folders() == [f"{identifier}.1"]
    node.cable.cut = set()
    assert await node.run("--idle-exit", "0.2") == 0
    assert await node.shard.state(identifier) is State.FINISHED


async def test_a_payload_goes_on_while_the_router_is_away(node: Node) -> None:
    [identifier] = await node.shard.submit(job(argv=[], shell="until test -e ../../../go; do sleep 0.05; done"))
    with node.pilot(*ONE) as pilot:
        await node.reaches(identifier, State.RUNNING)
        node.cable.cut = {"heartbeat", "report", "get_job"}
        await eventually(lambda: len(node.cable.refused) >= 3, DEADLINE_S, what="heartbeats are lost")
        (node.work.parent / "go").touch()
        await eventually(lambda: "report" in node.cable.refused, DEADLINE_S, what="the payload ends")
        node.cable.cut = set()
        assert await pilot.ends() == 0
    assert await node.shard.state(identifier) is State.FINISHED


async def test_a_journal_that_cannot_be_written_does_not_cost_the_outcome(node: Node) -> None:
    report = await _run(node, shell="sleep 0.5; mkdir ../journal.json.new")
    assert report.state is State.FINISHED


async def test_a_node_that_cannot_hold_a_job_gives_it_back_and_ends(node: Node) -> None:
    [identifier] = await node.shard.submit(job())
    node.work.mkdir()
    (node.work / f"{identifier}.1").touch()
    assert await node.run() == 6
    assert _events(await node.shard.job(identifier)) == [Event.SUBMIT_READY, Event.CLAIM, Event.RELEASE]


async def test_jobs_granted_beyond_the_one_it_runs_are_given_back_at_once(node: Node) -> None:
    ids = await node.shard.submit(job(argv=[], shell="until test -e ../../../go; do sleep 0.05; done"), job(), job())
    node.cable.n_jobs = 3
    with node.pilot(*ONE) as pilot:
        await node.reaches(ids[0], State.RUNNING)
        for identifier in ids[1:]:
            assert _events(await node.reaches(identifier, State.ACTIVATED))[-2:] == [Event.CLAIM, Event.RELEASE]
        (node.work.parent / "go").touch()
        assert await pilot.ends() == 0
    assert await node.shard.state(ids[0]) is State.FINISHED
    assert node.folders() == []


async def test_a_renewed_token_is_used(node: Node) -> None:
    [identifier] = await node.shard.submit(job(argv=[], shell="until test -e ../../../go; do sleep 0.05; done"))
    good = node.token_file.read_text(encoding="utf-8")
    with node.pilot(*ONE) as pilot:
        await node.reaches(identifier, State.RUNNING)
        node.token_file.write_text("expired", encoding="utf-8")
        await eventually(lambda: "no heartbeat" in pilot.said, DEADLINE_S, what="it is refused")
        node.token_file.write_text(good, encoding="utf-8")
        (node.work.parent / "go").touch()
        assert await pilot.ends() == 0
    assert await node.shard.state(identifier) is State.FINISHED


# --- exit codes


async def test_a_pilot_ends_after_as_many_jobs_as_it_was_told(node: Node) -> None:
    ids = await node.shard.submit(job(), job(), job())
    assert await node.run("--max-jobs", "2") == 0
    assert [await node.shard.state(i) for i in ids] == [State.FINISHED, State.FINISHED, State.ACTIVATED]


async def test_a_pilot_without_work_ends_when_it_was_idle_for_long_enough(node: Node) -> None:
    assert await node.run("--idle-exit", "0.3", "--wait", "0") == 0
    assert await node.run("--idle-exit", "0.3", "--wait", "60") == 0


async def test_a_refused_token_ends_the_pilot(node: Node) -> None:
    node.token_file.write_text("rubbish", encoding="utf-8")
    with node.pilot() as pilot:
        assert await pilot.ends() == 5
        assert "refused" in pilot.said


async def test_an_unknown_computing_queue_ends_the_pilot(node: Node) -> None:
    assert await node.run("--queue", "NOWHERE") == 5


async def test_a_router_that_is_not_there_ends_the_pilot_after_its_patience(node: Node) -> None:
    node.cable.cut = {"get_job"}
    assert await node.run("--patience", "0.3") == 4


async def test_a_work_directory_that_cannot_be_used_ends_the_pilot_before_it_asks(node: Node) -> None:
    node.work.touch()
    assert await node.run() == 6
    assert node.cable.passed == []


@pytest.mark.parametrize("wrong", [("--wait", "61"), ("--server", "localhost:1"), ("--token-file", "/nowhere")])
async def test_wrong_use_has_its_own_code(node: Node, wrong: tuple[str, str]) -> None:
    assert await node.run(*wrong) == 2


async def test_the_pilot_is_no_child_of_the_environment(node: Node) -> None:
    """What the payload sees of the pilot's environment is its PATH, no more."""
    os.environ["CULM_TEST_SECRET"] = "hidden"
    try:
        report = await _run(node, shell="env")
    finally:
        del os.environ["CULM_TEST_SECRET"]
    assert "PATH=" in report.stdout_tail
    assert "hidden" not in report.stdout_tail


async def test_a_pilot_asks_at_least_once_however_little_idleness_it_is_allowed(node: Node) -> None:
    """Clearing up after another one may take longer than that, and may be what made the job ready."""
    [identifier] = await node.shard.submit(job())
    assert await node.run("--idle-exit", "0.000001") == 0
    assert await node.shard.state(identifier) is State.FINISHED
