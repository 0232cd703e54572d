"""What pilots see of a router: every answer to get_job, clients that hang up, repeats, stale attempts."""

import asyncio
import secrets
import socket
from typing import Any

import msgspec
import pytest

from culm.client import Client
from culm.errors import ClientFault, Conflict
from culm.registry_wire import ChangedAnswer, QueueRequest
from culm.states import State
from culm.topology import Queue
from culm.wire import (
    GetJobAnswer,
    GetJobRequest,
    Grant,
    HeartbeatRequest,
    JobSpec,
    PilotInfo,
    ReportRequest,
    SubmitAnswer,
    SubmitRequest,
)
from tests.front import RunningFront, front
from tests.partition import ADMIN, PILOT, QUEUE, USER, Partition, job
from tests.waiting import eventually

DEADLINE_S = 15.0
WAIT_S = 30.0


def asking(**changes: Any) -> GetJobRequest:
    """A get_job of pilot p1."""
    values = {"request_id": secrets.token_hex(8), "queue": QUEUE, "pilot": PilotInfo(id="p1", host="node1")}
    return GetJobRequest(**(values | changes))


async def submit(user: Client, *specs: JobSpec, key: str = "") -> SubmitAnswer:
    """Submit these jobs, or one small one."""
    jobs = list(specs) or [job()]
    return await user.submit(SubmitRequest(idempotency_key=key or secrets.token_hex(8), jobs=jobs))


async def parked(shard: Partition, n_pilots: int = 1) -> None:
    """Wait until so many pilots wait at the shard."""
    waiting = shard.shard.dispatcher._parking
    await eventually(lambda: len(waiting) == n_pilots, DEADLINE_S, what=f"{n_pilots} pilots are parked")


async def test_no_job_is_an_empty_answer_without_a_reason(shard: Partition) -> None:
    async with front(shard) as router, router.client(PILOT) as pilot:
        assert await pilot.get_job(asking()) == GetJobAnswer()


async def test_several_jobs_come_in_one_answer_best_first(shard: Partition) -> None:
    async with front(shard) as router, router.client() as user, router.client(PILOT) as pilot:
        answer = await submit(user, *(job(priority=priority) for priority in (10, 900, 500)))
        grants = (await pilot.get_job(asking(n_jobs=2))).jobs
        assert [grant.id for grant in grants] == [answer.ids[1], answer.ids[2]]
        assert [grant.priority for grant in grants] == [900, 500]
        assert [grant.id for grant in (await pilot.get_job(asking(n_jobs=100))).jobs] == [answer.ids[0]]


@pytest.mark.parametrize("kind", ["application/json", "application/msgpack"])
async def test_the_spec_comes_in_the_dialect_of_the_pilot(shard: Partition, kind: str) -> None:
    spec = job(argv=["echo", "grüße", "\u2028"], environment={"A": "1"}, memory_mb=5, outputs=["out"])
    stored = msgspec.structs.replace(spec, cores=1, max_attempts=3)
    async with front(shard) as router, router.client() as user:
        await submit(user, spec)
        encode = msgspec.json.encode if kind == "application/json" else msgspec.msgpack.encode
        reply = await router.send("POST", "/v1/get_job", encode(asking()), kind=kind, token=router.token(PILOT))
        assert reply.headers["Content-Type"] == kind
        assert msgspec.convert(reply.body["jobs"][0]["spec"], JobSpec) == stored


async def test_a_waiting_pilot_is_woken_by_a_submit(shard: Partition) -> None:
    async with front(shard) as router, router.client() as user, router.client(PILOT) as pilot:
        waiting = asyncio.create_task(pilot.get_job(asking(wait_s=WAIT_S)))
        await parked(shard)
        answer = await submit(user)
        async with asyncio.timeout(WAIT_S / 3):
            assert [grant.id for grant in (await waiting).jobs] == answer.ids


async def test_a_wait_that_brings_nothing_ends_in_time_and_empty(shard: Partition) -> None:
    async with front(shard) as router, router.client(PILOT) as pilot:
        began = asyncio.get_running_loop().time()
        assert (await pilot.get_job(asking(wait_s=0.3))).jobs == []
        assert 0.25 < asyncio.get_running_loop().time() - began < 5.0


class _Raw:
    """A get_job over a bare socket, so that it can be hung up at any moment."""

    def __init__(self, router: RunningFront) -> None:
        self._router = router

    async def ask(self, request: GetJobRequest) -> "_Raw":
        body = msgspec.json.encode(request)
        head = (
            f"POST /v1/get_job HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {self._router.token(PILOT)}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        host, port = self._router.url.removeprefix("http://").split(":")
        self._socket = socket.create_connection((host, int(port)))
        self._socket.sendall(head.encode() + body)
        return self

    def hang_up(self) -> bool:
        """Close the connection now; whether an answer had arrived by then, which nobody can take back."""
        try:
            return bool(self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except BlockingIOError:
            return False
        finally:
            self._socket.close()


async def test_a_pilot_that_hangs_up_while_it_waits_gets_no_job(shard: Partition) -> None:
    async with front(shard) as router, router.client() as user, router.client(PILOT) as pilot:
        gone = await _Raw(router).ask(asking(wait_s=WAIT_S))
        await parked(shard)
        gone.hang_up()
        await parked(shard, 0)
        answer = await submit(user)
        assert [grant.id for grant in (await pilot.get_job(asking())).jobs] == answer.ids
        view = await user.job(answer.ids[0] or 0)
        assert view.job.attempt == 1


async def test_a_pilot_that_hangs_up_while_it_is_answered_gives_its_job_back(shard: Partition) -> None:
    """Hung up at any moment before the answer is there: the job comes to the next pilot, long before its lease ends."""
    async with front(shard) as router, router.client() as user, router.client(PILOT) as pilot:
        n_given_back = 0
        for n_turns in range(0, 60, 3):
            answer = await submit(user)
            gone = await _Raw(router).ask(asking())
            for _ in range(n_turns):
                await asyncio.sleep(0)
            if gone.hang_up():
                continue

            async def granted() -> list[int]:
                return [grant.id for grant in (await pilot.get_job(asking(request_id=secrets.token_hex(8)))).jobs]

            assert await eventually(granted, DEADLINE_S, what="the next pilot gets the job") == answer.ids
            n_given_back += 1
        assert n_given_back > 1


async def test_an_answer_that_cannot_be_written_is_given_back(
    shard: Partition, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with front(shard) as router, router.client() as user, router.client(PILOT) as pilot:
        answer = await submit(user)
        given_back = []
        monkeypatch.setattr("router.dialects.grants_in", lambda _dialect, found: given_back.append(found) or 1 / 0)
        with pytest.raises(Exception, match="internal"):
            await pilot.get_job(asking())
        monkeypatch.undo()
        assert len(given_back) == 1

        async def granted() -> list[int]:
            return [grant.id for grant in (await pilot.get_job(asking())).jobs]

        assert await eventually(granted, DEADLINE_S, what="the job is dispatched again") == answer.ids


async def test_a_repeated_request_gets_the_same_job(shard: Partition) -> None:
    async with front(shard) as router, router.client() as user, router.client(PILOT) as pilot:
        await submit(user, job(), job(), job())
        request = asking(n_jobs=2)
        first = await pilot.get_job(request)
        assert len(first.jobs) == 2
        again = await pilot.get_job(request)
        assert [(g.id, g.attempt, g.lease_token) for g in again.jobs] == [
            (g.id, g.attempt, g.lease_token) for g in first.jobs
        ]


async def test_the_request_id_of_another_pilots_token_is_another_request(shard: Partition) -> None:
    stranger = msgspec.structs.replace(PILOT, subject="strangers")
    async with front(shard) as router, router.client() as user:
        await submit(user)
        request = asking()
        async with router.client(PILOT) as pilot, router.client(stranger) as other:
            assert len((await pilot.get_job(request)).jobs) == 1
            assert (await other.get_job(request)).jobs == []


async def test_a_stale_attempt_is_a_conflict_and_changes_nothing(shard: Partition) -> None:
    async with front(shard) as router, router.client() as user, router.client(PILOT) as pilot:
        await submit(user)
        [first] = (await pilot.get_job(asking())).jobs
        old = {"id": first.id, "attempt": first.attempt, "lease_token": first.lease_token}
        await shard.sql("UPDATE lease SET expires_at = '2001-01-01'")

        async def granted_again() -> list[Grant]:
            return (await pilot.get_job(asking())).jobs

        [second] = await eventually(granted_again, DEADLINE_S, what="the job is dispatched again")
        assert (second.id, second.attempt) == (first.id, first.attempt + 1)
        before = await user.job(first.id)
        for stale in (old, old | {"attempt": second.attempt}, old | {"lease_token": "0" * 16, "attempt": 9}):
            with pytest.raises(Conflict) as heard:
                await pilot.heartbeat(HeartbeatRequest(**stale, state=State.RUNNING))
            assert heard.value.code == "lease_lost"
            with pytest.raises(Conflict):
                await pilot.report(ReportRequest(**stale, state=State.FAILED))
        assert await user.job(first.id) == before


async def test_a_repeated_final_report_gets_the_first_answer(shard: Partition) -> None:
    async with front(shard) as router, router.client() as user, router.client(PILOT) as pilot:
        await submit(user)
        [grant] = (await pilot.get_job(asking())).jobs
        held = {"id": grant.id, "attempt": grant.attempt, "lease_token": grant.lease_token}
        first = await pilot.report(ReportRequest(**held, state=State.FINISHED, exit_code=0))
        assert first.state is State.FINISHED
        assert await pilot.report(ReportRequest(**held, state=State.FINISHED, exit_code=0)) == first
        # Also where the repeat says something else: the first report stands.
        assert await pilot.report(ReportRequest(**held, state=State.FAILED, exit_code=1)) == first
        assert [report.exit_code for report in (await user.job(grant.id)).reports] == [0]


async def test_an_offline_queue_gives_its_reason_and_no_job(shard: Partition) -> None:
    async with (
        front(shard) as router,
        router.client() as user,
        router.client(PILOT) as pilot,
        router.client(ADMIN) as admin,
    ):
        answer = await submit(user)
        await admin.post("queue", QueueRequest(queue=QUEUE, changes={"status": "offline"}), ChangedAnswer)
        router.forward.fresh_topology()
        assert await pilot.get_job(asking()) == GetJobAnswer(reason="queue_offline")
        # Also to one that would wait: there is nothing to wait for.
        async with asyncio.timeout(5.0):
            assert await pilot.get_job(asking(wait_s=60.0)) == GetJobAnswer(reason="queue_offline")
        await admin.post("queue", QueueRequest(queue=QUEUE, changes={"status": "online"}), ChangedAnswer)
        router.forward.fresh_topology()
        assert [grant.id for grant in (await pilot.get_job(asking())).jobs] == answer.ids


async def test_a_repeat_finds_its_job_though_the_queue_went_offline(shard: Partition) -> None:
    async with (
        front(shard) as router,
        router.client() as user,
        router.client(PILOT) as pilot,
        router.client(ADMIN) as admin,
    ):
        answer = await submit(user)
        request = asking()
        await pilot.get_job(request)
        await admin.post("queue", QueueRequest(queue=QUEUE, changes={"status": "offline"}), ChangedAnswer)
        router.forward.fresh_topology()
        assert [grant.id for grant in (await pilot.get_job(request)).jobs] == answer.ids


async def test_a_pilots_token_opens_its_own_queues_only(shard: Partition) -> None:
    elsewhere = msgspec.structs.replace(PILOT, queues=["FZK-*", "BNL"])
    async with front(shard) as router, router.client() as user, router.client(PILOT) as pilot:
        answer = await submit(user, job(), job())
        [grant] = (await pilot.get_job(asking())).jobs
        held = {"id": grant.id, "attempt": grant.attempt, "lease_token": grant.lease_token}
        async with router.client(elsewhere) as stranger:
            for refused in (
                stranger.get_job(asking()),
                stranger.heartbeat(HeartbeatRequest(**held, state=State.RUNNING)),
                stranger.report(ReportRequest(**held, state=State.FINISHED)),
            ):
                with pytest.raises(ClientFault) as caught:
                    await refused
                assert (caught.value.code, caught.value.http_status) == ("forbidden", 403)
        assert [(await user.job(i or 0)).job.state for i in answer.ids] == [State.SENT, State.ACTIVATED]


async def test_a_pilots_token_is_for_pilots_verbs_only(shard: Partition) -> None:
    async with front(shard) as router:
        token = router.token(PILOT)
        for method, path, body in (
            ("POST", "/v1/submit", b'{"idempotency_key": "x", "jobs": [{"site": "BNL", "argv": ["true"]}]}'),
            ("POST", "/v1/cancel", b'{"ids": [1]}'),
            ("POST", "/v1/sites", b'{"sites": [{"name": "X", "region": "US", "queues": {}}]}'),
            ("POST", "/v1/queue", b'{"queue": "BNL-q", "changes": {"status": "offline"}}'),
            ("POST", "/v1/report", b'{"id": 1, "event": "finish"}'),
            ("GET", "/v1/job/1", None),
            ("GET", "/v1/jobs", None),
            ("GET", "/v1/topology", None),
        ):
            reply = await router.send(method, path, body, token=token)
            assert (reply.status, reply.code) in {(403, "forbidden"), (404, "unknown_job")}, (path, reply.body)
        assert await shard.rows("SELECT id FROM job") == []
        assert router.forward.fresh_topology().queue(QUEUE)[2] == Queue()


async def test_a_users_token_takes_no_job(shard: Partition) -> None:
    async with front(shard) as router, router.client(USER) as user:
        await submit(user)
        with pytest.raises(ClientFault) as caught:
            await user.get_job(asking())
        assert caught.value.http_status == 403


async def test_a_vos_pilot_takes_its_vos_jobs_only(shard: Partition) -> None:
    charmm = msgspec.structs.replace(USER, subject="cy", vo="charmm", groups=[])
    async with front(shard) as router, router.client() as user, router.client(charmm) as other:
        await submit(user)
        theirs = await submit(other)
        async with router.client(msgspec.structs.replace(PILOT, vos=["charmm"])) as pilot:
            assert [grant.id for grant in (await pilot.get_job(asking(n_jobs=10))).jobs] == theirs.ids


async def test_pilots_that_wait_keep_nobody_else_from_the_shard(shard: Partition) -> None:
    async with (
        front(shard, link_window=4, link_waiting=40) as router,
        router.client() as user,
        router.client(PILOT, patience_s=0.0) as pilot,
    ):
        waiting = [asyncio.ensure_future(pilot.get_job(asking(wait_s=30.0))) for _ in range(40)]
        link = router.forward.links._links["us1"]
        await eventually(
            lambda: link._connection is not None and link._connection.n_waiting == 40, 10.0, what="all wait"
        )
        answer = await submit(user, *(JobSpec(site="BNL", argv=["true"]) for _ in range(40)))
        granted = [grant for one in await asyncio.gather(*waiting) for grant in one.jobs]
        assert sorted(grant.id for grant in granted) == sorted(map(int, filter(None, answer.ids)))
        for grant in granted:
            held = {"id": grant.id, "attempt": grant.attempt, "lease_token": grant.lease_token}
            await pilot.heartbeat(HeartbeatRequest(**held, state=State.RUNNING))
