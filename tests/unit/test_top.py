"""What `culm top` shows, made from what the monitor last said."""

import io

from rich.console import Console

from culm.wire import CountsAnswer, ShardRow, ShardsAnswer
from ops.cli.top import Seen, page


def shown(seen: Seen | None, away: str = "") -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(page(seen, away))
    return console.export_text()


def shard(name: str, *, answers: bool, age_s: float | None, rate: float | None) -> ShardRow:
    return ShardRow(
        name=name,
        authority="central",
        link="",
        regions=["US"],
        n_slots=1,
        n_active=None if age_s is None else 7,
        age_s=age_s,
        answers=answers,
        dispatched_per_s=rate,
    )


def seen(*rows: ShardRow, missing: list[str] | None = None) -> Seen:
    regions = {"US": {"activated": 5, "finished": 8}, "EU": {"finished": 2}}
    counts = CountsAnswer(
        total={"activated": 5, "finished": 10}, by_region=regions, by_site={}, shards={}, missing_shards=missing or []
    )
    return Seen(1_700_000_000.0, counts, ShardsAnswer(epochs={}, shards=list(rows)))


def test_states_stand_by_region_in_the_order_of_a_jobs_life() -> None:
    lines = [" ".join(line.replace("│", " ").split()) for line in shown(seen()).splitlines()]
    assert "EU 0 2" in lines
    assert "US 5 8" in lines
    assert "all 5 10" in lines


def test_the_rate_is_the_sum_over_the_shards_that_answer() -> None:
    rows = (
        shard("us1", answers=True, age_s=0.1, rate=1.25),
        shard("eu1", answers=True, age_s=0.1, rate=2.0),
        shard("old1", answers=True, age_s=0.1, rate=None),
        shard("gone1", answers=False, age_s=40.0, rate=100.0),
    )
    assert "15 jobs, 3.25 jobs/s dispatched" in shown(seen(*rows))
    assert "dispatch rate not known" in shown(seen())


def test_missing_shards_are_named_whoever_missed_them() -> None:
    text = shown(seen(shard("eu1", answers=False, age_s=None, rate=None), missing=["us1"]))
    assert "no answer from eu1, us1" in text
    assert "never heard" in text
    assert "no answer" not in shown(seen(shard("us1", answers=True, age_s=0.1, rate=0.0)))


def test_a_monitor_that_is_away_is_said_beside_what_was_last_seen() -> None:
    assert shown(None, "the monitor does not answer").strip() == "the monitor does not answer"
    text = shown(seen(), "the monitor does not answer")
    assert "15 jobs" in text
    assert "the monitor does not answer" in text
