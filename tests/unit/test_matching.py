"""Matching: the fast form and the explaining form agree, each reason alone, and class ids that never change."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from culm.matching import Offer, Requirements, matches, refusals

amounts = st.sampled_from([0, 1, 2, 1999, 2000, 2001, 2**31 - 1])
tags = st.sampled_from(["", "12.0.6", "24.2.1", "x86_64-el9"])
tag_sets = st.frozensets(st.sampled_from(["12.0.6", "24.2.1", "x86_64-el9"]))
labels = st.sampled_from(["user", "panda", "managed"])
vos = st.sampled_from(["atlas", "charmm", ""])

needs_of_any_kind = st.builds(
    Requirements,
    label=labels,
    vo=vos,
    cores=st.sampled_from([1, 2, 8]),
    memory_mb=amounts,
    disk_mb=amounts,
    walltime_s=amounts,
    release=tags,
    platform=tags,
    pilot_type=st.sampled_from(["", "container"]),
    queue=st.sampled_from(["", "BNL_ATLAS_1", "CERN-PROD"]),
)
offers_of_any_kind = st.builds(
    Offer,
    queue=st.sampled_from(["BNL_ATLAS_1", "CERN-PROD"]),
    labels=st.frozensets(labels),
    vos=st.none() | st.frozensets(vos),
    cores=st.sampled_from([1, 2, 8]),
    memory_mb=amounts,
    disk_mb=amounts,
    walltime_s=amounts,
    releases=tag_sets,
    platforms=tag_sets,
    pilot_type=st.sampled_from(["", "container"]),
)

NEEDS = Requirements(
    label="user",
    vo="atlas",
    cores=4,
    memory_mb=2000,
    disk_mb=10_000,
    walltime_s=3600,
    release="24.2.1",
    platform="x86_64-el9",
    pilot_type="container",
    queue="BNL_ATLAS_1",
)
OFFER = Offer(
    queue="BNL_ATLAS_1",
    labels=frozenset({"user", "panda"}),
    vos=frozenset({"atlas"}),
    cores=4,
    memory_mb=2000,
    disk_mb=10_000,
    walltime_s=3600,
    releases=frozenset({"24.2.1", "12.0.6"}),
    platforms=frozenset({"x86_64-el9"}),
    pilot_type="container",
)


@settings(max_examples=500)
@given(needs_of_any_kind, offers_of_any_kind)
def test_what_dispatches_is_what_explains(needs: Requirements, offer: Offer) -> None:
    assert matches(needs, offer) == (not refusals(needs, offer))


@given(needs_of_any_kind, offers_of_any_kind)
def test_a_refusal_says_what_was_needed_and_offered_once_per_reason(needs: Requirements, offer: Offer) -> None:
    found = refusals(needs, offer)
    assert len({refusal.reason for refusal in found}) == len(found)
    assert all(refusal.needed for refusal in found if refusal.reason != "wrong_vo")


def test_an_exact_fit_fits() -> None:
    assert matches(NEEDS, OFFER)
    assert refusals(NEEDS, OFFER) == []


@pytest.mark.parametrize(
    ("change", "reason", "needed", "offered"),
    [
        ({"labels": frozenset({"managed", "test"})}, "wrong_label", "user", "managed|test"),
        ({"labels": frozenset()}, "wrong_label", "user", ""),
        ({"vos": frozenset({"charmm"})}, "wrong_vo", "atlas", "charmm"),
        ({"vos": frozenset()}, "wrong_vo", "atlas", ""),
        ({"queue": "CERN-PROD"}, "wrong_queue", "BNL_ATLAS_1", "CERN-PROD"),
        ({"pilot_type": ""}, "wrong_pilot_type", "container", ""),
        ({"cores": 3}, "too_few_cores", "4", "3"),
        ({"memory_mb": 1999}, "too_little_memory_mb", "2000", "1999"),
        ({"disk_mb": 9_999}, "too_little_disk_mb", "10000", "9999"),
        ({"walltime_s": 3599}, "too_little_walltime_s", "3600", "3599"),
        ({"releases": frozenset({"12.0.6"})}, "no_matching_release", "24.2.1", "12.0.6"),
        ({"releases": frozenset()}, "no_matching_release", "24.2.1", ""),
        ({"platforms": frozenset()}, "no_matching_platform", "x86_64-el9", ""),
    ],
)
def test_each_reason_alone(change: dict[str, object], reason: str, needed: str, offered: str) -> None:
    offer = msgspec.structs.replace(OFFER, **change)
    assert not matches(NEEDS, offer)
    (refusal,) = refusals(NEEDS, offer)
    assert (refusal.reason, refusal.needed, refusal.offered) == (reason, needed, offered)


def test_every_reason_at_once() -> None:
    nothing = Offer(queue="X", labels=frozenset(), vos=frozenset(), cores=1, memory_mb=1, disk_mb=1, walltime_s=1)
    assert len(refusals(NEEDS, nothing)) == 10


@pytest.mark.parametrize("name", ["memory_mb", "disk_mb", "walltime_s"])
def test_zero_in_an_offer_is_no_limit_known(name: str) -> None:
    offer = msgspec.structs.replace(OFFER, **{name: 0})
    assert matches(msgspec.structs.replace(NEEDS, **{name: 2**31 - 1}), offer)


@pytest.mark.parametrize(
    ("name", "indifferent"),
    [("memory_mb", 0), ("disk_mb", 0), ("walltime_s", 0), ("release", ""), ("platform", ""), ("pilot_type", ""),
     ("queue", "")],
)  # fmt: skip
def test_empty_in_a_need_does_not_matter(name: str, indifferent: object) -> None:
    poor = Offer(queue="CERN-PROD", labels=frozenset({"user"}), cores=4, memory_mb=1, disk_mb=1, walltime_s=1)
    with_it = {refusal.reason for refusal in refusals(NEEDS, poor)}
    without = {refusal.reason for refusal in refusals(msgspec.structs.replace(NEEDS, **{name: indifferent}), poor)}
    assert len(with_it - without) == 1


def test_a_pilot_with_a_type_takes_jobs_that_ask_for_none() -> None:
    assert matches(msgspec.structs.replace(NEEDS, pilot_type=""), OFFER)


def test_any_vo() -> None:
    assert matches(NEEDS, msgspec.structs.replace(OFFER, vos=None))


def test_a_class_id_is_the_same_on_every_shard_and_in_every_release() -> None:
    """Pinned numbers: a class row of an old shard must mean the same after a move or an upgrade."""
    assert Requirements(label="user", vo="atlas").class_id() == CLASS_ID_PLAIN
    assert NEEDS.class_id() == CLASS_ID_FULL


@given(needs_of_any_kind, needs_of_any_kind)
def test_class_ids_tell_requirements_apart(one: Requirements, other: Requirements) -> None:
    assert (one.class_id() == other.class_id()) == (one == other)
    assert 0 <= one.class_id() < 2**63


CLASS_ID_PLAIN = 5388786272259443242
CLASS_ID_FULL = 4553590774715440313
