"""The thin path over HTTP: submit, get_job, heartbeat, report through a router and a shard."""

import secrets

from culm.states import State
from culm.wire import GetJobRequest, HeartbeatRequest, PilotInfo, ReportRequest, SubmitRequest
from tests.front import front
from tests.partition import PILOT, QUEUE, Partition, job


async def test_a_job_goes_from_submit_to_finish_over_http(shard: Partition) -> None:
    async with front(shard) as router, router.client() as user, router.client(PILOT) as pilot:
        submitted = await user.submit(SubmitRequest(idempotency_key="one", jobs=[job()]))
        request = GetJobRequest(request_id=secrets.token_hex(8), queue=QUEUE, pilot=PilotInfo(id="p1"))
        [grant] = (await pilot.get_job(request)).jobs
        assert [grant.id] == submitted.ids
        held = {"id": grant.id, "attempt": grant.attempt, "lease_token": grant.lease_token}
        assert (await pilot.heartbeat(HeartbeatRequest(**held, state=State.RUNNING))).state is State.RUNNING
        assert (await pilot.report(ReportRequest(**held, state=State.FINISHED, exit_code=0))).state is State.FINISHED
        view = await user.job(grant.id)
        assert view.job.state is State.FINISHED
        assert [report.exit_code for report in view.reports] == [0]
