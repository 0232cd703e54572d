"""What a submitter may ask for."""

import pytest

from culm import labels
from culm.errors import ClientFault
from culm.wire import InputFile, JobSpec, Principal
from router.policy import check_jobs

USER = Principal(role="user", subject="ann", authority="central", vo="atlas", groups=["higgs"])
PRODUCTION = Principal(role="user", subject="prod", authority="central", vo="atlas", roles=["production"])
ADMIN = Principal(role="admin", subject="root", authority="central")
PILOT = Principal(role="pilot", subject="p", authority="central", queues=["*"])


def spec(**changes: object) -> JobSpec:
    return JobSpec(**({"argv": ["true"]} | changes))  # type: ignore[arg-type]  # fields by name


def refused(who: Principal, *specs: JobSpec) -> ClientFault:
    with pytest.raises(ClientFault) as caught:
        check_jobs(who, list(specs))
    return caught.value


@pytest.mark.parametrize(
    "good",
    [
        {"argv": ["true"]},
        {"argv": ["echo", ""]},
        {"argv": [], "shell": "echo hi"},
        {"environment": {"A": "b=c"}},
        {"outputs": ["out.root", "..."]},
        {"working_group": "higgs"},
        {"label": "panda", "priority": 2000},
        {"priority": 1000},
        {"priority": 0},
    ],
)
def test_an_ordinary_job_of_an_ordinary_user_passes(good: dict[str, object]) -> None:
    check_jobs(USER, [spec(**good)])


@pytest.mark.parametrize(
    "bad",
    [
        {"argv": []},
        {"argv": ["true"], "shell": "true"},
        {"argv": [""]},
        {"argv": ["tr\0ue"]},
        {"argv": ["echo", "\0"]},
        {"argv": [], "shell": "echo \0"},
        {"environment": {"A": "\0"}},
        {"environment": {"A\0": "b"}},
        {"environment": {"A=B": "c"}},
        {"outputs": ["../etc/passwd"]},
        {"outputs": ["/etc/passwd"]},
        {"outputs": [".."]},
        {"outputs": ["."]},
        {"outputs": ["a\0b"]},
        {"inputs": [InputFile(name="a\0b")]},
        {"label": "nonsense"},
    ],
)
def test_what_no_pilot_could_run_is_a_bad_job_whoever_asks(bad: dict[str, object]) -> None:
    for who in (USER, PRODUCTION, ADMIN):
        error = refused(who, spec(), spec(**bad))
        assert (error.code, error.http_status, error.details) == ("bad_job", 400, {"index": 1})
        assert error.message.startswith("jobs[1]: ")


@pytest.mark.parametrize(
    "bold",
    [
        {"working_group": "susy"},
        {"priority": 1001},
        {"label": "panda", "priority": 2001},
        *({"label": label} for label in sorted(labels.PRODUCTION)),
    ],
)
def test_what_needs_a_role_is_forbidden_to_an_ordinary_user(bold: dict[str, object]) -> None:
    error = refused(USER, spec(**bold))
    assert (error.code, error.http_status, error.details) == ("forbidden", 403, {"index": 0})
    check_jobs(ADMIN, [spec(**bold)])


@pytest.mark.parametrize("bold", [{"priority": 900_000}, *({"label": label} for label in sorted(labels.PRODUCTION))])
def test_production_may_name_priorities_and_its_labels(bold: dict[str, object]) -> None:
    check_jobs(PRODUCTION, [spec(**bold)])


def test_production_of_a_vo_is_not_in_every_group() -> None:
    assert refused(PRODUCTION, spec(working_group="higgs")).code == "forbidden"


def test_a_pilot_submits_nothing() -> None:
    error = refused(PILOT, spec())
    assert (error.code, error.http_status) == ("forbidden", 403)
