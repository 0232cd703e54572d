"""Settings: the file, the environment over it, and clear words for what is wrong."""

from pathlib import Path
from typing import Annotated, get_args, get_origin

import pytest

from culm import settings
from culm.errors import ClientFault
from culm.settings import MonitorSettings, RouterSettings, Settings, ShardSettings

ROUTER = 'topology_dir = "topology"\ntrusted_keys_dir = "keys"\n'
SHARD = """
name = "us1"
link = "unix:/run/us1.sock"
http = "unix:/run/us1-http.sock"
topology_dir = "topology"
redis = "unix:///run/us1-valkey.sock"
[database]
socket = "/run/us1-db.sock"
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "settings.toml"
    path.write_text(text, encoding="utf-8")
    return path


def load_router(folder: Path, text: str = ROUTER, environment: dict[str, str] | None = None) -> RouterSettings:
    return settings.load(write(folder, text), RouterSettings, prefix="CULM_ROUTER_", environment=environment or {})


def load_shard(folder: Path, text: str = SHARD, environment: dict[str, str] | None = None) -> ShardSettings:
    return settings.load(write(folder, text), ShardSettings, prefix="CULM_SHARD_", environment=environment or {})


def test_a_file_and_defaults(tmp_path: Path) -> None:
    loaded = load_router(tmp_path, ROUTER + "workers = 4\nforward_deadline_s = 2\n")
    assert loaded.workers == 4
    assert loaded.forward_deadline_s == 2.0
    assert loaded.port == 25080
    assert loaded.host == "127.0.0.1"


def test_tables_are_nested_settings(tmp_path: Path) -> None:
    loaded = load_shard(tmp_path, SHARD + "[timeouts]\nfirst_lease_s = 5\n[dispatch]\ncap = 10\n")
    assert loaded.timeouts.first_lease_s == 5.0
    assert loaded.timeouts.heartbeat_s == 7200.0
    assert loaded.dispatch.cap == 10
    assert loaded.database.socket == "/run/us1-db.sock"


def test_the_environment_is_stronger_than_the_file(tmp_path: Path) -> None:
    loaded = load_router(tmp_path, ROUTER + "workers = 4\n", {"CULM_ROUTER_WORKERS": "7", "CULM_ROUTER_HOST": "::1"})
    assert (loaded.workers, loaded.host) == (7, "::1")


def test_a_nested_key_in_the_environment(tmp_path: Path) -> None:
    environment = {"CULM_SHARD_TIMEOUTS__FIRST_LEASE_S": "0.5", "CULM_SHARD_DATABASE__CLAIM_CONNECTIONS": "1"}
    loaded = load_shard(tmp_path, environment=environment)
    assert loaded.timeouts.first_lease_s == 0.5
    assert loaded.database.claim_connections == 1
    assert loaded.database.socket == "/run/us1-db.sock"


def test_other_variables_do_not_matter(tmp_path: Path) -> None:
    loaded = load_router(tmp_path, environment={"CULM_SHARD_NAME": "x", "PATH": "/bin", "ROUTER_WORKERS": "9"})
    assert loaded.workers == 2


def test_the_process_environment_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CULM_ROUTER_PORT", "26301")
    path = write(tmp_path, ROUTER)
    assert settings.load(path, RouterSettings, prefix="CULM_ROUTER_").port == 26301


@pytest.mark.parametrize(
    ("text", "environment", "named"),
    [
        (ROUTER + "worker = 4\n", {}, "worker"),
        (ROUTER + 'workers = "many"\n', {}, "workers"),
        (ROUTER + "workers = 0\n", {}, "workers"),
        (ROUTER + "workers = 65\n", {}, "workers"),
        (ROUTER + "port = 65536\n", {}, "port"),
        (ROUTER + "port = 1.5\n", {}, "port"),
        (ROUTER + "forward_deadline_s = 0\n", {}, "forward_deadline_s"),
        (ROUTER + "forward_deadline_s = nan\n", {}, "forward_deadline_s"),
        (ROUTER + "forward_deadline_s = inf\n", {}, "forward_deadline_s"),
        (ROUTER + "name = 5\n", {}, "name"),
        (ROUTER + 'name = ""\n', {}, "name"),
        ('topology_dir = "t"\n', {}, "trusted_keys_dir"),
        (ROUTER + '[link_tls]\nca_file = "ca.pem"\n', {}, "cert_file"),
        (ROUTER + "workers = \n", {}, "not TOML"),
        (ROUTER + "workers = 1\nworkers = 2\n", {}, "not TOML"),
        (ROUTER, {"CULM_ROUTER_WORKERS": "many"}, "workers"),
        (ROUTER, {"CULM_ROUTER_WORKERZ": "1"}, "workerz"),
        (ROUTER, {"CULM_ROUTER_WORKERS__MORE": "1"}, "workers"),
        (ROUTER + "workers = 1\n", {"CULM_ROUTER_WORKERS__MORE": "1"}, "workers is not a table"),
        (ROUTER, {"CULM_ROUTER_": "1"}, "unknown field"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, environment: dict[str, str], named: str) -> None:
    with pytest.raises(ClientFault, match=named) as caught:
        load_router(tmp_path, text, environment)
    assert caught.value.code == "bad_settings"


@pytest.mark.parametrize(
    ("text", "environment", "origin"),
    [
        ("", {"CULM_SHARD_PROCESS": "many"}, "CULM_SHARD_PROCESS"),
        ("", {"CULM_SHARD_PROCESZ": "1"}, "CULM_SHARD_PROCESZ"),
        ("", {"CULM_SHARD_DISPATCH__CAP": "0"}, "CULM_SHARD_DISPATCH__CAP"),
        ("", {"CULM_SHARD_DISPATCH__CAPS": "1", "CULM_SHARD_DISPATCH__MAX_BATCH": "1"}, "CULM_SHARD_DISPATCH__CAPS"),
        ("", {"CULM_SHARD_PROCESS__MORE": "1"}, "CULM_SHARD_PROCESS__MORE"),
        ("", {"CULM_SHARD_DISPATCH": "much"}, "CULM_SHARD_DISPATCH"),
        ("[dispatch]\ncap = 0\n", {"CULM_SHARD_DISPATCH__MAX_BATCH": "1", "CULM_SHARD_PROCESS": "1"}, "settings.toml"),
        ("[dispatch]\ncaps = 1\n", {"CULM_SHARD_DISPATCH__MAX_BATCH": "1"}, "settings.toml"),
        ("", {"CULM_SHARD_LINK_TLS__CA_FILE": "ca.pem"}, "settings.toml"),
    ],
)
def test_what_is_wrong_is_sought_where_it_came_from(
    tmp_path: Path, text: str, environment: dict[str, str], origin: str
) -> None:
    with pytest.raises(ClientFault) as caught:
        load_shard(tmp_path, SHARD + text, environment)
    assert caught.value.message.partition(":")[0].endswith(origin)


def test_an_unknown_key_in_a_table(tmp_path: Path) -> None:
    with pytest.raises(ClientFault, match="first_leese_s"):
        load_shard(tmp_path, SHARD + "[timeouts]\nfirst_leese_s = 5\n")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ClientFault, match=r"absent\.toml: No such file") as caught:
        settings.load(tmp_path / "absent.toml", RouterSettings, prefix="CULM_ROUTER_", environment={})
    assert caught.value.code == "bad_settings"


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    path.write_bytes(b'name = "\xff\xfe"')
    with pytest.raises(ClientFault, match="not TOML"):
        settings.load(path, RouterSettings, prefix="CULM_ROUTER_", environment={})


@pytest.mark.parametrize("kind", [RouterSettings, ShardSettings, MonitorSettings])
def test_keys_for_the_documentation(kind: type[Settings]) -> None:
    keys = settings.keys(kind)
    assert set(keys) == set(kind.__struct_fields__)
    assert any(get_origin(hint) is Annotated or get_args(hint) for hint in keys.values())
