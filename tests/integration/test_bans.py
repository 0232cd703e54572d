"""A banned account submits nothing and takes nothing; what it has ready is held back until it is let in again."""

import secrets

import msgspec
import pytest

from culm import topology_store
from culm.client import Client
from culm.errors import ClientFault, Unavailable
from culm.registry_wire import BanRequest, ChangedAnswer, TopologyAnswer
from culm.states import State
from culm.topology import Section
from culm.wire import GetJobRequest, JobSpec, PilotInfo, SubmitRequest
from shard.bans import Bans
from shard.ownership import Ownership
from tests.front import RunningFront, front
from tests.partition import ADMIN, OTHER_USER, PILOT, PRODUCTION, QUEUE, USER, Partition
from tests.waiting import eventually

DEADLINE_S = 15.0


async def submit(client: Client, n_jobs: int = 1) -> list[int]:
    jobs = [JobSpec(site="BNL", argv=["true"])] * n_jobs
    answer = await client.submit(SubmitRequest(idempotency_key=secrets.token_hex(8), jobs=jobs))
    return [identifier for identifier in answer.ids if identifier is not None]


async def take(client: Client) -> list[int]:
    request = GetJobRequest(request_id=secrets.token_hex(8), queue=QUEUE, pilot=PilotInfo(id="p"))
    return [grant.id for grant in (await client.get_job(request)).jobs]


async def ban(router: RunningFront, account: str, *, banned: bool = True, reason: str = "a stolen token") -> None:
    async with router.client(ADMIN) as admin:
        await admin.post("ban", BanRequest(account=account, banned=banned, reason=reason), ChangedAnswer)
    router.forward.fresh_topology()


async def test_what_a_banned_owner_has_ready_is_held_back_and_let_go(shard: Partition) -> None:
    async with (
        front(shard) as router,
        router.client(USER) as ann,
        router.client(OTHER_USER) as bob,
        router.client(PILOT) as pilot,
    ):
        hers, [his] = await submit(ann, 3), await submit(bob)
        assert await take(pilot) == hers[:1]
        await ban(router, "central:ann")
        with pytest.raises(ClientFault, match="a stolen token") as caught:
            await submit(ann)
        assert (caught.value.code, caught.value.http_status) == ("banned", 403)

        async def held() -> bool:
            return [await shard.state(identifier) for identifier in hers[1:]] == [State.PENDING] * 2

        await eventually(held, DEADLINE_S, what="they are held back")
        assert await shard.state(hers[0]) is State.SENT
        [reason] = (await ann.why(hers[1])).reasons
        assert (reason.code, "a stolen token" in reason.text) == ("owner_banned", True)
        assert await take(pilot) == [his]
        assert await take(pilot) == []
        await ban(router, "central:ann", banned=False)
        for identifier in hers[1:]:

            async def runs(identifier: int = identifier) -> bool:
                return await take(pilot) == [identifier]

            await eventually(runs, DEADLINE_S, what="it runs")
        assert await shard.rows("SELECT owner FROM held_owner") == []
        await submit(ann)


async def test_a_job_whose_inputs_are_missing_is_not_let_go_with_the_others(shard: Partition) -> None:
    from culm.states import Event
    from culm.wire import InputFile

    async with front(shard) as router, router.client(USER) as ann:
        [ready] = await submit(ann)
        jobs = [JobSpec(site="BNL", argv=["true"], inputs=[InputFile(name="in", ready=False)])]
        [waits] = (await ann.submit(SubmitRequest(idempotency_key="k", jobs=jobs))).ids
        assert waits is not None
        await shard.say(waits, Event.INPUTS_MISSING)
        await ban(router, "central:ann")

        async def is_held() -> bool:
            return await shard.state(ready) is State.PENDING

        await eventually(is_held, DEADLINE_S, what="held")
        await ban(router, "central:ann", banned=False)

        async def is_back() -> bool:
            return await shard.state(ready) is State.ACTIVATED

        await eventually(is_back, DEADLINE_S, what="let go")
        assert await shard.state(waits) is State.WAITING


async def test_a_banned_pilot_gets_nothing(shard: Partition) -> None:
    async with front(shard) as router, router.client(PILOT) as pilot:
        await ban(router, "central:pilots", reason="")
        with pytest.raises(ClientFault, match="no reason was given") as caught:
            await take(pilot)
        assert caught.value.code == "banned"
        await ban(router, "central:pilots", banned=False)
        assert await take(pilot) == []


async def test_only_an_admin_bans_and_only_an_account(shard: Partition) -> None:
    async with front(shard) as router:
        for who in (USER, PRODUCTION, PILOT):
            async with router.client(who) as client:
                with pytest.raises(ClientFault, match="forbidden"):
                    await client.post("ban", BanRequest(account="central:bob"), ChangedAnswer)
        async with router.client(USER) as user:
            await ban(router, "central:eve")
            told = await user.get("topology", {}, TopologyAnswer)
            # Who is banned is no other user's business.
            assert [section.banned for section in told.sections] == [{}]
            await ban(router, "central:eve", banned=False)
        async with router.client(ADMIN) as admin:
            for account in ("ann", ":ann", "central:", "x" * 170 + ":y"):
                with pytest.raises(ClientFault) as caught:
                    await admin.post("ban", BanRequest(account=account), ChangedAnswer)
                assert caught.value.http_status == 400
            first = await admin.post("ban", BanRequest(account="central:bob", reason="r"), ChangedAnswer)
            assert await admin.post("ban", BanRequest(account="central:bob", reason="r"), ChangedAnswer) == first
        section = topology_store.load_section(router.folder / "topology", "central")
        assert section.banned == {"central:bob": "r"}
        # Read again as it was written.
        assert msgspec.json.decode(msgspec.json.encode(section), type=type(section)) == section


async def test_a_ban_holds_in_the_slots_of_its_authority_and_is_lifted_there(shard: Partition) -> None:
    """CERN bans her too, for its own slots: that says nothing about her jobs in the centre's."""
    async with front(shard) as router, router.client(USER) as ann, router.client(PILOT) as pilot:
        hers = await submit(ann, 2)
        await ban(router, "central:ann")

        async def held() -> bool:
            return [await shard.state(identifier) for identifier in hers] == [State.PENDING] * 2

        await eventually(held, DEADLINE_S, what="they are held back")
        topology_store.create(
            router.folder / "topology", Section(authority="CERN", epoch=1, banned={"central:ann": ""})
        )
        await ban(router, "central:ann", banned=False)
        for identifier in hers:

            async def runs(identifier: int = identifier) -> bool:
                return await take(pilot) == [identifier]

            await eventually(runs, DEADLINE_S, what="it runs")
        assert await shard.rows("SELECT owner FROM held_owner") == []


async def test_held_jobs_of_a_slot_that_is_not_open_here_are_not_forgotten(shard: Partition) -> None:
    async with front(shard) as router, router.client(USER) as ann, router.client(PILOT) as pilot:
        [one] = await submit(ann)
        await ban(router, "central:ann")

        async def held() -> bool:
            return await shard.state(one) is State.PENDING

        await eventually(held, DEADLINE_S, what="it is held back")
        bans, ownership = shard.shard.bans, shard.shard.ownership
        bans._ownership = Ownership("us1", shard.shard.database, lambda: shard.shard.topology.current)
        await ban(router, "central:ann", banned=False)
        bans._next_look = 0.0
        await bans.turn()
        assert await shard.rows("SELECT owner FROM held_owner") == [("central:ann",)]
        assert await shard.state(one) is State.PENDING
        bans._ownership = ownership

        async def runs() -> bool:
            bans._next_look = 0.0
            return await take(pilot) == [one]

        await eventually(runs, DEADLINE_S, what="it runs")


async def test_many_jobs_are_gone_through_in_steps_and_one_owner_keeps_no_other_from_being_banned(
    shard: Partition, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shard.bans.EXAMINED", 3)
    monkeypatch.setattr("shard.bans.BATCH", 2)
    look_at = Bans._look_at

    async def fails(bans: Bans, owner: str, *, held: bool) -> None:
        if owner == "central:amy":
            raise Unavailable("database_slow", "too slow")
        await look_at(bans, owner, held=held)

    monkeypatch.setattr(Bans, "_look_at", fails)
    async with front(shard) as router, router.client(USER) as ann:
        hers = await submit(ann, 10)
        await shard.cancel(*hers[2:5])
        await ban(router, "central:amy")
        await ban(router, "central:ann")
        left = [*hers[:2], *hers[5:]]

        async def all_are(state: State) -> bool:
            return {await shard.state(identifier) for identifier in left} == {state}

        await eventually(lambda: all_are(State.PENDING), DEADLINE_S, what="they are held back")
        await ban(router, "central:ann", banned=False)
        await eventually(lambda: all_are(State.ACTIVATED), DEADLINE_S, what="they are let go")
        assert {await shard.state(identifier) for identifier in hers[2:5]} == {State.CANCELLED}
