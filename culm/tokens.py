"""Signed tokens: who asks. JWTs with EdDSA (RFC 8037), one key ring per authority, verified by key id.

A key ring's folder holds `<kid>.key` (private, mode 0600) and, in the folder of trusted keys, `<kid>.pub`. The kid
begins with the authority's name. Rotation adds a key and keeps the old public one: tokens that are out stay good
until they expire. Verifiers read the folder again when a kid is new to them, so nothing restarts.
"""

import logging
import os
import re
import secrets
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any, Final

import jwt
import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from culm.clock import Clock, SystemClock
from culm.errors import ClientFault
from culm.wire import Principal

ALGORITHM: Final = "EdDSA"
AUDIENCE: Final = "culm"
LEEWAY_S: Final = 30
MAX_TOKEN_CHARS: Final = 8192
MAX_NAME_CHARS: Final = 128
"""A subject becomes an owner, and the database has no room for more."""
CACHED: Final = 20_000
RELOAD_S: Final = 1.0
"""A folder of keys that looks unchanged is read no more often, whatever unknown kids are shown."""

_KID: Final = re.compile(r"[A-Za-z0-9]+-[A-Za-z0-9-]+")
"""What may become the name of a file."""

log = logging.getLogger("culm.tokens")


class KeyRing:
    """The signing keys of one authority."""

    def __init__(self, folder: Path, trusted: Path, authority: str) -> None:
        self._folder = folder
        self._trusted = trusted
        self.authority = authority

    def ensure(self) -> str:
        """The kid of the newest key; makes the first one. Safe to retry: yes."""
        kids = self.kids()
        return kids[-1] if kids else self.rotate()

    def kids(self) -> list[str]:
        """All signing keys, oldest first."""
        return sorted(path.stem for path in self._folder.glob(f"{self.authority}-*.key"))

    def rotate(self) -> str:
        """Add a key that signs from now on; its kid."""
        kid = f"{self.authority}-{int(time.time() * 1000):013d}-{secrets.token_hex(3)}"
        key = Ed25519PrivateKey.generate()
        for folder in (self._folder, self._trusted):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        # The public part first: a token must never be out before it can be verified.
        _write_new(self._trusted / f"{kid}.pub", public, 0o644)
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        _write_new(self._folder / f"{kid}.key", private, 0o600)
        return kid

    def issue(self, principal: Principal, valid_s: float) -> str:
        """Sign a token for `valid_s` seconds. The principal's authority must be the ring's own."""
        if principal.authority != self.authority:
            raise ClientFault("bad_authority", f"this ring signs for {self.authority} only")
        if not 0 < len(principal.subject) <= MAX_NAME_CHARS or len(principal.vo) > MAX_NAME_CHARS:
            raise ClientFault("bad_principal", f"subject and VO have at most {MAX_NAME_CHARS} characters")
        kid = self.ensure()
        key = load_pem_private_key((self._folder / f"{kid}.key").read_bytes(), None)
        if not isinstance(key, Ed25519PrivateKey):
            raise ClientFault("bad_key", f"{kid} is no Ed25519 key")
        claims = {name: value for name, value in msgspec.to_builtins(principal).items() if name != "authority"}
        now = int(time.time())
        times = {"iat": now, "exp": int(now + valid_s), "jti": secrets.token_hex(8)}
        claims["sub"] = claims.pop("subject")
        return jwt.encode(
            claims | times | {"aud": AUDIENCE, "iss": principal.authority}, key, ALGORITHM, headers={"kid": kid}
        )


def public_keys(trusted: Path, authority: str) -> dict[str, str]:
    """The trusted public keys of an authority, PEM by kid."""
    return {path.stem: path.read_text(encoding="ascii") for path in sorted(trusted.glob(f"{authority}-*.pub"))}


def adopt_keys(trusted: Path, authority: str, keys: dict[str, str]) -> bool:
    """Trust exactly these keys of another authority from now on; whether anything changed.

    An answer without keys changes nothing: an authority always has one.

    Raises ClientFault(bad_key) for what is no Ed25519 key of that authority. Safe to retry: yes.
    """
    for kid, text in keys.items():
        if not _KID.fullmatch(kid) or kid.partition("-")[0] != authority or not _is_public_key(text):
            raise ClientFault("bad_key", f"{kid[:80]!r} is no key of {authority}")
    known = public_keys(trusted, authority)
    if not keys or keys == known:
        return False
    for kid, text in keys.items():
        if known.get(kid) != text:
            _replace(trusted / f"{kid}.pub", text.encode("ascii"))
    for kid in known.keys() - keys.keys():
        (trusted / f"{kid}.pub").unlink(missing_ok=True)
    return True


class Verifier:
    """Checks tokens against the trusted keys; a good one is remembered until it expires."""

    def __init__(self, trusted: str | Path, clock: Clock | None = None) -> None:
        self._trusted = Path(trusted)
        self._clock = clock or SystemClock()
        self._keys: dict[str, Ed25519PublicKey] = {}
        self._known: OrderedDict[str, tuple[float, Principal]] = OrderedDict()
        self._loaded_at = float("-inf")
        self._folder_at = 0

    def verify(self, header: str | None) -> Principal:
        """The principal of an Authorization header.

        Raises ClientFault with status 401: no_token, bad_token, token_expired, unknown_key.
        """
        if not header:
            raise _refused("no_token", "a bearer token is needed")
        scheme, _, token = header.partition(" ")
        # A header that is not ASCII reaches us with surrogates in it, on which a decoder stumbles.
        if scheme.lower() != "bearer" or not token or len(token) > MAX_TOKEN_CHARS or not token.isascii():
            raise _refused("bad_token", "the Authorization header is not 'Bearer TOKEN'")
        known = self._known.get(token)
        if known is not None and self._clock.now() < known[0] + LEEWAY_S:
            return known[1]
        expires_at, principal = self._decode(token)
        self._known[token] = (expires_at, principal)
        while len(self._known) > CACHED:
            self._known.popitem(last=False)
        return principal

    def expires_at(self, header: str) -> float:
        """When a token ends, seconds since the epoch. Raises as `verify`."""
        self.verify(header)
        return self._known[header.partition(" ")[2]][0]

    def _decode(self, token: str) -> tuple[float, Principal]:
        try:
            kid = str(jwt.get_unverified_header(token).get("kid", ""))
            claims: dict[str, Any] = jwt.decode(
                token,
                self._key(kid),
                algorithms=[ALGORITHM],
                audience=AUDIENCE,
                leeway=LEEWAY_S,
                options={"require": ["exp", "sub", "iss", "aud"]},
            )
        except jwt.ExpiredSignatureError:
            raise _refused("token_expired", "the token has expired") from None
        except jwt.PyJWTError as error:
            raise _refused("bad_token", f"the token is not good: {error}") from None
        # The key says who signed: a key of one authority never speaks for another.
        if kid.partition("-")[0] != claims["iss"]:
            raise _refused("bad_token", "the token's issuer is not the owner of its key")
        fields = {name: claims[name] for name in ("role", "vo", "groups", "roles", "queues", "vos") if name in claims}
        try:
            principal = msgspec.convert(
                fields | {"subject": claims["sub"], "authority": claims["iss"]}, Principal, strict=True
            )
        except msgspec.ValidationError as error:
            raise _refused("bad_token", f"the token's claims are not good: {error}") from None
        if not 0 < len(principal.subject) <= MAX_NAME_CHARS or len(principal.vo) > MAX_NAME_CHARS:
            raise _refused("bad_token", "the token's subject or VO is empty or too long")
        return float(claims["exp"]), principal

    def _key(self, kid: str) -> Ed25519PublicKey:
        if kid not in self._keys and self._may_know_more():
            self._load()
        key = self._keys.get(kid)
        if key is None:
            raise _refused("unknown_key", "the token's key is not trusted here")
        return key

    def _may_know_more(self) -> bool:
        """At once when a file came or went, so that a new key is good from its first token on; else now and then."""
        return _modified_at(self._trusted) != self._folder_at or self._clock.monotonic() - self._loaded_at >= RELOAD_S

    def _load(self) -> None:
        self._loaded_at = self._clock.monotonic()
        # Before the files: what changes meanwhile is seen next time.
        self._folder_at = _modified_at(self._trusted)
        keys: dict[str, Ed25519PublicKey] = {}
        for path in self._trusted.glob("*.pub"):
            try:
                key = load_pem_public_key(path.read_bytes())
            except (OSError, ValueError, UnsupportedAlgorithm) as error:
                # One broken file must not keep the other keys from being seen, nor withdrawn ones from being dropped.
                log.warning("%s is no public key: %s", path, error)
                continue
            if isinstance(key, Ed25519PublicKey):
                keys[path.stem] = key
        if any(keys.get(kid) != key for kid, key in self._keys.items()):
            # A key was withdrawn or replaced: so is every token it signed.
            self._known.clear()
        self._keys = keys

    async def poll(self) -> None:
        """One turn of a background loop: sees withdrawn keys."""
        self._load()


def _is_public_key(text: str) -> bool:
    try:
        return isinstance(load_pem_public_key(text.encode("ascii")), Ed25519PublicKey)
    except (ValueError, UnsupportedAlgorithm):
        return False


def _refused(code: str, message: str) -> ClientFault:
    return ClientFault(code, message, http_status=401)


def _modified_at(folder: Path) -> int:
    """When a file last came or went, nanoseconds; 0 for no folder."""
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return 0


def _write_new(path: Path, content: bytes, mode: int) -> None:
    """Never wider than `mode`, never seen half written, durable."""
    beside = path.with_suffix(".new")
    with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    beside.rename(path)


def _replace(path: Path, content: bytes) -> None:
    """Never seen half written. The name of the new file is its process's own: several may do this at once."""
    beside = path.with_suffix(f".{os.getpid()}.new")
    beside.write_bytes(content)
    beside.replace(path)
