"""Logs are one JSON object a line; metrics are exposed as text."""

import io
import json
import logging
import sys

import pytest
from prometheus_client import CollectorRegistry, Counter

from culm import telemetry
from culm.clock import SystemClock


def _record(message: str, *arguments: object) -> logging.LogRecord:
    return logging.LogRecord("culm.test", logging.WARNING, __file__, 1, message, arguments, None)


def test_a_line_says_when_who_and_what() -> None:
    fields = json.loads(telemetry.JsonFormatter("shard us1").format(_record("took %d ms", 7)))
    assert fields["message"] == "took 7 ms"
    assert (fields["level"], fields["logger"], fields["process"]) == ("WARNING", "culm.test", "shard us1")
    assert len(fields["at"]) == len("2026-01-01T00:00:00.000")


def test_a_message_with_line_breaks_stays_one_line() -> None:
    line = telemetry.JsonFormatter("x").format(_record("first\nsecond \x1b[31m"))
    assert "\n" not in line
    assert json.loads(line)["message"] == "first\nsecond \x1b[31m"


def test_a_traceback_is_a_field() -> None:
    record = _record("failed")
    try:
        raise ZeroDivisionError("here")
    except ZeroDivisionError:
        record.exc_info = sys.exc_info()
    assert "ZeroDivisionError: here" in json.loads(telemetry.JsonFormatter("x").format(record))["traceback"]


def test_configured_logging_writes_json_to_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    before = (root.handlers[:], root.level)
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    try:
        root.handlers[:] = []
        telemetry.configure_logging("router", "info")
        logging.getLogger("culm.x").info("hello")
        logging.getLogger("culm.x").debug("not this")
    finally:
        root.handlers[:], root.level = before
    assert [json.loads(line)["message"] for line in stream.getvalue().splitlines()] == ["hello"]


def test_metrics_are_exposed_as_text() -> None:
    registry = CollectorRegistry()
    Counter("culm_things_total", "Things", ["kind"], registry=registry).labels("a").inc(3)
    assert b'culm_things_total{kind="a"} 3.0' in telemetry.exposition(registry)


def test_the_machines_clock() -> None:
    clock = SystemClock()
    assert clock.now() > 1_700_000_000
    assert clock.monotonic() <= clock.monotonic()
