"""Addresses of our endpoints: what is refused before anything listens."""

import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from culm import address
from culm.address import Address
from culm.errors import ClientFault, Conflict


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder with a short name: a unix socket's path is limited."""
    with tempfile.TemporaryDirectory(prefix="culm-") as folder:
        yield Path(folder)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("unix:/run/culm/us1.sock", Address("unix", path="/run/culm/us1.sock")),
        ("unix:/" + "x" * 106, Address("unix", path="/" + "x" * 106)),
        ("tcp:127.0.0.1:25090", Address("tcp", host="127.0.0.1", port=25090)),
        ("tcp:127.9.9.9:1", Address("tcp", host="127.9.9.9", port=1)),
        ("tcp:[::1]:65535", Address("tcp", host="::1", port=65535)),
        ("tcp:localhost:25090", Address("tcp", host="localhost", port=25090)),
        ("tls:shard.example.org:25090", Address("tls", host="shard.example.org", port=25090)),
        ("tls:10.0.0.1:25090", Address("tls", host="10.0.0.1", port=25090)),
    ],
)
def test_good_addresses(text: str, expected: Address) -> None:
    assert address.parse(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "", "unix:", "unix:relative.sock", "tcp:25090", "tcp::25090", "tcp:127.0.0.1:", "tcp:127.0.0.1:0",
        "tcp:127.0.0.1:65536", "tcp:127.0.0.1:-1", "tcp:127.0.0.1:http", "tls:host", "http:127.0.0.1:80",
        "127.0.0.1:80", "unix:/" + "x" * 107, "unix:/" + "ü" * 60,
    ],
)  # fmt: skip
def test_bad_addresses(text: str) -> None:
    with pytest.raises(ClientFault) as caught:
        address.parse(text)
    assert caught.value.code == "bad_address"


@pytest.mark.parametrize(
    "text", ["tcp:0.0.0.0:25090", "tcp:10.0.0.1:25090", "tcp:shard.example.org:25090", "tcp:[::]:1", "tcp:[fe80::1]:1"]
)
def test_plain_tcp_outside_loopback_is_refused(text: str) -> None:
    with pytest.raises(ClientFault) as caught:
        address.parse(text)
    assert caught.value.code == "plain_tcp_refused"


def test_a_socket_gets_a_folder_of_its_own(short_folder: Path) -> None:
    address.prepare_socket(str(short_folder / "new" / "a.sock"))
    assert (short_folder / "new").stat().st_mode & 0o777 == 0o700


def test_a_stale_socket_is_removed(short_folder: Path) -> None:
    path = short_folder / "a.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
    assert path.is_socket()
    address.prepare_socket(str(path))
    assert not path.exists()


def test_a_socket_that_somebody_listens_at_is_left_to_him(short_folder: Path) -> None:
    """A second process with the same settings would leave the first one deaf."""
    path = short_folder / "a.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(0)
        for _ in range(3):
            with pytest.raises(Conflict, match="socket_in_use"):
                address.prepare_socket(str(path))
    assert path.is_socket()


def test_a_file_that_is_no_socket_is_left_alone(short_folder: Path) -> None:
    path = short_folder / "precious"
    path.write_text("data")
    address.prepare_socket(str(path))
    assert path.read_text() == "data"


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701, 0o777])
def test_a_folder_that_others_may_enter_is_refused(short_folder: Path, mode: int) -> None:
    short_folder.chmod(mode)
    with pytest.raises(ClientFault) as caught:
        address.prepare_socket(str(short_folder / "a.sock"))
    assert caught.value.code == "open_socket_folder"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_somebody_else_is_refused(short_folder: Path) -> None:
    folder = short_folder / "theirs"
    folder.mkdir(mode=0o700)
    os.chown(folder, 12345, 12345)
    with pytest.raises(ClientFault) as caught:
        address.prepare_socket(str(folder / "a.sock"))
    assert caught.value.code == "open_socket_folder"


def test_tls_without_settings_is_refused() -> None:
    for make in (address.server_tls, address.client_tls):
        with pytest.raises(ClientFault) as caught:
            make(None)
        assert caught.value.code == "no_tls"
