"""One full sample of every message: no field left at its default, so that the pinned bytes show all of them."""

from typing import Any, Final

import msgspec

from culm import frames, matching, registry_wire, wire
from culm.policies import Policy
from culm.states import Event, State
from culm.topology import Placement, Queue, Region, Section, Shard, Site, SiteRegistration

ID: Final = (12_288 << 39) | 7
JOBSET: Final = (3 << 39) | 1
TOKEN: Final = "t0k3n"

SPEC = wire.JobSpec(
    region="US",
    site="BNL",
    queue="BNL_ATLAS_1",
    name="evgen-1",
    argv=["/bin/echo", "grüß"],
    shell="echo hi",
    environment={"A": "1"},
    label="managed",
    working_group="higgs",
    cores=8,
    memory_mb=16_000,
    disk_mb=20_000,
    walltime_s=86_400,
    release="24.2.1",
    platform="x86_64-el9",
    pilot_type="container",
    priority=900,
    max_attempts=5,
    inputs=[wire.InputFile(name="in.root", ready=False)],
    outputs=["out.root"],
    parent_id=ID,
)
ERROR = wire.JobError(plane="pilot", code=1099, text="lost")
USAGE = wire.Usage(wall_s=12.5, cpu_s=11.25, rss_mb=512, disk_mb=64)
PILOT = wire.PilotInfo(id="pilot-1", host="wn1.example.org", type="container", version="0.1.0")
PRINCIPAL = wire.Principal(
    role="user",
    subject="alice",
    authority="central",
    vo="atlas",
    groups=["higgs"],
    roles=["production", "manager:higgs"],
    queues=["BNL_*"],
    vos=["atlas"],
)
AT = wire.SlotRef(3, 42)
ERROR_BODY = wire.ErrorBody(
    code="shard_down", message="us1 is down", retryable=True, retry_after_s=1.5, details={"shard": "us1"}
)
QUEUE = Queue(
    status="offline",
    type="production",
    cores=8,
    memory_mb=16_000,
    disk_mb=20_000,
    walltime_s=86_400,
    releases=["24.2.1"],
    platforms=["x86_64-el9"],
    priority_offsets={"higgs": -10},
    reason="cooling",
    first_lease_s=300.0,
    heartbeat_s=1800.0,
    holding_s=3600.0,
    transferring_s=7200.0,
    activated_s=86_400.0,
    unready_s=43_200.0,
    default_cores=4,
    default_memory_mb=2000,
    default_disk_mb=1000,
    default_walltime_s=3600,
    default_max_attempts=5,
    max_priority=900,
)
WARNING = wire.SubmitWarning(
    index=1,
    n_jobs=3,
    reasons=[wire.Reason(code="no_pilot_asked", text="no pilot of BNL-q has asked", queue="BNL-q")],
)
HEARTBEAT = wire.HeartbeatRequest(id=ID, attempt=2, lease_token=TOKEN, state=State.RUNNING, usage=USAGE)
REPORT = wire.ReportRequest(
    id=ID,
    attempt=2,
    lease_token=TOKEN,
    state=State.FAILED,
    event=Event.FAIL,
    exit_code=-9,
    error=ERROR,
    stdout_tail="out",
    stderr_tail="err",
    usage=USAGE,
)
QUERY = wire.JobsQuery(
    region="US",
    site="BNL",
    state=State.ACTIVATED,
    owner="alice",
    jobset=JOBSET,
    limit=50,
    after=ID,
    order="newest",
    before=f"1764000000000000.{ID}",
    since=1764000000.5,
    until=1764000001.5,
)
GRANT = wire.Grant(
    id=ID,
    attempt=2,
    lease_token=TOKEN,
    lease_s=600.0,
    heartbeat_s=7200.0,
    jobset=JOBSET,
    owner="alice",
    vo="atlas",
    priority=-12,
    spec=msgspec.Raw(msgspec.msgpack.encode(SPEC)),
)
ROW = wire.JobRow(
    id=ID,
    state=State.RUNNING,
    site="BNL",
    region="US",
    queue="BNL_ATLAS_1",
    name="evgen-1",
    owner="alice",
    vo="atlas",
    working_group="higgs",
    label="managed",
    priority=900,
    attempt=2,
    max_attempts=5,
    jobset=JOBSET,
    parent_id=ID,
    created_at=1_700_000_000.25,
    modified_at=1_700_000_001.5,
    pilot="pilot-1",
    host="wn1.example.org",
    cancel_requested=True,
    error=ERROR,
)
EVENT = wire.JobEvent(
    n=2,
    at=1_700_000_000.25,
    event=Event.CLAIM,
    source=State.ACTIVATED,
    target=State.SENT,
    attempt=2,
    actor="pilot-1",
    detail="why",
)
ATTEMPT = wire.AttemptReport(
    attempt=2,
    at=1_700_000_001.5,
    state=State.FAILED,
    exit_code=-9,
    error=ERROR,
    stdout_tail="out",
    stderr_tail="err",
    usage=USAGE,
)
REQUIREMENTS = matching.Requirements(
    label="managed",
    vo="atlas",
    cores=8,
    memory_mb=16_000,
    disk_mb=20_000,
    walltime_s=86_400,
    release="24.2.1",
    platform="x86_64-el9",
    pilot_type="container",
    queue="BNL_ATLAS_1",
)
OFFER = matching.Offer(
    queue="BNL_ATLAS_1",
    labels=frozenset({"user"}),
    vos=frozenset({"atlas"}),
    cores=8,
    memory_mb=16_000,
    disk_mb=20_000,
    walltime_s=86_400,
    releases=frozenset({"24.2.1"}),
    platforms=frozenset({"x86_64-el9"}),
    pilot_type="container",
)

SAMPLES: Final[tuple[msgspec.Struct, ...]] = (
    SPEC,
    ERROR,
    USAGE,
    PILOT,
    PRINCIPAL,
    AT,
    ERROR_BODY,
    HEARTBEAT,
    REPORT,
    QUERY,
    GRANT,
    ROW,
    EVENT,
    ATTEMPT,
    REQUIREMENTS,
    OFFER,
    wire.InputFile(name="in.root", ready=False),
    wire.SubmitRequest(idempotency_key="k-1", jobs=[SPEC, wire.JobSpec(shell="true")], jobset=JOBSET),
    wire.ShardOutcome(ok=False, n_jobs=3, error=ERROR_BODY),
    wire.SubmitAnswer(
        jobset=JOBSET,
        ids=[ID, None],
        shards={"us1": wire.ShardOutcome(ok=False, n_jobs=1, error=ERROR_BODY)},
        warnings=[WARNING],
    ),
    wire.GetJobRequest(
        request_id="r-12345678",
        queue="BNL_ATLAS_1",
        pilot=PILOT,
        label="user",
        cores=8,
        memory_mb=16_000,
        disk_mb=20_000,
        walltime_s=86_400,
        n_jobs=4,
        wait_s=30.0,
    ),
    wire.GetJobAnswer(jobs=[GRANT], reason="queue_offline"),
    wire.HeartbeatAnswer(state=State.RUNNING, lease_s=7200.0, heartbeat_s=7200.0, command="cancel"),
    wire.ReportAnswer(id=ID, attempt=2, state=State.FAILED),
    wire.CancelRequest(ids=[ID], jobset=JOBSET),
    wire.CancelledJob(id=ID, outcome="requested", state=State.RUNNING),
    wire.CancelAnswer(
        jobs=[wire.CancelledJob(id=ID, outcome="requested", state=State.RUNNING)], missing_shards=["eu1"]
    ),
    wire.JobView(job=ROW, spec=SPEC, history=[EVENT], reports=[ATTEMPT]),
    wire.JobsAnswer(jobs=[ROW], next=ID, missing_shards=["eu1"], before=f"1764000000000000.{ID}"),
    wire.SlotJobs(at=AT, specs=[SPEC], offsets=[50]),
    wire.ShardSubmit(
        principal=PRINCIPAL,
        key="k-1",
        jobset=JOBSET,
        parts=[wire.SlotJobs(at=AT, specs=[SPEC], offsets=[50])],
        parent_depths={ID: 1},
    ),
    WARNING,
    wire.ShardSubmitAnswer(first_ids=[ID], warnings=[WARNING]),
    wire.LeaseTimes(first_s=60.0, heartbeat_s=600.0),
    wire.ShardGetJob(
        slots=[AT, wire.SlotRef(4, 41)],
        request_id="r-12345678",
        subject="pilots-of-bnl",
        offer=OFFER,
        pilot=PILOT,
        lease=wire.LeaseTimes(first_s=60.0, heartbeat_s=600.0),
        n_jobs=4,
        wait_s=30.0,
    ),
    wire.ShardHeartbeat(at=AT, principal=PRINCIPAL, request=HEARTBEAT),
    wire.ShardReport(at=AT, principal=PRINCIPAL, request=REPORT),
    wire.ShardCancel(principal=PRINCIPAL, slots=[AT], ids=[ID], jobset=JOBSET),
    wire.ShardJob(at=AT, principal=PRINCIPAL, id=ID),
    wire.Reason(code="no_pilot_asked", text="no pilot of BNL-q has asked", queue="BNL-q", since=1_700_000_000.0),
    wire.WhyAnswer(
        id=ID,
        state=State.ACTIVATED,
        reasons=[
            wire.Reason(
                code="too_little_memory_mb", text="it needs more", queue="BNL-q", needed="4000", offered="2000"
            ),
            wire.Reason(code="behind_others", text="it waits", queue="BNL-q", n_ahead=7, rate_per_s=0.5),
        ],
    ),
    wire.Refused(code="no_matching_release", needed="r1", offered="r2|r3", n_classes=2, example=ID),
    wire.QueueWhy(
        queue="BNL-q",
        status="online",
        reason="",
        last_asked_at=1_700_000_000.0,
        n_pilots=3,
        n_asked=9,
        n_given=1,
        refused=[wire.Refused(code="wrong_label", needed="user", offered="managed", n_classes=1, example=ID)],
    ),
    wire.SiteWhyAnswer(site="BNL", window_s=300.0, queues=[], missing_shards=["us2"]),
    wire.PileUp(
        site="BNL",
        region="US",
        state=State.ACTIVATED,
        n_jobs=900,
        n_usual=100,
        n_before=600,
        cause="pilots_do_not_fit",
        text="none can take any",
        example=ID,
        shards=["us1"],
    ),
    wire.PileUpsAnswer(hours=6, pile_ups=[], n_samples={"us1": 5}, missing_shards=["eu1"]),
    wire.PilotSeen(
        id="p1",
        host="node1",
        queue="BNL-q",
        first_at=1_700_000_000.0,
        last_at=1_700_000_060.0,
        n_asked=9,
        n_answered=2,
        n_jobs=5,
        last_job_at=1_700_000_050.0,
        site="BNL",
    ),
    wire.QueueSeen(queue="BNL-q", last_asked_at=1_700_000_060.0, n_pilots=3, n_asked=9, n_given=5, site="BNL"),
    wire.PilotsAnswer(window_s=300.0, queues=[], pilots=[], n_left_out=3, missing_shards=["eu1"]),
    wire.ShardPileUps(principal=PRINCIPAL, hours=6),
    wire.SlotPileUp(
        slot=3,
        state=State.FAILED,
        n_jobs=900,
        n_usual=100,
        n_before=600,
        cause="jobs_fail",
        text="they failed",
        example=ID,
    ),
    wire.ShardPileUpsAnswer(shard="us1", n_samples=5, pile_ups=[]),
    wire.ShardPilots(principal=PRINCIPAL, since_s=3600.0, limit=100, queues=["BNL-q"]),
    wire.ShardPilotsAnswer(shard="us1", window_s=300.0, queues=[], pilots=[], n_left_out=3),
    wire.Happening(id=ID, slot=3, state=State.SENT, event=Event.CLAIM, attempt=1, owner="central:ann", vo="atlas"),
    wire.ShardHappenings(generation="0a1b", seq=7, wait_s=20.0),
    wire.ShardHappeningsAnswer(generation="0a1b", seq=9, reset=False, happened=[], at=1_700_000_000.0),
    wire.ShardSiteWhy(principal=PRINCIPAL, site="BNL"),
    wire.ShardJobs(principal=PRINCIPAL, query=QUERY, slots=[3], also=[4], queues=["BNL-q"]),
    wire.ShardKnown(account="central:alice", key="my-key", slots=[3, 4]),
    wire.ShardKnownAnswer(slots=[4]),
    wire.ShardDepths(ids=[ID]),
    wire.ShardDepthsAnswer(depths={ID: 1}),
    wire.ShardRelease(request_id="r-12345678", subject="pilots-of-bnl"),
    wire.ShardReleaseAnswer(n_jobs=1),
    wire.ShardCounts(account="central:ann"),
    wire.ArchivePartition(name="p202611", before="2026-12-01", n_jobs=5, n_rows_estimated=4, n_bytes=16384),
    wire.ShardArchive(principal=PRINCIPAL, older_s=3600.0, drop="p202610", exported=5),
    wire.ShardArchiveAnswer(shard="us1", n_moved=200, n_dropped=3, partitions=[]),
    wire.ArchiveRequest(older_s=3600.0, drop="p202610", shard="us1", exported={"us1": 5}),
    wire.ArchiveAnswer(shards=[], missing_shards=["eu1"], why_missing={"eu1": "shard_down: no answer"}),
    wire.ShardExport(principal=PRINCIPAL, name="p202610", after=ID),
    wire.ExportRequest(shard="us1", name="p202610", after=ID),
    wire.ExportAnswer(jobs=[], next=ID),
    wire.ErrorCount(slot=3, plane="pilot", code=1213, n_jobs=4, example=ID, last_at=1_700_000_000.0),
    wire.ShardErrors(principal=PRINCIPAL, hours=24),
    wire.ShardErrorsAnswer(shard="us1", errors=[], n_left_out=2, n_jobs_left_out=3),
    wire.ErrorRow(plane="pilot", code=1213, site="BNL", region="US", n_jobs=4, example=ID, last_at=1_700_000_000.0),
    wire.ErrorsAnswer(hours=24, errors=[], missing_shards=["eu1"], n_left_out=2, n_jobs_left_out=3),
    wire.ShardRow(
        name="us1",
        authority="central",
        link="unix:/us1",
        regions=["US"],
        n_slots=3,
        n_active=17,
        age_s=0.25,
        answers=True,
        dispatched_per_s=12.5,
    ),
    wire.ShardsAnswer(epochs={"central": 43}, shards=[]),
    wire.SlotCount(slot=3, state=State.ACTIVATED, n_jobs=17),
    wire.ShardCountsAnswer(
        shard="us1",
        at=1_700_000_000.25,
        counts=[wire.SlotCount(slot=3, state=State.ACTIVATED, n_jobs=17)],
        n_dispatched=9,
        window_s=300.0,
        owners={"central:ann": 17},
        n_owners=201,
    ),
    wire.CountsAnswer(
        total={"activated": 17},
        by_region={"US": {"activated": 17}},
        by_site={"BNL": {"activated": 17}},
        shards={"us1": 0.25},
        missing_shards=["eu1"],
        active_by_owner={"central:ann": 17},
        owners_at_least=True,
        n_owners_left_out=101,
    ),
    registry_wire.SitesRequest(
        sites=[SiteRegistration(name="BNL", region="US", queues={"BNL-q": QUEUE})],
        reason="from the catalogue",
        expected_epoch=42,
    ),
    registry_wire.QueueRequest(queue="BNL-q", changes={"status": "offline"}, reason="cooling"),
    registry_wire.SlotsRequest(site="BNL", n_slots=4, reason="hot"),
    registry_wire.VoRequest(vo="atlas", changes={"heartbeat_s": 600}, expected_epoch=42, reason="short jobs"),
    registry_wire.ChangedAnswer(authority="central", epoch=43),
    registry_wire.TopologyAnswer(
        sections=[
            Section(
                authority="central",
                epoch=42,
                shards={"us1": Shard(link="tls:us1.example.org:25090", weight=2)},
                regions={"US": Region(slot=0, shards=["us1"], strict=True)},
                sites={"BNL": Site(region="US", slots=[3], queues={"BNL-q": QUEUE})},
                placement={3: Placement("us1", 42)},
                default_region="US",
                vos={"atlas": Policy(heartbeat_s=600.0, default_memory_mb=2000)},
                last_slot=3,
            )
        ]
    ),
    registry_wire.ShardRequest(
        name="us2", link="tls:us2.example.org:25090", region="US", weight=2, expected_epoch=42, reason="more disks"
    ),
    registry_wire.BanRequest(account="central:ann", reason="a stolen token"),
    registry_wire.AuthorityAnswer(
        authority="CERN",
        section=Section(
            authority="CERN",
            epoch=7,
            shards={"cern1": Shard(link="tls:cern1.example.org:25090")},
            regions={"CERN": Region(slot=12_288, shards=["cern1"], strict=True)},
            placement={12_288: Placement("cern1", 1)},
        ),
        keys={"CERN-1700000000000-0a0b0c": "-----BEGIN PUBLIC KEY-----\n..."},
        keys_order=1_700_000_000_001,
    ),
    frames.Frame(frames.Kind.CALL, 9, "get_job", 10_000, b"\x80"),
)

BY_NAME: Final[dict[str, msgspec.Struct]] = {type(sample).__name__: sample for sample in SAMPLES}

BASES: Final = frozenset({"Request", "Answer"})


def message_types() -> set[str]:
    """Every message that `culm.wire` and `culm.registry_wire` define, by name."""
    found: set[str] = set()
    for module in (wire, registry_wire):
        for name, value in vars(module).items():
            if isinstance(value, type) and issubclass(value, msgspec.Struct) and value.__module__ == module.__name__:
                found.add(name)
    return found - BASES


def plain(sample: Any) -> Any:
    """A sample as maps, lists and scalars, as any other reader of MessagePack sees it."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(sample))
