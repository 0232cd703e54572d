"""What holds for a job: the computing queue's word, the VO's, the settings', and each authority's in its own slots."""

import msgspec
import pytest

from culm.errors import ClientFault
from culm.policies import MAX_VOS, NO_POLICY, Policy, over
from culm.section_changes import set_queue, set_vo
from culm.settings import SubmitDefaults, Timeouts
from culm.states import LEASED, State
from culm.topology import CENTRAL, Placement, Queue, Region, Section, Shard, Site, Topology, validate
from culm.wire import JobSpec
from shard.terms import Terms, silence_s, with_defaults

CERN = 12_288
replace = msgspec.structs.replace


def central(**vos: Policy) -> Section:
    """Region US with site BNL, whose first computing queue has a word of its own."""
    return Section(
        authority=CENTRAL,
        epoch=5,
        shards={"us1": Shard(link="unix:/run/us1")},
        regions={"US": Region(slot=0, shards=["us1"])},
        sites={"BNL": Site(region="US", slots=[1], queues={"BNL_1": Queue(heartbeat_s=10, cores=8), "BNL_2": Queue()})},
        placement={0: Placement("us1", 1), 1: Placement("us1", 2)},
        vos=vos,
    )


def cern(**vos: Policy) -> Section:
    """The strict region, its own authority."""
    return Section(
        authority="CERN",
        epoch=3,
        shards={"cern1": Shard(link="unix:/run/cern1")},
        regions={"CERN": Region(slot=CERN, shards=["cern1"], strict=True)},
        sites={"CERN-PROD": Site(region="CERN", slots=[CERN + 1], queues={"CERN_1": Queue(activated_s=7)})},
        placement={CERN: Placement("cern1", 1), CERN + 1: Placement("cern1", 2)},
        vos=vos,
    )


ATLAS = Policy(heartbeat_s=100, holding_s=200)


def test_the_computing_queue_is_asked_first_then_the_vo() -> None:
    topology = Topology([central(atlas=ATLAS)])
    assert topology.policy(1, "atlas") == topology.policy(1, "atlas", "BNL_2") == ATLAS
    assert topology.policy(1, "atlas", "BNL_1") == Policy(heartbeat_s=10, holding_s=200)
    assert topology.policy(1, "cms", "BNL_1") == Policy(heartbeat_s=10)
    assert topology.policy(1, "cms") == topology.policy(0, "cms", "nowhere") == NO_POLICY


@pytest.mark.parametrize("home", [CENTRAL, "CERN", None])
def test_each_authority_decides_in_its_own_slots_and_nobody_elses(home: str | None) -> None:
    """What the centre says of a VO changes nothing in the strict region, nor the other way round."""
    topology = Topology([central(atlas=ATLAS), cern(cms=Policy(heartbeat_s=1))], home)
    assert topology.policy(CERN, "atlas") == topology.policy(CERN + 1, "atlas") == NO_POLICY
    assert topology.policy(CERN + 1, "atlas", "CERN_1") == Policy(activated_s=7)
    assert topology.policy(CERN, "cms") == Policy(heartbeat_s=1)
    assert topology.policy(1, "cms") == NO_POLICY
    # A computing queue of another authority has no say either.
    assert topology.policy(1, "atlas", "CERN_1") == ATLAS


def test_a_slot_of_an_authority_that_is_not_known_has_no_policy() -> None:
    topology = Topology([cern(atlas=ATLAS)])
    assert topology.policy(1, "atlas") == NO_POLICY
    assert list(topology.policies(1)) == []


def test_every_policy_of_a_slot_is_found() -> None:
    topology = Topology([central(atlas=ATLAS), cern()])
    assert list(topology.policies(0)) == [ATLAS]
    assert list(topology.policies(1)) == [ATLAS, Queue(heartbeat_s=10, cores=8), Queue()]


@pytest.mark.parametrize("name", Policy.__struct_fields__)
def test_every_field_of_two_policies_is_taken_from_the_first_that_says_it(name: str) -> None:
    one, two = Policy(**{name: 1}), Policy(**{name: 2})
    assert over(one, two) == over(one, NO_POLICY) == over(NO_POLICY, one) == one


# --- changes ---------------------------------------------------------------------------------------------------------


def test_a_change_is_of_the_named_fields_only_at_the_next_epoch() -> None:
    after = set_vo(central(atlas=ATLAS), "atlas", heartbeat_s=5)
    assert (after.epoch, after.vos) == (6, {"atlas": Policy(heartbeat_s=5, holding_s=200)})
    assert replace(after, epoch=5, vos={"atlas": ATLAS}) == central(atlas=ATLAS)
    assert set_vo(after, "atlas", heartbeat_s=5) is after
    assert set_vo(after, "atlas", heartbeat_s=0, holding_s=0).vos == {}
    assert set_vo(after, "cms", heartbeat_s=0) is after


def test_what_was_set_is_read_again_as_it_was_written() -> None:
    after = set_vo(central(), "atlas", heartbeat_s=5, default_cores=2)
    assert msgspec.json.decode(msgspec.json.encode(after), type=Section) == after


def test_there_are_only_so_many() -> None:
    full = central(**{f"vo{n}": ATLAS for n in range(MAX_VOS)})
    validate(full)
    assert len(set_vo(full, "vo0", heartbeat_s=3).vos) == MAX_VOS
    with pytest.raises(ClientFault, match="bad_vo"):
        set_vo(full, "one-more", heartbeat_s=3)
    with pytest.raises(ClientFault, match="bad_topology"):
        validate(replace(full, vos=full.vos | {"one-more": ATLAS}))


@pytest.mark.parametrize("what", ["cores", "memory_mb", "disk_mb", "walltime_s"])
def test_a_computing_queues_default_is_something_that_it_has(what: str) -> None:
    good = set_queue(central(), "BNL_1", **{what: 8, f"default_{what}": 8})
    with pytest.raises(ClientFault, match=f"default_{what} is 9") as caught:
        set_queue(good, "BNL_1", **{f"default_{what}": 9})
    assert caught.value.code == "bad_topology"


# --- terms -----------------------------------------------------------------------------------------------------------


def terms(*sections: Section) -> Terms:
    topology = Topology(sections)
    return Terms(Timeouts(), SubmitDefaults(), lambda: topology)


def test_no_gap_is_left() -> None:
    settings = Timeouts()
    found = terms(central(atlas=ATLAS)).of(1, "atlas", "BNL_1")
    assert (found.heartbeat_s, found.holding_s, found.first_lease_s) == (10, 200, settings.first_lease_s)
    assert (found.transferring_s, found.activated_s) == (settings.transferring_s, settings.activated_s)
    assert (found.unready_s, found.default_cores, found.default_max_attempts) == (settings.unready_s, 1, 3)


def test_another_topology_is_obeyed_at_once() -> None:
    now = [Topology([central(atlas=ATLAS)])]
    known = Terms(Timeouts(), SubmitDefaults(), lambda: now[0])
    assert known.of(1, "atlas").heartbeat_s == 100
    assert known.shortest(1)[0] == Timeouts().activated_s
    now[0] = Topology([central(atlas=Policy(heartbeat_s=5, activated_s=6))])
    assert known.of(1, "atlas").heartbeat_s == 5
    assert known.shortest(1)[0] == 6


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shard.terms.MAX_REMEMBERED", 3)
    known = terms(central(atlas=ATLAS))
    for n in range(10):
        known.of(1, f"vo{n}")
    assert len(known._known) <= 3
    assert known.of(1, "atlas").heartbeat_s == 100


def test_the_shortest_wait_of_a_slot_is_that_of_its_own_vos_and_queues() -> None:
    known = terms(central(atlas=Policy(unready_s=9)), cern())
    assert known.shortest(1) == (Timeouts().activated_s, 9)
    assert known.shortest(CERN + 1) == (7, Timeouts().unready_s)
    assert known.shortest(CERN) == (Timeouts().activated_s, Timeouts().unready_s)


def test_a_long_wait_of_one_vo_does_not_lengthen_the_shortest() -> None:
    assert terms(central(atlas=Policy(unready_s=9e6))).shortest(1)[1] == Timeouts().unready_s


@pytest.mark.parametrize("state", sorted(LEASED))
def test_every_leased_state_has_its_silence(state: State) -> None:
    expected = {
        State.SENT: 1,
        State.STARTING: 2,
        State.RUNNING: 2,
        State.HOLDING: 3,
        State.MERGING: 3,
        State.TRANSFERRING: 4,
    }
    assert silence_s(state, Policy(holding_s=3, transferring_s=4), (1, 2)) == expected[state]


def test_what_a_job_says_is_kept_and_what_it_does_not_say_is_filled_in() -> None:
    policy = Policy(
        default_cores=2, default_memory_mb=3, default_disk_mb=4, default_walltime_s=5, default_max_attempts=6
    )
    filled = with_defaults(JobSpec(argv=["true"]), policy)
    assert filled == JobSpec(argv=["true"], cores=2, memory_mb=3, disk_mb=4, walltime_s=5, max_attempts=6)
    said = JobSpec(argv=["true"], cores=1, memory_mb=1, disk_mb=1, walltime_s=1, max_attempts=1)
    assert with_defaults(said, policy) == said
