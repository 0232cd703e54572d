"""What operators change through a router: sites and computing queues, by an admin of that authority only."""

import secrets
from pathlib import Path
from typing import Any

import msgspec
import pytest

from culm.topology import Section
from culm.topology_store import AUDIT, load_section
from culm.wire import GetJobRequest, PilotInfo, Principal, SubmitRequest
from tests.front import Reply, RunningFront, front
from tests.partition import ADMIN, PILOT, PRODUCTION, QUEUE, USER, Partition, job

SITE = {"name": "MWT2", "region": "US", "queues": {"MWT2-q": {"cores": 4}}}


async def post(
    router: RunningFront, verb: str, body: object, who: Principal = ADMIN, *, dialect: str = "json"
) -> Reply:
    encode = msgspec.json.encode if dialect == "json" else msgspec.msgpack.encode
    return await router.send(
        "POST", f"/v1/{verb}", encode(body), kind=f"application/{dialect}", token=router.token(who)
    )


def section(shard: Partition) -> Section:
    return load_section(Path(shard.settings.topology_dir), "central")


async def test_a_site_that_was_just_registered_takes_jobs_and_pilots(shard: Partition) -> None:
    async with front(shard) as router, router.client() as user, router.client(PILOT) as pilot:
        reply = await post(router, "sites", {"sites": [SITE], "reason": "new"})
        assert (reply.status, reply.body) == (200, {"authority": "central", "epoch": section(shard).epoch})
        submitted = await user.submit(SubmitRequest(idempotency_key="k", jobs=[job(site="MWT2")]))
        request = GetJobRequest(request_id=secrets.token_hex(8), queue="MWT2-q", pilot=PilotInfo(id="p"))
        assert [grant.id for grant in (await pilot.get_job(request)).jobs] == submitted.ids
        rows = (Path(shard.settings.topology_dir) / AUDIT).read_bytes().splitlines()
        assert msgspec.json.decode(rows[-1])["actor"] == "central:root"


async def test_the_same_registration_again_changes_nothing(shard: Partition) -> None:
    async with front(shard) as router:
        first = await post(router, "sites", {"sites": [SITE]})
        before = section(shard)
        again = await post(router, "sites", {"sites": [SITE]})
        assert (again.status, again.body) == (200, first.body)
        assert section(shard) == before


async def test_a_registration_from_an_older_epoch_is_refused(shard: Partition) -> None:
    async with front(shard) as router:
        before = section(shard).epoch
        assert (await post(router, "queue", {"queue": QUEUE, "changes": {"cores": 16}})).status == 200
        reply = await post(router, "sites", {"sites": [SITE], "expected_epoch": before})
        assert (reply.status, reply.code) == (409, "epoch_changed")
        assert "MWT2" not in section(shard).sites
        assert (await post(router, "sites", {"sites": [SITE], "expected_epoch": before + 1})).status == 200


async def test_an_operators_status_is_kept_with_his_reason(shard: Partition) -> None:
    async with front(shard) as router:
        reply = await post(router, "queue", {"queue": QUEUE, "changes": {"status": "offline"}, "reason": "downtime"})
        assert reply.status == 200
        described = section(shard).sites["BNL"].queues[QUEUE]
        assert (described.status, described.reason) == ("offline", "downtime")
        catalogue = {"name": "BNL", "region": "US", "queues": {QUEUE: {"status": "online", "cores": 16}}}
        assert (await post(router, "sites", {"sites": [catalogue]})).status == 200
        described = section(shard).sites["BNL"].queues[QUEUE]
        assert (described.status, described.reason, described.cores) == ("offline", "downtime", 16)


@pytest.mark.parametrize("who", [USER, PRODUCTION, PILOT], ids=lambda who: who.subject)
@pytest.mark.parametrize(
    ("verb", "body"), [("sites", {"sites": [SITE]}), ("queue", {"queue": QUEUE, "changes": {"status": "offline"}})]
)
async def test_nobody_but_an_admin_changes_anything(
    shard: Partition, verb: str, body: dict[str, Any], who: Principal
) -> None:
    before = section(shard)
    async with front(shard) as router:
        reply = await post(router, verb, body, who)
        assert (reply.status, reply.code) == (403, "forbidden")
    assert section(shard) == before


@pytest.mark.parametrize("dialect", ["json", "msgpack"])
@pytest.mark.parametrize(
    ("verb", "body", "status", "code"),
    [
        ("sites", {"sites": []}, 400, "bad_request"),
        ("sites", {"sites": [SITE | {"nonsense": 1}]}, 400, "bad_request"),
        ("sites", {"sites": [SITE | {"name": ""}]}, 400, "bad_request"),
        ("sites", {"sites": [{"name": "BNL", "region": "EU", "queues": {}}]}, 409, "site_in_other_region"),
        ("sites", {"sites": [SITE | {"queues": {QUEUE: {}}}]}, 409, "queue_of_other_site"),
        ("sites", {"sites": [SITE | {"queues": {"q": {"cores": 0}}}]}, 400, "bad_request"),
        ("queue", {"queue": "nowhere", "changes": {"cores": 1}}, 404, "unknown_queue"),
        ("queue", {"queue": QUEUE, "changes": {}}, 400, "bad_request"),
        ("queue", {"queue": QUEUE, "changes": {"section": 1}}, 400, "bad_queue"),
        ("queue", {"queue": QUEUE, "changes": {"queue": "x"}}, 400, "bad_queue"),
        ("queue", {"queue": QUEUE, "changes": {"status": "asleep"}}, 400, "bad_queue"),
        ("queue", {"queue": QUEUE, "changes": {"cores": 10**12}}, 400, "bad_queue"),
        ("queue", {"queue": QUEUE, "changes": {"heartbeat_s": 1e300}}, 400, "bad_queue"),
    ],
)
async def test_a_change_that_is_not_good_changes_nothing(
    shard: Partition, verb: str, body: dict[str, Any], status: int, code: str, dialect: str
) -> None:
    before = section(shard)
    async with front(shard) as router:
        reply = await post(router, verb, body, dialect=dialect)
        assert (reply.status, reply.code) == (status, code)
        assert section(shard) == before
        assert (await post(router, "queue", {"queue": QUEUE, "changes": {"cores": 2}})).status == 200


async def test_an_infinite_lease_never_reaches_the_section(shard: Partition) -> None:
    """JSON cannot carry it: written, it would make the section unreadable to every process."""
    async with front(shard) as router:
        body = {"queue": QUEUE, "changes": {"first_lease_s": float("inf")}}
        reply = await post(router, "queue", body, dialect="msgpack")
        assert (reply.status, reply.code) == (400, "bad_queue")
        assert section(shard).epoch == 2


async def test_the_topology_is_shown_to_users_but_not_to_pilots(shard: Partition) -> None:
    async with front(shard) as router:
        shown = await router.send("GET", "/v1/topology")
        assert shown.status == 200
        assert msgspec.convert(shown.body["sections"], list[Section], strict=False) == [section(shard)]
        assert (await router.send("GET", "/v1/topology", token=router.token(PILOT))).code == "forbidden"
