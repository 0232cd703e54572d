"""Addresses of our own endpoints: `unix:/path`, `tls:host:port`, and on loopback only `tcp:host:port`."""

import ipaddress
import os
import socket
import ssl
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from culm.errors import ClientFault, Conflict
from culm.settings import TlsSettings

MAX_SOCKET_PATH_BYTES = 107
"""sun_path of Linux holds 108 bytes with the terminating zero."""


@dataclass(frozen=True)
class Address:
    """A parsed address; `path` for unix, `host` and `port` for the others."""

    kind: Literal["unix", "tcp", "tls"]
    path: str = ""
    host: str = ""
    port: int = 0


def parse(text: str) -> Address:
    """Read an address. Raises ClientFault(bad_address); a plain TCP address outside loopback is refused."""
    kind, _, rest = text.partition(":")
    if kind == "unix" and rest.startswith("/"):
        if len(rest.encode()) > MAX_SOCKET_PATH_BYTES:
            raise ClientFault("bad_address", f"the socket path {rest} is longer than {MAX_SOCKET_PATH_BYTES} bytes")
        return Address("unix", path=rest)
    host, _, port = rest.rpartition(":")
    if kind not in {"tcp", "tls"} or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ClientFault("bad_address", f"{text!r} is not unix:/path, tls:host:port or tcp:host:port")
    if kind == "tcp" and not is_loopback(host):
        raise ClientFault("plain_tcp_refused", f"{text}: plain TCP is for loopback only; between machines use tls:")
    return Address("tcp" if kind == "tcp" else "tls", host=host.strip("[]"), port=int(port))


def prepare_socket(path: str) -> None:
    """Make way for a unix socket: its folder must be ours alone, a stale socket is removed.

    Raises ClientFault(open_socket_folder) if anybody else could reach the socket, Conflict(socket_in_use) if somebody
    listens there. Safe to retry: yes.
    """
    folder = Path(path).parent
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    info = folder.stat()
    if info.st_uid != os.getuid() or stat.S_IMODE(info.st_mode) & 0o077:
        raise ClientFault("open_socket_folder", f"{folder} must belong to this user with mode 0700")
    if Path(path).is_socket():
        if _answers(path):
            raise Conflict("socket_in_use", f"another process listens at {path}")
        Path(path).unlink()


def server_tls(settings: TlsSettings | None) -> ssl.SSLContext:
    """The accepting side: asks for a certificate of the shared CA. Raises ClientFault(no_tls) without settings."""
    context = _context(settings, ssl.Purpose.CLIENT_AUTH)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_tls(settings: TlsSettings | None) -> ssl.SSLContext:
    """The connecting side. Raises ClientFault(no_tls) without settings."""
    return _context(settings, ssl.Purpose.SERVER_AUTH)


def _context(settings: TlsSettings | None, purpose: ssl.Purpose) -> ssl.SSLContext:
    if settings is None:
        raise ClientFault("no_tls", "a tls: address needs the settings link_tls")
    context = ssl.create_default_context(purpose, cafile=settings.ca_file)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(settings.cert_file, settings.key_file)
    return context


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except BlockingIOError:
            return True  # it listens, but its queue is full
        except OSError:
            return False
        return True


def is_loopback(host: str) -> bool:
    """Whether nobody outside of this machine reaches a host; a name other than localhost counts as reachable."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
