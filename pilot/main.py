"""The pilot's command line."""

import argparse
import os
import socket
import sys
from pathlib import Path
from urllib.parse import urlsplit

from pilot import processes
from pilot.agent import UNUSABLE, Agent, Plan
from pilot.client import Router
from pilot.stop import Stop

USAGE = 2
EPILOG = (
    "Exit codes: 0 idle for --idle-exit or --max-jobs done; 2 wrong use; 4 the router did not answer; 5 it refused "
    "(the message says why); 6 the work directory cannot be used; 143 stopped by a signal, the job was given back."
)


def main(arguments: "list[str] | None" = None) -> int:
    """The command; its exit code."""
    options = _parser().parse_args(arguments)
    try:
        _token(options.token_file)
        router = Router(options.server, lambda: _token(options.token_file), options.ca)
    except (OSError, ValueError) as error:
        return _end(USAGE, error)
    try:
        options.work_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Absolute: payloads run elsewhere, and have it as their HOME.
        plan = _plan(options, options.work_dir.resolve())
    except OSError as error:
        return _end(UNUSABLE, error)
    stop = Stop()
    stop.listen()
    processes.adopt_orphans()
    return Agent(plan, router, stop).run()


def _plan(options: argparse.Namespace, work: Path) -> Plan:
    return Plan(
        queue=options.queue,
        name=options.name,
        work=work,
        wait_s=options.wait,
        max_jobs=options.max_jobs,
        idle_exit_s=options.idle_exit,
        heartbeat_s=options.heartbeat,
        patience_s=options.patience,
        report_patience_s=options.report_patience,
    )


def _token(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip()


def _end(code: int, error: Exception) -> int:
    sys.stderr.write(f"pilot: {error}\n")
    return code


def _url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise argparse.ArgumentTypeError(f"{text!r} is not an http(s) URL")
    return text


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1e9:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds")
    return value


def _wait(text: str) -> float:
    value = _seconds(text)
    if value > 60:
        raise argparse.ArgumentTypeError("a router lets a pilot wait for 60 seconds at most")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="culm-pilot", description="Pull jobs and run them.", epilog=EPILOG)
    add = parser.add_argument
    add("--server", required=True, type=_url, help="the router's URL")
    add("--queue", required=True, help="the computing queue to ask for")
    add("--token-file", required=True, type=Path, help="a file with the pilot's token; read again at every call")
    add("--ca", default="", help="PEM of the certificate authority of an https URL (default: the system's)")
    add("--name", default=f"{socket.gethostname()}-{os.getpid()}"[-128:], help="the pilot's name (default: HOST-PID)")
    add("--work-dir", type=Path, default=Path("culm-pilot"), help="where payloads run (default ./culm-pilot)")
    add("--wait", type=_wait, default=20.0, help="long poll, seconds, 0 to 60 (default 20)")
    add("--max-jobs", type=_count, default=0, help="end after so many jobs (default: never)")
    add("--idle-exit", type=_seconds, default=0.0, help="end after so many seconds without work (default: never)")
    add("--heartbeat", type=_seconds, default=0.0, help="seconds between heartbeats (default: a third of the lease)")
    add("--patience", type=_seconds, default=60.0, help="seconds to ask a silent router for work (default 60)")
    add("--report-patience", type=_seconds, default=3600.0, help="seconds to try to report (default 3600)")
    return parser
