"""How a client comes in."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path
from typing import Any

import grpc
import pytest

from maskwire.credentials import Endpoint, is_local

TOKEN = "secret-token-0123456789"


@pytest.mark.parametrize(
    ("target", "local"),
    [
        ("127.0.0.1:1", True), ("localhost:50051", True), ("[::1]:1", True), ("unix:/tmp/a.sock", True),
        ("127.1.2.3:9", True), ("10.0.0.1:1", False), ("box.example:1", False),
        ("dns:///box.example:1", False),
        ("dns:///localhost:1", True), ("localhost.example:1", False),
    ],
)  # fmt: skip
def test_what_stays_on_this_machine(target: str, local: bool) -> None:
    assert is_local(target) is local


def test_a_token_goes_nowhere_in_plaintext_unless_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"would be sent to box\.example:1 in plaintext"):
        Endpoint.of("box.example:1", token=TOKEN)
    assert Endpoint.of("box.example:1", token=TOKEN, allow_insecure=True).metadata
    assert Endpoint.of("127.0.0.1:1", token=TOKEN).metadata == (("authorization", f"Bearer {TOKEN}"),)
    (tmp_path / "t").write_text(f"# ours\n\n{TOKEN} 2031-01-01T00:00:00Z\n")
    endpoint = Endpoint.of("127.0.0.1:1", token_file=tmp_path / "t")
    assert endpoint.metadata == (("authorization", f"Bearer {TOKEN}"),)
    assert TOKEN not in repr(endpoint)


def test_a_token_file_is_read_again_when_it_changes_and_is_usable(tmp_path: Path) -> None:
    file = tmp_path / "token"
    with pytest.raises(FileNotFoundError):
        Endpoint.of("127.0.0.1:1", token_file=file)
    file.write_text(TOKEN)
    endpoint = Endpoint.of("127.0.0.1:1", token_file=file)

    def sent() -> str:
        [(_, value)] = endpoint.metadata
        return value.removeprefix("Bearer ")

    for unusable in ("", "two\u00e4", None):
        file.unlink()
        if unusable is not None:
            file.write_text(unusable)
        assert sent() == TOKEN, "the former one stays in use"
    file.write_text("another-token-0123456789")
    assert sent() == "another-token-0123456789"
    (tmp_path / "next").write_text("third-token-0123456789")
    (tmp_path / "next").rename(file)
    assert sent() == "third-token-0123456789"


def test_a_relative_token_file_stays_the_same_file_when_the_program_changes_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "token").write_text(f"token-of-{folder}")
    monkeypatch.chdir(tmp_path / "one")
    endpoint = Endpoint.of("127.0.0.1:1", token_file="token")
    monkeypatch.chdir(tmp_path / "two")
    assert endpoint.metadata == (("authorization", "Bearer token-of-one"),)
    (tmp_path / "one" / "token").write_text("replaced-token-of-one")
    assert endpoint.metadata == (("authorization", "Bearer replaced-token-of-one"),)


def test_a_fifo_is_read_once_because_a_second_read_would_wait_for_a_writer(tmp_path: Path) -> None:
    fifo = tmp_path / "token"
    os.mkfifo(fifo)
    writer = threading.Thread(target=fifo.write_text, args=(TOKEN,))
    writer.start()
    endpoint = Endpoint.of("127.0.0.1:1", token_file=fifo)
    writer.join()
    os.utime(fifo, ns=(1, 1))  # the stamp has changed, whatever the clock's resolution
    sent: list[object] = []
    reader = threading.Thread(target=lambda: sent.append(endpoint.metadata), daemon=True)
    reader.start()
    reader.join(10)
    assert sent == [(("authorization", f"Bearer {TOKEN}"),)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cert": "a"}, "cert and key must be given together"),
        ({"tls": False, "ca": "a"}, "tls=False excludes"),
        ({"token": "a", "token_file": "b"}, "not both"),
        ({"token": "two words"}, "no spaces"),
        ({"ca": __file__}, "must be a PEM file"),
    ],
)
def test_options_that_do_not_fit_together_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Endpoint.of("127.0.0.1:1", **options)


def test_a_proxy_of_the_environment_sees_nothing_of_a_local_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        proxy = f"http://127.0.0.1:{listener.getsockname()[1]}"

        def listen() -> None:
            listener.settimeout(1)
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                return
            heard.append(connection.recv(100))
            connection.close()

        for name in ("http_proxy", "grpc_proxy", "https_proxy"):
            monkeypatch.setenv(name, proxy)
        thread = threading.Thread(target=listen)
        thread.start()
        with Endpoint.of("localhost:1", token=TOKEN).channel() as channel, pytest.raises(grpc.RpcError):
            channel.unary_unary("/a/b")(b"", timeout=0.7)
        thread.join()
    assert heard == []
