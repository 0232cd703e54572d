"""Why is my job not running? The code that dispatches explains: the same classes, the same matching, the same order.

A job that is ready is held against what its computing queues are and what their pilots offered lately. If any of them
fits, the job waits its turn, and that is the whole answer; else each computing queue has its reasons.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Final

from culm import access
from culm.errors import ClientFault
from culm.matching import Offer, Requirements, refusals
from culm.states import LEASED, UNREADY, State
from culm.topology import Queue, Topology, authority_of_slot
from culm.wire import Principal, QueueWhy, Reason, Refused, ShardJob, ShardSiteWhy, SiteWhyAnswer, WhyAnswer
from shard.archive import find_archived_rows
from shard.askers import WINDOW_S, Askers
from shard.classes import ClassRegistry
from shard.database import Database, Row, Transaction
from shard.growth import Asking
from shard.hints import ClassKey
from shard.obstacles import NO_QUEUE, Obstacles

MAX_AHEAD: Final = 10_000
MAX_REASONS: Final = 50
MAX_CLASSES: Final = 200
"""Classes that are looked at for what a computing queue is refused for."""
MAX_OFFERS: Final = 64
"""Offers that the classes of one slot are held against when it is asked why it piles up."""
CLASSES_PER_STATEMENT: Final = 100
_MICROSECONDS: Final = 1_000_000
_AFTER_WORKER: Final = frozenset({State.HOLDING, State.TRANSFERRING, State.MERGING})


@dataclass(frozen=True)
class _Place:
    """What the explanation needs of a job's row."""

    id: int
    key: ClassKey
    state: State
    queue: str
    ranking: int
    attempt: int
    lost: int
    max_attempts: int
    modified_at: float
    pilot: str
    host: str
    error: str
    cancel_requested: bool


class Why:
    """The use cases."""

    def __init__(self, database: Database, classes: ClassRegistry, askers: Askers, obstacles: Obstacles) -> None:
        self._database = database
        self._classes = classes
        self._askers = askers
        self._obstacles = obstacles

    async def job(self, topology: Topology, call: ShardJob) -> WhyAnswer:
        """Why a job is not running. Raises ClientFault(unknown_job), Unavailable. Safe to retry: yes."""
        rows = await self._fetch("read_place", call.id) or await self._archived(call.id)
        if not rows or not access.may_read(
            call.principal, vo=rows[0][5], owner=rows[0][4], authority=authority_of_slot(rows[0][0])
        ):
            raise ClientFault("unknown_job", f"job {call.id} is not known", http_status=404)
        place = _place(call.id, rows[0])
        ban = topology.ban_of(rows[0][4], authority_of_slot(rows[0][0]))
        if place.state is State.PENDING or (ban is not None and place.state is State.ACTIVATED):
            told = f"{rows[0][4]} {'was banned, and is let in again' if ban is None else f'is banned: {ban}'}"
            return WhyAnswer(id=call.id, state=place.state, reasons=[Reason(code="owner_banned", text=told)])
        if place.state is State.ACTIVATED:
            reasons = await self._of_ready(topology, place)
        else:
            lease = await self._fetch("read_lease_end", call.id) if place.state in LEASED else []
            ends_at = lease[0][0] / _MICROSECONDS if lease else None
            reasons = [_of_other(place, ends_at)]
        if place.cancel_requested:
            told = "its cancel was asked for: the pilot is told at its next heartbeat"
            reasons.insert(0, Reason(code="cancel_requested", text=told))
        return WhyAnswer(id=call.id, state=place.state, reasons=reasons[:MAX_REASONS])

    async def site(self, topology: Topology, call: ShardSiteWhy) -> SiteWhyAnswer:
        """What the pilots of a site get and are refused for. Raises ClientFault(unknown_site), Unavailable."""
        access.require_role(call.principal, "user", "admin")
        site = topology.site(call.site)
        slots = {*site.slots, topology.region(site.region).slot}
        keys = [key for key in self._classes.active() if key.slot in slots]
        seen = self._visible(keys, call.principal)
        found = [await self._of_queue(name, queue, seen) for name, queue in sorted(site.queues.items())]
        return SiteWhyAnswer(site=call.site, window_s=WINDOW_S, queues=found)

    async def asking(self, topology: Topology, slot: int, who: Principal) -> Asking:
        """What is known of the pilots that may take from a slot; a user's are held against jobs of his VO.

        Raises Unavailable. Safe to retry: yes.
        """
        queues, askers = self._obstacles.queues(topology, slot), self._askers
        online = [name for name, queue in queues.items() if queue.status != "offline"]
        asking = [name for name in online if askers.offers(name)]
        each = max(1, MAX_OFFERS // max(1, len(asking)))
        offers = [offer for name in asking for offer in askers.offers(name)[:each]][:MAX_OFFERS]
        seen = self._visible([key for key in self._classes.active() if key.slot == slot], who)
        refused: dict[tuple[str, str, str], list[ClassKey]] = {}
        n_refused = 0
        for key, needs in seen if offers else ():
            nearest = min((refusals(needs, offer) for offer in offers), key=len)
            n_refused += bool(nearest)
            for one in nearest:
                refused.setdefault((one.reason, one.needed, one.offered), []).append(key)
        most = max(refused.items(), key=lambda item: len(item[1]), default=None)
        return Asking(
            n_queues=len(queues),
            n_offline=len(queues) - len(online),
            reason=next((queue.reason for queue in queues.values() if queue.status == "offline" and queue.reason), ""),
            n_asked=sum(map(askers.n_asked, online)),
            n_pilots=sum(map(askers.n_pilots, online)),
            last_at=max(map(askers.last_at, online), default=0.0),
            n_classes=len(seen),
            n_refused=n_refused,
            refused=await self._told(*most) if most is not None else None,
        )

    def _visible(self, keys: Iterable[ClassKey], who: Principal) -> list[tuple[ClassKey, Requirements]]:
        """The first of these classes that are known here; a user's are of his VO."""
        seen = ((key, needs) for key in keys if (needs := self._classes.needs(key)) is not None)
        return list(islice((one for one in seen if who.role != "user" or one[1].vo == who.vo), MAX_CLASSES))

    # --- one job

    async def _of_ready(self, topology: Topology, place: _Place) -> list[Reason]:
        # Its class may not be known here yet: of a job that has just come with its slot.
        needs = self._classes.needs(place.key)
        queues = self._obstacles.queues(topology, place.key.slot)
        if needs is None:
            return [NO_QUEUE]
        reasons, fitting = self._obstacles.between(needs, queues)
        return reasons if fitting is None else [await self._turn(topology, place, fitting)]

    async def _turn(self, topology: Topology, place: _Place, offer: Offer) -> Reason:
        """Where it stands among all that the same pilots take here: of their site, and of its region."""
        name = offer.queue
        _, site, _ = topology.queue(name)
        slots = [*site.slots, topology.region(site.region).slot]
        keys, n_ahead = self._classes.fitting(slots, offer), 0
        for start in range(0, len(keys), CLASSES_PER_STATEMENT):
            some = keys[start : start + CLASSES_PER_STATEMENT]
            n_ahead += await self._database.run("user", partial(_count_before, place=place, keys=some))
            if n_ahead >= MAX_AHEAD:
                break
        n_ahead = min(n_ahead, MAX_AHEAD)
        rate = sum(map(self._askers.n_given_of, slots)) / WINDOW_S
        if not n_ahead:
            told = f"it is the next one for the pilots of {name}"
            last = self._askers.last_at(name) or None
            return Reason(code="ready_to_run", text=told, queue=name, n_ahead=0, rate_per_s=rate, since=last)
        many = "more than 10,000" if n_ahead >= MAX_AHEAD else f"{n_ahead}"
        told = f"{many} ready jobs rank before it for the pilots of {name}"
        told += f"; {rate:.2f} a second were given lately" + (f", that is {n_ahead / rate:.0f} s" if rate else "")
        return Reason(code="behind_others", text=told, queue=name, n_ahead=n_ahead, rate_per_s=rate)

    # --- one computing queue

    async def _of_queue(self, name: str, queue: Queue, seen: Sequence[tuple[ClassKey, Requirements]]) -> QueueWhy:
        askers, offers = self._askers, self._askers.offers(name)
        refused: dict[tuple[str, str, str], list[ClassKey]] = {}
        for key, needs in seen if offers else ():
            per_offer = [refusals(needs, offer) for offer in offers]
            for one in min(per_offer, key=len):
                refused.setdefault((one.reason, one.needed, one.offered), []).append(key)
        told = [await self._told(*item) for item in sorted(refused.items())]
        return QueueWhy(
            queue=name,
            status=queue.status,
            reason=queue.reason,
            last_asked_at=askers.last_at(name) or None,
            n_pilots=askers.n_pilots(name),
            n_asked=askers.n_asked(name),
            n_given=askers.n_given(name),
            refused=[one for one in told if one is not None],
        )

    async def _told(self, what: tuple[str, str, str], keys: Sequence[ClassKey]) -> Refused | None:
        """A refusal with one of its jobs; None where those are gone."""
        best = await self._database.run("user", partial(_best, key=keys[0]))
        if not best:
            return None
        code, needed, offered = what
        return Refused(code=code, needed=needed, offered=offered, n_classes=len(keys), example=best[0][0])  # type: ignore[arg-type]

    async def _archived(self, identifier: int) -> list[Row]:
        """The columns of `read_place` of a job that has ended long ago."""
        row = (await self._database.run("user", lambda tx: find_archived_rows(tx, [identifier]))).get(identifier)
        if row is None:
            return []
        ended = (row[10], row[22], row[11], row[15], row[16], row[17], row[19], row[20], row[21], row[18])
        return [(row[1], 0, row[2], row[3], row[5], row[6], row[9], *ended)]

    async def _fetch(self, statement: str, identifier: int) -> list[Row]:
        return await self._database.run("user", lambda tx: tx.fetch(statement, identifier))


async def _count_before(tx: Transaction, place: _Place, keys: Sequence[ClassKey]) -> int:
    rows = [(*key, place.ranking, place.ranking, place.id, MAX_AHEAD) for key in keys]
    return int((await tx.fetch_rows("count_before", rows))[0][0])


async def _best(tx: Transaction, key: ClassKey) -> list[Row]:
    return await tx.fetch_rows("best_ready", [(*key, 1)])


def _place(identifier: int, row: Row) -> _Place:
    error = f"{row[13]} {row[14]}: {row[15]}" if row[13] is not None else ""
    return _Place(
        id=identifier,
        key=ClassKey(row[0], row[1]),
        state=State(row[2]),
        queue=row[3],
        ranking=-row[6],
        attempt=row[7],
        lost=row[8],
        max_attempts=row[9],
        modified_at=row[10] / _MICROSECONDS,
        pilot=row[11],
        host=row[12],
        error=error,
        cancel_requested=bool(row[16]),
    )


def _utc(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(at))


def _of_other(place: _Place, lease_ends_at: float | None) -> Reason:
    """What a job that is not ready does, or how it ended."""
    since, state = place.modified_at, place.state
    if state in UNREADY:
        return Reason(code="inputs_missing", text=f"it is {state}: its inputs are not all there", since=since)
    pilot = f"pilot {place.pilot} on {place.host or 'an unknown host'}"
    unless = f"; taken for lost if nothing is heard by {_utc(lease_ends_at)}" if lease_ends_at else ""
    if state is State.SENT:
        told = f"{pilot} was given it and has given no sign of life yet{unless}"
        return Reason(code="sent", text=told, queue=place.queue, since=since)
    if state in _AFTER_WORKER:
        return Reason(
            code="outputs_pending", text=f"it has run and is {state}: its outputs are accounted for", since=since
        )
    if state in LEASED:
        told = f"it is {state} with {pilot}, attempt {place.attempt}{unless}"
        return Reason(code="running", text=told, queue=place.queue, since=since)
    if state is State.FAILED and place.lost >= place.max_attempts:
        told = (
            f"{place.lost} of {place.max_attempts} attempts were lost; the last: {place.error or 'no error was told'}"
        )
        return Reason(code="attempts_used_up", text=told, since=since)
    told = f"it has {state}" if state in (State.FINISHED, State.FAILED) else f"it was {state}"
    return Reason(code=state.value, text=told + (f": {place.error}" if place.error else ""), since=since)  # type: ignore[arg-type]
