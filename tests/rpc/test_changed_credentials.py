"""Certificates and tokens are replaced while a client trains: no step fails, and the old ones end."""

from __future__ import annotations

import shutil
import signal
import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from certificates import Authority, Pair
from serving import ServerProcess, wait_until

import maskwire
from maskwire.errors import TlsError, UnauthenticatedError, UnavailableError

Serve = Callable[..., ServerProcess]
OLD, NEW = "old-token-0123456789abcdef", "new-token-0123456789abcdef"


def served_certificate(server: ServerProcess, client: Pair) -> bytes:
    """The certificate, in DER, that a new connection gets."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.load_cert_chain(client.cert, client.key)
    host, port = server.address.split(":")
    with (
        socket.create_connection((host, int(port)), timeout=20) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secure,
    ):
        found = secure.getpeercert(binary_form=True)
    assert found is not None
    return found


def first_of(pair: Pair) -> bytes:
    text = Path(pair.cert).read_text()
    end = "-----END CERTIFICATE-----\n"
    return ssl.PEM_cert_to_DER_cert(text[: text.index(end) + len(end)])


class Files:
    """The files that a server is configured with, and a way to replace them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.cert, self.key, self.ca, self.token = (
            str(folder / name) for name in ("tls.crt", "tls.key", "ca.crt", "train.token")
        )

    def replace(self, pair: Pair | None = None, authority: Authority | None = None, token: str = "") -> None:
        """As Kubernetes and cert-manager do: each file is replaced by another one."""
        replaced = {}
        if pair is not None:
            replaced |= {self.cert: Path(pair.cert).read_bytes(), self.key: Path(pair.key).read_bytes()}
        if authority is not None:
            replaced[self.ca] = Path(authority.ca).read_bytes()
        if token:
            replaced[self.token] = f"{token}\n".encode()
        for name, content in replaced.items():
            part = Path(f"{name}.part")
            part.write_bytes(content)
            shutil.move(part, name)


class Training(threading.Thread):
    """A client with four steps in flight, until `end`."""

    def __init__(self, server: ServerProcess, ca: str, client: Pair, token: str) -> None:
        super().__init__()
        self.options: Any = {"ca": ca, "cert": client.cert, "key": client.key, "token": token}
        self.server = server
        self.ending = False
        self.steps: list[int] = []
        self.waits: list[str] = []
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            with maskwire.connect(self.server.address, on_wait=self.waits.append, **self.options) as trainer:
                flying: list[Any] = []
                while not self.ending or flying:
                    while not self.ending and len(flying) < 4:
                        flying.append(trainer.submit(np.ones((2, 4), dtype=int)))
                    self.steps.append(flying.pop(0).result().step)
        except BaseException as error:
            self.error = error

    def go_on(self) -> None:
        """Wait for some more steps."""
        here = len(self.steps)
        wait_until(lambda: len(self.steps) >= here + 20 or self.error, "more steps")

    def end(self) -> None:
        self.ending = True
        self.join(60)


def test_files_are_replaced_under_load_without_a_failed_step(serve: Serve, tmp_path: Path) -> None:
    first, second = Authority(tmp_path / "first"), Authority(tmp_path / "second")
    files = Files(tmp_path / "files")
    old, new = (authority.issue("server", "127.0.0.1") for authority in (first, second))
    old_client, new_client = (authority.issue("client", "a@example.org") for authority in (first, second))
    old_pair, new_pair = ({"cert": each.cert, "key": each.key} for each in (old_client, new_client))
    files.replace(old, first, OLD)
    server = serve(
        seconds=0.002, serve__tls_certificate=files.cert, serve__tls_key=files.key,
        serve__tls_client_ca=files.ca, serve__token_train_file=files.token,
    )  # fmt: skip

    def hang_up(words: str) -> None:
        count = server.log.read_text().count(words)
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: server.log.read_text().count(words) > count, words)

    training = Training(server, first.ca, old_client, OLD)
    training.go_on()
    assert served_certificate(server, old_client) == first_of(old)

    # An invalid file: the old ones stay in use, and the log says what is wrong.
    files.replace(Pair(cert=new.cert, key=old.key))
    hang_up("serve.tls_certificate, serve.tls_key: ")
    assert "; the previous certificates or tokens stay in use" in server.log.read_text()
    training.go_on()
    assert served_certificate(server, old_client) == first_of(old)
    Path(files.token).write_text("short\n")
    hang_up("a token must have at least 16 characters")
    with maskwire.attach(server.address, ca=first.ca, **old_pair, token=OLD) as a:
        assert a.status().state.name == "SERVING"

    files.replace(new, token=OLD)
    Path(files.token).write_text(f"{OLD}\n{NEW}\n")  # they overlap
    hang_up("read the certificates again")
    training.go_on()
    assert served_certificate(server, old_client) == first_of(new)
    with pytest.raises(TlsError, match="not signed by an authority"):
        maskwire.connect(server.address, ca=first.ca, **old_pair, token=NEW)
    with maskwire.attach(server.address, ca=second.ca, **old_pair, token=NEW) as a:
        assert a.status().step > 0

    files.replace(authority=second)  # clients of the first are no longer let in
    hang_up("read the certificates again")
    with pytest.raises(UnavailableError):
        maskwire.connect(server.address, ca=second.ca, **old_pair, token=NEW, retry_for=0.1)
    training.go_on()
    training.end()
    assert training.error is None
    assert training.waits == []
    assert training.steps == list(range(1, len(training.steps) + 1))

    again = Training(server, second.ca, new_client, NEW)
    again.go_on()
    files.replace(token=NEW)  # the old one is revoked
    hang_up("read the tokens again: 1 are valid")
    again.go_on()
    with pytest.raises(UnauthenticatedError, match="does not know the token"):
        maskwire.connect(server.address, ca=second.ca, **new_pair, token=OLD)
    again.end()
    assert (again.error, again.waits) == (None, [])
    assert not any(token in server.log.read_text() for token in (OLD, NEW))
    assert server.stop() == 0


def test_a_client_whose_token_is_revoked_is_refused_its_next_step(serve: Serve, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(OLD)
    server = serve(seconds=0.002, serve__token_train_file=str(token))
    with maskwire.connect(server.address, token=OLD, retry_for=1) as trainer:
        assert trainer.train_step(np.ones((2, 4), dtype=int)).step == 1
        token.write_text(NEW)
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: "read the tokens again" in server.log.read_text(), "the new token")
        with pytest.raises(UnauthenticatedError):
            trainer.train_step(np.ones((2, 4), dtype=int))


def test_a_client_takes_the_new_token_of_its_file_without_a_restart(serve: Serve, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "client.token", tmp_path / "train.token"
    ours.write_text(OLD)
    theirs.write_text(f"{OLD}\n")
    server = serve(seconds=0, serve__token_train_file=str(theirs))
    with maskwire.connect(server.address, token_file=ours, retry_for=0) as trainer:
        assert trainer.train_step(np.ones((2, 4), dtype=int)).step == 1
        theirs.write_text(f"{OLD}\n{NEW}\n")  # they overlap
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: "read the tokens again" in server.log.read_text(), "both tokens")
        ours.write_text(NEW)
        assert trainer.train_step(np.ones((2, 4), dtype=int)).step == 2
        theirs.write_text(f"{NEW}\n")
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: server.log.read_text().count("read the tokens again") == 2, "the new token alone")
        assert trainer.train_step(np.ones((2, 4), dtype=int)).step == 3
