"""Which ranks are alive: each follower and the leader send one another a byte every second.

A dead process closes its connection at once. A frozen process or a lost host falls silent. Either ends this
process, so that the launcher restarts all ranks. The collectives' own timeouts would take minutes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

BEAT_SECONDS = 1.0
_BEAT, _END = b".", b"E"
_TOKEN_BYTES = 16

OnLoss = Callable[[str], None]
"""Called once with what happened, on a thread of its own. It ends the process."""


class Monitor:
    """The leader's side: listens, and watches one connection of each follower."""

    def __init__(self, host: str, followers: int, timeout: float, on_loss: OnLoss) -> None:
        """`timeout`, in seconds, is how long a follower may be silent, or take to connect."""
        self._timeout, self._on_loss = timeout, on_loss
        self._token = secrets.token_hex(_TOKEN_BYTES)
        self._listener = socket.create_server((host, 0))
        self._followers = followers
        self._links: dict[int, socket.socket] = {}
        self._lock = threading.Lock()
        self._ending = False
        threading.Thread(target=self._accept, name="maskwire-liveness", daemon=True).start()

    @property
    def address(self) -> str:
        """HOST:PORT:TOKEN, for `watch_leader`."""
        host, port = self._listener.getsockname()[:2]
        return f"{host}:{port}:{self._token}"

    def end_followers(self) -> None:
        """Tell the followers to exit with code 0: the leader ends for good."""
        with self._lock:
            self._ending = True
            for link in self._links.values():
                with contextlib.suppress(OSError):
                    link.sendall(_END)

    def _accept(self) -> None:
        deadline = time.monotonic() + self._timeout
        while len(self._links) < self._followers:
            self._listener.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                link, _ = self._listener.accept()
            except OSError:
                missing = self._followers - len(self._links)
                self._lost(f"{missing} of {self._followers} followers did not connect in {self._timeout:g} s")
                return
            rank = self._greeted(link)
            if rank is None:
                link.close()
                continue
            with self._lock:
                self._links[rank] = link
            threading.Thread(target=self._watch, args=(rank, link), daemon=True).start()
        self._listener.close()
        while not self._ending:
            time.sleep(BEAT_SECONDS)
            with self._lock:
                for link in () if self._ending else self._links.values():
                    with contextlib.suppress(OSError):  # its watcher notices
                        link.sendall(_BEAT)

    def _greeted(self, link: socket.socket) -> int | None:
        """The rank of a follower that sent the token and its rank; None: something else connected."""
        link.settimeout(self._timeout)
        try:
            said = link.makefile("rb", buffering=0).readline(2 * _TOKEN_BYTES + 16).decode()
        except (OSError, UnicodeDecodeError):
            return None
        token, _, rank = said.strip().partition(" ")
        return int(rank) if secrets.compare_digest(token, self._token) and rank.isdigit() else None

    def _watch(self, rank: int, link: socket.socket) -> None:
        problem = _silence(link, self._timeout, end=lambda: None)
        if not self._ending:
            self._lost(f"rank {rank} {problem}")

    def _lost(self, problem: str) -> None:
        with self._lock:
            if self._ending:
                return
            self._ending = True
        self._on_loss(problem)


def watch_leader(
    address: str, rank: int, timeout: float, on_loss: OnLoss, on_end: Callable[[], None]
) -> None:
    """Connect to the leader's monitor, and watch it on threads of their own. Raises OSError.

    `on_end` is called when the leader says that it ends for good.
    """
    host, port, token = address.rsplit(":", 2)
    link = socket.create_connection((host, int(port)), timeout)
    link.sendall(f"{token} {rank}\n".encode())

    def beat() -> None:
        with contextlib.suppress(OSError):
            while True:
                time.sleep(BEAT_SECONDS)
                link.sendall(_BEAT)

    def watch() -> None:
        on_loss(f"the leader {_silence(link, timeout, end=on_end)}")

    for work in (beat, watch):
        threading.Thread(target=work, name="maskwire-liveness", daemon=True).start()


def _silence(link: socket.socket, timeout: float, *, end: Callable[[], None]) -> str:
    """Read until the other side is gone, and say how it went."""
    link.settimeout(timeout)
    try:
        while data := link.recv(64):
            if _END in data:
                end()
    except TimeoutError:
        return f"was silent for {timeout:g} s"
    except OSError as error:
        return f"is not reachable any more ({error.strerror or error})"
    return "ended"


def exit_now(code: int) -> Callable[[str], None]:
    """An `OnLoss` that logs and exits: the state of all ranks is thrown away."""

    def end(problem: str) -> None:
        log.critical("%s: all ranks restart, and the run is recovered from its journal", problem)
        logging.shutdown()
        os._exit(code)

    return end
