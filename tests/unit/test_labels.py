"""PanDA's label mapping, every job label against every pilot label, by the state and the type of the queue."""

import pytest

from culm.labels import ANY, PRODUCTION, allowed_job_labels

JOB_LABELS = [
    *("managed", "test", "prod_test", "user", "panda", "usermerge", "ddm", "software", "install", "regional"),
    *("ptest", "rc_test", "rc_test2", "rc_alrb"),
]

# What a pilot of a label takes at a queue that is online, of type unified.
ONLINE = {
    "": "managed test",
    "managed": "managed test",
    "user": "user panda",
    "test": "test prod_test",
    "prod_test": "prod_test",
    "ddm": "ddm",
    "software": "software",
    "install": "install",
    "panda": "panda",
    "usermerge": "usermerge",
    "regional": "regional",
    "unified": " ".join(JOB_LABELS),
}
# A queue in status test turns the ordinary pilots into test pilots; the others stay what they are.
IN_TEST = ONLINE | dict.fromkeys(("", "managed", "user", "unified"), "test prod_test")
NEUTRAL = ("ptest", "rc_test", "rc_test2", "rc_alrb")
STREAM_OF_TYPE = {"production": "managed test", "analysis": "user panda", "unified": " ".join(JOB_LABELS)}


@pytest.mark.parametrize("pilot", ONLINE)
@pytest.mark.parametrize("job", JOB_LABELS)
@pytest.mark.parametrize("queue_type", ["analysis", "production", "unified"])
def test_online(pilot: str, job: str, queue_type: str) -> None:
    allowed = allowed_job_labels(pilot, queue_status="online", queue_type=queue_type)
    assert (job in allowed) == (job in ONLINE[pilot].split())


@pytest.mark.parametrize("pilot", IN_TEST)
@pytest.mark.parametrize("job", JOB_LABELS)
def test_a_queue_in_test(pilot: str, job: str) -> None:
    allowed = allowed_job_labels(pilot, queue_status="test", queue_type="unified")
    assert (job in allowed) == (job in IN_TEST[pilot].split())


@pytest.mark.parametrize("pilot", NEUTRAL)
@pytest.mark.parametrize("status", ["online", "test"])
@pytest.mark.parametrize(("queue_type", "stream"), STREAM_OF_TYPE.items())
def test_pilots_under_test_take_the_queues_own_stream(pilot: str, status: str, queue_type: str, stream: str) -> None:
    allowed = allowed_job_labels(pilot, queue_status=status, queue_type=queue_type)
    assert allowed == {*stream.split(), pilot}


def test_a_test_job_never_goes_to_an_ordinary_user_pilot() -> None:
    assert not allowed_job_labels("user", queue_status="online", queue_type="unified") & {"test", "prod_test"}


def test_an_unknown_label_stands_for_itself_only() -> None:
    assert allowed_job_labels("new_kind", queue_status="online", queue_type="unified") == {"new_kind"}


def test_the_sets_of_labels() -> None:
    assert sorted(JOB_LABELS) == sorted(ANY)
    assert PRODUCTION <= ANY
    assert not PRODUCTION & {"user", "panda", "usermerge"}
