"""Typed settings: a TOML file, then environment variables, then validation. Unknown keys are errors.

`CULM_ROUTER_WORKERS=4` overrides `workers` of the router; a nested key is joined with two underscores
(`CULM_SHARD_TIMEOUTS__FIRST_LEASE_S=5`). `docs/settings.md` is generated from these classes. Paths may be relative to
the file's own folder.
"""

import os
import tomllib
from collections.abc import Mapping
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
    cert_file: Text
    key_file: Text


class RouterSettings(Settings, frozen=True, kw_only=True):
    """The router: stateless, several worker processes on one port."""

    name: Text = "router"
    host: Text = "127.0.0.1"
    port: Annotated[int, Meta(ge=1, le=65535)] = 25080
    workers: Annotated[int, Meta(ge=1, le=64)] = 2
    topology_dir: Text
    """The folder of the topology's sections, one file per authority."""
    trusted_keys_dir: Text
    """Public keys of every authority whose tokens are accepted; read again when an unknown key id shows up."""
    forward_deadline_s: Seconds = 10.0
    """How long a forwarded request may take, beyond the time a get_job asked to wait."""
    link_stall_s: Seconds = 1.0
    """A shard that answers no ping for so long is taken for dead: its requests are answered 503."""
    link_window: Count = 4096
    """Requests under way on one link; beyond it 503."""
    max_connections: Count = 20_000
    topology_poll_s: Seconds = 0.5
    link_tls: TlsSettings | None = None
    log_level: Text = "INFO"


class DatabaseSettings(Settings, frozen=True, kw_only=True):
    """The partition's InnoDB database, reached by unix socket or, with a password file, by TCP."""

    socket: str = ""
    host: str = ""
    port: int = 3306
    user: Text = "root"
    password_file: str = ""
    name: Text = "culm"
    claim_connections: Annotated[int, Meta(ge=1, le=16)] = 2
    """Connections that run claim batches; more than two do not help (measured)."""
    write_connections: Annotated[int, Meta(ge=1, le=64)] = 6
    read_connections: Annotated[int, Meta(ge=1, le=64)] = 2
    connect_timeout_s: Seconds = 2.0
    statement_timeout_s: Seconds = 5.0
    acquire_timeout_s: Seconds = 2.0


class Timeouts(Settings, frozen=True, kw_only=True):
    """How long a job may stay silent in a state; seconds. The defaults are PanDA's, the first lease is ours."""

    first_lease_s: Seconds = 600.0
    """`sent` until the first sign of life."""
    heartbeat_s: Seconds = 7200.0
    """`starting` and `running` between two heartbeats."""
    holding_s: Seconds = 172_800.0
    """`holding` and `merging` until the outputs are accounted for."""
    transferring_s: Seconds = 172_800.0
    activated_s: Seconds = 604_800.0
    """`activated` without ever being taken: closed."""
    unready_s: Seconds = 604_800.0
    """`defined`, `waiting`, `assigned`: closed."""
    grace_s: Seconds = 60.0
    """After a restart of the shard or its database the reaper waits so long: heartbeats could not come."""


class DispatchSettings(Settings, frozen=True, kw_only=True):
    """The dispatch queue and the claim batches."""

    cap: Annotated[int, Meta(ge=1, le=100_000)] = 2000
    """Hints kept per requirement class: the best ones."""
    max_batch: Annotated[int, Meta(ge=1, le=1024)] = 128
    max_pending: Count = 20_000
    """get_job requests waiting for a claim; beyond it 503."""
    max_parked: Count = 50_000
    """Long polls parked; beyond it they are answered at once."""
    reap_interval_s: Seconds = 1.0
    sweep_interval_s: Seconds = 5.0
    redis_timeout_s: Seconds = 0.15
    """Then the breaker opens and dispatch goes by the database."""
    breaker_s: Seconds = 1.0


class ShardSettings(Settings, frozen=True, kw_only=True):
    """One shard: the server of one partition."""

    name: Text
    process: Annotated[int, Meta(ge=0, le=99)] = 0
    """Number of this process among those that serve the partition."""
    link: Text
    """Where routers connect: `unix:/path`, `tls:host:port`, or on loopback only `tcp:host:port`."""
    link_tls: TlsSettings | None = None
    http: Text
    """Where health and metrics are served: `unix:/path` or `tcp:host:port`."""
    topology_dir: Text
    redis: Text
    """`unix:///path` or `redis://..` of a Valkey or Redis >= 7."""
    database: DatabaseSettings
    timeouts: Timeouts = Timeouts()
    dispatch: DispatchSettings = DispatchSettings()
    topology_poll_s: Seconds = 0.5
    stop_s: Seconds = 10.0
    """How long a stopping shard may take to answer what it has begun."""
    log_level: Text = "INFO"


class MonitorSettings(Settings, frozen=True, kw_only=True):
    """The monitor: asks all shards at once."""

    name: Text = "monitor"
    host: Text = "127.0.0.1"
    port: Annotated[int, Meta(ge=1, le=65535)] = 25081
    topology_dir: Text
    trusted_keys_dir: Text
    shard_deadline_s: Seconds = 0.8
    link_stall_s: Seconds = 1.0
    topology_poll_s: Seconds = 0.5
    link_tls: TlsSettings | None = None
    log_level: Text = "INFO"


S = TypeVar("S", bound=Settings)


def load(path: Path, kind: type[S], *, prefix: str, environment: Mapping[str, str] | None = None) -> S:
    """Read, override, validate.

    Args:
        path: a TOML file.
        kind: the settings class.
        prefix: of the environment variables, e.g. `CULM_ROUTER_`.
        environment: os.environ unless given.

    Raises:
        ClientFault: bad_settings, with the file and the key.
    """
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ClientFault("bad_settings", f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ClientFault("bad_settings", f"{path} is not TOML: {error}") from None
    for key, text in (os.environ if environment is None else environment).items():
        if key.startswith(prefix):
            _set(values, key.removeprefix(prefix).lower().split("__"), text, where=key)
    try:
        return msgspec.convert(values, kind, strict=False)
    except msgspec.ValidationError as error:
        raise ClientFault("bad_settings", f"{path}: {error}") from None


def keys(kind: type[Settings]) -> dict[str, Any]:
    """The keys of a settings class with their types, for the generated documentation."""
    return get_type_hints(kind, include_extras=True)


def _set(values: dict[str, Any], path: list[str], text: str, *, where: str) -> None:
    for part in path[:-1]:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise ClientFault("bad_settings", f"{where}: {part} is not a table")
    values[path[-1]] = text
