"""PanDA's default priority formula (PrioUtil of panda-server, unchanged from 2009 to 2026).

A priority is a whole number, larger first; only the formula may make it negative, a caller may not.
"""

from typing import Final

MAX_PRIORITY: Final = 1_000_000
USER_BASE: Final = 1000
BUILD_BASE: Final = 2000
EXPRESS_RUN: Final = 6000
EXPRESS_BUILD: Final = 6500
DDM: Final = 200_000
JOBS_PER_PRIORITY_STEP: Final = 5


def default_priority(
    label: str, *, serial: int, offset: int = 0, quota_weight: float = 0.0, express: bool = False
) -> int:
    """The priority of a job for which the submitter named none.

    Args:
        label: the job's label; `panda` marks a build job.
        serial: jobs that the owner has in the system already, plus this one's index in the call (0, 1, ..).
        offset: the computing queue's offset for the job's group.
        quota_weight: used CPU over the daily quota, counted from 1 on; 0 below it.
        express: the express lane (6000 for run jobs, 6500 for builds).
    """
    if label == "ddm":
        return DDM
    if express:
        return EXPRESS_BUILD if label == "panda" else EXPRESS_RUN
    if label == "panda":
        return BUILD_BASE + offset
    weight = int(100 * quota_weight) if quota_weight >= 1 else 0
    return USER_BASE + offset - serial // JOBS_PER_PRIORITY_STEP - weight
