"""The other authorities: a copy of each one's section and public keys, kept up to date while it can be reached.

An authority changes its own section only, so there is never anything to merge: the newer epoch of its own wins. While
it is cut off, the last good copy stays, and so do the keys that its tokens are verified with.
"""

import asyncio
import logging
import ssl
import time
from pathlib import Path
from typing import Final

import aiohttp
import msgspec

from culm import access, topology_store
from culm.errors import ClientFault, CulmError, Unavailable
from culm.registry_wire import AuthorityAnswer
from culm.settings import RouterSettings
from culm.tokens import adopt_keys, public_keys
from culm.topology import Topology
from culm.wire import Principal
from router.metrics import PEER_HEARD

DEADLINE_S: Final = 2.0
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


class Peers:
    """Asks a router of every other authority."""

    def __init__(self, settings: RouterSettings) -> None:
        self._settings = settings
        self._cut_off: set[str] = set()
        for authority in settings.peers:
            # There from the start, as 0: one that was never heard is missed, too.
            PEER_HEARD.labels(authority)

    async def poll(self) -> None:
        """One turn of a background loop: all peers at once; one that does not answer is left as it was last heard."""
        peers = self._settings.peers
        if not peers:
            return
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=DEADLINE_S)) as session:
            await asyncio.gather(*(self._follow(session, name, url) for name, url in peers.items()))

    async def _follow(self, session: aiohttp.ClientSession, authority: str, url: str) -> None:
        try:
            answer = await self._ask(session, url)
            if answer.authority != authority or answer.section.authority != authority:
                raise ClientFault("bad_peer", f"{url} speaks for {answer.authority}, not for {authority}")
            await asyncio.to_thread(self._adopt, answer)
        except CulmError as error:
            # Said once for every time that it is cut off.
            if authority not in self._cut_off:
                log.warning("authority %s is cut off: %s", authority, error)
            self._cut_off.add(authority)
        else:
            if authority in self._cut_off:
                log.info("authority %s is back", authority)
            self._cut_off.discard(authority)
            PEER_HEARD.labels(authority).set(time.time())

    def _adopt(self, answer: AuthorityAnswer) -> None:
        # The keys first: whoever is named in the section may speak for it at once.
        if adopt_keys(Path(self._settings.trusted_keys_dir), answer.authority, answer.keys):
            log.info("the keys of %s have changed", answer.authority)
        if topology_store.adopt(Path(self._settings.topology_dir), answer.section):
            log.info("the section of %s is at epoch %d", answer.authority, answer.section.epoch)

    async def _ask(self, session: aiohttp.ClientSession, url: str) -> AuthorityAnswer:
        try:
            token = await asyncio.to_thread(Path(self._settings.peer_token_file).read_text, encoding="ascii")
            async with session.get(
                f"{url.rstrip('/')}/v1/authority",
                headers={"Authorization": f"Bearer {token.strip()}"},
                ssl=_tls(self._settings.peer_ca_file) if url.startswith("https:") else True,
            ) as response:
                if response.content_length is None or response.content_length > MAX_ANSWER_BYTES:
                    raise Unavailable("bad_answer", f"{url} answers with more than {MAX_ANSWER_BYTES >> 20} MiB")
                body = await response.read()
                if response.status != 200:
                    raise Unavailable("peer_refuses", f"{url} answers {response.status}: {body[:200]!r}")
                return msgspec.json.decode(body, type=AuthorityAnswer)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise Unavailable("unreachable", f"no answer from {url}: {error or type(error).__name__}") from None
        except msgspec.DecodeError as error:
            raise Unavailable("bad_answer", f"{url} gave an answer that is not ours: {error}") from None


def _tls(ca_file: str) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=ca_file or None)
