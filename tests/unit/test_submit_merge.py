"""What a submit over several shards says: ids in the order of the call, per shard what became of its part."""

import pytest

from culm.errors import ClientFault, Conflict, CulmError, Moved, Unavailable
from culm.topology import CENTRAL, Placement, Region, Section, Shard, Topology
from culm.wire import JobSpec, ShardSubmitAnswer, SubmitAnswer
from router.resolve import ShardPart, split_by_shard
from router.submit import _merge

JOBSET = 77
DOWN = Unavailable("shard_down", "us2 is down", retry_after_s=3.0)
REUSED = Conflict("key_reused", "another body")


def parts() -> list[ShardPart]:
    """Jobs 0 and 2 go to us1, job 1 to us2."""
    section = Section(
        authority=CENTRAL,
        epoch=1,
        shards={"us1": Shard(link="unix:/run/us1"), "us2": Shard(link="unix:/run/us2")},
        regions={"A": Region(slot=0, shards=["us1"]), "B": Region(slot=1, shards=["us2"])},
        placement={0: Placement("us1", 1), 1: Placement("us2", 1)},
    )
    return split_by_shard(Topology([section]), [JobSpec(region=name, argv=["true"]) for name in "ABA"], "key")


def merge(*answers: ShardSubmitAnswer | CulmError) -> SubmitAnswer:
    return _merge(3, JOBSET, list(zip(parts(), answers, strict=True)))


def ok(first_id: int) -> ShardSubmitAnswer:
    return ShardSubmitAnswer(first_ids=[first_id])


def failure(*answers: ShardSubmitAnswer | CulmError) -> CulmError:
    with pytest.raises(CulmError) as caught:
        merge(*answers)
    return caught.value


def test_ids_come_in_the_order_of_the_call() -> None:
    merged = merge(ok(100), ok(900))
    assert (merged.jobset, merged.ids) == (JOBSET, [100, 900, 101])
    assert {name: (one.ok, one.n_jobs) for name, one in merged.shards.items()} == {"us1": (True, 2), "us2": (True, 1)}


def test_a_part_that_is_missing_is_said_with_what_was_accepted() -> None:
    error = failure(ok(100), DOWN)
    assert isinstance(error, Unavailable)
    assert (error.code, error.http_status, error.retryable, error.retry_after_s) == ("partial_submit", 503, True, 3.0)
    answer = error.details["answer"]
    assert answer.ids == [100, None, 101]
    assert answer.shards["us1"].ok
    said = answer.shards["us2"].error
    assert (said.code, said.retryable) == ("shard_down", True)


def test_when_every_shard_is_down_the_call_can_be_repeated() -> None:
    error = failure(Unavailable("deadline", "late"), DOWN)
    assert (error.code, error.retryable, error.retry_after_s) == ("partial_submit", True, 3.0)
    assert error.details["answer"].ids == [None, None, None]


@pytest.mark.parametrize("answers", [(REUSED, DOWN), (DOWN, REUSED), (REUSED, REUSED), (ok(100), REUSED)])
def test_a_part_that_is_refused_for_good_makes_the_call_one_not_to_repeat(
    answers: tuple[ShardSubmitAnswer | CulmError, ...],
) -> None:
    error = failure(*answers)
    assert not error.retryable
    assert 400 <= error.http_status < 500


@pytest.mark.parametrize("other", [ok(1), DOWN, REUSED])
def test_a_slot_that_has_moved_is_asked_for_again_before_anything_is_said(
    other: ShardSubmitAnswer | CulmError,
) -> None:
    assert isinstance(failure(Moved(0, 1), other), Moved)
    assert isinstance(failure(other, Moved(1, 1)), Moved)


@pytest.mark.parametrize("error", [DOWN, REUSED, ClientFault("unknown_parent", "none")])
def test_the_error_of_an_only_shard_is_the_calls_error(error: CulmError) -> None:
    with pytest.raises(CulmError) as caught:
        _merge(2, JOBSET, [(parts()[0], error)])
    assert caught.value is error
