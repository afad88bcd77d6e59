"""Detects lost ranks: the leader and each follower send each other a byte every second.

A dead process closes its connection at once. A frozen process or a lost host falls silent. In both cases
this process exits, so that the launcher restarts all ranks. The collectives' own timeouts would take minutes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

BEAT_SECONDS = 1.0
GRACE_SECONDS = 2.0
"""How long a failed rank waits before it exits. If the cause is the loss of another rank, this module ends
the process within that time, and reports the lost rank."""
LOOPBACK = "127.0.0.1"
_BEAT, _END = b".", b"E"
_TOKEN_BYTES = 16
_EXIT_STATUS = 49
"""Index of `exit_code` (field 52 in proc_pid_stat(5)) in the fields that follow the process's name."""

OnLoss = Callable[[str, bool], None]
"""Called on a background thread with a description of the loss, and whether the batch that is being computed
may be its cause. It may if a rank ended, but not if a rank fell silent. The function ends the process."""


@dataclass(frozen=True)
class LeaderAddress:
    """The address at which followers connect to the leader's monitor."""

    host: str
    port: int
    token: str
    """A secret that a follower sends first, to show that it belongs to the group."""
    pid: int


class Monitor:
    """The leader's monitor: accepts one connection from each follower, and watches it."""

    def __init__(self, host: str, followers: int, timeout: float, on_loss: OnLoss) -> None:
        """`timeout`, in seconds, is how long a follower may be silent, or take to connect."""
        self._followers, self._timeout, self._on_loss = followers, timeout, on_loss
        self._listener = socket.create_server((host, 0))
        port = self._listener.getsockname()[1]
        self.address = LeaderAddress(host, port, secrets.token_hex(_TOKEN_BYTES), os.getpid())
        self._links: dict[int, socket.socket] = {}
        self._lock = threading.Lock()
        self._ending = False
        threading.Thread(target=self._run, name="maskwire-liveness", daemon=True).start()

    def end_followers(self) -> None:
        """Tell the followers to exit with code 0, because the leader ends for good."""
        with self._lock:
            self._ending = True
            _send(self._links.values(), _END)

    def _run(self) -> None:
        self._accept()
        while not self._ending:
            time.sleep(BEAT_SECONDS)
            with self._lock:
                if not self._ending:
                    _send(self._links.values(), _BEAT)

    def _accept(self) -> None:
        deadline = time.monotonic() + self._timeout
        with self._listener:
            self._listener.settimeout(0.1)
            while len(self._links) < self._followers:
                try:
                    link, _ = self._listener.accept()
                except TimeoutError:
                    if time.monotonic() < deadline:
                        continue
                    missing = self._followers - len(self._links)
                    self._lost(
                        f"{missing} of {self._followers} followers did not connect",
                        None,
                        batch_is_suspect=False,
                    )
                    return
                threading.Thread(target=self._watch, args=(link,), daemon=True).start()

    def _watch(self, link: socket.socket) -> None:
        link.settimeout(self._timeout)
        with link:
            try:
                token, rank, pid = _greeting(link.makefile("rb", buffering=0).readline(128))
            except (OSError, ValueError):
                return
            if not secrets.compare_digest(token, self.address.token.encode()):
                return
            with self._lock:
                self._links[rank] = link
            here = _of_this_host(self.address, pid)
            problem, is_frozen = _read_until_gone(link, self._timeout, here)
            self._lost(f"rank {rank} {problem}", here if is_frozen else None, batch_is_suspect=not is_frozen)

    def _lost(self, problem: str, frozen: int | None, *, batch_is_suspect: bool) -> None:
        with self._lock:
            if self._ending:
                return
            self._ending = True
        if frozen is not None:
            _kill(frozen)
        self._on_loss(problem, batch_is_suspect)


def watch_leader(
    address: LeaderAddress, rank: int, timeout: float, on_loss: OnLoss, on_end: Callable[[], None]
) -> None:
    """Connect to the leader's monitor, and watch the leader on two background threads.

    `on_end` is called when the leader announces that it ends for good, `on_loss` when it is lost. Raises
    OSError if the connection fails.
    """
    link = socket.create_connection((address.host, address.port), timeout)
    link.sendall(f"{address.token} {rank} {os.getpid()}\n".encode())

    def beat() -> None:
        while True:
            time.sleep(BEAT_SECONDS)
            _send([link], _BEAT)

    def watch() -> None:
        here = _of_this_host(address, address.pid)
        with link:
            problem, is_frozen = _read_until_gone(link, timeout, here)
        if not problem:
            on_end()
            return
        if is_frozen and here is not None:
            _kill(here)
        on_loss(f"the leader {problem}", not is_frozen)

    for work in (beat, watch):
        threading.Thread(target=work, name="maskwire-liveness", daemon=True).start()


def exit_now(code: int, note: Callable[[str, bool], None]) -> OnLoss:
    """Return an `OnLoss` that exits with `code`, so that the launcher restarts all ranks.

    `note` first records the problem, and whether a batch may be its cause.
    """

    def end(problem: str, batch_is_suspect: bool = True) -> None:
        note(problem, batch_is_suspect)
        log.critical("%s: all ranks restart, and the run is recovered from its journal", problem)
        logging.shutdown()
        os._exit(code)

    return end


def _send(links: Iterable[socket.socket], data: bytes) -> None:
    for link in links:
        with contextlib.suppress(OSError):  # the thread that reads from the link notices
            link.sendall(data)


def _greeting(line: bytes) -> tuple[bytes, int, int]:
    """Parse a follower's token, rank and process id. Raises ValueError if the line has another form."""
    token, rank, pid = line.split()
    return token, int(rank), int(pid)


def _of_this_host(address: LeaderAddress, pid: int) -> int | None:
    """The process id of the other side if all ranks are on this host; None if it may be another host's."""
    return pid if address.host == LOOPBACK else None


def _read_until_gone(link: socket.socket, timeout: float, pid: int | None) -> tuple[str, bool]:
    """Read until the other side is gone. Returns the problem, and whether the other side may be frozen.

    `pid` is the other side's process id if it is on this host. The problem is "" if the leader announced that
    it ends for good.
    """
    link.settimeout(timeout)
    try:
        while data := link.recv(64):
            if _END in data:
                return "", False
    except ConnectionError:
        pass
    except TimeoutError:
        return f"was silent for {timeout:g} s", True
    except OSError as error:
        return f"is not reachable ({error.strerror or error})", False
    return "ended" if pid is None else how_it_ended(pid), False


def how_it_ended(pid: int) -> str:
    """Describe how a process of this host ended, to follow its name; "ended" if the kernel no longer knows.

    The kernel knows until the process's parent has collected its exit status, which torch's launcher does
    within a tenth of a second.
    """
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        status = int(after_name[_EXIT_STATUS])
    except (OSError, ValueError, IndexError):
        return "ended"
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        killed = f"was killed by signal {number} ({signal.strsignal(number)})"
        return f"{killed}, perhaps for lack of memory; check dmesg" if number == signal.SIGKILL else killed
    return f"ended with exit code {code}" if (code := os.WEXITSTATUS(status)) else "ended"


def _kill(pid: int) -> None:
    """Kill a frozen process on this host, for whose end the launcher would wait 30 seconds."""
    with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGKILL)
