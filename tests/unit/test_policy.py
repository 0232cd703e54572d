"""What a submitter may ask for."""

from typing import Any

import pytest

from culm.errors import ClientFault
from culm.labels import ANY, PRODUCTION
from culm.wire import InputFile, JobSpec, Principal
from router.policy import check_jobs

ANN = Principal(role="user", subject="ann", authority="central", vo="atlas", groups=["higgs"])
PROD = Principal(role="user", subject="prod", authority="central", vo="atlas", roles=["production"])
ADMIN = Principal(role="admin", subject="root", authority="central")
PILOT = Principal(role="pilot", subject="p", authority="central", queues=["*"])


def spec(**changes: Any) -> JobSpec:
    return JobSpec(**({"argv": ["true"]} | changes))


def verdict(who: Principal, *specs: JobSpec) -> str:
    """The error's code, or "ok"."""
    try:
        check_jobs(who, list(specs))
    except ClientFault as error:
        return error.code
    return "ok"


@pytest.mark.parametrize(
    "good",
    [
        spec(),
        spec(argv=[], shell="echo hi"),
        spec(argv=["echo", ""]),
        spec(environment={"PATH": "/bin", "EMPTY": ""}),
        spec(outputs=["a.root", "..a", "...", "b c"]),
        spec(inputs=[InputFile(name="scope:dataset/file")]),
        spec(working_group="higgs"),
        spec(priority=0),
        spec(priority=1000),
        spec(label="panda", priority=2000),
        spec(label="ptest"),
    ],
)
def test_a_user_may(good: JobSpec) -> None:
    assert verdict(ANN, good) == "ok"


@pytest.mark.parametrize(
    "bad",
    [
        spec(argv=[]),
        spec(shell="x"),
        spec(argv=[""]),
        spec(argv=["", "x"]),
        spec(argv=["a\0"]),
        spec(argv=[], shell="a\0"),
        spec(environment={"A\0": "x"}),
        spec(environment={"A": "x\0"}),
        spec(environment={"A=": "x"}),
        spec(outputs=["a/b"]),
        spec(outputs=["/etc/passwd"]),
        spec(outputs=[".."]),
        spec(outputs=["."]),
        spec(outputs=["a\0"]),
        spec(inputs=[InputFile(name="\0")]),
        spec(label="x"),
        spec(label="unified"),
    ],
)
def test_nobody_may(bad: JobSpec) -> None:
    assert [verdict(who, bad) for who in (ANN, PROD, ADMIN)] == ["bad_job"] * 3


@pytest.mark.parametrize(
    ("privileged", "who"),
    [
        (spec(working_group="susy"), ADMIN),
        (spec(priority=1001), PROD),
        (spec(label="panda", priority=2001), PROD),
        *((spec(label=label), PROD) for label in sorted(PRODUCTION)),
    ],
)
def test_what_needs_a_privilege(privileged: JobSpec, who: Principal) -> None:
    assert verdict(ANN, privileged) == "forbidden"
    assert verdict(who, privileged) == "ok"
    assert verdict(ADMIN, privileged) == "ok"


def test_the_role_production_makes_nobody_a_member_of_a_group() -> None:
    assert verdict(PROD, spec(working_group="higgs")) == "forbidden"


def test_labels_that_are_not_productions_are_everybodys() -> None:
    assert {label for label in ANY if verdict(ANN, spec(label=label)) == "ok"} == ANY - PRODUCTION


def test_a_pilot_submits_nothing() -> None:
    assert verdict(PILOT, spec()) == "forbidden"


def test_the_first_offender_is_named() -> None:
    with pytest.raises(ClientFault) as caught:
        check_jobs(ANN, [spec(), spec(), spec(argv=[]), spec(label="managed")])
    assert (caught.value.code, caught.value.details) == ("bad_job", {"index": 2})
    assert caught.value.message.startswith("jobs[2]: ")
