"""Placement: the validator finds every kind of damage, registration is stable, nothing moves by itself."""

import itertools
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from culm.errors import ClientFault, Conflict
from culm.section_changes import add_shard, register_sites, set_queue
from culm.topology import (
    CENTRAL,
    SLOT_BLOCKS,
    Placement,
    Queue,
    Region,
    Section,
    Shard,
    Site,
    SiteRegistration,
    Topology,
    slot_block,
    validate,
)
from culm.wire import SlotRef

CERN_FIRST = 12_288
replace = msgspec.structs.replace


def section() -> Section:
    """Two open regions on two shards, three sites; BNL is hot and has two slots."""
    return Section(
        authority=CENTRAL,
        epoch=5,
        shards={"us1": Shard(link="unix:/run/us1"), "eu1": Shard(link="unix:/run/eu1", weight=2)},
        regions={"US": Region(slot=0, shards=["us1"]), "EU": Region(slot=1, shards=["eu1"])},
        sites={
            "BNL": Site(region="US", slots=[2, 3], queues={"BNL_1": Queue(memory_mb=2000), "BNL_2": Queue()}),
            "FZK": Site(region="EU", slots=[4], queues={"FZK_1": Queue(status="test")}),
        },
        placement={
            0: Placement("us1", 1),
            1: Placement("eu1", 1),
            2: Placement("us1", 2),
            3: Placement("us1", 5),
            4: Placement("eu1", 2),
        },
        default_region="US",
    )


def cern() -> Section:
    """The strict region, its own authority."""
    return Section(
        authority="CERN",
        epoch=3,
        shards={"cern1": Shard(link="tls:cern.example.org:25090"), "cern2": Shard(link="tls:c2.example.org:25090")},
        regions={"CERN": Region(slot=CERN_FIRST, shards=["cern1"], strict=True)},
        sites={"CERN-PROD": Site(region="CERN", slots=[CERN_FIRST + 1], queues={"CERN_1": Queue()})},
        placement={CERN_FIRST: Placement("cern1", 1), CERN_FIRST + 1: Placement("cern1", 2)},
    )


def _site(base: Section, name: str, **changes: Any) -> Section:
    return replace(base, sites=base.sites | {name: replace(base.sites[name], **changes)})


def _place(base: Section, slot: int, shard: str, epoch: int = 1) -> Section:
    return replace(base, placement=base.placement | {slot: Placement(shard, epoch)})


def test_good_sections_are_good() -> None:
    validate(section())
    validate(cern())
    validate(Section(authority=CENTRAL, epoch=1))


DAMAGE: list[tuple[Callable[[], Section], str]] = [
    (lambda: _place(section(), 4, "gone1"), "unknown shard gone1"),
    (lambda: _place(section(), CERN_FIRST, "us1"), "outside the block"),
    (lambda: _place(section(), 4, "eu1", epoch=6), "past the section's"),
    (lambda: _place(section(), 4, "eu1", epoch=0), "past the section's"),
    (lambda: _site(section(), "FZK", region="Mars"), "unknown region Mars"),
    (lambda: _site(section(), "FZK", slots=[]), "has no slot"),
    (lambda: _site(section(), "FZK", slots=[2]), "slot 2 belongs to"),
    (lambda: _site(section(), "FZK", slots=[1]), "slot 1 belongs to"),
    (lambda: _site(section(), "FZK", slots=[4, 4]), "slot 4 belongs to"),
    (lambda: _site(section(), "FZK", slots=[9]), "placed nowhere"),
    (lambda: _site(section(), "FZK", slots=[-1]), "outside 0..16383"),
    (lambda: _site(section(), "FZK", slots=[16_384]), "outside 0..16383"),
    (lambda: _site(section(), "FZK", queues={"BNL_1": Queue()}), "named by the sites"),
    (lambda: replace(section(), regions=section().regions | {"EU": Region(slot=1, shards=["x"])}), "unknown shard x"),
    (lambda: replace(section(), regions=section().regions | {"EU": Region(slot=7, shards=["eu1"])}), "placed nowhere"),
    (lambda: replace(section(), default_region="Mars"), "default region Mars"),
    (
        lambda: replace(section(), shards=section().shards | {"us2": Shard(link="unix:/run/us1")}),
        "shards us1 and us2 have the same link unix:/run/us1",
    ),
    (lambda: _place(cern(), CERN_FIRST + 1, "cern2"), "is strict"),
    (lambda: _place(cern(), CERN_FIRST, "cern2"), "is strict"),
    (lambda: replace(_place(cern(), CERN_FIRST, "cern2"), sites={}), "is strict"),
]


@pytest.mark.parametrize(("damaged", "message"), DAMAGE)
def test_every_kind_of_damage_is_found(damaged: Callable[[], Section], message: str) -> None:
    with pytest.raises(ClientFault, match=message) as caught:
        validate(damaged())
    assert caught.value.code == "bad_topology"


def test_an_authority_without_a_block_of_slots_is_refused() -> None:
    with pytest.raises(ClientFault) as caught:
        validate(replace(section(), authority="Mars"))
    assert caught.value.code == "unknown_authority"


def test_blocks_of_slots_cover_all_and_never_overlap() -> None:
    blocks = sorted(SLOT_BLOCKS.values())
    assert blocks[0][0] == 0
    assert blocks[-1][1] == 16_383
    for (_, last), (first, _) in itertools.pairwise(blocks):
        assert first == last + 1
    assert slot_block("CERN") == (12_288, 16_383)


@pytest.mark.parametrize("what", [section, cern])
def test_json_round_trip(what: Callable[[], Section]) -> None:
    assert msgspec.json.decode(msgspec.json.encode(what()), type=Section) == what()


def test_a_document_with_a_typing_error_is_refused() -> None:
    text = msgspec.json.encode(section()).replace(b'"default_region"', b'"defualt_region"')
    with pytest.raises(msgspec.ValidationError, match="defualt_region"):
        msgspec.json.decode(text, type=Section)


# --- resolving -------------------------------------------------------------------------------------------------------


def test_every_request_finds_its_slot() -> None:
    topology = Topology([section(), cern()])
    assert topology.queue("BNL_2")[0] == "BNL"
    assert topology.queue("BNL_1")[2].memory_mb == 2000
    assert topology.site("CERN-PROD").slots == [CERN_FIRST + 1]
    assert topology.region("EU").slot == 1
    assert topology.slot(3) == SlotRef(3, 5)
    assert topology.place(CERN_FIRST) == Placement("cern1", 1)
    assert set(topology.slots_on("us1")) == {SlotRef(0, 1), SlotRef(2, 2), SlotRef(3, 5)}
    assert topology.site_of_slot == {2: "BNL", 3: "BNL", 4: "FZK", CERN_FIRST + 1: "CERN-PROD"}
    assert topology.region_of_slot[3] == "US"
    assert topology.region_of_slot[0] == "US"
    assert topology.epochs == {CENTRAL: 5, "CERN": 3}
    assert topology.default_region("central") == "US"
    assert topology.default_region("CERN") == ""
    assert topology.authority_of_region("CERN") == "CERN"
    assert topology.authority_of_region("EU") == CENTRAL


@pytest.mark.parametrize(
    ("ask", "code"),
    [
        (lambda t: t.queue("X"), "unknown_queue"),
        (lambda t: t.site("X"), "unknown_site"),
        (lambda t: t.region("X"), "unknown_region"),
        (lambda t: t.slot(999), "unknown_slot"),
        (lambda t: t.authority_of_region("X"), "unknown_region"),
    ],
)
def test_what_is_unknown_is_said(ask: Callable[[Topology], object], code: str) -> None:
    with pytest.raises(ClientFault) as caught:
        ask(Topology([section(), cern()]))
    assert caught.value.code == code
    assert caught.value.http_status in {400, 404}


def test_half_a_topology_still_works() -> None:
    """When the other authority cannot be reached, CERN resolves its own requests."""
    alone = Topology([cern()])
    assert alone.queue("CERN_1")[0] == "CERN-PROD"
    assert alone.default_region("central") == ""


@pytest.mark.parametrize(
    ("clash", "message"),
    [
        (lambda: replace(cern(), shards=cern().shards | {"us1": Shard(link="unix:/x")}), "shard us1"),
        (lambda: replace(cern(), sites={"BNL": cern().sites["CERN-PROD"]}), "site BNL"),
        (
            lambda: replace(
                cern(),
                regions=cern().regions | {"US": Region(slot=CERN_FIRST + 5, shards=["cern1"])},
                placement=cern().placement | {CERN_FIRST + 5: Placement("cern1", 1)},
            ),
            "region US",
        ),
        (lambda: _site(cern(), "CERN-PROD", queues={"BNL_1": Queue()}), "computing queue BNL_1"),
        (lambda: replace(cern(), shards=cern().shards | {"x1": Shard(link="unix:/run/us1")}), "link unix:/run/us1"),
    ],
)
def test_two_authorities_never_share_a_name(clash: Callable[[], Section], message: str) -> None:
    with pytest.raises(ClientFault, match=message):
        Topology([section(), clash()])


def test_a_shard_of_ours_that_another_authority_names_once_more_is_passed_over() -> None:
    placed = cern().placement | {CERN_FIRST + 7: Placement("x1", 1)}
    other = replace(cern(), shards=cern().shards | {"x1": Shard(link="unix:/run/us1")}, placement=placed)
    for home, kept, passed_over in ((CENTRAL, "us1", "x1"), ("CERN", "x1", "us1")):
        topology = Topology([section(), other], home)
        assert kept in topology.shards
        assert passed_over not in topology.shards
        assert not list(topology.slots_on(passed_over))
        [clash] = topology.clashes
        assert clash.startswith("link unix:/run/us1 is named by ")


# --- registering -----------------------------------------------------------------------------------------------------


def wanted(*names: str, region: str = "US") -> list[SiteRegistration]:
    return [SiteRegistration(name=name, region=region, queues={f"{name}_q": Queue(cores=4)}) for name in names]


def test_a_new_site_gets_the_next_slot_at_the_next_epoch() -> None:
    after = register_sites(section(), wanted("AGLT2"))
    assert after.epoch == 6
    assert after.sites["AGLT2"] == Site(region="US", slots=[5], queues={"AGLT2_q": Queue(cores=4)})
    assert after.placement[5] == Placement("us1", 6)


def test_what_was_placed_stays_where_it_was() -> None:
    before = section()
    after = register_sites(before, wanted(*(f"S{i}" for i in range(100)), region="EU"))
    assert {slot: after.placement[slot] for slot in before.placement} == before.placement
    assert all(after.sites[name] == site for name, site in before.sites.items())


def test_registering_again_changes_nothing() -> None:
    once = register_sites(section(), wanted("AGLT2", "SLAC"))
    assert register_sites(once, wanted("AGLT2", "SLAC")) is once
    assert register_sites(once, []) is once


def test_a_new_shard_moves_nothing_by_itself() -> None:
    before = register_sites(section(), wanted(*(f"S{i}" for i in range(50))))
    regions = before.regions | {"US": Region(slot=0, shards=["us1", "us2"])}
    grown = replace(before, shards=before.shards | {"us2": Shard(link="unix:/run/us2")}, regions=regions)
    again = register_sites(grown, wanted(*(f"S{i}" for i in range(50))))
    assert again.placement == before.placement
    later = register_sites(grown, wanted(*(f"T{i}" for i in range(50))))
    assert {later.placement[later.sites[f"T{i}"].slots[0]].shard for i in range(50)} == {"us1", "us2"}


def test_weights_are_honoured_roughly() -> None:
    shards = {"a": Shard(link="unix:/a", weight=1), "b": Shard(link="unix:/b", weight=3)}
    base = Section(
        authority=CENTRAL,
        epoch=1,
        shards=shards,
        regions={"US": Region(slot=0, shards=["a", "b"])},
        placement={0: Placement("a", 1)},
    )
    after = register_sites(base, wanted(*(f"site-{i}" for i in range(400))))
    on_b = sum(place.shard == "b" for place in after.placement.values())
    assert 240 <= on_b <= 360


def test_a_shard_of_weight_zero_gets_no_new_site() -> None:
    base = section()
    base = replace(
        base,
        shards=base.shards | {"us2": Shard(link="unix:/x", weight=0)},
        regions=base.regions | {"US": Region(slot=0, shards=["us1", "us2"])},
    )
    after = register_sites(base, wanted(*(f"S{i}" for i in range(40))))
    assert "us2" not in {place.shard for place in after.placement.values()}
    drained = replace(base, shards={name: replace(shard, weight=0) for name, shard in base.shards.items()})
    with pytest.raises(Conflict) as caught:
        register_sites(drained, wanted("AGLT2"))
    assert caught.value.code == "no_shard"


def test_a_site_of_a_strict_region_stays_on_its_own_shards() -> None:
    base = cern()
    after = register_sites(base, wanted(*(f"C{i}" for i in range(40)), region="CERN"))
    slots = [slot for site in after.sites.values() for slot in site.slots]
    assert {after.placement[slot].shard for slot in slots} == {"cern1"}


def test_a_new_region_never_lands_on_a_strict_regions_shard() -> None:
    after = register_sites(cern(), wanted("ELSEWHERE", region="CH"))
    assert after.regions["CH"].shards == ["cern2"]
    only = replace(cern(), shards={"cern1": cern().shards["cern1"]})
    with pytest.raises(Conflict) as caught:
        register_sites(only, wanted("ELSEWHERE", region="CH"))
    assert caught.value.code == "no_shard"


def test_a_new_region_gets_a_slot_of_its_own_before_its_first_site() -> None:
    after = register_sites(section(), wanted("TRIUMF", region="CA"))
    assert after.regions["CA"].slot == 5
    assert after.sites["TRIUMF"].slots == [6]
    assert after.placement[5].shard == after.placement[6].shard == after.regions["CA"].shards[0]


def test_out_of_slots() -> None:
    last = SLOT_BLOCKS[CENTRAL][1]
    full = _place(section(), last - 1, "us1")
    one_more = register_sites(full, wanted("LAST"))
    assert one_more.sites["LAST"].slots == [last]
    with pytest.raises(Conflict) as caught:
        register_sites(one_more, wanted("TOO_LATE"))
    assert caught.value.code == "out_of_slots"


def test_a_slot_number_is_never_used_twice_even_after_its_site_is_gone() -> None:
    """Ids of jobs carry the slot: a tombstone keeps the number taken."""
    gone = replace(section(), sites={"BNL": section().sites["BNL"]})
    assert register_sites(gone, wanted("NEW", region="EU")).sites["NEW"].slots == [5]


def test_a_site_never_changes_its_region_by_registration() -> None:
    with pytest.raises(Conflict) as caught:
        register_sites(section(), wanted("BNL", region="EU"))
    assert caught.value.code == "site_in_other_region"


@pytest.mark.parametrize("sites", [["SLAC"], ["SLAC", "AGLT2"]])
def test_a_computing_queue_belongs_to_one_site(sites: list[str]) -> None:
    name = "BNL_1" if len(sites) == 1 else "NEW_1"
    registrations = [SiteRegistration(name=site, region="US", queues={name: Queue()}) for site in sites]
    with pytest.raises(Conflict) as caught:
        register_sites(section(), registrations)
    assert caught.value.code == "queue_of_other_site"


def test_a_queue_that_the_push_does_not_name_stays() -> None:
    after = register_sites(section(), [SiteRegistration(name="BNL", region="US", queues={"BNL_3": Queue()})])
    assert set(after.sites["BNL"].queues) == {"BNL_1", "BNL_2", "BNL_3"}
    assert after.sites["BNL"].slots == [2, 3]


def test_a_push_of_the_catalogue_keeps_what_an_operator_set() -> None:
    by_hand = set_queue(section(), "BNL_1", status="offline", reason="cooling failed")
    pushed = SiteRegistration(name="BNL", region="US", queues={"BNL_1": Queue(memory_mb=4000)})
    after = register_sites(by_hand, [pushed]).sites["BNL"].queues["BNL_1"]
    assert (after.status, after.reason, after.memory_mb) == ("offline", "cooling failed", 4000)


def test_a_push_changes_a_status_that_nobody_set_by_hand() -> None:
    pushed = SiteRegistration(name="FZK", region="EU", queues={"FZK_1": Queue(status="online")})
    assert register_sites(section(), [pushed]).sites["FZK"].queues["FZK_1"].status == "online"


def test_a_push_with_a_reason_of_its_own_overrides_the_operator() -> None:
    by_hand = set_queue(section(), "BNL_1", status="offline", reason="cooling failed")
    pushed = Queue(status="brokeroff", reason="decommissioned")
    after = register_sites(by_hand, [SiteRegistration(name="BNL", region="US", queues={"BNL_1": pushed})])
    assert after.sites["BNL"].queues["BNL_1"] == pushed


def test_set_queue_changes_one_queue_at_the_next_epoch() -> None:
    after = set_queue(section(), "FZK_1", status="online", memory_mb=3000)
    assert after.epoch == 6
    assert after.sites["FZK"].queues["FZK_1"] == Queue(status="online", memory_mb=3000)
    assert after.sites["BNL"] == section().sites["BNL"]


@pytest.mark.parametrize("change", [{"status": "asleep"}, {"cores": 0}, {"memory_mb": "lots"}, {"colour": "red"}])
def test_set_queue_refuses_what_a_queue_cannot_have(change: dict[str, object]) -> None:
    with pytest.raises(ClientFault) as caught:
        set_queue(section(), "FZK_1", **change)
    assert caught.value.code == "bad_queue"


def test_set_queue_of_an_unknown_queue() -> None:
    with pytest.raises(ClientFault) as caught:
        set_queue(section(), "X", status="online")
    assert caught.value.code == "unknown_queue"


@settings(max_examples=40, deadline=None)
@given(st.lists(st.dictionaries(st.integers(0, 12), st.sampled_from(["US", "EU", "CA"]), max_size=6), max_size=5))
def test_any_order_of_registrations_keeps_a_valid_document_and_stable_slots(
    pushes: list[dict[int, str]],
) -> None:
    now = section()
    for push in pushes:
        registrations = [r for i, region in push.items() for r in wanted(f"S{i}", region=region)]
        try:
            after = register_sites(now, registrations)
        except Conflict as error:
            assert error.code == "site_in_other_region"
            continue
        validate(after)
        assert after.epoch in {now.epoch, now.epoch + 1}
        assert all(after.sites[name].slots == site.slots for name, site in now.sites.items())
        assert now.placement.items() <= after.placement.items()
        now = after


# --- a shard more -----------------------------------------------------------------------------------------------------


def test_a_new_region_gets_a_slot_on_its_shard_and_nothing_moves() -> None:
    before = section()
    after = add_shard(before, "asia1", Shard(link="unix:/run/asia1"), "ASIA")
    assert after.epoch == 6
    region = after.regions["ASIA"]
    assert region.shards == ["asia1"]
    assert region.slot not in before.placement
    assert after.placement == before.placement | {region.slot: Placement("asia1", 6)}
    assert (after.sites, after.shards) == (before.sites, before.shards | {"asia1": Shard(link="unix:/run/asia1")})


def test_a_shard_of_a_known_region_takes_part_in_what_comes_later_only() -> None:
    before = section()
    after = add_shard(before, "us2", Shard(link="unix:/run/us2"), "US")
    assert after.regions["US"].shards == ["us1", "us2"]
    assert after.placement == before.placement
    many = [SiteRegistration(name=f"US-{number}", region="US", queues={f"q{number}": Queue()}) for number in range(60)]
    registered = register_sites(after, many)
    placed = {registered.placement[registered.sites[one.name].slots[0]].shard for one in many}
    assert placed == {"us1", "us2"}


def test_a_shard_that_is_there_already_changes_nothing_and_another_of_its_name_is_refused() -> None:
    there = section()
    assert add_shard(there, "us1", Shard(link="unix:/run/us1"), "US") is there
    assert add_shard(there, "us1", Shard(link="unix:/run/us1"), "") is there
    for shard, region in ((Shard(link="unix:/elsewhere"), "US"), (Shard(link="unix:/run/us1"), "EU")):
        with pytest.raises(Conflict, match="shard_exists"):
            add_shard(there, "us1", shard, region)
