"""HTTPS at router and monitor: clients and pilots with the authority's certificate, and nothing in the clear."""

import asyncio
import os
import ssl
import sys
from pathlib import Path

import aiohttp
import pytest

from culm.client import Client
from culm.errors import ClientFault, Unavailable
from culm.https import Https
from culm.settings import HttpsSettings, MonitorSettings, RouterSettings
from culm.states import State
from culm.wire import JobSpec, SubmitRequest
from tests.certificates import authority, certificate
from tests.cluster import ROOT
from tests.front import front
from tests.partition import PILOT, QUEUE, USER, Partition

DEADLINE_S = 30.0


@pytest.fixture
def shown(tmp_path: Path) -> HttpsSettings:
    """A certificate for localhost, of the authority `ca`; `other` is another authority."""
    certificate(tmp_path, "router", authority(tmp_path, "ca"))
    authority(tmp_path, "other")
    return HttpsSettings(cert_file=str(tmp_path / "router.pem"), key_file=str(tmp_path / "router.key"))


async def test_clients_and_pilots_speak_https(shard: Partition, shown: HttpsSettings, tmp_path: Path) -> None:
    ca_file = str(tmp_path / "ca.pem")
    async with front(shard, https=shown) as router, Client(router.url, router.token(USER), ca_file=ca_file) as user:
        jobs = [JobSpec(site="BNL", argv=["true"])]
        [identifier] = (await user.submit(SubmitRequest(idempotency_key="k", jobs=jobs))).ids
        assert identifier is not None
        command = [
            *(sys.executable, "-P", "-m", "pilot", "--server", router.url, "--queue", QUEUE, "--max-jobs", "1"),
            *("--token-file", str(router.token_file(PILOT)), "--work-dir", str(tmp_path / "work"), "--ca", ca_file),
        ]
        pilot = await asyncio.create_subprocess_exec(*command, env=os.environ | {"PYTHONPATH": str(ROOT)})
        async with asyncio.timeout(DEADLINE_S):
            assert await pilot.wait() == 0
        assert (await user.job(identifier)).job.state is State.FINISHED


async def test_who_does_not_know_the_authority_sends_nothing(
    shard: Partition, shown: HttpsSettings, tmp_path: Path
) -> None:
    async with front(shard, https=shown) as router:
        for ca_file in ("", str(tmp_path / "other.pem")):
            async with Client(router.url, router.token(USER), ca_file=ca_file, patience_s=0.0) as user:
                with pytest.raises(Unavailable) as caught:
                    await user.job(1)
                assert "certificate" in caught.value.message.lower()
        async with aiohttp.ClientSession() as session:
            with pytest.raises(aiohttp.ClientError):
                await session.get(router.url.replace("https", "http") + "/health")


def test_a_certificate_that_was_renewed_is_shown_without_a_restart(shown: HttpsSettings, tmp_path: Path) -> None:
    https = Https(shown, "127.0.0.1", behind_tls_front=False)

    def poll() -> None:
        asyncio.run(https.poll())

    poll()
    for name in ("router.pem", "router.key"):
        (tmp_path / name).unlink()
    certificate(tmp_path, "router", authority(tmp_path, "ca"))
    poll()
    Path(shown.key_file).write_text("rubbish", encoding="utf-8")
    with pytest.raises(ClientFault, match="bad_certificate"):
        poll()
    # Told once, and the one before goes on being shown.
    poll()
    assert https.context is not None
    assert https.context.minimum_version is ssl.TLSVersion.TLSv1_2


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "router.example.org", "::"])  # is refused
def test_tokens_do_not_cross_the_network_in_the_clear(host: str) -> None:
    with pytest.raises(ClientFault, match="behind_tls_front"):
        Https(None, host, behind_tls_front=False)
    assert Https(None, host, behind_tls_front=True).context is None


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_on_loopback_plain_http_is_right(host: str) -> None:
    assert Https(None, host, behind_tls_front=False).context is None


def test_files_that_are_no_certificate_are_said(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("x", encoding="utf-8")
    for name in ("x", "nowhere"):
        with pytest.raises(ClientFault, match="bad_certificate"):
            Https(
                HttpsSettings(cert_file=str(tmp_path / name), key_file=str(tmp_path / name)),
                "127.0.0.1",
                behind_tls_front=False,
            )


def test_router_and_monitor_have_the_same_two_settings() -> None:
    for kind in (RouterSettings, MonitorSettings):
        made = kind(topology_dir="t", trusted_keys_dir="k")
        assert (made.https, made.behind_tls_front) == (None, False)
