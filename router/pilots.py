"""What pilots ask: get_job, heartbeat, report."""

import asyncio
import logging
from typing import Final

import msgspec

from culm import access
from culm.errors import CulmError, Moved
from culm.ids import slot_of
from culm.shard_links import ShardLinks
from culm.topology import Queue, Site, Topology
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


async def get_job(forward: Forward, principal: Principal, request: GetJobRequest) -> GetJobAnswer:
    """Find work for a pilot; none is an answer.

    Raises:
        ClientFault: unknown_queue, forbidden (the token is not scoped for the computing queue).
        Unavailable: as the shard says, or shard_down.

    Safe to retry: yes, by the request id.
    """
    if not access.allows_queue(principal, request.queue):
        raise access.forbidden(f"the token is not scoped for the computing queue {request.queue}")
    forward.resolve(lambda topology: topology.queue(request.queue))

    async def attempt(topology: Topology) -> GetJobAnswer:
        _, site, queue = topology.queue(request.queue)
        return await _ask_shards(forward, topology, (principal, request), (site, queue))

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


class Orphans:
    """Jobs that were granted to a client that is gone: given back at once, in the background."""

    def __init__(self, links: ShardLinks) -> None:
        self._links = links
        self._tasks: set[asyncio.Task[None]] = set()

    def unsent(self, shards: list[str], principal: Principal, request: GetJobRequest) -> None:
        """The answer to a get_job could not be written to its client."""
        for shard in shards:
            self._release(shard, request.request_id, principal.subject)

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


async def _ask_shards(
    forward: Forward, topology: Topology, asked: tuple[Principal, GetJobRequest], where: tuple[Site, Queue]
) -> GetJobAnswer:
    """Ask the shards of the pilot's slots in turn, its home first; if none has work, wait at home.

    Usually there is one. A shard that is down does not keep the pilot from the others, unless none has work.
    """
    principal, request = asked
    site, queue = where
    shards = pilot_slots(topology, site, request.pilot.id)
    turns: list[tuple[str, list[SlotRef], float | None]] = [(shard, slots, 0.0) for shard, slots in shards]
    if len(shards) == 1:
        turns = [(*shards[0], request.wait_s)]
    elif request.wait_s:
        turns.append((*shards[0], request.wait_s))
    # A repeat is answered by the shard that answered first, wherever there is work by now (invariant I6): an offer of
    # no label takes nothing new.
    turns = [*((shard, slots, None) for shard, slots in shards[1:]), *turns]
    offer = offer_of(principal, request, queue)
    failed: CulmError | None = None
    for shard, slots, wait_s in turns:
        message = ShardGetJob(
            slots=slots,
            request_id=request.request_id,
            subject=principal.subject,
            offer=msgspec.structs.replace(offer, labels=frozenset()) if wait_s is None else offer,
            pilot=request.pilot,
            lease=lease_times(queue),
            n_jobs=request.n_jobs,
            wait_s=wait_s or 0.0,
        )
        try:
            answer = await forward.links.ask(
                shard, "get_job", message, GetJobAnswer, forward.deadline_s + message.wait_s
            )
        except Moved:
            raise
        except CulmError as error:
            failed = error
            continue
        if answer.jobs:
            return answer
    if failed is not None:
        raise failed
    return GetJobAnswer(reason=f"queue_{queue.status}" if queue.status != "online" else "")
