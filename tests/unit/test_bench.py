"""The benchmark's table and arithmetic; what it runs is measured, and tested in tests/system/test_bench.py."""

import asyncio
import os
import time

import msgspec
import pytest

from loadtest.bench import cells, cpu, rounds, traffic
from loadtest.bench.figures import FIGURES, GIVES, Figure
from loadtest.bench.rig import Sample, granted
from loadtest.bench.rounds import Cell


def _sample(cpu_us: float, client_share: float = 0.2) -> Sample:
    return Sample(
        n=10, cpu_us=cpu_us, parts={"router": cpu_us}, rate=5.0, p50_ms=1.0, p99_ms=2.0, client_share=client_share
    )


def test_every_figure_of_a_cell_is_in_the_table() -> None:
    given = [identifier for ids in GIVES.values() for identifier in ids]
    assert len(given) == len(set(given))
    assert set(given) == set(FIGURES)


def test_a_figure_is_measured_by_its_cell_alone() -> None:
    assert cells.names_for(["commits_per_job_c64", "empty_vs_hit"]) == ["echo64", "empty"]
    assert cells.names_for(["wake_ms", "backlog_1e7"]) == ["parked", "backlog_huge"]


@pytest.mark.parametrize(("at_most", "value", "met"), [(True, 1.9, True), (True, 2.1, False), (False, 2.1, True)])
def test_a_target_has_a_good_side(*, at_most: bool, value: float, met: bool) -> None:
    assert Figure("x", "", 2.0, at_most=at_most).met(value) is met


def test_the_median_is_told_with_its_spread() -> None:
    told = rounds.tell("cpu_vs_echo_c64", [3.0, 1.0, 2.0])
    assert (told.value, told.spread, told.rounds, told.met) == (2.0, (1.0, 3.0), 3, False)


async def test_rounds_are_interleaved_and_the_warm_up_is_thrown_away() -> None:
    ran: list[str] = []

    def variant(name: str, cpu_us: float) -> rounds.Variant:
        async def run() -> Sample:
            ran.append(name)
            return _sample(cpu_us if len(ran) > 2 else 1000.0)

        return run

    cell = Cell(
        "a cell",
        ("empty_vs_hit",),
        {"a": variant("a", 6.0), "b": variant("b", 3.0)},
        lambda samples: {"empty_vs_hit": samples["b"].cpu_us / samples["a"].cpu_us},
    )
    told = await rounds.run(cell, 2, lambda _text: None)
    assert ran == ["a", "b", "b", "a", "a", "b"]
    assert (told["empty_vs_hit"].value, told["empty_vs_hit"].rounds, told["empty_vs_hit"].note) == (0.5, 2, "")


async def test_clients_that_measure_themselves_are_named() -> None:
    async def busy() -> Sample:
        return _sample(1.0, client_share=0.9)

    cell = Cell("a cell", ("empty_vs_hit",), {"a": busy}, lambda _samples: {"empty_vs_hit": 1.0})
    told = await rounds.run(cell, 1, lambda _text: None)
    assert "a" in told["empty_vs_hit"].note


def test_what_several_runs_cost_is_added_up() -> None:
    whole = cells.together([_sample(3.0), _sample(4.0)])
    assert (whole.cpu_us, whole.parts, whole.rate) == (7.0, {"router": 7.0}, 2.5)


def test_processor_time_is_this_process_own() -> None:
    assert cpu.seconds(os.getpid()) >= 0
    with pytest.raises(ProcessLookupError):
        cpu.seconds(2**22)


def test_no_answers_grant_nothing() -> None:
    assert granted([]) == []


async def test_traffic_keeps_to_its_rate() -> None:
    """The pauses, by a clock that stands still: each request later by the same."""
    order = traffic.Order(
        host="h", port=1, path="/", token="t", content_type="c", bodies=[b""] * 4, n_clients=2, rate=10.0
    )
    run = traffic._Run(order, asyncio.Event())
    run._began = time.perf_counter() + 1000.0
    pauses = [run.pause_s() - 1000.0 for _ in range(3)]
    assert [round(pause, 1) for pause in pauses] == [0.1, 0.2, 0.3]
    freely = traffic._Run(msgspec.structs.replace(order, rate=0.0), asyncio.Event())
    assert freely.pause_s() == 0.0
