"""What pilots ask: get_job, heartbeat, report."""

import asyncio
import logging
from dataclasses import dataclass
from typing import Final

import msgspec

from culm import access
from culm.errors import CulmError, Moved
from culm.ids import slot_of
from culm.shard_links import ShardLinks
from culm.topology import Queue, Topology
from culm.wire import (
    GetJobAnswer,
    GetJobRequest,
    HeartbeatAnswer,
    HeartbeatRequest,
    Principal,
    ReportAnswer,
    ReportRequest,
    ShardGetJob,
    ShardHeartbeat,
    ShardRelease,
    ShardReleaseAnswer,
    ShardReport,
    SlotRef,
)
from router.forward import Forward
from router.resolve import lease_times, offer_of, pilot_slots

RELEASE_DEADLINE_S: Final = 2.0
_GET_JOB: Final = msgspec.msgpack.Decoder(ShardGetJob)
_ANSWER: Final = msgspec.msgpack.Decoder(GetJobAnswer)

log = logging.getLogger("router.pilots")


async def get_job(forward: Forward, orphans: "Orphans", principal: Principal, request: GetJobRequest) -> GetJobAnswer:
    """Find work for a pilot; none is an answer. `orphans` takes what was granted beyond the answer.

    Raises:
        ClientFault: unknown_queue, forbidden (the token is not scoped for the computing queue).
        Unavailable: as the shard says, or shard_down.

    Safe to retry: yes, by the request id.
    """
    access.require_role(principal, "pilot", "admin")
    _, site, _ = forward.resolve(lambda topology: topology.queue(request.queue))
    authority = forward.topology.authority_of_region(site.region)
    if not access.allows_queue(principal, request.queue, authority):
        raise access.forbidden(f"the token is not scoped for the computing queue {request.queue} of {authority}")
    reason = forward.topology.ban_of(principal.account, authority)
    if reason is not None:
        raise access.banned(principal.account, reason)

    async def attempt(topology: Topology) -> GetJobAnswer:
        _, site, queue = topology.queue(request.queue)
        shards = pilot_slots(topology, site, request.pilot.id)
        return await _Question(forward, orphans, principal, request, queue, shards).answer()

    return await forward.corrected(attempt)


async def heartbeat(forward: Forward, principal: Principal, request: HeartbeatRequest) -> HeartbeatAnswer:
    """A sign of life. Raises as the shard (Conflict lease_lost, ..). Safe to retry: yes."""
    access.require_role(principal, "pilot", "admin")
    return await forward.to_slot(
        slot_of(request.id),
        "heartbeat",
        lambda at: ShardHeartbeat(at=at, principal=principal, request=request),
        HeartbeatAnswer,
    )


async def report(forward: Forward, principal: Principal, request: ReportRequest) -> ReportAnswer:
    """What became of a job. Raises as the shard (Conflict lease_lost, ..). Safe to retry: yes."""
    if request.state is not None:
        access.require_role(principal, "pilot", "admin")
    return await forward.to_slot(
        slot_of(request.id),
        "report",
        lambda at: ShardReport(at=at, principal=principal, request=request),
        ReportAnswer,
    )


def shards_of(topology: Topology, answer: GetJobAnswer) -> list[str]:
    """The shards that the jobs of an answer live on."""
    return list({topology.place(slot_of(grant.id)).shard for grant in answer.jobs})


class Orphans:
    """Jobs that were granted to a client that is gone: given back at once, in the background."""

    def __init__(self, links: ShardLinks) -> None:
        self._links = links
        self._tasks: set[asyncio.Task[None]] = set()

    def unsent(self, shards: list[str], principal: Principal, request: GetJobRequest) -> None:
        """The answer to a get_job could not be written to its client."""
        for shard in shards:
            self._release(shard, request.request_id, principal.account)

    def crossed(self, shard: str, verb: str, body: bytes, answer: bytes) -> None:
        """An answer came over the link for a caller that is gone."""
        if verb != "get_job":
            return
        try:
            n_jobs = len(_ANSWER.decode(answer).jobs)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            # We are inside the link's protocol: an exception would end the connection of all others.
            log.warning("an unreadable answer of shard %s: %s", shard, error)
            return
        if n_jobs:
            call = _GET_JOB.decode(body)
            self._release(shard, call.request_id, call.subject)

    def _release(self, shard: str, request_id: str, subject: str) -> None:
        task = asyncio.get_running_loop().create_task(self._ask(shard, request_id, subject))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _ask(self, shard: str, request_id: str, subject: str) -> None:
        message = ShardRelease(request_id=request_id, subject=subject)
        try:
            await self._links.ask(shard, "release", message, ShardReleaseAnswer, RELEASE_DEADLINE_S)
        except CulmError as error:
            # The short first lease will do it.
            log.warning("could not give back request %s: %s", request_id, error)


@dataclass(frozen=True)
class _Question:
    """One get_job at the shards of its pilot, its home first."""

    forward: Forward
    orphans: Orphans
    principal: Principal
    request: GetJobRequest
    queue: Queue
    shards: list[tuple[str, list[SlotRef]]]

    async def answer(self) -> GetJobAnswer:
        """Work from the first shard that has any; a shard that is down keeps it from the others only if none has."""
        # A queue that is offline gives nothing new, however long one waits.
        wait_s = 0.0 if self.queue.status == "offline" else self.request.wait_s
        if len(self.shards) == 1:
            answer = await self._ask(0, wait_s)
        else:
            answer = await self._in_turn()
            if not answer.jobs and wait_s:
                answer = await self._wait_everywhere(wait_s)
        if answer.jobs or self.queue.status == "online":
            return answer
        return msgspec.structs.replace(answer, reason=f"queue_{self.queue.status}")

    async def _in_turn(self) -> GetJobAnswer:
        # A repeat is answered by the shard that answered first, wherever there is work by now (invariant I6): before
        # its home is asked for new work, the others are asked for what they have given.
        others = range(1, len(self.shards))
        turns = [*((n, True) for n in others), *((n, False) for n in range(len(self.shards)))]
        failed: CulmError | None = None
        for number, only_repeat in turns:
            try:
                answer = await self._ask(number, 0.0, only_repeat=only_repeat)
            except Moved:
                raise
            except CulmError as error:
                failed = error
                continue
            if answer.jobs:
                return answer
        if failed is not None and not self.request.wait_s:
            raise failed
        return GetJobAnswer()

    async def _wait_everywhere(self, wait_s: float) -> GetJobAnswer:
        """Wait at all shards at once: the first work is taken, what another one gives as well goes back at once."""
        asked = {asyncio.ensure_future(self._ask(n, wait_s)): n for n in range(len(self.shards))}
        waiting = set(asked)
        found: GetJobAnswer | None = None
        failed: CulmError | None = None
        try:
            while waiting and found is None:
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in sorted(done, key=asked.__getitem__):
                    try:
                        answer = task.result()
                    except Moved:
                        raise
                    except CulmError as error:
                        failed = error
                        continue
                    if found is None and answer.jobs:
                        found = answer
                    elif answer.jobs:
                        self.orphans.unsent([self.shards[asked[task]][0]], self.principal, self.request)
        finally:
            # The link tells those shards; what they have granted by then is an orphan, and goes back too.
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
        if found is not None:
            return found
        if failed is not None:
            raise failed
        return GetJobAnswer()

    async def _ask(self, number: int, wait_s: float, *, only_repeat: bool = False) -> GetJobAnswer:
        shard, slots = self.shards[number]
        offer = offer_of(self.principal, self.request, self.queue)
        message = ShardGetJob(
            slots=slots,
            request_id=self.request.request_id,
            subject=self.principal.account,
            # An offer of no label takes nothing new.
            offer=msgspec.structs.replace(offer, labels=frozenset()) if only_repeat else offer,
            pilot=self.request.pilot,
            lease=lease_times(self.queue),
            n_jobs=self.request.n_jobs,
            wait_s=wait_s,
        )
        return await self.forward.links.ask(
            shard, "get_job", message, GetJobAnswer, self.forward.deadline_s + wait_s, waits=wait_s > 0
        )
