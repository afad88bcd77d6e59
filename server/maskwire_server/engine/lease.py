"""The writer lease: which client's session is open, and when it expires."""

from __future__ import annotations

from collections.abc import Callable

from maskwire.v1.digest import VERSIONS
from maskwire_server.journal.records import SessionRecord
from maskwire_server.session_holder import ClientProcess, Holder


class Lease:
    """The lease of the newest epoch. A session ends when it is closed or idle for too long.

    Callers hold the run's mutex. Only status reports read the lease without it.
    """

    def __init__(self, idle_seconds: float, clock: Callable[[], float]) -> None:
        self._idle_seconds = idle_seconds
        self._clock = clock
        self._active = clock()
        self.epoch = 0
        self.client_name = ""
        self.process: ClientProcess | None = None
        self.digest_versions: tuple[int, ...] = VERSIONS
        """The versions of the digest that the client of the newest epoch computes."""
        self.closed = True
        self._opening = False
        self._ended = False  # the session has expired; steps in flight do not renew it, only `touch` does
        self.superseded: Holder | None = None
        """The client whose open session the newest epoch took over."""

    @property
    def holder(self) -> Holder | None:
        """The client of the newest epoch; None before the first."""
        return Holder(self.client_name, self.epoch, self.process) if self.epoch else None

    def resume(
        self,
        session: SessionRecord | None,
        process: ClientProcess | None = None,
        digest_versions: tuple[int, ...] = VERSIONS,
    ) -> None:
        """Continue with the newest recorded epoch after a restart or restore. Its idle time starts now."""
        if session is not None:
            self.digest_versions = digest_versions
            self.epoch, self.client_name, self.closed = session.epoch, session.client_name, session.closed
            self.process, self.superseded = process, None
        self.opened()

    def open(
        self,
        epoch: int,
        client_name: str,
        process: ClientProcess | None = None,
        digest_versions: tuple[int, ...] = VERSIONS,
        *,
        supersedes: bool = False,
    ) -> None:
        """Begin a new epoch. Its session counts as open while its record is being made durable.

        `supersedes` says whether the session of the previous epoch is still open.
        """
        self.superseded = self.holder if supersedes else None
        self.epoch, self.client_name, self.process, self.closed = epoch, client_name, process, False
        self.digest_versions = digest_versions
        self._opening = True
        self.touch()

    def opened(self) -> None:
        """Start the idle timer, because the new epoch is durable."""
        self._opening = False
        self.touch()

    def touch(self) -> None:
        """Restart the idle timer, because a request of the session arrived or was answered."""
        self._active = self._clock()
        self._ended = False

    def present(self, busy: bool) -> str:
        """Return the name of the client whose session is open, or "" if none is.

        `busy` says whether steps are queued or in flight. A session does not expire while it is busy.
        """
        if self.closed or not self.epoch:
            return ""
        if not busy and not self._opening and self._clock() - self._active >= self._idle_seconds:
            self._ended = True
        return "" if self._ended else self.client_name
