"""The pilot's loop and its command line."""

import argparse
import os
import random
import secrets
import signal
import socket
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from pilot import __version__, journal, runner
from pilot.client import RefusedError, Router, UnreachableError

POLL_S = 0.05
REPORT_PATIENCE_S = 3600.0
RELEASE_PATIENCE_S = 5.0
GET_PATIENCE_S = 60.0
HEARTBEAT_PATIENCE_S = 1.0
EMPTY_PAUSE_S = 2.0

DONE, REFUSED, UNREACHABLE, STOPPED = 0, 5, 4, 143
EPILOG = (
    "Exit codes: 0 idle for --idle-exit or --max-jobs done; 2 wrong use; 4 the router did not answer; 5 it refused "
    "(the message says why); 143 stopped by SIGTERM, the job was given back."
)


class _StoppedError(Exception):
    """SIGTERM or SIGINT."""


class Pilot:
    """One pilot: one job at a time."""

    def __init__(self, options: argparse.Namespace, router: Router) -> None:
        self._options = options
        self._router = router
        self._work: Path = options.work_dir
        self._stopped = False

    def stop(self, _number: int, _frame: "FrameType | None") -> None:
        """A signal's handler: the loop sees it at its next turn."""
        self._stopped = True
        raise _StoppedError

    def run(self) -> int:
        """Pull and run until told, or idle for long enough; an exit code."""
        try:
            self._clear_up()
            return self._loop()
        except _StoppedError:
            return STOPPED
        except RefusedError as error:
            _say(f"refused: {error}")
            return REFUSED
        except UnreachableError as error:
            _say(f"the router does not answer: {error}")
            return UNREACHABLE

    def _loop(self) -> int:
        n_jobs, idle_since = 0, time.monotonic()
        while not self._options.max_jobs or n_jobs < self._options.max_jobs:
            grants = self._get()
            for grant in grants:
                self._do(grant)
                n_jobs += 1
            if grants:
                idle_since = time.monotonic()
            elif self._options.idle_exit and time.monotonic() - idle_since > self._options.idle_exit:
                break
            elif not self._options.wait:
                time.sleep(EMPTY_PAUSE_S * random.uniform(0.5, 1.5))  # noqa: S311  # spreads load, no secret
        return DONE

    def _get(self) -> list[dict[str, Any]]:
        me = {"id": self._options.name, "host": socket.gethostname()[:128], "version": __version__}
        request = {"request_id": secrets.token_hex(12), "queue": self._options.queue, "pilot": me}
        if self._options.wait:
            request["wait_s"] = self._options.wait
        answer = self._router.call("get_job", request, GET_PATIENCE_S, self._options.wait)
        return list(answer["jobs"])

    def _do(self, grant: dict[str, Any]) -> None:
        entry = journal.begin(self._work, grant)
        payload = None
        try:
            self._beat(entry, "starting")
            payload = runner.start(grant["spec"], entry.payload)
            entry.note(pid=payload.process.pid, started=journal.start_time(payload.process.pid))
            outcome = self._watch(entry, payload, grant)
        except _StoppedError:
            self._give_back(entry, payload)
            raise
        except OSError as error:
            failed = {"plane": "pilot", "code": runner.FAILED_TO_START, "text": str(error)[:1000]}
            outcome = {"state": "failed", "error": failed}
        except RefusedError as error:
            _say(f"job {grant['id']}: {error}")
            outcome = None
        if outcome is None:
            if payload is not None:
                payload.end()
            entry.close()
            return
        entry.note(outcome=outcome)
        self._report(entry, outcome, REPORT_PATIENCE_S)
        entry.close()

    def _watch(self, entry: journal.Entry, payload: runner.Payload, grant: dict[str, Any]) -> "dict[str, Any] | None":
        """Until the payload ends; None if the lease is not ours any more."""
        interval_s = self._options.heartbeat or max(1.0, float(grant["heartbeat_s"]) / 3)
        next_beat = 0.0
        cancelled = False
        while True:
            code = payload.poll()
            if code is not None:
                payload.end()
                outcome = payload.outcome(code)
                return outcome | ({"state": "cancelled"} if cancelled else {})
            if time.monotonic() >= next_beat:
                next_beat = time.monotonic() + interval_s
                try:
                    if self._beat(entry, "running", payload.usage()) == "cancel":
                        cancelled = True
                        payload.end("cancelled")
                except UnreachableError:
                    # The payload goes on: the router may be back before the lease ends.
                    next_beat = time.monotonic() + min(interval_s, 10.0)
            time.sleep(POLL_S)

    def _beat(self, entry: journal.Entry, state: str, usage: "dict[str, Any] | None" = None) -> "str | None":
        message = _lease(entry) | {"state": state} | ({"usage": usage} if usage else {})
        patience_s = GET_PATIENCE_S if state == "starting" else HEARTBEAT_PATIENCE_S
        command = self._router.call("heartbeat", message, patience_s).get("command")
        return str(command) if command else None

    def _report(self, entry: journal.Entry, outcome: dict[str, Any], patience_s: float) -> None:
        try:
            self._router.call("report", _lease(entry) | outcome, patience_s)
        except RefusedError as error:
            # A lost lease: somebody else has the job. What we have done of it counts for nothing.
            _say(f"job {entry.record['id']}: {error}")

    def _give_back(self, entry: journal.Entry, payload: "runner.Payload | None") -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        if payload is not None:
            payload.end()
        try:
            self._report(entry, {"state": "activated"}, RELEASE_PATIENCE_S)
        except UnreachableError as error:
            _say(f"could not give job {entry.record['id']} back: {error}")
            return
        entry.close()

    def _clear_up(self) -> None:
        """What killed pilots have left on this host: report what they finished, give back what they did not."""
        for entry in journal.left_behind(self._work):
            journal.end_group(entry.record)
            if entry.record.get("id"):
                self._report(entry, entry.record.get("outcome") or {"state": "activated"}, GET_PATIENCE_S)
            entry.close()


def main(arguments: "list[str] | None" = None) -> int:
    """The command; its exit code."""
    options = _parser().parse_args(arguments)
    try:
        token = options.token_file.read_text(encoding="utf-8").strip()
        options.work_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        _say(str(error))
        return 2
    pilot = Pilot(options, Router(options.server, token))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pilot.stop)
    return pilot.run()


def _lease(entry: journal.Entry) -> dict[str, Any]:
    return {name: entry.record[name] for name in ("id", "attempt", "lease_token")}


def _say(text: str) -> None:
    sys.stderr.write(f"pilot: {text}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="culm-pilot", description="Pull jobs and run them.", epilog=EPILOG)
    parser.add_argument("--server", required=True, help="the router's URL")
    parser.add_argument("--queue", required=True, help="the computing queue to ask for")
    parser.add_argument("--token-file", required=True, type=Path, help="a file with the pilot's token")
    parser.add_argument("--name", default=f"{socket.gethostname()}-{os.getpid()}", help="the pilot's name")
    parser.add_argument("--work-dir", type=Path, default=Path("culm-pilot"), help="where payloads run")
    parser.add_argument("--wait", type=float, default=20.0, help="long poll, seconds, 0 to 60 (default 20)")
    parser.add_argument("--max-jobs", type=int, default=0, help="end after so many jobs (default: never)")
    parser.add_argument("--idle-exit", type=float, default=0.0, help="end after so many seconds without work")
    parser.add_argument("--heartbeat", type=float, default=0.0, help="seconds between heartbeats (default: a third)")
    return parser
