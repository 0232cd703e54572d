"""Tokens at the front door: forged, expired, withdrawn and new ones, without a restart."""

import base64
import hashlib
import hmac
import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import jwt
import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from culm.errors import ClientFault
from culm.tokens import AUDIENCE, KeyRing
from culm.wire import JobsQuery, Principal
from tests.front import RunningFront, front
from tests.partition import ADMIN, USER, Partition
from tests.waiting import eventually


@pytest.fixture
async def router(shard: Partition) -> AsyncIterator[RunningFront]:
    """A router over a shard."""
    async with front(shard) as running:
        yield running


async def answered(router: RunningFront, token: str, **options: Any) -> tuple[int, str]:
    """The status and the error's code of a read with this token."""
    reply = await router.send("GET", "/v1/jobs", token=token, **options)
    if reply.status == 401:
        assert reply.headers["WWW-Authenticate"] == "Bearer"
    return reply.status, "" if reply.status == 200 else reply.code


def _part(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


def _claims(**changes: Any) -> dict[str, Any]:
    now = int(time.time())
    values = {"sub": "ann", "role": "user", "vo": "atlas", "iss": "central", "aud": AUDIENCE, "exp": now + 600}
    return {name: value for name, value in (values | changes).items() if value is not None}


def _signed(router: RunningFront, claims: dict[str, Any], *, kid: str = "", key: object = None) -> str:
    """A token of the router's own key, unless another is given, with any claims."""
    kid = kid or router.ring.ensure()
    own = load_pem_private_key((router.folder / "keys" / f"{router.ring.ensure()}.key").read_bytes(), None)
    return jwt.encode(claims, key or own, "EdDSA", headers={"kid": kid})  # type: ignore[arg-type]


async def test_a_good_token_is_let_in(router: RunningFront) -> None:
    assert await answered(router, _signed(router, _claims())) == (200, "")


async def test_nothing_but_health_works_without_a_token(router: RunningFront) -> None:
    for method, path in (
        *(("POST", f"/v1/{verb}") for verb in ("submit", "get_job", "heartbeat", "report", "cancel", "sites", "queue")),
        *(("GET", f"/v1/{verb}") for verb in ("job/1", "jobs", "topology")),
        ("GET", "/metrics"),
    ):
        reply = await router.send(method, path, b"{}" if method == "POST" else None, token="")
        assert (reply.status, reply.code) == (401, "no_token"), path
    assert (await router.send("GET", "/health", token="")).status == 200


async def test_metrics_are_for_those_who_read_them(router: RunningFront) -> None:
    assert (await router.send("GET", "/metrics", token=router.token(USER))).code == "forbidden"
    reader = msgspec.structs.replace(USER, roles=["monitor"])
    headers = {"Authorization": f"Bearer {router.token(reader)}"}
    async with aiohttp.ClientSession(headers=headers) as http, http.get(f"{router.url}/metrics") as answer:
        assert answer.status == 200
        assert "culm_request_seconds_count" in await answer.text()


@pytest.mark.parametrize(
    "header",
    ["Basic YW5uOmFubg==", "Bearer", "Bearer ", "token", "Bearer " + "x" * 8000,
     "Bearer \xff\xfe", "Bearer a.b.c", "Bearer ü.ü.ü"],
)  # fmt: skip
async def test_what_is_no_bearer_token_is_refused(router: RunningFront, header: str) -> None:
    reply = await router.send("GET", "/v1/jobs", token="", headers={"Authorization": header})
    assert reply.status == 401
    assert reply.code in {"bad_token", "no_token"}


async def test_an_expired_token_is_refused(router: RunningFront) -> None:
    assert await answered(router, router.token(USER, valid_s=-3600)) == (401, "token_expired")


async def test_a_tampered_token_is_refused(router: RunningFront) -> None:
    head, claims, signature = router.token(USER).split(".")
    assert await answered(router, f"{head}.{_part(_claims(role='admin'))}.{signature}") == (401, "bad_token")
    flipped = ("A" if signature[5] != "A" else "B").join([signature[:5], signature[6:]])
    assert await answered(router, f"{head}.{claims}.{flipped}") == (401, "bad_token")
    assert await answered(router, f"{head}.{claims}.") == (401, "bad_token")


@pytest.mark.parametrize("algorithm", ["none", "None", "HS256", "RS256", ""])
async def test_a_token_does_not_choose_its_algorithm(router: RunningFront, algorithm: str) -> None:
    header = {"alg": algorithm, "typ": "JWT", "kid": router.ring.ensure()}
    for signature in ("", "AAAA"):
        forged = f"{_part(header)}.{_part(_claims(role='admin'))}.{signature}"
        assert await answered(router, forged) == (401, "bad_token")


async def test_a_public_key_is_no_secret_to_sign_with(router: RunningFront) -> None:
    kid = router.ring.ensure()
    head = f"{_part({'alg': 'HS256', 'typ': 'JWT', 'kid': kid})}.{_part(_claims(role='admin'))}"
    public = (router.folder / "trusted" / f"{kid}.pub").read_bytes()
    mac = hmac.new(public, head.encode(), hashlib.sha256).digest()
    forged = f"{head}.{base64.urlsafe_b64encode(mac).rstrip(b'=').decode()}"
    assert await answered(router, forged) == (401, "bad_token")


async def test_a_key_that_is_not_trusted_opens_nothing(router: RunningFront) -> None:
    stranger = Ed25519PrivateKey.generate()
    assert await answered(router, _signed(router, _claims(), kid="central-1-x", key=stranger)) == (401, "unknown_key")
    assert await answered(router, _signed(router, _claims(), key=stranger)) == (401, "bad_token")
    for kid in ("../keys/x", "", "\0"):
        token = jwt.encode(_claims(), stranger, "EdDSA", headers={"kid": kid})
        assert (await answered(router, token))[0] == 401


@pytest.mark.parametrize(
    "changes",
    [
        {"aud": "somebody"}, {"aud": None}, {"exp": None}, {"sub": None}, {"iss": None}, {"iss": "CERN"}, {"sub": ""},
        {"sub": "x" * 129}, {"vo": "x" * 129}, {"role": "root"}, {"role": None}, {"vo": 5}, {"groups": "higgs"},
        {"exp": "soon"}, {"nbf": 2**40}, {"sub": 7}, {"queues": [1]},
    ],
    ids=str,
)  # fmt: skip
async def test_a_signature_does_not_make_bad_claims_good(router: RunningFront, changes: dict[str, Any]) -> None:
    assert await answered(router, _signed(router, _claims(**changes))) == (401, "bad_token")


async def test_a_new_key_is_good_from_its_first_token_on(router: RunningFront) -> None:
    for _ in range(3):
        # Just before, somebody has made the router look at its keys.
        assert (await answered(router, _signed(router, _claims(), kid="central-0-x")))[1] == "unknown_key"
        before = router.token(USER)
        router.ring.rotate()
        assert await answered(router, router.token(USER)) == (200, "")
        assert await answered(router, before) == (200, "")


async def test_a_withdrawn_key_is_refused_without_a_restart(router: RunningFront) -> None:
    old_kid, old = router.ring.ensure(), router.token(USER)
    assert await answered(router, old) == (200, "")
    router.ring.rotate()
    assert await answered(router, router.token(USER)) == (200, "")
    (router.folder / "trusted" / f"{old_kid}.pub").unlink()
    await router.verifier.poll()
    assert await answered(router, old) == (401, "unknown_key")
    assert await answered(router, router.token(USER)) == (200, "")


@pytest.mark.parametrize("content", [b"", b"rubbish", b"-----BEGIN PUBLIC KEY-----\n"])
async def test_a_broken_key_file_stops_neither_new_keys_nor_withdrawals(router: RunningFront, content: bytes) -> None:
    kid, token = router.ring.ensure(), router.token(USER)
    assert await answered(router, token) == (200, "")
    (router.folder / "trusted" / "central-broken.pub").write_bytes(content)
    router.ring.rotate()
    assert await answered(router, router.token(USER)) == (200, "")
    (router.folder / "trusted" / f"{kid}.pub").unlink()
    await router.verifier.poll()
    assert await answered(router, token) == (401, "unknown_key")


async def test_a_key_of_another_authority_speaks_for_that_authority_only(router: RunningFront) -> None:
    cern = KeyRing(router.folder / "cern", router.folder / "trusted", "CERN")
    principal = Principal(role="user", subject="ann", authority="CERN", vo="atlas")
    assert await answered(router, cern.issue(principal, 60)) == (200, "")
    with pytest.raises(ClientFault):
        cern.issue(USER, 60)
    key = load_pem_private_key((router.folder / "cern" / f"{cern.ensure()}.key").read_bytes(), None)
    assert await answered(router, _signed(router, _claims(), kid=cern.ensure(), key=key)) == (401, "bad_token")


async def test_an_admin_changes_the_section_of_his_own_authority_only(router: RunningFront) -> None:
    cern = KeyRing(router.folder / "cern", router.folder / "trusted", "CERN")
    token = cern.issue(msgspec.structs.replace(ADMIN, authority="CERN"), 60)
    body = b'{"queue": "BNL-q", "changes": {"status": "offline"}}'
    reply = await router.send("POST", "/v1/queue", body, token=token)
    assert (reply.status, reply.code) == (403, "forbidden")


async def test_private_keys_are_for_the_owner_only(router: RunningFront) -> None:
    router.ring.rotate()
    for path in (router.folder / "keys").iterdir():
        assert (path.suffix, path.stat().st_mode & 0o777) == (".key", 0o600)
    assert (router.folder / "keys").stat().st_mode & 0o777 == 0o700


async def test_a_ring_signs_for_no_nameless_subject(router: RunningFront) -> None:
    for subject in ("", "x" * 129):
        with pytest.raises(ClientFault) as caught:
            router.ring.issue(msgspec.structs.replace(USER, subject=subject), 60)
        assert caught.value.code == "bad_principal"


async def test_a_token_is_verified_once_and_dies_in_memory_too(router: RunningFront) -> None:
    """The cache of verified tokens does not outlive their time; the leeway is for both."""
    token = _signed(router, _claims(exp=int(time.time()) - 29))
    assert await answered(router, token) == (200, "")

    async def refused() -> bool:
        return await answered(router, token) == (401, "token_expired")

    await eventually(refused, 10.0, what="the token has expired in the cache")


async def test_a_stranger_cannot_make_the_router_read_a_body(router: RunningFront) -> None:
    reply = await router.send("POST", "/v1/submit", secrets.token_bytes(100_000), token="x.y.z")
    assert (reply.status, reply.code) == (401, "bad_token")
    async with router.client() as user:
        assert (await user.jobs(JobsQuery())).jobs == []
