"""Typed settings: a TOML file, then environment variables, then validation. Unknown keys are errors.

`CULM_ROUTER_WORKERS=4` overrides `workers` of the router; a nested key is joined with two underscores
(`CULM_SHARD_TIMEOUTS__FIRST_LEASE_S=5`). `docs/settings.md` is generated from these classes. Paths are taken as they
are: a relative one belongs to the folder in which the process was started.
"""

import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import msgspec
from msgspec import Meta

from culm.errors import ClientFault

Seconds = Annotated[float, Meta(gt=0, le=10_000_000)]
Count = Annotated[int, Meta(ge=1, le=1_000_000)]
Text = Annotated[str, Meta(min_length=1)]


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of one service's settings."""


class TlsSettings(Settings, frozen=True, kw_only=True):
    """The link between machines: both sides show a certificate of the shared CA."""

    ca_file: Text
    """PEM of the shared certificate authority."""
    cert_file: Text
    """PEM of this side's certificate."""
    key_file: Text
    """PEM of its private key."""


class HttpsSettings(Settings, frozen=True, kw_only=True):
    """What a listening HTTP address shows; files that are renewed are read again within a minute."""

    cert_file: Text
    """PEM of the certificate, with what leads up to its authority."""
    key_file: Text
    """PEM of its private key."""


class RouterSettings(Settings, frozen=True, kw_only=True):
    """The router: stateless, several worker processes on one port."""

    name: Text = "router"
    """Its name in logs, metrics and on the links."""
    host: Text = "127.0.0.1"
    """The address to listen on."""
    port: Annotated[int, Meta(ge=1, le=65535)] = 25080
    """The port to listen on."""
    https: HttpsSettings | None = None
    """Serve HTTPS (TLS 1.2 or newer) with this certificate; without it plain HTTP, on loopback only."""
    behind_tls_front: bool = False
    """Plain HTTP outside of loopback is allowed: a front before it speaks TLS with the clients."""
    workers: Annotated[int, Meta(ge=1, le=64)] = 2
    """Worker processes that share the port."""
    topology_dir: Text
    """The folder of the topology's sections, one file per authority."""
    trusted_keys_dir: Text
    """Public keys of every authority whose tokens are accepted; read again when an unknown key id shows up."""
    authority: Text = "central"
    """Whose process this is: its section of the topology is changed here, and its names win over another's."""
    peers: dict[str, str] = {}
    """URL of a router of every other authority (https: outside of this machine), whose section and keys are copied."""
    peer_token_file: str = ""
    """A file with the token of this authority, role `peer`, that the peers' routers are shown."""
    peer_ca_file: str = ""
    """PEM of the certificate authority of the peers' https URLs; "" for the system's."""
    peer_poll_s: Seconds = 2.0
    """How often the peers are asked."""
    forward_deadline_s: Seconds = 10.0
    """How long a forwarded request may take, beyond the time a get_job asked to wait."""
    link_stall_s: Seconds = 0.6
    """A shard that answers no ping for so long is taken for dead; its requests are answered 503 after 1.5 times it."""
    link_window: Count = 4096
    """Requests under way on one link, not counting pilots that wait for work; beyond it 503."""
    link_waiting: Count = 20_000
    """Pilots that wait for work on one link; beyond it 503."""
    fast_lane: bool = True
    """Serve get_job, heartbeat and report without a framework's request for each; false: aiohttp serves all alike."""
    max_connections: Count = 20_000
    """Connections of clients per worker process; beyond it 503."""
    topology_poll_s: Seconds = 0.5
    """How often the topology is looked at for a newer epoch."""
    link_tls: TlsSettings | None = None
    """Certificates of the links between machines; not needed for unix sockets."""
    log_level: Text = "INFO"
    """DEBUG, INFO, WARNING or ERROR."""


class DatabaseSettings(Settings, frozen=True, kw_only=True):
    """The partition's InnoDB database, reached by unix socket or, with a password file, by TCP."""

    socket: str = ""
    """Path of the server's unix socket; stronger than `host`."""
    host: str = ""
    """The server's host, where there is no socket."""
    port: int = 3306
    """The server's port."""
    user: Text = "root"
    """The database user."""
    password_file: str = ""
    """A file with the password in its first line."""
    name: Text = "culm"
    """The schema."""
    claim_connections: Annotated[int, Meta(ge=1, le=16)] = 2
    """Connections that run claim batches; more than two do not help (measured)."""
    write_connections: Annotated[int, Meta(ge=1, le=64)] = 6
    """Connections for submits, heartbeats, reports and the reaper."""
    read_connections: Annotated[int, Meta(ge=1, le=64)] = 2
    """Connections for the shard's own reads: what is refilled, what has expired."""
    user_connections: Annotated[int, Meta(ge=1, le=64)] = 2
    """Connections for what people and the monitor read; however slow that is, it holds up nothing else."""
    connect_timeout_s: Seconds = 2.0
    """How long a new connection may take."""
    statement_timeout_s: Seconds = 5.0
    """How long a statement may take; then its connection is closed."""
    acquire_timeout_s: Seconds = 2.0
    """How long a request waits for a free connection; then 503."""


class Timeouts(Settings, frozen=True, kw_only=True):
    """How long a job may stay silent in a state; seconds. The defaults are PanDA's, the first lease is ours.

    The first six hold where neither the computing queue nor the VO has a policy (`culm vo set`, `culm site set`).
    """

    first_lease_s: Seconds = 600.0
    """`sent` until the first sign of life."""
    heartbeat_s: Seconds = 7200.0
    """`starting` and `running` between two heartbeats."""
    holding_s: Seconds = 172_800.0
    """`holding` and `merging` until the outputs are accounted for."""
    transferring_s: Seconds = 172_800.0
    """`transferring` until the outputs have arrived."""
    activated_s: Seconds = 604_800.0
    """`activated` without ever being taken: closed."""
    unready_s: Seconds = 604_800.0
    """`defined`, `waiting`, `assigned`: closed."""
    max_releases: Count = 100
    """So often a job may be given back for free; each further time uses up an attempt."""
    grace_s: Seconds = 60.0
    """After a restart of the shard or its database the reaper waits so long: heartbeats could not come."""


class SubmitDefaults(Settings, frozen=True, kw_only=True):
    """What a job gets that does not say, where neither its computing queue nor its VO has a default."""

    cores: Annotated[int, Meta(ge=1, le=4096)] = 1
    """Cores."""
    memory_mb: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0
    """MiB of memory; 0: does not matter."""
    disk_mb: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0
    """MiB of disk; 0: does not matter."""
    walltime_s: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0
    """Seconds of walltime; 0: does not matter."""
    max_attempts: Annotated[int, Meta(ge=1, le=50)] = 3
    """Attempts that may be lost."""
    max_priority: Annotated[int, Meta(ge=0, le=1_000_000)] = 0
    """No job gets a higher priority; 0: no bound."""


class DispatchSettings(Settings, frozen=True, kw_only=True):
    """The dispatch queue and the claim batches."""

    cap: Annotated[int, Meta(ge=1, le=100_000)] = 2000
    """Hints kept per requirement class: the best ones."""
    max_batch: Annotated[int, Meta(ge=1, le=1024)] = 128
    """Requests in one claim transaction."""
    shelf_mb: Annotated[int, Meta(ge=0, le=65_536)] = 64
    """Memory for ready jobs that were read ahead of their claim; 0: each claim reads its own."""
    max_classes: Count = 1000
    """Different requirements that the ready jobs of one slot may have: every get_job is matched with each."""
    max_classes_per_owner: Count = 200
    """How many of those one account may have brought."""
    max_pending: Count = 20_000
    """get_job requests waiting for a claim; beyond it 503."""
    max_parked: Count = 50_000
    """Long polls parked; beyond it they are answered at once."""
    reap_interval_s: Seconds = 1.0
    """How often ended leases are looked for."""
    sweep_interval_s: Seconds = 5.0
    """How often the dispatch queue is compared with the database and topped up."""
    redis_timeout_s: Seconds = 0.15
    """Then the breaker opens and dispatch goes by the database."""
    breaker_s: Seconds = 1.0
    """How long the breaker stays open before Redis is tried again."""


class ArchiveSettings(Settings, frozen=True, kw_only=True):
    """When jobs that ended leave the hot tables."""

    after_s: Annotated[float, Meta(ge=0, le=1e9)] = 259_200.0
    """So long after they ended; PanDA's three days. 0: never."""
    batch: Annotated[int, Meta(ge=1, le=1000)] = 50
    """Jobs of a slot in one turn, in as many transactions as their bytes need."""
    interval_s: Seconds = 0.25
    """Between two batches of a slot."""


class ShardSettings(Settings, frozen=True, kw_only=True):
    """One shard: the server of one partition."""

    name: Text
    """The shard's name in the topology."""
    link: Text
    """Where routers connect: `unix:/path`, `tls:host:port`, or on loopback only `tcp:host:port`."""
    link_tls: TlsSettings | None = None
    """Certificates of the links between machines; not needed for unix sockets."""
    http: Text
    """Where health and metrics are served: `unix:/path` or `tcp:host:port`."""
    topology_dir: Text
    """The folder of the topology's sections, one file per authority."""
    authority: Text = "central"
    """Whose process this is: its section of the topology is changed here, and its names win over another's."""
    redis: Text
    """`unix:///path` or `redis://..` of a Valkey or Redis >= 7."""
    database: DatabaseSettings
    """The partition's database."""
    timeouts: Timeouts = Timeouts()
    """How long a job may stay silent."""
    submit: SubmitDefaults = SubmitDefaults()
    """What a job gets that does not say."""
    dispatch: DispatchSettings = DispatchSettings()
    """The dispatch queue and the claim batches."""
    archive: ArchiveSettings = ArchiveSettings()
    """When jobs that ended leave the hot tables."""
    samples_kept_hours: Annotated[int, Meta(ge=2, le=720)] = 48
    """How many hourly samples of the tallies are kept: so far back a state that grows can be compared."""
    topology_poll_s: Seconds = 0.5
    """How often the topology is looked at for a newer epoch."""
    stop_s: Seconds = 10.0
    """How long a stopping shard may take to answer what it has begun."""
    log_level: Text = "INFO"
    """DEBUG, INFO, WARNING or ERROR."""


class MonitorSettings(Settings, frozen=True, kw_only=True):
    """The monitor: asks all shards at once."""

    name: Text = "monitor"
    """Its name in logs, metrics and on the links."""
    host: Text = "127.0.0.1"
    """The address to listen on."""
    port: Annotated[int, Meta(ge=1, le=65535)] = 25081
    """The port to listen on."""
    https: HttpsSettings | None = None
    """Serve HTTPS (TLS 1.2 or newer) with this certificate; without it plain HTTP, on loopback only."""
    behind_tls_front: bool = False
    """Plain HTTP outside of loopback is allowed: a front before it speaks TLS with the clients."""
    topology_dir: Text
    """The folder of the topology's sections, one file per authority."""
    trusted_keys_dir: Text
    """Public keys of every authority whose tokens are accepted."""
    authority: Text = "central"
    """Whose process this is: its section of the topology is changed here, and its names win over another's."""
    shard_deadline_s: Seconds = 0.8
    """How long a shard may take to answer; later it is named as missing."""
    link_stall_s: Seconds = 0.6
    """A shard that answers no ping for so long is taken for dead."""
    topology_poll_s: Seconds = 0.5
    """How often the topology is looked at for a newer epoch."""
    link_tls: TlsSettings | None = None
    """Certificates of the links between machines; not needed for unix sockets."""
    log_level: Text = "INFO"
    """DEBUG, INFO, WARNING or ERROR."""


S = TypeVar("S", bound=Settings)
_PLACE = re.compile(r"at `\$\.([^`]+)`$")
_UNKNOWN = re.compile(r"unknown field `([^`]*)`")
"""How msgspec says where it found what is wrong."""


def load(path: Path, kind: type[S], *, prefix: str, environment: Mapping[str, str] | None = None) -> S:
    """Read, override, validate.

    Args:
        path: a TOML file.
        kind: the settings class.
        prefix: of the environment variables, e.g. `CULM_ROUTER_`.
        environment: os.environ unless given.

    Raises:
        ClientFault: bad_settings, with the key and the file or environment variable that it came from.
    """
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ClientFault("bad_settings", f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ClientFault("bad_settings", f"{path} is not TOML: {error}") from None
    variables: dict[tuple[str, ...], str] = {}
    for variable, text in (os.environ if environment is None else environment).items():
        if variable.startswith(prefix):
            key = tuple(variable.removeprefix(prefix).lower().split("__"))
            _set(values, key, text, where=variable)
            variables[key] = variable
    try:
        return msgspec.convert(values, kind, strict=False)
    except msgspec.ValidationError as error:
        raise ClientFault("bad_settings", f"{_origin(str(error), variables) or path}: {error}") from None


def keys(kind: type[Settings]) -> dict[str, Any]:
    """The keys of a settings class with their types, for the generated documentation."""
    return get_type_hints(kind, include_extras=True)


def _origin(message: str, variables: Mapping[tuple[str, ...], str]) -> str:
    """The environment variable that a validation error is about, "" if it is about the file."""
    if "missing required field" in message:
        return ""
    unknown, place = _UNKNOWN.search(message), _PLACE.search(message)
    key = (*(place[1].split(".") if place else ()), *(unknown.groups() if unknown else ()))
    # A table where a value belongs is an error of the value's place; the variable names something in that table.
    return next((variable for known, variable in variables.items() if known[: len(key)] == key), "")


def _set(values: dict[str, Any], path: Sequence[str], text: str, *, where: str) -> None:
    for part in path[:-1]:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise ClientFault("bad_settings", f"{where}: {part} is not a table")
    values[path[-1]] = text
