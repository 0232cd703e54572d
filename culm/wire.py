"""The messages: what clients and pilots send over HTTP, and what a router sends to a shard over the link.

The normative page is `docs/protocol.md`; the bytes are pinned in `tests/golden/`. To change a message: only add
fields, with a default, at the end; old and new processes must understand each other for one release; then mint new
golden bytes beside the old ones. Requests refuse unknown fields, so that a typing error is not silently ignored;
answers do not, so that an older client can read a newer server.

Units: `_s` seconds, `_mb` MiB, `_at` seconds since the epoch (UTC). 0 or "" in a requirement means "does not matter".
"""

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from culm.ids import MAX_JOB_ID
from culm.matching import Offer
from culm.priorities import MAX_PRIORITY
from culm.states import Event, State

MAX_JOBS_PER_SUBMIT: Final = 2000
MAX_IDS_PER_CALL: Final = 1000
MAX_WARNINGS: Final = 20
MAX_JOBS_PER_GET: Final = 100
MAX_WAIT_S: Final = 60.0
MAX_BODY_BYTES: Final = 2 << 20
MAX_FRAME_BYTES: Final = 8 << 20
MAX_TAIL_CHARS: Final = 8192
MAX_PARENT_DEPTH: Final = 5
MAX_ATTEMPT: Final = 2**31 - 1
"""JSON can carry whole numbers beyond 64 bits, which neither MessagePack nor a database column can."""
MAX_TIME: Final = 253_402_300_799
"""The last second of the year 9999, unix time: databases know none after it."""
MAX_USAGE_S: Final = 1e12
"""MessagePack can carry infinity, which neither JSON nor a database column can."""

JobId = Annotated[int, Meta(ge=1, le=MAX_JOB_ID)]
Name = Annotated[str, Meta(min_length=1, max_length=128)]
OptionalName = Annotated[str, Meta(max_length=128)]
Key = Annotated[str, Meta(min_length=1, max_length=128)]
Amount = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Word = Annotated[str, Meta(max_length=65536)]
Tail = Annotated[str, Meta(max_length=MAX_TAIL_CHARS)]


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """Base of what a client sends."""


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """Base of what it gets back."""


# --- jobs -----------------------------------------------------------------------------------------------------------


class InputFile(Request, frozen=True, kw_only=True):
    """A file that must be there before the job may start; `ready` says that it is."""

    name: Name
    ready: bool = True


class JobSpec(Request, frozen=True, kw_only=True):
    """One job as its submitter describes it. Immutable once stored.

    Target: a computing `queue`, or a `site`, or a `region`; none of them is the default region. Payload: exactly one
    of `argv` (run as it is) and `shell` (given to `/bin/sh -c`). Where `cores`, `memory_mb`, `disk_mb`, `walltime_s`
    or `max_attempts` are not said (None, 0), the default of the computing queue, the VO or the shard is stored.
    """

    region: OptionalName = ""
    site: OptionalName = ""
    queue: OptionalName = ""
    name: Annotated[str, Meta(max_length=256)] = ""
    argv: Annotated[list[Word], Meta(max_length=1024)] = []
    shell: Word = ""
    environment: Annotated[dict[Name, Word], Meta(max_length=256)] = {}
    label: Name = "user"
    working_group: OptionalName = ""
    cores: Annotated[int, Meta(ge=1, le=4096)] | None = None
    memory_mb: Amount = 0
    disk_mb: Amount = 0
    walltime_s: Amount = 0
    release: OptionalName = ""
    platform: OptionalName = ""
    pilot_type: OptionalName = ""
    priority: Annotated[int, Meta(ge=0, le=MAX_PRIORITY)] | None = None
    max_attempts: Annotated[int, Meta(ge=1, le=50)] | None = None
    inputs: Annotated[list[InputFile], Meta(max_length=1000)] = []
    outputs: Annotated[list[Name], Meta(max_length=1000)] = []
    parent_id: JobId | None = None


class JobError(Request, frozen=True, kw_only=True):
    """Why a job failed: PanDA's plane, code and text.

    Planes: pilot, exe, sup, ddm, brokerage, jobDispatcher, taskBuffer, trans.
    """

    plane: Name
    code: Annotated[int, Meta(ge=0, le=2**31 - 1)]
    text: Annotated[str, Meta(max_length=1000)] = ""


class Usage(Request, frozen=True, kw_only=True):
    """What the payload has used so far."""

    wall_s: Annotated[float, Meta(ge=0, le=MAX_USAGE_S)] = 0.0
    cpu_s: Annotated[float, Meta(ge=0, le=MAX_USAGE_S)] = 0.0
    rss_mb: Amount = 0
    disk_mb: Amount = 0


# --- the five verbs --------------------------------------------------------------------------------------------------


class SubmitRequest(Request, frozen=True, kw_only=True):
    """Up to 2,000 jobs. The same key with the same jobs gives the same ids, however often it is sent."""

    idempotency_key: Key
    jobs: Annotated[list[JobSpec], Meta(min_length=1, max_length=MAX_JOBS_PER_SUBMIT)]
    jobset: JobId | None = None
    """Join an existing jobset; None makes one, the same for every repeat of this key."""


class ErrorBody(Answer, frozen=True, kw_only=True):
    """Every error, in every dialect of /v1: {"error": {..}}."""

    code: str
    message: str
    retryable: bool
    retry_after_s: float | None = None
    details: dict[str, Any] = {}


class ShardOutcome(Answer, frozen=True, kw_only=True):
    """What one shard did with its part of a call."""

    ok: bool
    n_jobs: int
    error: ErrorBody | None = None


class SubmitAnswer(Answer, frozen=True, kw_only=True):
    """`ids` in the order of the request; None where that job's shard gave no answer: repeat the call."""

    jobset: int
    ids: list[int | None]
    shards: dict[str, ShardOutcome]
    warnings: list["SubmitWarning"] = []
    """By index, at most MAX_WARNINGS."""


class PilotInfo(Request, frozen=True, kw_only=True):
    """Who asks."""

    id: Name
    host: OptionalName = ""
    type: OptionalName = ""
    version: OptionalName = ""


class GetJobRequest(Request, frozen=True, kw_only=True):
    """A pilot asks for work. The same request id gets the same jobs while their leases live.

    0 in what it offers means: what the computing queue offers.
    """

    request_id: Annotated[str, Meta(min_length=8, max_length=64)]
    queue: Name
    pilot: PilotInfo
    label: OptionalName = "unified"
    cores: Annotated[int, Meta(ge=0, le=4096)] = 0
    memory_mb: Amount = 0
    disk_mb: Amount = 0
    walltime_s: Amount = 0
    n_jobs: Annotated[int, Meta(ge=1, le=MAX_JOBS_PER_GET)] = 1
    wait_s: Annotated[float, Meta(ge=0, le=MAX_WAIT_S)] = 0.0


class Grant(Answer, frozen=True, kw_only=True):
    """One job for the pilot: it is his until the lease ends."""

    id: int
    attempt: int
    lease_token: str
    lease_s: float
    """Send a first sign of life before this."""
    heartbeat_s: float
    """Then one at least this often."""
    jobset: int
    owner: str
    vo: str
    priority: int
    spec: msgspec.Raw
    """The JobSpec as stored: MessagePack on the link, in the client's dialect over HTTP."""


class GetJobAnswer(Answer, frozen=True, kw_only=True):
    """No job is an answer, not an error: `jobs` is empty then, and `reason` may say why (e.g. queue_offline)."""

    jobs: list[Grant] = []
    reason: str = ""


class HeartbeatRequest(Request, frozen=True, kw_only=True):
    """A sign of life of a leased job; its state may move on (starting, running)."""

    id: JobId
    attempt: Annotated[int, Meta(ge=1, le=MAX_ATTEMPT)]
    lease_token: Key
    state: State
    usage: Usage | None = None


class HeartbeatAnswer(Answer, frozen=True, kw_only=True):
    """`command` is "cancel" when the payload must be ended and reported, else None."""

    state: State
    lease_s: float
    heartbeat_s: float
    command: str | None = None


class ReportRequest(Request, frozen=True, kw_only=True):
    """What became of a job.

    A pilot sends `state` with `attempt` and `lease_token`. State `activated` gives the job back: no attempt is used up;
    with an `error` the attempt had begun and is lost, as if its lease had ended. The data side (role production or
    admin) sends `event` instead: inputs_missing, assign, inputs_ready, move_outputs, merge, finish, fail.
    """

    id: JobId
    attempt: Annotated[int, Meta(ge=0, le=MAX_ATTEMPT)] = 0
    lease_token: OptionalName = ""
    state: State | None = None
    event: Event | None = None
    exit_code: Annotated[int, Meta(ge=-255, le=255)] | None = None
    error: JobError | None = None
    stdout_tail: Tail = ""
    stderr_tail: Tail = ""
    usage: Usage | None = None


class ReportAnswer(Answer, frozen=True, kw_only=True):
    """The state after the report. A repeated final report is answered as the first was."""

    id: int
    attempt: int
    state: State


class CancelRequest(Request, frozen=True, kw_only=True):
    """End jobs by id, or a whole jobset. Exactly one of the two."""

    ids: Annotated[list[JobId], Meta(max_length=MAX_IDS_PER_CALL)] = []
    jobset: JobId | None = None
    after: Annotated[int, Meta(ge=0, le=MAX_JOB_ID)] = 0
    """Of a jobset: only jobs after this id."""


CancelOutcome = Literal["cancelled", "requested", "already_final", "not_found", "forbidden", "unknown"]


class CancelledJob(Answer, frozen=True, kw_only=True):
    """`requested`: it runs, its pilot is told at the next heartbeat. `unknown`: the shard gave no answer."""

    id: int
    outcome: CancelOutcome
    state: State | None = None


class CancelAnswer(Answer, frozen=True, kw_only=True):
    """One entry per job; shards that gave no answer are named.

    A large jobset is ended in several calls: `next` is the `after` of the following one, None at the end.
    """

    jobs: list[CancelledJob]
    missing_shards: list[str] = []
    next: int | None = None


# --- reads -----------------------------------------------------------------------------------------------------------


class JobRow(Answer, frozen=True, kw_only=True):
    """One line of a list of jobs."""

    id: int
    state: State
    site: str
    region: str
    queue: str
    name: str
    owner: str
    vo: str
    working_group: str
    label: str
    priority: int
    attempt: int
    max_attempts: int
    jobset: int
    parent_id: int | None
    created_at: float
    modified_at: float
    pilot: str
    host: str
    cancel_requested: bool
    error: JobError | None = None
    lost: int = 0
    """Attempts that are used up; the others were given back. `max_attempts` bounds this one."""


class JobEvent(Answer, frozen=True, kw_only=True):
    """One transition of a job, in the order of `n`."""

    n: int
    at: float
    event: Event
    source: State | None
    target: State
    attempt: int
    actor: str
    detail: str


class AttemptReport(Answer, frozen=True, kw_only=True):
    """The final report of one attempt."""

    attempt: int
    at: float
    state: State
    exit_code: int | None
    error: JobError | None
    stdout_tail: str
    stderr_tail: str
    usage: Usage | None


class JobView(Answer, frozen=True, kw_only=True):
    """All that is known of one job."""

    job: JobRow
    spec: JobSpec
    history: list[JobEvent]
    """Oldest first, the newest 1,000."""
    reports: list[AttemptReport]
    """By attempt, the newest 50."""
    events_left_out: int = 0
    reports_left_out: int = 0
    """Older ones that are not shown."""


class JobsQuery(Request, frozen=True, kw_only=True):
    """Filters of a list of jobs.

    In the order "id" `after` is the last id of the page before; in the order "newest" `before` is what that page told.
    """

    region: OptionalName = ""
    site: OptionalName = ""
    state: State | None = None
    owner: OptionalName = ""
    jobset: JobId | None = None
    limit: Annotated[int, Meta(ge=1, le=1000)] = 100
    after: Annotated[int, Meta(ge=0, le=MAX_JOB_ID)] = 0
    order: Literal["id", "newest"] = "id"
    before: Annotated[str, Meta(pattern=r"^([0-9]{1,18}\.[0-9]{1,16})?\Z")] = ""
    since: Annotated[float, Meta(ge=0, le=MAX_TIME)] | None = None
    """Submitted then or later, unix time."""
    until: Annotated[float, Meta(ge=0, le=MAX_TIME)] | None = None
    """Submitted before."""


class JobsAnswer(Answer, frozen=True, kw_only=True):
    """A page in the order that was asked for; `next`, or `before`, is None at the end.

    Shards that gave no answer are named.
    """

    jobs: list[JobRow]
    next: int | None = None
    """`after` of the following page."""
    missing_shards: list[str] = []
    before: str | None = None
    """`before` of the following page."""


ReasonCode = Literal[
    "owner_banned", "ready_to_run", "behind_others", "no_pilot_asked", "no_queue_there", "queue_offline",
    "queue_in_test", "wrong_label", "wrong_vo", "wrong_queue", "wrong_pilot_type", "too_few_cores",
    "too_little_memory_mb", "too_little_disk_mb", "too_little_walltime_s", "no_matching_release",
    "no_matching_platform", "inputs_missing", "sent", "running", "outputs_pending", "cancel_requested",
    "attempts_used_up", "failed", "finished", "cancelled", "closed", "shard_down", "region_cut_off",
]  # fmt: skip
"""Why a job is where it is; the refusals among them are those of `culm.matching`."""


class Reason(Answer, frozen=True, kw_only=True):
    """One true reason, as a code, a sentence, and its figures."""

    code: ReasonCode
    text: str
    queue: str = ""
    """The computing queue that it holds for; "" for all."""
    needed: str = ""
    offered: str = ""
    """Of a refusal: what the job needs, what is offered there."""
    n_ahead: int | None = None
    """Of `behind_others`: ready jobs that rank before it, counted to 10,000."""
    rate_per_s: float | None = None
    """Of `behind_others`: jobs of its slot that were dispatched in the last minutes."""
    since: float | None = None
    """Since when, or when last, seconds since the epoch; None: never, or not known."""


class SubmitWarning(Answer, frozen=True, kw_only=True):
    """Jobs of a submit that nobody can run as things are. They are accepted all the same, and wait."""

    index: int
    """The place in the call of the first of them."""
    n_jobs: int
    """So many of the call need the same in the same place."""
    reasons: list[Reason]
    """As `why` would say; the first ones where there are many computing queues."""


class WhyAnswer(Answer, frozen=True, kw_only=True):
    """Why a job is not running, or what it does. The first reason is the nearest to it."""

    id: int
    state: State | None
    """None where the shard of the job cannot be asked."""
    reasons: list[Reason]


class Refused(Answer, frozen=True, kw_only=True):
    """Ready jobs that a computing queue's pilots cannot take."""

    code: ReasonCode
    needed: str
    offered: str
    n_classes: int
    """Different requirements that are refused for this reason."""
    example: int
    """A job of those."""


class QueueWhy(Answer, frozen=True, kw_only=True):
    """What the pilots of a computing queue ask for, get, and are refused for; counts are of the last minutes."""

    queue: str
    status: str
    reason: str
    last_asked_at: float | None
    n_pilots: int
    n_asked: int
    n_given: int
    refused: list[Refused]
    """Empty where no pilot asked lately: then nothing was refused."""


class SiteWhyAnswer(Answer, frozen=True, kw_only=True):
    """Per computing queue of a site; shards that gave no answer are named."""

    site: str
    window_s: float
    queues: list[QueueWhy]
    missing_shards: list[str] = []


CauseCode = Literal[
    "site_offline", "no_queue_there", "no_pilot_asked", "pilots_do_not_fit", "more_arrives_than_is_dispatched",
    "owners_banned", "pilots_give_no_sign", "heartbeats_stop", "more_starts_than_ends", "outputs_not_accounted",
    "inputs_do_not_come", "jobs_fail",
]  # fmt: skip
"""Why jobs probably pile up in a state."""


class PileUp(Answer, frozen=True, kw_only=True):
    """A state that grows at a site, against the last hours."""

    site: str
    region: str
    state: State
    n_jobs: int
    n_usual: int
    """The mean of the hourly samples of the hours before this one."""
    n_before: int
    """In the newest of those. Of `failed`, which only ever grows, `n_jobs` have failed since then, `n_usual` would have
    at the pace of before, and this is 0."""
    cause: CauseCode
    text: str
    """The cause as a sentence with its figures."""
    example: int | None = None
    """A job that it holds for, where one is known."""
    shards: list[str] = []


class PileUpsAnswer(Answer, frozen=True, kw_only=True):
    """What piles up, the most jobs above the usual first. A shard that gave no answer is named."""

    hours: int
    pile_ups: list[PileUp]
    n_samples: dict[str, int]
    """Per shard that answered: the hours that it could compare with; 0 where it cannot say yet."""
    missing_shards: list[str] = []


class PilotSeen(Answer, frozen=True, kw_only=True):
    """A pilot that has asked for work; counts are from when it was first seen."""

    id: str
    host: str
    queue: str
    first_at: float
    last_at: float
    n_asked: int
    """Requests, those that wait among them."""
    n_answered: int
    """Requests that got at least one job."""
    n_jobs: int
    """Jobs that it was given."""
    last_job_at: float | None = None
    """When it was last given one; None: never."""
    site: str = ""


class QueueSeen(Answer, frozen=True, kw_only=True):
    """Who asks for a computing queue; counts are of the last minutes."""

    queue: str
    last_asked_at: float | None
    n_pilots: int
    n_asked: int
    n_given: int
    site: str = ""


class PilotsAnswer(Answer, frozen=True, kw_only=True):
    """The computing queues by name, and the pilots that asked lately, the latest first."""

    window_s: float
    """What the counts of a computing queue are of."""
    queues: list[QueueSeen]
    pilots: list[PilotSeen]
    n_left_out: int = 0
    """Pilots beyond the limit."""
    missing_shards: list[str] = []


# --- router to shard ------------------------------------------------------------------------------------------------


class Principal(msgspec.Struct, frozen=True, kw_only=True):
    """Who a verified token speaks for."""

    role: Literal["pilot", "user", "admin", "peer"]
    subject: str
    authority: str
    vo: str = ""
    groups: list[str] = []
    roles: list[str] = []
    """`production`, `monitor`, `manager:<group>`."""
    queues: list[str] = []
    """Computing queues a pilot may ask for: names, or a prefix ending in `*`."""
    vos: list[str] | None = None
    """VOs whose jobs a pilot may take; None is any."""

    @property
    def account(self) -> str:
        """Who it is among all authorities, `authority:subject`: two authorities may know the same subject."""
        return f"{self.authority}:{self.subject}"


class SlotRef(msgspec.Struct, frozen=True, array_like=True):
    """A slot and the epoch at which the router believes it open."""

    slot: int
    epoch: int


class SlotJobs(msgspec.Struct, frozen=True, kw_only=True):
    """The jobs of one call for one slot, in the order of the call."""

    at: SlotRef
    specs: list[JobSpec]
    offsets: list[int] = []
    """Priority offset of each job (computing queue and group); empty means none."""


class ShardSubmit(msgspec.Struct, frozen=True, kw_only=True):
    """One shard's part of a submit."""

    principal: Principal
    key: str
    jobset: int
    parts: list[SlotJobs]
    parent_depths: dict[int, int] = {}
    """How deep each parent that is named lies: 0 for a job that has no parent itself."""
    call_digest: bytes = b""
    """16 bytes that stand for the whole call, of which this may be a part; empty from a router of before."""


class ShardSubmitAnswer(Answer, frozen=True, kw_only=True):
    """The first id per part; a part's ids are contiguous. Warnings count the jobs through all parts."""

    first_ids: list[int]
    warnings: list[SubmitWarning] = []


class ShardKnown(msgspec.Struct, frozen=True, kw_only=True):
    """In which of these slots jobs of an account and an idempotency key are stored."""

    account: str
    key: str
    slots: list[int]


class ShardKnownAnswer(Answer, frozen=True, kw_only=True):
    """Those of the slots."""

    slots: list[int]


class LeaseTimes(msgspec.Struct, frozen=True, array_like=True):
    """Time-outs of a computing queue, seconds; 0 means the shard's default."""

    first_s: float = 0.0
    heartbeat_s: float = 0.0


class ShardGetJob(msgspec.Struct, frozen=True, kw_only=True):
    """A get_job with everything resolved: the slots in the order of preference and what is offered."""

    slots: list[SlotRef]
    request_id: str
    subject: str
    offer: Offer
    pilot: PilotInfo
    lease: LeaseTimes
    n_jobs: int
    wait_s: float


class ShardHeartbeat(msgspec.Struct, frozen=True, kw_only=True):
    """One heartbeat for one slot."""

    at: SlotRef
    principal: Principal
    request: HeartbeatRequest


class ShardReport(msgspec.Struct, frozen=True, kw_only=True):
    """One report for one slot."""

    at: SlotRef
    principal: Principal
    request: ReportRequest


class ShardCancel(msgspec.Struct, frozen=True, kw_only=True):
    """Jobs to end: ids by slot, or a jobset over the slots named."""

    principal: Principal
    slots: list[SlotRef]
    ids: list[int] = []
    jobset: int | None = None
    after: int = 0


class ShardJob(msgspec.Struct, frozen=True, kw_only=True):
    """Read one job whole."""

    at: SlotRef
    principal: Principal
    id: int


class Happening(Answer, frozen=True, kw_only=True):
    """A job has changed its state, and that is committed."""

    id: int
    slot: int
    state: State
    event: Event
    attempt: int
    owner: str
    vo: str


class ShardHappenings(msgspec.Struct, frozen=True, kw_only=True):
    """What has happened after a position; generation "" asks for the present one."""

    generation: str = ""
    seq: int = 0
    wait_s: float = 0.0


class ShardHappeningsAnswer(Answer, frozen=True, kw_only=True):
    """`happened` ends at `seq`. `reset`: what came after the position is not known any more; look at what is stored."""

    generation: str
    seq: int
    reset: bool
    happened: list[Happening]
    at: float


class ShardSiteWhy(msgspec.Struct, frozen=True, kw_only=True):
    """Why the pilots of a site get nothing, or little."""

    principal: Principal
    site: str


class ShardJobs(msgspec.Struct, frozen=True, kw_only=True):
    """Read a page of jobs; `slots` empty means all of the shard's."""

    principal: Principal
    query: JobsQuery
    slots: list[int] = []
    also: list[int] = []
    """Slots of which only the jobs are wanted that ran, or run, at these computing queues."""
    queues: list[str] = []


class ShardPileUps(msgspec.Struct, frozen=True, kw_only=True):
    """Judge which states grow against the last hours."""

    principal: Principal
    hours: int


class SlotPileUp(Answer, frozen=True, kw_only=True):
    """A state that grows in a slot; the numbers as in `PileUp`."""

    slot: int
    state: State
    n_jobs: int
    n_usual: int
    n_before: int
    cause: CauseCode
    text: str
    example: int | None = None


class ShardPileUpsAnswer(Answer, frozen=True, kw_only=True):
    """The most jobs above the usual first."""

    shard: str
    n_samples: int
    pile_ups: list[SlotPileUp]


class ShardPilots(msgspec.Struct, frozen=True, kw_only=True):
    """Who asked in the last `since_s` seconds; `queues` None means all."""

    principal: Principal
    since_s: float
    limit: int
    queues: list[str] | None = None


class ShardPilotsAnswer(Answer, frozen=True, kw_only=True):
    """The latest pilots first, at most `limit`."""

    shard: str
    window_s: float
    queues: list[QueueSeen]
    pilots: list[PilotSeen]
    n_left_out: int = 0


class ShardDepths(msgspec.Struct, frozen=True, kw_only=True):
    """Ask how deep jobs lie in their chains of parents."""

    ids: list[int]


class ShardDepthsAnswer(Answer, frozen=True, kw_only=True):
    """Unknown jobs are missing."""

    depths: dict[int, int]


class ShardRelease(msgspec.Struct, frozen=True, kw_only=True):
    """Give back what was granted to a client that is gone. By request id, so that nothing else can be meant."""

    request_id: str
    subject: str


class ShardReleaseAnswer(Answer, frozen=True, kw_only=True):
    """How many jobs went back."""

    n_jobs: int


class ShardCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Counts by slot and state."""

    account: str = ""
    """Counted for certain, however few its jobs are."""


class SlotCount(Answer, frozen=True, kw_only=True):
    """How many jobs of one slot are in one state."""

    slot: int
    state: State
    n_jobs: int
    vo: str = ""


class ErrorCount(Answer, frozen=True, kw_only=True):
    """Jobs of a slot that failed with one error in the hours that were asked for."""

    slot: int
    plane: str
    code: int
    n_jobs: int
    example: int
    """One of them."""
    last_at: float
    """The beginning of the last hour with one, seconds since the epoch."""


class ShardErrors(msgspec.Struct, frozen=True, kw_only=True):
    """Count errors of the last hours."""

    principal: Principal
    hours: int


class ShardErrorsAnswer(Answer, frozen=True, kw_only=True):
    """The most frequent first."""

    shard: str
    errors: list[ErrorCount]
    n_left_out: int = 0
    """Rarer errors of a slot that are not among them,"""
    n_jobs_left_out: int = 0
    """and the jobs that failed with those."""


class ArchivePartition(Answer, frozen=True, kw_only=True):
    """A part of a shard's archive: what ended before a date, and not before the date of the part before it."""

    name: str
    before: str
    """YYYY-MM-DD, UTC."""
    n_jobs: int
    n_rows_estimated: int
    n_bytes: int


class ShardArchive(msgspec.Struct, frozen=True, kw_only=True):
    """Move a batch of what ended longer ago than `older_s` (None: nothing), or drop a partition by name."""

    principal: Principal
    older_s: float | None = None
    drop: str = ""
    exported: int | None = None
    """The partition must have so many jobs to be dropped; None: any number."""


class ShardArchiveAnswer(Answer, frozen=True, kw_only=True):
    """What was moved or dropped, and the partitions after it."""

    shard: str
    n_moved: int = 0
    n_dropped: int = 0
    partitions: list[ArchivePartition] = []


class ArchiveRequest(Request, frozen=True, kw_only=True):
    """Move a batch of old jobs on every shard of this authority, or drop a partition on one of them or on all."""

    older_s: Annotated[float, Meta(ge=0, le=1e9)] | None = None
    drop: OptionalName = ""
    shard: OptionalName = ""
    """"" for all of this authority."""
    exported: Annotated[dict[Name, Annotated[int, Meta(ge=0, le=MAX_JOB_ID)]], Meta(max_length=1000)] | None = None
    """By shard, how many jobs the partition must have to be dropped: what an export of it has; None: any number."""


class ArchiveAnswer(Answer, frozen=True, kw_only=True):
    """Per shard."""

    shards: list[ShardArchiveAnswer]
    missing_shards: list[str] = []
    why_missing: dict[str, str] = {}
    """By shard of those, code and message."""


class ShardExport(msgspec.Struct, frozen=True, kw_only=True):
    """A page of a partition of the archive, after a job."""

    principal: Principal
    name: str
    after: int = 0


class ExportRequest(Request, frozen=True, kw_only=True):
    """A page of a partition of one shard's archive: the jobs after an id, each whole."""

    shard: Name
    name: Name
    after: Annotated[int, Meta(ge=0, le=MAX_JOB_ID)] = 0


class ExportAnswer(Answer, frozen=True, kw_only=True):
    """In the order of their ids; `next` is what to ask for after these, None at the end."""

    jobs: list[JobView]
    next: int | None = None


class ShardCountsAnswer(Answer, frozen=True, kw_only=True):
    """From the tallies, at the database's time `at`."""

    shard: str
    at: float
    counts: list[SlotCount]
    owners: dict[str, int] = {}
    """Jobs that are not final, of the accounts with the most of them, and of the one that was asked for."""
    n_owners: int = 0
    """Accounts with such jobs, those among `owners` and the others."""
    archived: list[SlotCount] = []
    """What has left the hot tables; not among `counts`."""
    n_dispatched: int = 0
    """Jobs that were given to pilots in the last `window_s` seconds; 0 from a shard that does not say."""
    window_s: float = 0.0


class CountsAnswer(Answer, frozen=True, kw_only=True):
    """The monitor's merged counts. A shard that gave no answer is named, and what is shown of it is its last known."""

    total: dict[str, int]
    by_region: dict[str, dict[str, int]]
    by_site: dict[str, dict[str, int]]
    shards: dict[str, float]
    """Age in seconds of what is shown of each shard that was ever heard."""
    missing_shards: list[str] = []
    by_vo: dict[str, dict[str, int]] = {}
    archived: dict[str, int] = {}
    """Jobs in the archive by state; not among the others."""
    active_by_owner: dict[str, int] = {}
    """Jobs that are not final, of the accounts with the most of them."""
    owners_at_least: bool = False
    """A shard has more accounts than it names: those of `active_by_owner` may have more jobs there."""
    n_owners_left_out: int = 0
    """At least so many more accounts have such jobs."""


class ErrorRow(Answer, frozen=True, kw_only=True):
    """Jobs that failed with one error at one site."""

    plane: str
    code: int
    site: str
    region: str
    n_jobs: int
    example: int
    """One of them."""
    last_at: float
    """The beginning of the last hour with one, seconds since the epoch."""


class ErrorsAnswer(Answer, frozen=True, kw_only=True):
    """The monitor's merged errors of the last hours, the most frequent first."""

    hours: int
    errors: list[ErrorRow]
    missing_shards: list[str] = []
    n_left_out: int = 0
    """At most so many more rows, of rarer errors, are not told,"""
    n_jobs_left_out: int = 0
    """and so many jobs failed with those, maybe with errors that are among the rows."""


class ShardRow(Answer, frozen=True, kw_only=True):
    """One shard as the topology has it, and whether it answers."""

    name: str
    authority: str
    link: str
    regions: list[str]
    n_slots: int
    n_active: int | None
    """Jobs that are not final, as last heard; None if it was never heard."""
    age_s: float | None
    """Of what is shown; None if it was never heard."""
    answers: bool
    dispatched_per_s: float | None = None
    """Jobs given to pilots, the mean of the last minutes, as last heard; None if it was never heard."""


class ShardsAnswer(Answer, frozen=True, kw_only=True):
    """All shards, and the epoch of each authority's section."""

    epochs: dict[str, int]
    shards: list[ShardRow]
