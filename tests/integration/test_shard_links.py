"""The links to all shards: in step with the topology, many shards at once, and answers that are not ours."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from culm.errors import Bug, Unavailable
from culm.link import LinkOptions, LinkServer
from culm.shard_links import ShardLinks
from culm.topology import CENTRAL, Section, Shard, Topology
from culm.wire import ShardCounts, ShardCountsAnswer
from tests import servers
from tests.waiting import eventually

DEADLINE_S = 10.0


class Answerer:
    """A real accepting side that answers everything with the same bytes."""

    def __init__(self, name: str, answer: bytes) -> None:
        self._answer = answer
        self.server = LinkServer(name, self._handle, lambda *_call: None)

    async def _handle(self, _verb: str, _body: bytes, _deadline_s: float) -> bytes:
        return self._answer


def _counts(name: str) -> bytes:
    return msgspec.msgpack.encode(ShardCountsAnswer(shard=name, at=1.0, counts=[]))


def _topology(folder: Path, *names: str) -> Topology:
    shards = {name: Shard(link=f"unix:{folder / name}") for name in names}
    return Topology([Section(authority=CENTRAL, epoch=1, shards=shards)])


class Cluster:
    """Links, and the topology that they follow."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.topology = Topology([])
        self.links = ShardLinks(lambda: self.topology, LinkOptions(stall_s=0.3))

    async def follow(self, *names: str) -> None:
        """These shards from now on."""
        self.topology = _topology(self.folder, *names)
        await self.links.refresh()

    async def connected(self, *names: str) -> None:
        """Wait for the links to these shards."""
        await eventually(lambda: all(self.links._links[name].connected for name in names), DEADLINE_S, what="linked")

    async def ask(self, name: str) -> ShardCountsAnswer:
        """One call."""
        return await self.links.ask(name, "counts", ShardCounts(), ShardCountsAnswer, DEADLINE_S)


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    with servers.folder() as name:
        made = Cluster(Path(name))
        yield made
        await made.links.stop()


@asynccontextmanager
async def serving(cluster: Cluster, name: str, answer: bytes | None = None, *, at: str = "") -> AsyncIterator[None]:
    peer = Answerer(name, _counts(at or name) if answer is None else answer)
    await peer.server.start(f"unix:{cluster.folder / (at or name)}")
    try:
        yield
    finally:
        await peer.server.stop(0.0)


async def test_links_follow_the_topology(cluster: Cluster) -> None:
    async with serving(cluster, "us1"), serving(cluster, "eu1"):
        await cluster.follow("us1")
        await cluster.connected("us1")
        assert (await cluster.ask("us1")).shard == "us1"
        with pytest.raises(Unavailable) as caught:
            await cluster.ask("eu1")
        assert (caught.value.code, caught.value.details) == ("shard_down", {"shard": "eu1"})
        await cluster.follow("eu1")
        await cluster.connected("eu1")
        assert (await cluster.ask("eu1")).shard == "eu1"
        with pytest.raises(Unavailable):
            await cluster.ask("us1")


async def test_a_shard_that_moved_to_another_address_is_followed(cluster: Cluster) -> None:
    async with serving(cluster, "us1", at="here"), serving(cluster, "us1", at="there"):
        for address in ("here", "there"):
            shards = {"us1": Shard(link=f"unix:{cluster.folder / address}")}
            cluster.topology = Topology([Section(authority=CENTRAL, epoch=1, shards=shards)])
            await cluster.links.refresh()
            await cluster.connected("us1")
            assert (await cluster.ask("us1")).shard == address


@pytest.mark.parametrize("rubbish", [b"", b"\xc1", b"\x80", b"\x93\x01\x02\x03", b"\x81\xa5shard\xa2\xff\xfe", b"text"])
async def test_an_answer_that_is_not_ours_costs_only_its_own_call(cluster: Cluster, rubbish: bytes) -> None:
    async with serving(cluster, "us1"), serving(cluster, "eu1", rubbish):
        await cluster.follow("us1", "eu1", "nowhere")
        await cluster.connected("us1", "eu1")
        calls = [(name, ShardCounts()) for name in ("us1", "eu1", "nowhere")]
        good, odd, down = await cluster.links.ask_many(calls, "counts", ShardCountsAnswer, DEADLINE_S)
        assert isinstance(good, ShardCountsAnswer)
        assert good.shard == "us1"
        assert isinstance(odd, Bug)
        assert "eu1 answered counts" in odd.message
        assert isinstance(down, Unavailable)
        assert (await cluster.ask("us1")).shard == "us1"
