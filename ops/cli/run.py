"""`culm router|shard|monitor run --config FILE`: what systemd, containers and the supervisor start."""

from pathlib import Path

import click

from culm import metrics_folder, settings
from ops.cli.lazy import LazyGroup, Place

_CONFIG = click.option(
    "--config", required=True, type=click.Path(dir_okay=False, path_type=Path), help="TOML; see docs/settings.md."
)


@click.group()
def router() -> None:
    """The front door: resolves site or region to a shard, and forwards."""


@router.command("run")
@_CONFIG
def router_run(config: Path) -> None:
    """Run a router until SIGTERM. CULM_ROUTER_<KEY> overrides a key of the file.

    \b
    Examples:
      culm router run --config router.toml
    """
    options = settings.load(config, settings.RouterSettings, prefix="CULM_ROUTER_")
    from router.door import require_free  # noqa: PLC0415  # a process imports its own service only

    # Before anything is touched that belongs to whoever has the port.
    require_free(options.host, options.port)
    if options.workers > 1:
        metrics_folder.prepare(options.host, options.port)
    from router.main import run  # noqa: PLC0415  # after `prepare`: it defines metrics

    try:
        run(options)
    finally:
        metrics_folder.remove()


@click.group(
    cls=LazyGroup,
    places={
        "run": Place("ops.cli.run", "shard_run", "run one until SIGTERM"),
        "list": Place("ops.cli.shard", "list_shards", "all shards, and which of them answer"),
        "show": Place("ops.cli.shard", "show", "one shard with its regions, sites and slots"),
        "add": Place("ops.cli.shard", "add", "let a new shard join, for a new region or beside others"),
    },
)
def shard() -> None:
    """The servers of the partitions."""


@click.command("run")
@_CONFIG
def shard_run(config: Path) -> None:
    """Run a shard until SIGTERM. CULM_SHARD_<KEY> overrides a key of the file.

    \b
    Examples:
      culm shard run --config shard.toml
    """
    from shard.main import run  # noqa: PLC0415

    run(settings.load(config, settings.ShardSettings, prefix="CULM_SHARD_"))


@click.group()
def monitor() -> None:
    """The merged view of all shards."""


@monitor.command("run")
@_CONFIG
def monitor_run(config: Path) -> None:
    """Run a monitor until SIGTERM. CULM_MONITOR_<KEY> overrides a key of the file.

    \b
    Examples:
      culm monitor run --config monitor.toml
    """
    from monitor_api.main import run  # noqa: PLC0415

    run(settings.load(config, settings.MonitorSettings, prefix="CULM_MONITOR_"))
