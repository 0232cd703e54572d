"""Who may do what."""

import pytest

from culm import access
from culm.errors import ClientFault
from culm.wire import Principal


def user(subject: str = "alice", vo: str = "atlas", roles: tuple[str, ...] = ()) -> Principal:
    return Principal(role="user", subject=subject, authority="central", vo=vo, roles=list(roles))


def pilot(*queues: str) -> Principal:
    return Principal(role="pilot", subject="p", authority="central", queues=list(queues))


ADMIN = Principal(role="admin", subject="root", authority="central")


@pytest.mark.parametrize(
    ("who", "queue", "allowed"),
    [
        (pilot("BNL_1"), "BNL_1", True),
        (pilot("BNL_1"), "BNL_2", False),
        (pilot("BNL_1"), "BNL_10", False),
        (pilot("BNL_*"), "BNL_10", True),
        (pilot("BNL_*"), "BNL", False),
        (pilot("*"), "anything", True),
        (pilot(), "BNL_1", False),
        (pilot("FZK_1", "BNL_1"), "BNL_1", True),
        (pilot("BNL*1"), "BNL_1", False),
        (ADMIN, "BNL_1", True),
        (user(), "BNL_1", False),
    ],
)
def test_a_pilot_asks_for_its_own_queues_only(who: Principal, queue: str, allowed: bool) -> None:
    assert access.allows_queue(who, queue, "central") is allowed
    assert not access.allows_queue(who, queue, "CERN")


@pytest.mark.parametrize(
    ("who", "vo", "allowed"),
    [(user(), "atlas", True), (user(), "charmm", False), (ADMIN, "charmm", True), (pilot("*"), "atlas", False)],
)
def test_reading_stays_inside_a_vo(who: Principal, vo: str, allowed: bool) -> None:
    assert access.may_read(who, vo=vo, owner="central:alice", authority="central") is allowed


@pytest.mark.parametrize(
    ("owner", "vo", "allowed"),
    [
        ("central:eve", "", True),
        ("central:eve", "atlas", False),
        ("central:alice", "", False),
        ("CERN:eve", "", False),
    ],
)
def test_who_has_no_vo_reads_his_own_jobs_without_one(owner: str, vo: str, *, allowed: bool) -> None:
    assert access.may_read(user("eve", vo=""), vo=vo, owner=owner, authority="central") is allowed


@pytest.mark.parametrize(
    ("who", "holds"),
    [
        # A slot of the centre and one of CERN's, of two VOs each.
        (ADMIN, [True, True, False, False]),
        (Principal(role="admin", subject="root", authority="CERN"), [False, False, True, True]),
        (user(), [True, False, True, False]),
        (user(vo=""), [False] * 4),
        (pilot("*"), [False] * 4),
    ],
)
def test_sums_are_read_as_far_as_jobs_are(who: Principal, holds: list[bool]) -> None:
    reach = access.reach(who)
    assert [reach.holds(slot, vo) for slot in (5, 12_288) for vo in ("atlas", "charmm")] == holds
    assert not reach.holds(5, "") or who is ADMIN


@pytest.mark.parametrize(
    ("who", "allowed"),
    [
        (user("alice"), True),
        (user("bob"), False),
        (user("bob", roles=("manager:higgs",)), True),
        (user("bob", roles=("manager:susy",)), False),
        (user("bob", roles=("production",)), True),
        (user("bob", vo="charmm", roles=("production", "manager:higgs")), False),
        (user("alice", vo="charmm"), False),
        (ADMIN, True),
        (pilot("*"), False),
    ],
)
def test_who_may_end_a_job_of_alice_in_the_group_higgs(who: Principal, allowed: bool) -> None:
    assert access.may_end(who, owner="central:alice", vo="atlas", working_group="higgs", authority="central") is allowed


def test_a_job_without_a_group_has_no_group_manager() -> None:
    manager = user("bob", roles=("manager:",))
    assert not access.may_end(manager, owner="central:alice", vo="atlas", working_group="", authority="central")


@pytest.mark.parametrize(
    ("who", "allowed"),
    [
        (user(roles=("production",)), True),
        (user(), False),
        (user(vo="charmm", roles=("production",)), False),
        (ADMIN, True),
        (pilot("*"), False),
    ],
)
def test_the_data_side_is_production_of_the_same_vo(who: Principal, allowed: bool) -> None:
    assert access.may_speak_for_data(who, vo="atlas", owner="central:alice", authority="central") is allowed


# --- authorities ------------------------------------------------------------------------------------------------------

WIDE = ("production", "manager:higgs")


@pytest.mark.parametrize(
    ("who", "owner", "authority", "reads", "ends", "speaks"),
    [
        # A namesake at another authority is somebody else.
        (user("alice"), "CERN:alice", "CERN", True, False, False),
        (user("alice"), "central:alice", "CERN", True, True, False),
        # Roles and admins reach as far as their authority: its slots, and its accounts' jobs anywhere.
        (user("bob", roles=WIDE), "CERN:alice", "CERN", True, False, False),
        (user("bob", roles=WIDE), "central:alice", "CERN", True, True, True),
        (user("bob", roles=WIDE), "CERN:alice", "central", True, True, True),
        (ADMIN, "CERN:alice", "CERN", False, False, False),
        (ADMIN, "central:alice", "CERN", True, True, True),
        (ADMIN, "CERN:alice", "central", True, True, True),
    ],
)
def test_rights_end_where_another_authority_begins(
    who: Principal, owner: str, authority: str, *, reads: bool, ends: bool, speaks: bool
) -> None:
    job = {"vo": "atlas", "owner": owner, "authority": authority}
    assert access.may_read(who, **job) is reads
    assert access.may_end(who, working_group="higgs", **job) is ends
    assert access.may_speak_for_data(who, **job) is speaks


def test_a_missing_role_is_403_and_names_both() -> None:
    access.require_role(ADMIN, "user", "admin")
    with pytest.raises(ClientFault, match=r"user or admin, the token has pilot") as caught:
        access.require_role(pilot("*"), "user", "admin")
    assert (caught.value.code, caught.value.http_status) == ("forbidden", 403)


@pytest.mark.parametrize(
    ("who", "allowed"),
    [
        (ADMIN, True),
        (user(roles=("monitor",)), True),
        (user(roles=("production", "manager:higgs")), False),
        (Principal(role="pilot", subject="p", authority="central", roles=["monitor"]), False),
    ],
)
def test_metrics_are_for_admins_and_the_role_monitor(who: Principal, allowed: bool) -> None:
    if allowed:
        access.require_monitor(who)
        return
    with pytest.raises(ClientFault) as caught:
        access.require_monitor(who)
    assert (caught.value.code, caught.value.http_status) == ("forbidden", 403)
