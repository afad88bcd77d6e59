"""A Unix socket: who can open it, and what is never replaced by it."""

from __future__ import annotations

import os
import socket
import stat
import tempfile
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest

from maskwire_server.errors import ConfigError
from maskwire_server.rpc.unix_socket import UnixSocket


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short path: that of a socket has at most 100 bytes."""
    with tempfile.TemporaryDirectory(dir="/tmp") as path:
        yield Path(path)


@pytest.fixture
def server() -> Iterator[grpc.Server]:
    made = grpc.server(futures.ThreadPoolExecutor(1))
    yield made
    made.stop(None)


def test_a_socket_and_its_folder_are_the_owners_alone(folder: Path, server: grpc.Server) -> None:
    path = folder / "new" / "a.sock"
    before = os.umask(0o022)
    try:
        made = UnixSocket(path)
        made.bind(server)
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)
    assert stat.S_ISSOCK(path.stat().st_mode)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    made.remove()
    assert not path.exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a\nb", "the path must be printable UTF-8, got b'/"),
        ("caf\udce9", "the path must be printable UTF-8, got b'/"),
        ("a?b", r"the path must not contain \?, # or %, got /"),
        ("a#b", r"the path must not contain \?, # or %, got /"),
        ("a%20b", r"the path must not contain \?, # or %, got /"),
        ("é" * 50, r"the path must have at most 100 bytes, got \d{3} bytes: /.*; choose a shorter path"),
    ],
)
def test_a_path_that_grpc_or_the_kernel_reads_as_another_is_refused(
    folder: Path, server: grpc.Server, name: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        UnixSocket(folder / name).bind(server)
    assert list(folder.iterdir()) == []


def test_a_file_in_the_place_of_a_socket_is_refused_and_kept(folder: Path, server: grpc.Server) -> None:
    path = folder / "notes"
    path.write_text("keep")
    made = UnixSocket(path)
    with pytest.raises(ConfigError, match=r"notes exists and is not a socket; choose another path"):
        made.bind(server)
    made.remove()
    assert path.read_text() == "keep"
    with pytest.raises(ConfigError, match=r"notes/a cannot be used \(Not a directory\); choose another path"):
        UnixSocket(path / "a").bind(server)


def test_a_socket_that_another_server_listens_on_is_refused_and_one_left_behind_replaced(
    folder: Path, server: grpc.Server
) -> None:
    path = folder / "a.sock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        made = UnixSocket(path)
        with pytest.raises(ConfigError, match=r"another server listens on .*a\.sock; choose another path"):
            made.bind(server)
        made.remove()
        assert path.exists()
    made.bind(server)
    server.start()
    with grpc.insecure_channel(f"unix:{path}") as channel:
        grpc.channel_ready_future(channel).result(20)


def test_a_folder_that_cannot_be_made_is_named(server: grpc.Server) -> None:
    with pytest.raises(ConfigError, match=r"cannot listen on /proc/none/a; check that its folder exists and"):
        UnixSocket(Path("/proc/none/a")).bind(server)
