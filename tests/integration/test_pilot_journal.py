"""The journal on a real disk, with real locks: what is kept, taken over, and left alone."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pilot import journal, processes
from tests.cluster import ROOT
from tests.waiting import eventually_sync

pytestmark = pytest.mark.integration
DEADLINE_S = 20.0
GRANT = {"id": 7, "attempt": 2, "lease_token": "secret", "spec": {"argv": ["true"]}}
_LIBC = ctypes.CDLL(None)
_PR_CAPBSET_DROP = 24
_READ_EVERYTHING = (1, 2)
"""CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""
OUTCOME = {"state": "finished", "exit_code": 0}


class Pilots:
    """What the live pilots of a test hold in its work directory."""

    def __init__(self, work: Path) -> None:
        self._work = work
        self._held: list[journal.Entry] = []

    def begin(self) -> journal.Entry:
        """One is granted the job."""
        return self._hold(journal.begin(self._work, GRANT))

    def question(self, queue: str) -> journal.Entry:
        """One is about to ask."""
        return self._hold(journal.question(self._work, queue))

    def _hold(self, entry: journal.Entry) -> journal.Entry:
        self._held.append(entry)
        return entry

    def end(self) -> None:
        """All locks are let go."""
        for entry in self._held:
            entry.leave()


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """An empty work directory."""
    path = tmp_path / "work"
    path.mkdir()
    return path


@pytest.fixture
def pilots(work: Path) -> Iterator[Pilots]:
    """Live pilots, as many as a test likes."""
    live = Pilots(work)
    yield live
    live.end()


def _died(entry: journal.Entry) -> None:
    """Its pilot is gone, its folder is not."""
    entry.leave()


def _records(work: Path) -> list[dict[str, Any]]:
    found = []
    for entry in journal.left_behind(work):
        found.append(entry.record)
        entry.leave()
    return found


def _give_up_roots_rights() -> None:
    for right in _READ_EVERYTHING:
        _LIBC.prctl(_PR_CAPBSET_DROP, right, 0, 0, 0)


def _names(work: Path) -> list[str]:
    return sorted(path.name for path in work.iterdir() if path.name != journal.GATE)


def test_what_is_noted_is_found_by_the_next_pilot(pilots: Pilots, work: Path) -> None:
    entry = pilots.begin()
    entry.note(pid=1, started=0)
    entry.note(outcome=OUTCOME)
    _died(entry)
    [record] = _records(work)
    assert record == {"id": 7, "attempt": 2, "lease_token": "secret", "pid": 1, "started": 0, "outcome": OUTCOME}


def test_the_spec_is_not_kept(pilots: Pilots) -> None:
    """It may be large, and hold what its owner would not leave lying on a worker node."""
    entry = pilots.begin()
    assert "spec" not in json.loads((entry.folder / journal.JOURNAL).read_text(encoding="utf-8"))


def test_only_their_owner_can_read_the_folders(pilots: Pilots) -> None:
    assert {path.stat().st_mode & 0o777 for path in (pilots.begin().folder, pilots.question("q").folder)} == {0o700}


def test_a_live_pilots_folder_is_not_taken_over(pilots: Pilots, work: Path) -> None:
    entry = pilots.begin()
    assert _records(work) == []
    with pytest.raises(BlockingIOError, match="another pilot"):
        pilots.begin()
    assert entry.payload.is_dir()


def test_the_lock_dies_with_its_process(work: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom pilot import journal\n"
        f"entry = journal.begin(Path(sys.argv[1]), {GRANT!r})\nprint('held', flush=True)\nsys.stdin.read()"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(work)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        assert _records(work) == []
        holder.kill()
        holder.wait()
        assert [record["id"] for record in _records(work)] == [7]
    finally:
        holder.kill()
        holder.communicate()


def test_a_payload_does_not_inherit_the_lock(pilots: Pilots, work: Path) -> None:
    """Else its orphans would keep the next pilot from what their pilot left."""
    entry = pilots.begin()
    orphan = subprocess.Popen(["sleep", "600"])
    try:
        _died(entry)
        assert [record["id"] for record in _records(work)] == [7]
    finally:
        orphan.kill()
        orphan.wait()


def test_a_granted_job_begins_with_an_empty_directory(pilots: Pilots) -> None:
    entry = pilots.begin()
    (entry.payload / "old").touch()
    (entry.folder / "stdout").write_text("old", encoding="utf-8")
    _died(entry)
    again = pilots.begin()
    assert list(again.payload.iterdir()) == []
    assert not (again.folder / "stdout").exists()


def test_closing_leaves_nothing_however_the_payload_left_it(pilots: Pilots, work: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir(mode=0o500)
    entry = pilots.begin()
    deep = entry.payload / "a" / "b"
    deep.mkdir(parents=True)
    (deep / "file").touch()
    (entry.payload / "link").symlink_to(outside)
    (entry.folder / "beside").symlink_to(outside)
    deep.chmod(0)
    (entry.payload / "a").chmod(0o500)
    entry.close()
    assert _names(work) == []
    assert outside.stat().st_mode & 0o777 == 0o500


def test_what_its_payload_forbade_is_removed_without_the_rights_of_root(work: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom pilot import journal\n"
        f"entry = journal.begin(Path(sys.argv[1]), {GRANT!r})\n"
        "forbidden = entry.payload / 'a'; forbidden.mkdir(); (forbidden / 'f').touch(); forbidden.chmod(0)\n"
        "try: list(forbidden.iterdir())\n"
        "except PermissionError: entry.close()\n"
        "else: sys.exit('nothing was forbidden')"
    )
    # Dropped from the bounding set, they are not had again after exec; an ordinary user has none to drop.
    subprocess.run(
        [sys.executable, "-c", code, str(work)],
        check=True,
        timeout=DEADLINE_S,
        preexec_fn=_give_up_roots_rights,
    )
    assert _names(work) == []


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", "{}", '{"id": 7}'])
def test_a_journal_that_says_nothing_is_cleared_away(pilots: Pilots, work: Path, content: str) -> None:
    entry = pilots.begin()
    (entry.folder / journal.JOURNAL).write_text(content, encoding="utf-8")
    _died(entry)
    assert _records(work) == []
    assert _names(work) == []


def test_a_journal_that_could_not_be_replaced_is_the_one_before(pilots: Pilots, work: Path) -> None:
    entry = pilots.begin()
    (entry.folder / (journal.JOURNAL + ".new")).mkdir()
    with pytest.raises(OSError, match="directory"):
        entry.note(outcome=OUTCOME)
    _died(entry)
    [record] = _records(work)
    assert "outcome" not in record


def test_what_was_killed_while_it_was_made_or_removed_is_cleared_away(pilots: Pilots, work: Path) -> None:
    (work / "7.2").mkdir()
    (work / "8.1").mkdir()
    (work / "8.1" / journal.LOCK).touch()
    (work / "ask.0badcafe").mkdir()
    assert _records(work) == []
    _died(pilots.question("q"))
    assert [name for name in _names(work) if not name.startswith("ask.")] == []
    assert not (work / "ask.0badcafe").exists()


def test_what_is_not_ours_is_left_alone(work: Path) -> None:
    for name in ("notes", "7.2.old", "x7.2"):
        (work / name).mkdir()
        (work / name / journal.LOCK).touch()
    (work / "9.1").write_text("a file", encoding="utf-8")
    assert _records(work) == []
    assert _names(work) == ["7.2.old", "9.1", "notes", "x7.2"]


def test_no_work_directory_means_that_nothing_is_left(tmp_path: Path) -> None:
    assert _records(tmp_path / "nowhere") == []


def test_the_processes_of_what_is_left_are_ended_before_it_is_told(pilots: Pilots, work: Path) -> None:
    entry = pilots.begin()
    left = subprocess.Popen(["sleep", "600"], env=os.environ | {processes.MARK: str(entry.folder)})
    try:
        _died(entry)
        assert len(_records(work)) == 1
        assert left.wait(DEADLINE_S) == -9
    finally:
        left.kill()
        left.wait()


# --- questions


def test_a_question_is_on_disk_before_it_is_asked(pilots: Pilots) -> None:
    entry = pilots.question("q")
    record = json.loads((entry.folder / journal.JOURNAL).read_text(encoding="utf-8"))
    assert record == {"request_id": entry.record["request_id"], "queue": "q"}
    assert len(entry.record["request_id"]) >= 8


def test_a_dead_pilots_question_is_asked_again_by_one_for_the_same_queue(pilots: Pilots) -> None:
    asked = pilots.question("q")
    assert pilots.question("q").record != asked.record
    _died(asked)
    assert pilots.question("another").record["request_id"] != asked.record["request_id"]
    again = pilots.question("q")
    assert again.record == asked.record
    assert pilots.question("q").record != asked.record


def test_an_answered_question_is_gone(pilots: Pilots, work: Path) -> None:
    pilots.question("q").close()
    assert _names(work) == []


def test_a_question_of_long_ago_is_cleared_away(pilots: Pilots, work: Path) -> None:
    old, young = pilots.question("other"), pilots.question("other")
    long_ago = time.time() - journal.QUESTION_S - 1
    os.utime(old.folder / journal.JOURNAL, (long_ago, long_ago))
    _died(old)
    _died(young)
    mine = pilots.question("q")
    assert _names(work) == sorted([young.folder.name, mine.folder.name])


def test_a_question_without_a_record_is_cleared_away(pilots: Pilots, work: Path) -> None:
    broken = pilots.question("q")
    (broken.folder / journal.JOURNAL).write_text("{", encoding="utf-8")
    _died(broken)
    mine = pilots.question("q")
    assert _names(work) == [mine.folder.name]


# --- many pilots at once


def test_pilots_that_come_and_go_at_once_never_take_a_live_ones_folder(work: Path) -> None:
    """Half of them make folders and hold them for a moment, half clear up as fast as they can."""
    maker = (
        "import sys\nfrom pathlib import Path\nfrom pilot import journal\n"
        "work, number = Path(sys.argv[1]), int(sys.argv[2])\n"
        "for attempt in range(1, 151):\n"
        "    entry = journal.begin(work, {'id': number, 'attempt': attempt, 'lease_token': 't'})\n"
        "    entry.note(outcome=1)\n"
        "    assert entry.payload.is_dir() and (entry.folder / journal.JOURNAL).exists()\n"
        "    entry.close()\n"
    )
    clearer = (
        "import sys\nfrom pathlib import Path\nfrom pilot import journal\n"
        "while not Path(sys.argv[2]).exists():\n"
        "    for entry in journal.left_behind(Path(sys.argv[1])):\n"
        "        sys.exit(f'took {entry.folder}')\n"
    )
    done = work.parent / "done"
    clearers = [subprocess.Popen([sys.executable, "-c", clearer, str(work), str(done)]) for _ in range(2)]
    makers = [subprocess.Popen([sys.executable, "-c", maker, str(work), str(number)]) for number in (1, 2)]
    try:
        eventually_sync(lambda: all(process.poll() is not None for process in makers), 60.0, what="they have ended")
        done.touch()
        assert [process.wait(DEADLINE_S) for process in [*makers, *clearers]] == [0, 0, 0, 0]
    finally:
        for process in [*makers, *clearers]:
            process.kill()
            process.wait()
    assert _names(work) == []


def test_a_holder_of_the_gate_that_is_stopped_is_named_and_waited_for_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import sys, time; from pathlib import Path; from pilot import journal\n"
    code += "with journal._gate(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)}) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"held\n"
            holder.send_signal(signal.SIGSTOP)
            monkeypatch.setattr(journal, "GATE_S", 0.2)
            with pytest.raises(TimeoutError, match=f"process {holder.pid}, which may be stopped"):
                journal.question(tmp_path, "q")
        finally:
            holder.kill()
    # The kernel gives the lock of a dead one back.
    journal.question(tmp_path, "q").close()
