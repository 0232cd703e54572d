"""The other authorities: a copy of each one's section and public keys, kept up to date while it can be reached.

An authority changes its own section only, so there is never anything to merge: the newer epoch of its own wins. While
it is cut off, the last good copy stays, and so do the keys that its tokens are verified with. One that steps back, or
says another thing at the same epoch, is not believed: it has lost its section (docs/runbook.md).
"""

import asyncio
import logging
import ssl
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import aiohttp
import msgspec

from culm import access, topology_store
from culm.address import is_loopback
from culm.errors import ClientFault, Conflict, CulmError, Unavailable
from culm.registry_wire import AuthorityAnswer
from culm.settings import RouterSettings
from culm.telemetry import TOPOLOGY_REFUSED
from culm.tokens import adopt_keys, public_keys
from culm.topology import Topology
from culm.wire import Principal
from router.metrics import PEER_HEARD

SILENT_S: Final = 2.0
"""A peer that says nothing for so long is cut off."""
DEADLINE_S: Final = 60.0
"""For the whole answer: a large section over a slow line takes its time."""
MAX_ANSWER_BYTES: Final = 64 << 20
"""A section of 10,000 sites has about 10 MB."""

log = logging.getLogger("router.peers")


async def tell(settings: RouterSettings, principal: Principal, topology: Topology) -> AuthorityAnswer:
    """What this authority decides, for the routers of the others. Raises ClientFault (forbidden, unknown_authority)."""
    access.require_role(principal, "peer", "admin")
    section = topology.sections.get(settings.authority)
    if section is None:
        raise ClientFault("unknown_authority", f"there is no section of {settings.authority} here", http_status=404)
    keys = await asyncio.to_thread(public_keys, Path(settings.trusted_keys_dir), settings.authority)
    return AuthorityAnswer(authority=settings.authority, section=section, keys=keys)


def require_private(peers: Mapping[str, str]) -> None:
    """Our token, and the keys to be trusted, cross no network in the clear. Raises ClientFault(plain_http_refused)."""
    for authority, url in peers.items():
        parts = urlsplit(url)
        if parts.scheme != "https" and not is_loopback(parts.hostname or ""):
            raise ClientFault("plain_http_refused", f"peer {authority}: {url} must be https: outside of this machine")


class Peers:
    """Asks a router of every other authority. Raises as `require_private`."""

    def __init__(self, settings: RouterSettings) -> None:
        require_private(settings.peers)
        self._settings = settings
        self._cut_off: set[str] = set()
        self._n_refused: Counter[str] = Counter()
        """By authority, how many of its answers in a row were out of order."""
        for authority in settings.peers:
            # There from the start, as 0: one that was never heard is missed, too.
            PEER_HEARD.labels(authority)

    async def poll(self) -> None:
        """One turn of a background loop: all peers at once; one that does not answer is left as it was last heard."""
        peers = self._settings.peers
        if not peers:
            return
        patience = aiohttp.ClientTimeout(total=DEADLINE_S, sock_connect=SILENT_S, sock_read=SILENT_S)
        # As it is sent: what a compressed answer grows to is not bounded by its length.
        async with aiohttp.ClientSession(timeout=patience, auto_decompress=False) as session:
            await asyncio.gather(*(self._follow(session, name, url) for name, url in peers.items()))

    async def _follow(self, session: aiohttp.ClientSession, authority: str, url: str) -> None:
        try:
            answer = await self._ask(session, url)
            if answer.authority != authority or answer.section.authority != authority:
                raise ClientFault("bad_peer", f"{url} speaks for {answer.authority}, not for {authority}")
            await asyncio.to_thread(self._adopt, answer)
        except Conflict as error:
            self._refuse(authority, error)
        except CulmError as error:
            # Said once for every time that it is cut off.
            if authority not in self._cut_off:
                log.warning("authority %s is cut off: %s", authority, error)
            self._cut_off.add(authority)
        else:
            if authority in self._cut_off:
                log.info("authority %s is back", authority)
            self._cut_off.discard(authority)
            self._n_refused.pop(authority, None)
            PEER_HEARD.labels(authority).set(time.time())

    def _refuse(self, authority: str, error: Conflict) -> None:
        self._n_refused[authority] += 1
        # Two workers that ask at once may write what they heard in the other order: no fault, and gone the next time.
        if self._n_refused[authority] > 1:
            TOPOLOGY_REFUSED.labels(authority).inc()
        if self._n_refused[authority] == 2:
            log.error("authority %s is not believed, what was known of it stays: %s", authority, error)

    def _adopt(self, answer: AuthorityAnswer) -> None:
        def trust() -> None:
            if adopt_keys(Path(self._settings.trusted_keys_dir), answer.authority, answer.keys):
                log.info("the keys of %s have changed", answer.authority)

        # The keys first: whoever is named in the section may speak for it at once.
        if topology_store.adopt(Path(self._settings.topology_dir), answer.section, trust):
            log.info("the section of %s is at epoch %d", answer.authority, answer.section.epoch)

    async def _ask(self, session: aiohttp.ClientSession, url: str) -> AuthorityAnswer:
        try:
            token = await asyncio.to_thread(Path(self._settings.peer_token_file).read_text, encoding="ascii")
            async with session.get(
                f"{url.rstrip('/')}/v1/authority",
                headers={"Authorization": f"Bearer {token.strip()}", "Accept-Encoding": "identity"},
                ssl=_tls(self._settings.peer_ca_file) if url.startswith("https:") else True,
            ) as response:
                if response.content_length is None or response.content_length > MAX_ANSWER_BYTES:
                    raise Unavailable("bad_answer", f"{url} answers with more than {MAX_ANSWER_BYTES >> 20} MiB")
                body = await response.read()
                if response.status != 200:
                    raise Unavailable("peer_refuses", f"{url} answers {response.status}: {body[:200]!r}")
                return msgspec.json.decode(body, type=AuthorityAnswer)
        except msgspec.DecodeError as error:
            raise Unavailable("bad_answer", f"{url} gave an answer that is not ours: {error}") from None
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise Unavailable("unreachable", f"no answer from {url}: {error or type(error).__name__}") from None


def _tls(ca_file: str) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=ca_file or None)
