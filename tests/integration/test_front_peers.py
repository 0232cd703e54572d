"""Routers of two authorities: each learns the other's section and keys, and nobody speaks for the other."""

import asyncio
import contextlib
import gzip
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from culm import topology_store
from culm.errors import ClientFault
from culm.registry_wire import AuthorityAnswer, ChangedAnswer, SitesRequest
from culm.settings import RouterSettings
from culm.telemetry import TOPOLOGY_REFUSED
from culm.tokens import Verifier, public_keys
from culm.topology import Placement, Queue, Region, Section, Shard, SiteRegistration
from culm.wire import Principal
from router.metrics import PEER_HEARD
from router.peers import Peers
from tests.front import RunningFront, front
from tests.partition import ADMIN, PILOT, USER, Partition

PEER = Principal(role="peer", subject="CERN", authority="central")
CERN_FIRST = 12_288


def cern(**changes: object) -> Section:
    """What CERN has of its own."""
    section = Section(
        authority="CERN",
        epoch=1,
        shards={"cern1": Shard(link="unix:/run/cern1")},
        regions={"CERN": Region(slot=CERN_FIRST, shards=["cern1"], strict=True)},
        placement={CERN_FIRST: Placement("cern1", 1)},
    )
    return msgspec.structs.replace(section, **changes)


@asynccontextmanager
async def follower(router: RunningFront, folder: Path, *, authority: str = "central") -> AsyncIterator[RouterSettings]:
    """The settings of a router of CERN, whose home is `folder`, and whose peer is `router`."""
    await asyncio.to_thread(topology_store.create, folder / "topology", cern())
    (folder / "trusted").mkdir()
    (folder / "peer").touch(mode=0o600)
    (folder / "peer").write_text(router.token(PEER), encoding="ascii")
    yield RouterSettings(
        topology_dir=str(folder / "topology"),
        trusted_keys_dir=str(folder / "trusted"),
        authority="CERN",
        peers={authority: router.url},
        peer_token_file=str(folder / "peer"),
        port=1,
    )


async def test_the_section_and_the_keys_of_a_peer_are_followed(shard: Partition, tmp_path: Path) -> None:
    async with front(shard) as router, follower(router, tmp_path) as settings, router.client(ADMIN) as admin:
        peers = Peers(settings)
        await peers.poll()
        theirs = topology_store.load_section(Path(settings.topology_dir), "central")
        assert theirs == router.forward.topology.sections["central"]
        user = Verifier(Path(settings.trusted_keys_dir)).verify(f"Bearer {router.token(USER)}")
        assert user == USER
        more = SiteRegistration(name="AGLT2", region="US", queues={"AGLT2-q": Queue()})
        changed = await admin.post("sites", SitesRequest(sites=[more]), ChangedAnswer)
        await asyncio.to_thread(router.ring.rotate)
        await peers.poll()
        topology = topology_store.load(Path(settings.topology_dir), "CERN")
        assert topology.epochs == {"CERN": 1, "central": changed.epoch}
        assert "AGLT2" in topology.sites
        assert Verifier(Path(settings.trusted_keys_dir)).verify(f"Bearer {router.token(USER)}") == USER


async def test_a_peer_that_is_cut_off_stays_as_it_was_last_heard(shard: Partition, tmp_path: Path) -> None:
    async with front(shard) as router, follower(router, tmp_path) as settings:
        peers = Peers(settings)
        await peers.poll()
        known = topology_store.load_section(Path(settings.topology_dir), "central")
        keys = public_keys(Path(settings.trusted_keys_dir), "central")
    await peers.poll()
    assert topology_store.load_section(Path(settings.topology_dir), "central") == known
    assert public_keys(Path(settings.trusted_keys_dir), "central") == keys


async def test_a_peer_that_steps_back_is_not_believed_and_said_once(
    shard: Partition, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with front(shard) as router, follower(router, tmp_path) as settings:
        folder = Path(settings.topology_dir)
        peers = Peers(settings)
        await peers.poll()
        keys = public_keys(Path(settings.trusted_keys_dir), "central")
        theirs = topology_store.load_section(folder, "central")
        known = msgspec.structs.replace(theirs, epoch=theirs.epoch + 1)
        assert topology_store.adopt(folder, known)
        await asyncio.to_thread(router.ring.rotate)
        counted = TOPOLOGY_REFUSED.labels("central")._value.get()
        heard = PEER_HEARD.labels("central")._value.get()
        # Once may be two workers that write in the other order.
        for n_counted in (0, 1, 2):
            await peers.poll()
            assert TOPOLOGY_REFUSED.labels("central")._value.get() == counted + n_counted
        assert topology_store.load_section(folder, "central") == known
        assert public_keys(Path(settings.trusted_keys_dir), "central") == keys
        assert PEER_HEARD.labels("central")._value.get() == heard
        assert (
            len([one for one in caplog.records if one.levelname == "ERROR" and "is not believed" in one.message]) == 1
        )


@pytest.mark.parametrize(
    ("url", "good"),
    [
        ("http://127.0.0.1:25080", True),
        ("http://localhost:25080", True),
        ("http://[::1]:25080", True),
        ("https://cern.example.org", True),
        ("http://cern.example.org:25080", False),
        ("http://127.0.0.1.example.org", False),
        ("http://127.0.0.1@cern.example.org", False),
        ("cern.example.org:25080", False),
    ],
)
def test_a_peer_is_not_asked_in_the_clear(url: str, good: bool) -> None:
    with contextlib.nullcontext() if good else pytest.raises(ClientFault, match="plain_http_refused"):
        Peers(RouterSettings(topology_dir="t", trusted_keys_dir="k", peers={"CERN": url}))


async def test_a_compressed_answer_is_not_blown_up(
    shard: Partition, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def compressed(request: web.Request) -> web.Response:
        assert request.headers["Accept-Encoding"] == "identity"
        section = Section(authority="central", epoch=1)
        body = gzip.compress(msgspec.json.encode(AuthorityAnswer(authority="central", section=section, keys={})))
        return web.Response(body=body, headers={"Content-Encoding": "gzip"}, content_type="application/json")

    app = web.Application()
    app.router.add_get("/v1/authority", compressed)
    async with TestServer(app) as server, front(shard) as router, follower(router, tmp_path) as settings:
        await Peers(msgspec.structs.replace(settings, peers={"central": str(server.make_url(""))})).poll()
        assert list(topology_store.load(Path(settings.topology_dir)).sections) == ["CERN"]
    assert "gave an answer that is not ours" in caplog.text


async def test_one_authority_cannot_speak_for_another(shard: Partition, tmp_path: Path) -> None:
    async with front(shard) as router, follower(router, tmp_path, authority="elsewhere") as settings:
        await Peers(settings).poll()
        assert list(topology_store.load(Path(settings.topology_dir)).sections) == ["CERN"]
        assert public_keys(Path(settings.trusted_keys_dir), "central") == {}


@pytest.mark.parametrize("who", [USER, PILOT], ids=lambda who: who.role)
async def test_what_an_authority_decides_is_told_to_peers_and_admins_only(shard: Partition, who: Principal) -> None:
    async with front(shard) as router:
        reply = await router.send("GET", "/v1/authority", token=router.token(who))
        assert (reply.status, reply.code) == (403, "forbidden")
        for allowed in (PEER, ADMIN):
            reply = await router.send("GET", "/v1/authority", token=router.token(allowed))
            told = msgspec.convert(reply.body, AuthorityAnswer, strict=False)
            assert (told.authority, told.section.authority) == ("central", "central")
            assert all("PRIVATE" not in text for text in told.keys.values())


async def test_a_peer_may_do_nothing_else(shard: Partition) -> None:
    async with front(shard) as router:
        token = router.token(PEER)
        for method, path, body in (
            ("POST", "/v1/submit", b'{"idempotency_key": "k", "jobs": [{"site": "BNL", "argv": ["true"]}]}'),
            ("POST", "/v1/get_job", b'{"request_id": "rrrrrrrr", "queue": "BNL-q", "pilot": {"id": "p"}}'),
            ("POST", "/v1/sites", b'{"sites": [{"name": "X", "region": "US", "queues": {}}]}'),
            ("GET", "/v1/jobs", None),
        ):
            reply = await router.send(method, path, body, token=token)
            assert reply.status == 403, (path, reply.body)
