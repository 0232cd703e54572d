"""Sites and computing queues, changed through a router: by admins only, with an audit row, kept by what is on disk."""

import asyncio
import json
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from culm.client import Client
from culm.errors import ClientFault, Conflict, CulmError, Unavailable
from culm.link import LinkServer
from culm.registry_wire import MAX_SITES_PER_CALL, ChangedAnswer, QueueRequest, ShardRequest, SitesRequest
from culm.topology import Queue, SiteRegistration
from culm.topology_store import AUDIT
from culm.wire import GetJobRequest, JobSpec, PilotInfo, SubmitRequest
from tests.front import RunningFront, front
from tests.partition import ADMIN, PILOT, PRODUCTION, QUEUE, USER, Partition


def site(name: str, region: str = "US", **queue: Any) -> SiteRegistration:
    """A site with one computing queue."""
    return SiteRegistration(name=name, region=region, queues={f"{name}-q": Queue(**queue)})


async def register(router: RunningFront, *sites: SiteRegistration) -> ChangedAnswer:
    """Register as an admin."""
    async with router.client(ADMIN) as admin:
        return await admin.post("sites", SitesRequest(sites=list(sites), reason="a test"), ChangedAnswer)


async def change(router: RunningFront, queue: str, **changes: Any) -> ChangedAnswer:
    """Change a computing queue as an admin."""
    async with router.client(ADMIN) as admin:
        return await admin.post("queue", QueueRequest(queue=queue, changes=changes), ChangedAnswer)


def audit(router: RunningFront) -> list[dict[str, Any]]:
    """The rows of the audit, oldest first."""
    path = router.folder / "topology" / AUDIT
    return [msgspec.json.decode(line) for line in path.read_bytes().splitlines()] if path.exists() else []


async def test_a_new_site_takes_jobs_and_pilots_at_once(shard: Partition) -> None:
    async with front(shard) as router, router.client(USER) as user, router.client(PILOT) as pilot:
        answer = await register(router, site("AGLT2"))
        jobs = [JobSpec(site="AGLT2", argv=["true"])]
        ids = (await user.submit(SubmitRequest(idempotency_key="k", jobs=jobs))).ids
        request = GetJobRequest(request_id="r" * 8, queue="AGLT2-q", pilot=PilotInfo(id="p"))
        assert [grant.id for grant in (await pilot.get_job(request)).jobs] == ids
        assert router.forward.topology.epochs == {"central": answer.epoch}


async def test_a_change_is_audited_with_its_author_and_nothing_to_change_is_none(shard: Partition) -> None:
    async with front(shard) as router:
        before = router.forward.topology.epochs["central"]
        first = await register(router, site("AGLT2"))
        assert await register(router, site("AGLT2")) == first
        assert first == ChangedAnswer(authority="central", epoch=before + 1)
        [row] = audit(router)
        assert (row["from_epoch"], row["to_epoch"]) == (before, before + 1)
        assert (row["actor"], row["reason"]) == ("central:root", "a test")


@pytest.mark.parametrize("who", [USER, PRODUCTION, PILOT], ids=lambda who: who.subject)
async def test_only_an_admin_changes_the_topology(shard: Partition, who: Any) -> None:
    async with front(shard) as router, router.client(who) as client:
        for verb, request in (
            ("sites", SitesRequest(sites=[site("X")])),
            ("queue", QueueRequest(queue=QUEUE, changes={"status": "offline"})),
        ):
            with pytest.raises(ClientFault) as caught:
                await client.post(verb, request, ChangedAnswer)
            assert (caught.value.code, caught.value.http_status) == ("forbidden", 403)
        assert audit(router) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"queue": "x"}, {"section": {}}, {"colour": "red"}, {"status": "asleep"}, {"cores": 0}, {"cores": 2**70},
        {"memory_mb": "lots"}, {"priority_offsets": {"": 10**12}}, {"releases": "all"}, {"status": None},
    ],
    ids=str,
)  # fmt: skip
async def test_what_a_queue_cannot_have_is_refused(shard: Partition, changes: dict[str, Any]) -> None:
    async with front(shard) as router:
        body = json.dumps({"queue": QUEUE, "changes": changes}).encode()
        reply = await router.send("POST", "/v1/queue", body, token=router.token(ADMIN))
        assert (reply.status, reply.code) == (400, "bad_queue"), reply.body
        assert audit(router) == []


async def test_requests_that_name_nothing_to_change_are_bad(shard: Partition) -> None:
    async with front(shard) as router:
        token = router.token(ADMIN)
        many = [{"name": f"S{n}", "region": "US", "queues": {}} for n in range(MAX_SITES_PER_CALL + 1)]
        for path, message in (
            ("/v1/queue", {"queue": QUEUE, "changes": {}}),
            ("/v1/queue", {"queue": QUEUE}),
            ("/v1/sites", {"sites": []}),
            ("/v1/sites", {"sites": many}),
            ("/v1/sites", {"sites": [{"name": "", "region": "US", "queues": {}}]}),
            ("/v1/sites", {"sites": [{"name": "X", "region": "US", "queues": {"q": {"stat": "online"}}}]}),
        ):
            reply = await router.send("POST", path, msgspec.json.encode(message), token=token)
            assert (reply.status, reply.code) == (400, "bad_request")
        assert audit(router) == []


async def test_a_site_keeps_its_region_and_a_queue_its_site(shard: Partition) -> None:
    async with front(shard) as router:
        taken = SiteRegistration(name="AGLT2", region="US", queues={QUEUE: Queue()})
        for wanted, code in ((site("BNL", "EU"), "site_in_other_region"), (taken, "queue_of_other_site")):
            with pytest.raises(Conflict) as caught:
                await register(router, wanted)
            assert caught.value.code == code
        with pytest.raises(ClientFault) as unknown:
            await change(router, "X", status="offline")
        assert unknown.value.http_status == 404
        assert audit(router) == []


async def test_a_status_set_by_hand_outlives_a_push_of_the_catalogue(shard: Partition) -> None:
    async with front(shard) as router:
        await change(router, QUEUE, status="offline")
        await register(router, site("BNL", memory_mb=4000))
        queue = router.forward.fresh_topology().queue(QUEUE)[2]
        assert (queue.status, queue.memory_mb, queue.reason) == ("offline", 4000, "set by root")


async def test_admins_at_once_lose_none_of_each_others_changes(shard: Partition) -> None:
    async with front(shard) as router:
        answers = await asyncio.gather(*(register(router, site(f"S{n}")) for n in range(12)))
        assert len({answer.epoch for answer in answers}) == 12
        known = router.forward.fresh_topology()
        assert known.sites.keys() == {"BNL", *(f"S{n}" for n in range(12))}
        assert len({slot for one in known.sites.values() for slot in one.slots}) == 13
        rows = audit(router)
        assert [row["from_epoch"] for row in rows] == [row["to_epoch"] - 1 for row in rows]
        assert len(rows) == 12


async def test_users_see_the_topology(shard: Partition) -> None:
    async with front(shard) as router:
        reply = await router.send("GET", "/v1/topology")
        assert [section["authority"] for section in reply.body["sections"]] == ["central"]
        assert reply.body["sections"][0]["sites"].keys() == {"BNL"}


async def test_a_change_that_the_disk_refuses_changes_nothing(shard: Partition) -> None:
    async with front(shard) as router:
        path = router.folder / "topology" / "central.json"
        good = path.read_bytes()
        path.write_bytes(b"{")
        with pytest.raises(CulmError) as caught:
            await register(router, site("X"))
        assert caught.value.code == "bad_topology"
        assert path.read_bytes() == b"{"
        path.write_bytes(good)
        assert (await register(router, site("X"))).epoch == 3


# --- authorities ------------------------------------------------------------------------------------------------------


async def test_a_router_changes_the_section_of_its_own_authority_only(shard: Partition) -> None:
    async with front(shard, authority="CERN") as router:
        with pytest.raises(ClientFault) as caught:
            await register(router, site("AGLT2"))
        assert (caught.value.code, caught.value.http_status) == ("forbidden", 403)
        assert audit(router) == []


async def join(router: RunningFront, **fields: Any) -> ChangedAnswer:
    """Add a shard as an admin."""
    async with router.client(ADMIN) as admin:
        return await admin.post("shard", ShardRequest(**fields), ChangedAnswer)


@asynccontextmanager
async def listening(name: str) -> AsyncIterator[str]:
    """The link of a shard that greets, and serves nothing yet."""

    async def refuse(verb: str, _body: bytes, _deadline_s: float) -> bytes:
        raise ClientFault("unknown_verb", verb)

    server = LinkServer(name, refuse, lambda *_call: None)
    with tempfile.TemporaryDirectory(prefix="culm-j-", dir="/tmp") as folder:
        await server.start(f"unix:{folder}/link")
        try:
            yield f"unix:{folder}/link"
        finally:
            await server.stop(1.0)


async def test_a_shard_joins_once_and_only_as_it_was_planned(shard: Partition) -> None:
    async with front(shard) as router, listening("asia1") as link:
        before = router.forward.topology.epochs["central"]
        wanted: dict[str, Any] = {"name": "asia1", "link": link, "region": "ASIA"}
        with pytest.raises(Conflict, match="other_shard"):
            await join(router, **(wanted | {"name": "asia2"}))
        with pytest.raises(Conflict, match="epoch_changed"):
            await join(router, **wanted, expected_epoch=before - 1)
        first = await join(router, **wanted, expected_epoch=before)
        assert await join(router, **wanted) == first
        topology = router.forward.fresh_topology()
        assert topology.regions["ASIA"].shards == ["asia1"]
        [row] = audit(router)
        assert (row["actor"], row["to_epoch"]) == ("central:root", before + 1)


async def test_a_shard_that_does_not_run_cannot_join(shard: Partition, tmp_path: Path) -> None:
    async with front(shard) as router:
        async with Client(router.url, router.token(ADMIN), patience_s=0.0) as admin:
            with pytest.raises(Unavailable) as caught:
                await admin.post("shard", ShardRequest(name="asia1", link=f"unix:{tmp_path}/none"), ChangedAnswer)
        assert caught.value.code == "shard_down"
        assert audit(router) == []


@pytest.mark.parametrize("link", ["somewhere", "tcp:example.org:1", "unix:relative"])
async def test_a_shard_at_no_address_of_ours_is_refused(shard: Partition, link: str) -> None:
    async with front(shard) as router:
        with pytest.raises(ClientFault) as caught:
            await join(router, name="asia1", link=link)
        assert caught.value.http_status == 400
        assert audit(router) == []
