"""What a shard answers on the link. Handlers hold no business logic: decode, call one use case, encode."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar

import msgspec

from culm import access, get_job_times, telemetry
from culm.errors import ClientFault, CulmError
from culm.link import Begun
from culm.topology import Topology
from culm.wire import (
    ExportAnswer,
    GetJobAnswer,
    Principal,
    ShardArchive,
    ShardArchiveAnswer,
    ShardCancel,
    ShardCounts,
    ShardCountsAnswer,
    ShardDepths,
    ShardErrors,
    ShardExport,
    ShardGetJob,
    ShardHappenings,
    ShardHeartbeat,
    ShardJob,
    ShardJobs,
    ShardKnown,
    ShardPileUps,
    ShardPilots,
    ShardRelease,
    ShardReleaseAnswer,
    ShardReport,
    ShardSiteWhy,
    ShardSubmit,
)
from shard import lists, reads
from shard.archive import Archive
from shard.askers import WINDOW_S, Askers
from shard.database import Database
from shard.dispatch import Dispatcher
from shard.happenings import Happenings
from shard.intake import Intake
from shard.lifecycle import Lifecycle
from shard.pile_ups import PileUps
from shard.signs import Signs
from shard.why import Why

M = TypeVar("M", bound=msgspec.Struct)

_ENCODER: Final = msgspec.msgpack.Encoder()
_GET_JOB: Final = msgspec.msgpack.Decoder(ShardGetJob)
_OK: Final = {verb: telemetry.REQUESTS.labels(verb, "ok") for verb in ("heartbeat", "report")}


@dataclass(frozen=True)
class UseCases:
    """The use cases of one shard."""

    name: str
    authority: str
    """Whose shard it is."""
    database: Database
    topology: Callable[[], Topology]
    intake: Intake
    dispatcher: Dispatcher
    lifecycle: Lifecycle
    signs: Signs
    why: Why
    happenings: Happenings
    archive: Archive
    askers: Askers
    pile_ups: PileUps


class Verbs:
    """The table of verbs; `handle` is the link's handler."""

    def __init__(self, cases: UseCases) -> None:
        self._cases = cases
        topology, database = cases.topology, cases.database
        self._table: dict[str, tuple[msgspec.msgpack.Decoder[Any], Callable[[Any], Awaitable[msgspec.Struct]]]] = {
            "submit": _entry(ShardSubmit, cases.intake.submit),
            "known": _entry(ShardKnown, cases.intake.known),
            "get_job": (_GET_JOB, self._get_job),
            "heartbeat": _entry(ShardHeartbeat, cases.lifecycle.heartbeat),
            "report": _entry(ShardReport, cases.lifecycle.report),
            "cancel": _entry(ShardCancel, cases.lifecycle.cancel),
            "release": _entry(ShardRelease, self._release),
            "job": _entry(ShardJob, lambda call: reads.read_job(database, topology(), call)),
            "jobs": _entry(ShardJobs, lambda call: lists.list_jobs(database, topology(), call)),
            "why": _entry(ShardJob, lambda call: cases.why.job(topology(), call)),
            "site_why": _entry(ShardSiteWhy, lambda call: cases.why.site(topology(), call)),
            "archive": _entry(ShardArchive, self._archive),
            "export": _entry(ShardExport, self._export),
            "happenings": _entry(ShardHappenings, cases.happenings.since),
            "counts": _entry(ShardCounts, self._counts),
            "pile_ups": _entry(ShardPileUps, lambda call: cases.pile_ups.judge(topology(), cases.name, call)),
            "pilots": _entry(ShardPilots, lambda call: cases.askers.seen(cases.name, cases.authority, call)),
            "errors": _entry(ShardErrors, lambda call: reads.read_errors(database, cases.name, call)),
            "depths": _entry(ShardDepths, lambda call: reads.read_depths(database, call)),
        }

        self._begun: dict[str, tuple[msgspec.msgpack.Decoder[Any], Callable[[Any], asyncio.Future[Any] | None]]] = {
            "get_job": (_GET_JOB, cases.dispatcher.begin),
            "heartbeat": (self._table["heartbeat"][0], cases.signs.begin),
            "report": (self._table["report"][0], cases.signs.begin),
        }

    async def handle(self, verb: str, body: bytes, _deadline_s: float) -> bytes:
        """Answer one call. Raises CulmError."""
        started = time.perf_counter()
        outcome = "ok"
        try:
            entry = self._table.get(verb)
            if entry is None:
                raise ClientFault("unknown_verb", f"{verb!r} is no verb of a shard", http_status=404)
            decoder, use_case = entry
            try:
                call = decoder.decode(body)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise ClientFault("bad_message", f"{verb}: {error}") from None
            return _ENCODER.encode(await use_case(call))
        except CulmError as error:
            outcome = error.code
            raise
        finally:
            if verb != "get_job" or outcome != "ok":
                telemetry.REQUESTS.labels(verb if verb in self._table else "unknown", outcome).observe(
                    time.perf_counter() - started
                )

    def begin(self, verb: str, body: bytes) -> Begun | None:
        """What pilots say all day, without a task; None for a call that has more to wait for. Raises CulmError."""
        entry = self._begun.get(verb)
        if entry is None:
            return None
        started = time.perf_counter()
        decoder, begin = entry
        try:
            call = decoder.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None
        waits = call.wait_s > 0 if isinstance(call, ShardGetJob) else None
        try:
            future = begin(call)
        except CulmError as error:
            _refused(verb, waits, started, error)
            raise
        return None if future is None else (future, partial(_finish, verb, waits, started))

    def undelivered(self, verb: str, body: bytes, _answer: bytes) -> None:
        """An answer that could not be sent: a get_job's jobs go back."""
        if verb == "get_job":
            call = _GET_JOB.decode(body)
            self._cases.dispatcher.hand_back(call.subject, call.request_id)

    async def _get_job(self, call: ShardGetJob) -> GetJobAnswer:
        started = time.perf_counter()
        try:
            answer = await self._cases.dispatcher.get_job(call)
        except CulmError as error:
            get_job_times.refused(time.perf_counter() - started, error, waits=call.wait_s > 0)
            raise
        elapsed_s = time.perf_counter() - started
        get_job_times.answered(elapsed_s, waits=call.wait_s > 0, has_jobs=bool(answer.jobs))
        return answer

    async def _archive(self, call: ShardArchive) -> ShardArchiveAnswer:
        self._require_own_admin(call.principal)
        archive = self._cases.archive
        n_moved = await archive.move(call.older_s) if call.older_s is not None else 0
        n_dropped = await archive.drop(call.drop, call.principal.account, call.exported) if call.drop else 0
        return ShardArchiveAnswer(
            shard=self._cases.name, n_moved=n_moved, n_dropped=n_dropped, partitions=await archive.partitions()
        )

    async def _counts(self, call: ShardCounts) -> ShardCountsAnswer:
        answer = await reads.read_counts(self._cases.database, self._cases.name, call)
        n_dispatched = self._cases.askers.n_given_in_all()
        return msgspec.structs.replace(answer, n_dispatched=n_dispatched, window_s=WINDOW_S)

    async def _export(self, call: ShardExport) -> ExportAnswer:
        self._require_own_admin(call.principal)
        jobs, following = await self._cases.archive.page(call.name, call.after)
        return ExportAnswer(jobs=reads.exported(self._cases.topology(), jobs), next=following)

    def _require_own_admin(self, principal: Principal) -> None:
        """A link carries the word of whatever router has a certificate: a shard obeys admins of its own authority only.

        Raises ClientFault(forbidden).
        """
        access.require_role(principal, "admin")
        own = self._cases.authority
        if principal.authority != own:
            raise access.forbidden(f"this shard obeys admins of {own}, the token is of {principal.authority}")

    async def _release(self, call: ShardRelease) -> ShardReleaseAnswer:
        # By way of the dispatcher: a repeat of that request, by way of another router, must wait for its end.
        return ShardReleaseAnswer(n_jobs=await self._cases.dispatcher.hand_back(call.subject, call.request_id))


def _finish(verb: str, waits: bool | None, started: float, future: "asyncio.Future[msgspec.Struct]") -> bytes:
    """`waits` is None of all but a get_job."""
    try:
        answer = future.result()
    except CulmError as error:
        _refused(verb, waits, started, error)
        raise
    body = _ENCODER.encode(answer)
    elapsed_s = time.perf_counter() - started
    if isinstance(answer, GetJobAnswer):
        get_job_times.answered(elapsed_s, waits=bool(waits), has_jobs=bool(answer.jobs))
    else:
        _OK[verb].observe(elapsed_s)
    return body


def _refused(verb: str, waits: bool | None, started: float, error: CulmError) -> None:
    elapsed_s = time.perf_counter() - started
    telemetry.REQUESTS.labels(verb, error.code).observe(elapsed_s)
    if waits is not None:
        get_job_times.refused(elapsed_s, error, waits=waits)


def _entry(
    kind: type[M], use_case: Callable[[M], Awaitable[msgspec.Struct]]
) -> tuple[msgspec.msgpack.Decoder[Any], Callable[[Any], Awaitable[msgspec.Struct]]]:
    return msgspec.msgpack.Decoder(kind), use_case
