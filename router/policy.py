"""What a submitter may ask for: pure checks of each job before anything is forwarded."""

from culm import access, labels, priorities
from culm.access import forbidden
from culm.errors import ClientFault
from culm.wire import JobSpec, Principal


def check_jobs(principal: Principal, specs: list[JobSpec]) -> None:
    """Raises ClientFault (bad_job, forbidden) that names the first offending job by its place in the call."""
    access.require_role(principal, "user", "admin")
    for index, spec in enumerate(specs):
        try:
            _check_job(principal, spec)
        except ClientFault as error:
            raise ClientFault(
                error.code, f"jobs[{index}]: {error.message}", http_status=error.http_status, details={"index": index}
            ) from None


def _check_job(principal: Principal, spec: JobSpec) -> None:
    if bool(spec.argv) == bool(spec.shell):
        raise ClientFault("bad_job", "exactly one of argv and shell is needed")
    if spec.argv and not spec.argv[0]:
        raise ClientFault("bad_job", "argv[0] is empty")
    if any("\0" in text for text in (*spec.argv, spec.shell, *spec.environment, *spec.environment.values())):
        raise ClientFault("bad_job", "a NUL byte cannot be passed to a process")
    if any("\0" in name for name in (*spec.outputs, *(file.name for file in spec.inputs))):
        raise ClientFault("bad_job", "a NUL byte cannot be part of a file's name")
    if any("=" in name for name in spec.environment):
        raise ClientFault("bad_job", "the name of an environment variable cannot hold '='")
    if any("/" in name or name in {".", ".."} for name in spec.outputs):
        raise ClientFault("bad_job", "an output is a file name without a path")
    if spec.label not in labels.ANY:
        raise ClientFault("bad_job", f"the label {spec.label!r} is none of {', '.join(sorted(labels.ANY))}")
    if principal.role == "admin":
        return
    is_production = access.is_production(principal)
    if spec.working_group and spec.working_group not in principal.groups:
        raise forbidden(f"{principal.subject} is not in the working group {spec.working_group}")
    if spec.label in labels.PRODUCTION and not is_production:
        raise forbidden(f"the label {spec.label} needs the role production")
    most = priorities.BUILD_BASE if spec.label == "panda" else priorities.USER_BASE
    if spec.priority is not None and spec.priority > most and not is_production:
        raise forbidden(f"a priority above {most} needs the role production")
