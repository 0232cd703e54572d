"""The certificate of a listening HTTP address, and the rule that tokens travel in the clear on loopback only."""

import logging
import ssl
from pathlib import Path
from typing import Final

from culm.address import is_loopback
from culm.errors import ClientFault
from culm.settings import HttpsSettings

POLL_S: Final = 30.0

log = logging.getLogger("culm.https")


class Https:
    """The TLS side of an address; `context` is None where it is plain HTTP.

    Args:
        settings: the certificate's files; None for plain HTTP.
        host: where it listens.
        behind_tls_front: plain HTTP is right, a front before it speaks TLS.

    Raises ClientFault: bad_certificate, plain_http_refused.
    """

    def __init__(self, settings: HttpsSettings | None, host: str, *, behind_tls_front: bool) -> None:
        self._settings = settings
        self.context: ssl.SSLContext | None = None
        if settings is None:
            if not (behind_tls_front or is_loopback(host)):
                raise ClientFault(
                    "plain_http_refused",
                    f"tokens would cross the network in the clear at {host}: give `https` a certificate, or say"
                    " behind_tls_front = true where a TLS front is before this process",
                )
            return
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._seen = self._marks()
        self._load()

    async def poll(self) -> None:
        """One turn of a background loop: read renewed files; new connections get the new certificate.

        Raises ClientFault(bad_certificate): the one before goes on being shown.
        """
        if self.context is None:
            return
        marks = self._marks()
        if marks != self._seen:
            self._seen = marks
            self._load()
            log.info("the certificate was renewed")

    def _load(self) -> None:
        assert self._settings is not None
        assert self.context is not None
        files = (self._settings.cert_file, self._settings.key_file)
        try:
            self.context.load_cert_chain(*files)
        except (OSError, ssl.SSLError) as error:
            raise ClientFault("bad_certificate", f"{files[0]} with {files[1]}: {error}") from None

    def _marks(self) -> list[tuple[int, int]]:
        """What changes when a file is replaced; (0, 0) for one that is not there at the moment."""
        assert self._settings is not None
        found = []
        for path in (self._settings.cert_file, self._settings.key_file):
            try:
                info = Path(path).stat()
            except OSError:
                found.append((0, 0))
            else:
                found.append((info.st_ino, info.st_mtime_ns))
        return found
