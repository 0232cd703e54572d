"""PanDA's `prodSourceLabel` streams: which jobs a pilot of a label may take.

Source: the label mapping of panda-server's getJob (2009) and JobUtils (2026).
"""

from typing import Final

ANY: Final = frozenset(
    {
        "managed", "test", "prod_test", "user", "panda", "usermerge", "ddm", "software", "install", "regional",
        "ptest", "rc_test", "rc_test2", "rc_alrb",
    }
)  # fmt: skip
"""Every label that a job may carry."""

PRODUCTION: Final = frozenset({"managed", "test", "prod_test", "ddm", "software", "install", "regional"})
"""Labels that only the role `production` or an admin may submit."""

_NEUTRAL: Final = frozenset({"ptest", "rc_test", "rc_test2", "rc_alrb"})
_TURNED_BY_TEST_STATUS: Final = frozenset({"", "managed", "user", "unified"})
_STREAMS: Final[dict[str, frozenset[str]]] = {
    "": frozenset({"managed", "test"}),
    "managed": frozenset({"managed", "test"}),
    "user": frozenset({"user", "panda"}),
    "test": frozenset({"test", "prod_test"}),
    "unified": ANY,
}
_QUEUE_TYPE_LABEL: Final = {"analysis": "user", "production": "managed", "unified": "unified"}


def allowed_job_labels(pilot_label: str, *, queue_status: str, queue_type: str) -> frozenset[str]:
    """The job labels that a pilot may take.

    Args:
        pilot_label: what the pilot asks for; "" is PanDA's "none given" and means production.
        queue_status: a computing queue in `test` turns ordinary pilots into test pilots.
        queue_type: analysis | production | unified; a neutral test pilot takes the queue's own stream beside its own.
    """
    if queue_status == "test" and pilot_label in _TURNED_BY_TEST_STATUS:
        return _STREAMS["test"]
    if pilot_label in _NEUTRAL:
        return _STREAMS[_QUEUE_TYPE_LABEL[queue_type]] | {pilot_label}
    return _STREAMS.get(pilot_label, frozenset({pilot_label}))
