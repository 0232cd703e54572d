"""What a router and a monitor make of the answers of several shards."""

from typing import Any

import msgspec
import pytest

from culm.errors import Bug, ClientFault, Conflict, CulmError, Moved, Unavailable
from culm.states import State
from culm.topology import Placement, Queue, Region, Section, Shard, Site, Topology
from culm.wire import (
    CountsAnswer,
    JobSpec,
    PilotSeen,
    Principal,
    QueueSeen,
    ShardCountsAnswer,
    ShardPileUpsAnswer,
    ShardPilotsAnswer,
    ShardSubmitAnswer,
    SlotCount,
    SlotJobs,
    SlotPileUp,
    SlotRef,
    SubmitAnswer,
)
from monitor_api.merge import UNPLACED, Heard, merge, merge_pile_ups, merge_pilots, merge_shards
from router.resolve import ShardPart
from router.submit import _merge

DOWN = Unavailable("shard_down", "gone", retry_after_s=3.0)


def part(shard: str, *places: list[int]) -> ShardPart:
    """A part with these places per slot."""
    jobs = [SlotJobs(at=SlotRef(n, 1), specs=[JobSpec(argv=["x"])] * len(some)) for n, some in enumerate(places)]
    return ShardPart(shard, places=list(places), slots=jobs)


def accepted(*first_ids: int) -> ShardSubmitAnswer:
    return ShardSubmitAnswer(first_ids=list(first_ids))


# --- submit ---------------------------------------------------------------------------------------------------------


def test_ids_return_to_the_places_of_their_jobs() -> None:
    done = [(part("a", [0, 3], [5]), accepted(100, 200)), (part("b", [1, 2, 4]), accepted(900))]
    merged = _merge(6, 7, list(done))
    assert merged.ids == [100, 900, 901, 101, 902, 200]
    assert merged.jobset == 7
    assert {name: (one.ok, one.n_jobs, one.error) for name, one in merged.shards.items()} == {
        "a": (True, 3, None),
        "b": (True, 3, None),
    }


def failing(*answers: ShardSubmitAnswer | CulmError) -> CulmError:
    """The error of a call of one job per shard."""
    with pytest.raises(CulmError) as caught:
        _merge(len(answers), 7, [(part(f"s{n}", [n]), answer) for n, answer in enumerate(answers)])
    return caught.value


def test_a_part_without_an_answer_is_said_and_may_be_repeated() -> None:
    error = failing(accepted(100), DOWN)
    assert (error.code, error.retryable, error.retry_after_s) == ("partial_submit", True, 3.0)
    answer = error.details["answer"]
    assert isinstance(answer, SubmitAnswer)
    assert answer.ids == [100, None]
    assert (answer.shards["s0"].ok, answer.shards["s1"].ok) == (True, False)
    assert answer.shards["s1"].error is not None
    assert answer.shards["s1"].error.code == "shard_down"


def test_no_part_with_an_answer_is_said_per_shard_too() -> None:
    error = failing(DOWN, Unavailable("deadline", "late", retry_after_s=1.0))
    assert (error.code, error.retry_after_s) == ("partial_submit", 3.0)
    assert error.details["answer"].ids == [None, None]


@pytest.mark.parametrize("only", [DOWN, Conflict("key_reused", "x"), ClientFault("too_deep", "x"), Moved(1, 2)])
def test_the_error_of_the_only_shard_is_the_calls(only: CulmError) -> None:
    assert failing(only) is only


@pytest.mark.parametrize(
    "final", [Conflict("key_reused", "x"), ClientFault("unknown_parent", "x", http_status=404), Bug("x")]
)
def test_an_error_for_good_is_not_worth_a_repeat_whatever_the_others_say(final: CulmError) -> None:
    for others in ([accepted(100), final], [DOWN, final], [final, accepted(100), DOWN]):
        error = failing(*others)
        assert (error.code, error.retryable) == (final.code, False)
        assert len(error.details["answer"].ids) == len(others)


def test_a_moved_slot_is_for_the_router_to_correct_first() -> None:
    for others in ([accepted(100)], [DOWN], [Conflict("key_reused", "x")]):
        assert isinstance(failing(*others, Moved(1, 2)), Moved)


def test_what_is_said_of_a_partial_submit_can_be_sent() -> None:
    body = msgspec.json.decode(msgspec.json.encode(failing(accepted(100), DOWN).details))
    assert body["answer"]["ids"] == [100, None]


# --- counts ---------------------------------------------------------------------------------------------------------

ADMIN = Principal(role="admin", subject="root", authority="central")


def topology() -> Topology:
    section = Section(
        authority="central",
        epoch=1,
        shards={"a": Shard(link="unix:/a"), "b": Shard(link="unix:/b")},
        regions={"US": Region(slot=0, shards=["a"])},
        sites={"BNL": Site(region="US", slots=[5, 6], queues={"q": Queue()})},
        placement={0: Placement("a", 1), 5: Placement("a", 1), 6: Placement("b", 1)},
    )
    return Topology([section])


def heard(at: float, **counts: int) -> Heard:
    """Counts like `activated_5=3`: state, slot, jobs."""
    rows = [
        SlotCount(slot=int(name.partition("_")[2]), state=State(name.partition("_")[0]), n_jobs=n)
        for name, n in counts.items()
    ]
    return Heard(ShardCountsAnswer(shard="x", at=0.0, counts=rows), at)


def test_counts_are_the_sum_over_shards_by_state_region_and_site() -> None:
    answers = {"a": heard(9.0, activated_0=2, activated_5=3, finished_5=1), "b": heard(9.5, activated_6=10)}
    merged = merge(topology(), answers, [], 10.0, ADMIN)
    assert merged.total == {"activated": 15, "finished": 1}
    assert merged.by_region == {"US": {"activated": 15, "finished": 1}}
    assert merged.by_site == {"(any site of US)": {"activated": 2}, "BNL": {"activated": 13, "finished": 1}}
    assert (merged.shards, merged.missing_shards) == ({"a": 1.0, "b": 0.5}, [])


def test_a_missing_shard_is_named_and_shown_as_last_heard() -> None:
    merged = merge(topology(), {"a": heard(10.0, running_5=1), "b": heard(4.0, running_6=7)}, ["b"], 10.0, ADMIN)
    assert merged.total == {"running": 8}
    assert (merged.shards["b"], merged.missing_shards) == (6.0, ["b"])


def test_a_shard_that_never_answered_is_named_and_not_counted_as_zero() -> None:
    merged = merge(topology(), {"a": heard(10.0)}, ["b"], 10.0, ADMIN)
    assert (merged.total, merged.missing_shards, "b" in merged.shards) == ({}, ["b"], False)


def test_jobs_of_a_slot_that_the_topology_does_not_know_are_not_lost() -> None:
    merged = merge(topology(), {"a": heard(1.0, failed_99=4)}, [], 1.0, ADMIN)
    assert merged.total == {"failed": 4}
    assert merged.by_region == {UNPLACED: {"failed": 4}}


def test_nothing_heard_is_an_empty_view() -> None:
    merged = merge(topology(), {}, ["b", "a"], 1.0, ADMIN)
    assert (merged.total, merged.by_region, merged.by_site, merged.missing_shards) == ({}, {}, {}, ["a", "b"])


def test_a_user_is_shown_the_counts_of_his_vo_and_of_accounts_his_own() -> None:
    rows = [
        SlotCount(slot=5, state=State.RUNNING, n_jobs=3, vo="atlas"),
        SlotCount(slot=5, state=State.RUNNING, n_jobs=40, vo="cms"),
    ]
    answer = ShardCountsAnswer(shard="x", at=0.0, counts=rows, owners={"central:ann": 2, "central:bob": 41})
    ann = Principal(role="user", subject="ann", authority="central", vo="atlas")
    mine = merge(topology(), {"a": Heard(answer, 1.0)}, [], 1.0, ann)
    assert (mine.total, mine.by_vo, mine.active_by_owner) == (
        {"running": 3}, {"atlas": {"running": 3}}, {"central:ann": 2}
    )  # fmt: skip
    everything = merge(topology(), {"a": Heard(answer, 1.0)}, [], 1.0, ADMIN)
    assert everything.by_vo == {"atlas": {"running": 3}, "cms": {"running": 40}}
    assert list(everything.active_by_owner) == ["central:bob", "central:ann"]


def test_accounts_that_a_shard_does_not_name_are_said() -> None:
    """bob is one of the busiest on `a`, and one of 300 on `b`, which names 200: 7 is the least that he has."""
    ann = Principal(role="user", subject="ann", authority="central", vo="atlas")
    whole = ShardCountsAnswer(shard="a", at=0.0, counts=[], owners={"central:bob": 7, "central:ann": 1}, n_owners=2)
    busy = {f"central:{n}": 1000 - n for n in range(200)}
    cut = ShardCountsAnswer(shard="b", at=0.0, counts=[], owners=busy | {"central:ann": 2}, n_owners=300)

    def merged(who: Principal, *answers: ShardCountsAnswer) -> CountsAnswer:
        return merge(topology(), {one.shard: Heard(one, 1.0) for one in answers}, [], 1.0, who)

    one, both, mine = merged(ADMIN, whole), merged(ADMIN, whole, cut), merged(ann, whole, cut)
    assert (one.owners_at_least, one.n_owners_left_out) == (False, 0)
    assert (both.owners_at_least, len(both.active_by_owner), both.n_owners_left_out) == (True, 100, 200)
    assert (mine.active_by_owner, mine.owners_at_least, mine.n_owners_left_out) == ({"central:ann": 3}, False, 0)


def test_an_admin_of_another_authority_is_shown_how_many_jobs_are_where_and_not_whose() -> None:
    rows = [SlotCount(slot=5, state=State.RUNNING, n_jobs=3, vo="atlas")]
    owners = {"central:ann": 2, "CERN:cy": 1}
    theirs = ShardCountsAnswer(shard="a", at=0.0, counts=rows, owners=owners)
    rows = [SlotCount(slot=12_288, state=State.RUNNING, n_jobs=7, vo="cms")]
    own = ShardCountsAnswer(shard="cern1", at=0.0, counts=rows, owners={"central:ann": 4, "CERN:cy": 3})
    cern = Section(
        authority="CERN",
        epoch=1,
        shards={"cern1": Shard(link="unix:/c")},
        regions={"CERN": Region(slot=12_288, shards=["cern1"])},
        placement={12_288: Placement("cern1", 1)},
    )
    both = Topology([topology().sections["central"], cern])
    root = Principal(role="admin", subject="root", authority="CERN")
    merged = merge(both, {"a": Heard(theirs, 1.0), "cern1": Heard(own, 1.0)}, [], 1.0, root)
    assert merged.by_region == {"US": {"running": 3}, "CERN": {"running": 7}}
    assert merged.by_vo == {"cms": {"running": 7}}
    assert merged.active_by_owner == {"central:ann": 4, "CERN:cy": 4}


def test_a_user_without_a_vo_is_shown_the_number_of_his_own_jobs() -> None:
    rows = [SlotCount(slot=5, state=State.RUNNING, n_jobs=3, vo="")]
    answer = ShardCountsAnswer(shard="a", at=0.0, counts=rows, archived=rows, owners={"central:eve": 1, "central:x": 2})
    eve = Principal(role="user", subject="eve", authority="central")
    merged = merge(topology(), {"a": Heard(answer, 1.0)}, [], 1.0, eve)
    assert (merged.total, merged.archived, merged.by_vo) == ({}, {}, {})
    assert merged.active_by_owner == {"central:eve": 1}


def test_shards_tell_their_dispatch_rate_and_an_older_one_none() -> None:
    said = ShardCountsAnswer(shard="a", at=0.0, counts=[], n_dispatched=30, window_s=300.0)
    older = ShardCountsAnswer(shard="b", at=0.0, counts=[])
    rows = merge_shards(topology(), {"a": Heard(said, 1.0), "b": Heard(older, 1.0)}, [], 1.0).shards
    assert {row.name: row.dispatched_per_s for row in rows} == {"a": 0.1, "b": None}


# --- pile-ups and pilots --------------------------------------------------------------------------------------------


def pile_up(slot: int, n_jobs: int, n_usual: int, text: str, state: State = State.ACTIVATED) -> SlotPileUp:
    return SlotPileUp(
        slot=slot, state=state, n_jobs=n_jobs, n_usual=n_usual, n_before=1, cause="no_pilot_asked", text=text, example=9
    )


def test_pile_ups_of_a_site_on_two_shards_are_one_with_the_cause_of_the_larger() -> None:
    found = merge_pile_ups(
        topology(),
        [
            ShardPileUpsAnswer(shard="a", n_samples=3, pile_ups=[pile_up(5, 100, 90, "a"), pile_up(0, 70, 10, "any")]),
            ShardPileUpsAnswer(
                shard="b", n_samples=3, pile_ups=[pile_up(6, 60, 10, "b"), pile_up(6, 30, 10, "sent", State.SENT)]
            ),
        ],
    )
    assert [(one.site, one.region, one.state, one.n_jobs, one.n_usual, one.n_before, one.shards) for one in found] == [
        ("(any site of US)", "US", "activated", 70, 10, 1, ["a"]),
        ("BNL", "US", "activated", 160, 100, 2, ["a", "b"]),
        ("BNL", "US", "sent", 30, 10, 1, ["b"]),
    ]
    assert (found[1].text, found[1].example) == ("b", 9)


def pilot(name: str, at: float, **changes: Any) -> PilotSeen:
    values = {"id": name, "host": "h", "queue": "q", "first_at": at, "last_at": at} | {"n_asked": 1, "n_answered": 0}
    return PilotSeen(**(values | {"n_jobs": 0} | changes))


def of_pilots(shard: str, *pilots: PilotSeen, n_left_out: int = 0, n_given: int = 0) -> ShardPilotsAnswer:
    queue = QueueSeen(queue="q", last_asked_at=pilots[0].last_at, n_pilots=2, n_asked=7, n_given=n_given)
    return ShardPilotsAnswer(shard=shard, window_s=300.0, queues=[queue], pilots=list(pilots), n_left_out=n_left_out)


def test_a_pilot_that_asks_two_shards_is_one_pilot() -> None:
    here = pilot("p1", 10.0, host="old", first_at=5.0, n_asked=4, n_answered=1, n_jobs=3, last_job_at=9.0)
    there = pilot("p1", 12.0, host="new", n_asked=3, n_answered=1, n_jobs=1, last_job_at=8.0)
    merged = merge_pilots(topology(), [of_pilots("a", here, n_given=3), of_pilots("b", there, n_given=1)], 10)
    [one] = merged.pilots
    assert one == pilot(
        "p1", 12.0, host="new", first_at=5.0, n_asked=4, n_answered=2, n_jobs=4, last_job_at=9.0, site="BNL"
    )
    [queue] = merged.queues
    assert (queue.site, queue.last_asked_at, queue.n_pilots, queue.n_asked, queue.n_given) == ("BNL", 12.0, 2, 7, 4)


def test_the_latest_pilots_are_shown_and_the_others_counted() -> None:
    answers = [
        of_pilots("a", *(pilot(f"p{n}", float(n)) for n in range(4)), n_left_out=5),
        of_pilots("b", pilot("x", 9)),
    ]
    merged = merge_pilots(topology(), answers, 2)
    assert ([one.id for one in merged.pilots], merged.n_left_out, merged.window_s) == (["x", "p3"], 8, 300.0)


def test_a_queue_that_is_not_in_the_topology_any_more_is_said_to_be_so() -> None:
    merged = merge_pilots(topology(), [of_pilots("a", pilot("p1", 1.0, queue="gone"))], 2)
    assert [one.site for one in merged.pilots] == [UNPLACED]
