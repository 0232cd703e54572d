"""Tokens: who may speak, and every way of pretending to be someone else."""

import base64
import hashlib
import hmac
import json
import time
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from culm.errors import ClientFault, Conflict
from culm.tokens import (
    AUDIENCE,
    LEEWAY_S,
    MAX_TOKEN_CHARS,
    RELOAD_S,
    KeyRing,
    ToldKeys,
    Verifier,
    adopt_keys,
    public_keys,
    told_keys,
)
from culm.wire import Principal
from tests.waiting import eventually_sync

USER = Principal(role="user", subject="ann", authority="central", vo="atlas", groups=["higgs"], roles=["manager:higgs"])
PILOT = Principal(role="pilot", subject="p", authority="central", queues=["BNL*"], vos=["atlas"])
VALID_S = 600.0


class Hands:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.moved_s = 0.0
        self._began = time.time()

    def now(self) -> float:
        return self._began + self.moved_s

    def monotonic(self) -> float:
        return self.moved_s


@pytest.fixture
def ring(tmp_path: Path) -> KeyRing:
    made = KeyRing(tmp_path / "keys", tmp_path / "trusted", "central")
    made.ensure()
    return made


@pytest.fixture
def clock() -> Hands:
    return Hands()


@pytest.fixture
def verifier(tmp_path: Path, ring: KeyRing, clock: Hands) -> Verifier:
    return Verifier(tmp_path / "trusted", clock)


def refused(verifier: Verifier, header: str | None) -> str:
    with pytest.raises(ClientFault) as caught:
        verifier.verify(header)
    assert caught.value.http_status == 401
    assert not caught.value.retryable
    return caught.value.code


def signed(ring: KeyRing, folder: Path, claims: dict[str, Any], **headers: object) -> str:
    """A header with claims of our choice, signed by the ring's own key."""
    kid = ring.ensure()
    key = load_pem_private_key((folder / "keys" / f"{kid}.key").read_bytes(), None)
    assert isinstance(key, Ed25519PrivateKey)
    return "Bearer " + jwt.encode(_good() | claims, key, "EdDSA", headers={"kid": kid} | headers)


def _good() -> dict[str, Any]:
    return {"sub": "ann", "iss": "central", "aud": AUDIENCE, "exp": int(time.time() + VALID_S), "role": "user"}


def _part(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


@pytest.mark.parametrize("principal", [USER, PILOT, Principal(role="admin", subject="root", authority="central")])
def test_a_token_says_who_it_was_issued_for(ring: KeyRing, verifier: Verifier, principal: Principal) -> None:
    header = f"Bearer {ring.issue(principal, VALID_S)}"
    assert verifier.verify(header) == principal
    assert verifier.verify(header) == principal
    assert verifier.verify(header.replace("Bearer", "bearer")) == principal


@pytest.mark.parametrize(
    ("header", "code"),
    [
        (None, "no_token"),
        ("", "no_token"),
        ("Bearer", "bad_token"),
        ("Bearer ", "bad_token"),
        ("Basic YTpi", "bad_token"),
        ("Bearer a.b.c", "bad_token"),
        ("Bearer \udcff.\udcfe.c", "bad_token"),
        ("Bearer é", "bad_token"),
        ("Bearer e30.e30.e30", "unknown_key"),
        ("Bearer bnVsbA.e30.e30", "bad_token"),
        ("Bearer " + "a" * (MAX_TOKEN_CHARS + 1), "bad_token"),
    ],
)
def test_what_is_no_token_is_refused(verifier: Verifier, header: str | None, code: str) -> None:
    assert refused(verifier, header) == code


def test_a_token_ends_also_when_it_is_remembered(ring: KeyRing, tmp_path: Path) -> None:
    verifier = Verifier(tmp_path / "trusted")
    header = f"Bearer {ring.issue(USER, 1.5 - LEEWAY_S)}"
    assert verifier.verify(header) == USER

    def is_over() -> bool:
        try:
            return verifier.verify(header) != USER
        except ClientFault as error:
            return error.code == "token_expired"

    eventually_sync(is_over, 10.0, what="the token ends")


def test_an_unsigned_token_is_refused(ring: KeyRing, verifier: Verifier) -> None:
    head = {"alg": "none", "typ": "JWT", "kid": ring.ensure()}
    for signature in ("", "AAAA"):
        assert refused(verifier, f"Bearer {_part(head)}.{_part(_good())}.{signature}") == "bad_token"


def test_a_public_key_is_no_shared_secret(ring: KeyRing, verifier: Verifier, tmp_path: Path) -> None:
    """The old trick: a verifier that lets the token choose takes the public key for an HMAC secret."""
    kid = ring.ensure()
    text = f"{_part({'alg': 'HS256', 'kid': kid})}.{_part(_good())}"
    digest = hmac.new((tmp_path / "trusted" / f"{kid}.pub").read_bytes(), text.encode(), hashlib.sha256).digest()
    forged = base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
    assert refused(verifier, f"Bearer {text}.{forged}") == "bad_token"


def test_a_token_that_was_tampered_with_is_refused(ring: KeyRing, verifier: Verifier) -> None:
    head, claims, signature = ring.issue(PILOT, VALID_S).split(".")
    wider = json.loads(base64.urlsafe_b64decode(claims + "==")) | {"queues": ["*"]}
    assert refused(verifier, f"Bearer {head}.{_part(wider)}.{signature}") == "bad_token"


def test_a_key_that_is_not_trusted_says_so_whatever_name_it_takes(
    ring: KeyRing, verifier: Verifier, tmp_path: Path
) -> None:
    stranger = KeyRing(tmp_path / "theirs", tmp_path / "their-trusted", "central")
    assert refused(verifier, f"Bearer {stranger.issue(USER, VALID_S)}") == "unknown_key"
    borrowed = jwt.encode(_good(), Ed25519PrivateKey.generate(), "EdDSA", headers={"kid": ring.ensure()})
    assert refused(verifier, f"Bearer {borrowed}") == "bad_token"
    upwards = jwt.encode(_good(), Ed25519PrivateKey.generate(), "EdDSA", headers={"kid": "../keys/x"})
    assert refused(verifier, f"Bearer {upwards}") == "unknown_key"


@pytest.mark.parametrize(
    "claims",
    [
        {"iss": "CERN"},
        {"aud": "other"},
        {"role": "root"},
        {"role": None},
        {"sub": ""},
        {"sub": "a" * 129},
        {"vo": "v" * 129},
        {"vo": 5},
        {"queues": "BNL"},
        {"queues": [1]},
        {"roles": {"production": True}},
    ],
)
def test_claims_that_are_not_good_are_refused_though_signed(
    ring: KeyRing, verifier: Verifier, tmp_path: Path, claims: dict[str, Any]
) -> None:
    assert verifier.verify(signed(ring, tmp_path, {})).subject == "ann"
    assert refused(verifier, signed(ring, tmp_path, claims)) == "bad_token"


@pytest.mark.parametrize("claim", ["sub", "iss", "aud", "exp", "role"])
def test_no_claim_that_matters_may_be_missing(ring: KeyRing, tmp_path: Path, verifier: Verifier, claim: str) -> None:
    kid = ring.ensure()
    key = load_pem_private_key((tmp_path / "keys" / f"{kid}.key").read_bytes(), None)
    assert isinstance(key, Ed25519PrivateKey)
    claims = _good()
    del claims[claim]
    token = jwt.encode(claims, key, "EdDSA", headers={"kid": kid})
    assert refused(verifier, f"Bearer {token}") == "bad_token"


def test_a_ring_signs_for_its_own_authority_only(ring: KeyRing) -> None:
    with pytest.raises(ClientFault) as caught:
        ring.issue(Principal(role="admin", subject="root", authority="CERN"), VALID_S)
    assert caught.value.code == "bad_authority"


# --- rotation -------------------------------------------------------------------------------------------------------


def test_a_new_key_is_good_at_once_and_the_old_ones_tokens_stay_good(ring: KeyRing, verifier: Verifier) -> None:
    before = f"Bearer {ring.issue(USER, VALID_S)}"
    assert verifier.verify(before) == USER
    old = ring.ensure()
    new = ring.rotate()
    assert ring.kids() == [old, new]
    after = f"Bearer {ring.issue(PILOT, VALID_S)}"
    assert jwt.get_unverified_header(after.split()[1])["kid"] == new
    assert verifier.verify(after) == PILOT
    assert verifier.verify(before) == USER


async def test_a_withdrawn_key_takes_its_tokens_with_it(ring: KeyRing, verifier: Verifier, tmp_path: Path) -> None:
    old = f"Bearer {ring.issue(USER, VALID_S)}"
    assert verifier.verify(old) == USER
    withdrawn = ring.ensure()
    ring.rotate()
    (tmp_path / "trusted" / f"{withdrawn}.pub").unlink()
    await verifier.poll()
    assert refused(verifier, old) == "unknown_key"
    assert verifier.verify(f"Bearer {ring.issue(USER, VALID_S)}") == USER


async def test_a_key_replaced_under_its_name_takes_its_tokens_with_it(
    ring: KeyRing, verifier: Verifier, tmp_path: Path
) -> None:
    old = f"Bearer {ring.issue(USER, VALID_S)}"
    assert verifier.verify(old) == USER
    theirs = KeyRing(tmp_path / "theirs", tmp_path / "their-trusted", "central")
    replacement = tmp_path / "their-trusted" / f"{theirs.ensure()}.pub"
    (tmp_path / "trusted" / f"{ring.ensure()}.pub").write_bytes(replacement.read_bytes())
    await verifier.poll()
    assert refused(verifier, old) == "bad_token"


@pytest.mark.parametrize("rubbish", [b"", b"rubbish", b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"])
async def test_one_broken_key_file_keeps_no_other_key_out_and_none_in(
    ring: KeyRing, verifier: Verifier, tmp_path: Path, rubbish: bytes
) -> None:
    (tmp_path / "trusted" / "a-broken.pub").write_bytes(rubbish)
    header = f"Bearer {ring.issue(USER, VALID_S)}"
    assert verifier.verify(header) == USER
    (tmp_path / "trusted" / f"{ring.ensure()}.pub").unlink()
    await verifier.poll()
    assert refused(verifier, header) == "unknown_key"


def test_the_folder_of_keys_may_come_later(tmp_path: Path, clock: Hands) -> None:
    verifier = Verifier(tmp_path / "trusted", clock)
    late = KeyRing(tmp_path / "keys", tmp_path / "trusted", "central")
    assert refused(verifier, "Bearer e30.e30.e30") == "unknown_key"
    assert verifier.verify(f"Bearer {late.issue(USER, VALID_S)}") == USER


def test_unknown_kids_do_not_make_us_read_the_folder_each_time(
    verifier: Verifier, clock: Hands, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[float] = []
    load = Verifier._load
    monkeypatch.setattr(Verifier, "_load", lambda self: (loads.append(clock.moved_s), load(self))[1])
    for _ in range(50):
        assert refused(verifier, "Bearer e30.e30.e30") == "unknown_key"
    assert loads == [0.0]
    clock.moved_s = RELOAD_S
    assert refused(verifier, "Bearer e30.e30.e30") == "unknown_key"
    assert loads == [0.0, RELOAD_S]


def test_private_keys_are_readable_to_their_owner_only(ring: KeyRing, tmp_path: Path) -> None:
    for path in (tmp_path / "keys").iterdir():
        assert path.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o700


# --- the keys of another authority ------------------------------------------------------------------------------------


def test_exactly_the_keys_that_an_authority_tells_are_trusted(tmp_path: Path, ring: KeyRing) -> None:
    theirs = KeyRing(tmp_path / "theirs", tmp_path / "their-trusted", "CERN")
    old = theirs.ensure()
    ours = tmp_path / "trusted"
    assert adopt_keys(ours, "CERN", told_keys(tmp_path / "their-trusted", "CERN"))
    new = theirs.rotate()
    (tmp_path / "their-trusted" / f"{old}.pub").unlink()
    told = told_keys(tmp_path / "their-trusted", "CERN")
    assert list(told.keys) == [new]
    assert adopt_keys(ours, "CERN", told)
    assert not adopt_keys(ours, "CERN", told)
    assert public_keys(ours, "CERN") == told.keys
    # Our own stay, and a token of theirs is good here.
    assert list(public_keys(ours, "central")) == [ring.ensure()]
    user = Principal(role="user", subject="ann", authority="CERN", vo="atlas")
    assert Verifier(ours).verify(f"Bearer {theirs.issue(user, VALID_S)}") == user


def test_an_older_word_on_keys_undoes_no_newer_one(tmp_path: Path, ring: KeyRing) -> None:
    told_at, ours = tmp_path / "their-trusted", tmp_path / "trusted"
    theirs = KeyRing(tmp_path / "theirs", told_at, "CERN")
    stolen = theirs.ensure()
    before = told_keys(told_at, "CERN")
    assert told_keys(told_at, "CERN") == before
    saved = {path.name: path.read_bytes() for path in told_at.iterdir()}
    new = theirs.rotate()
    (told_at / f"{stolen}.pub").unlink()
    after = told_keys(told_at, "CERN")
    assert after.order > before.order > 0
    assert adopt_keys(ours, "CERN", after)
    for stale in (before, ToldKeys(keys=before.keys)):
        with pytest.raises(Conflict, match="stale_keys"):
            adopt_keys(ours, "CERN", stale)
        assert list(public_keys(ours, "CERN")) == [new]
    # Their folder is restored from a copy of before: still the older word, until something is changed there.
    (told_at / f"{new}.pub").unlink()
    for name, content in saved.items():
        (told_at / name).write_bytes(content)
    assert told_keys(told_at, "CERN") == before
    newest = theirs.rotate()
    (told_at / f"{stolen}.pub").unlink()
    assert adopt_keys(ours, "CERN", told_keys(told_at, "CERN"))
    assert list(public_keys(ours, "CERN")) == [newest]


def test_a_number_that_cannot_be_read_withdraws_nothing(tmp_path: Path, ring: KeyRing) -> None:
    first = told_keys(tmp_path / "trusted", "central")
    (tmp_path / "trusted" / "central.order").write_bytes(b"{")
    again = told_keys(tmp_path / "trusted", "central")
    assert again.keys == first.keys
    assert again.order >= first.order


def test_an_answer_without_keys_withdraws_none(tmp_path: Path) -> None:
    trusted = tmp_path / "trusted"
    KeyRing(tmp_path / "theirs", trusted, "CERN").ensure()
    before = public_keys(trusted, "CERN")
    assert not adopt_keys(trusted, "CERN", ToldKeys(keys={}))
    assert public_keys(trusted, "CERN") == before


@pytest.mark.parametrize("kid", ["central-1-a", "CERN-../../x", "CERN", "CERN-1/x", "", "CERN-1-a\n"])
def test_a_key_under_the_name_of_somebody_else_is_refused(kid: str, tmp_path: Path, ring: KeyRing) -> None:
    good = public_keys(tmp_path / "trusted", "central")[ring.ensure()]
    with pytest.raises(ClientFault, match="bad_key"):
        adopt_keys(tmp_path / "trusted", "CERN", ToldKeys(keys={kid: good}))
    assert len(list((tmp_path / "trusted").iterdir())) == 1


def test_what_is_no_public_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ClientFault, match="bad_key"):
        rubbish = "-----BEGIN PUBLIC KEY-----\nrubbish\n-----END PUBLIC KEY-----\n"
        adopt_keys(tmp_path, "CERN", ToldKeys(keys={"CERN-1-a": rubbish}))
    assert list(tmp_path.iterdir()) == []
