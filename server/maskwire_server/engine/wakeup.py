"""Wakes a thread that waits for work."""

from __future__ import annotations

import contextlib
import threading


class Wakeup:
    """Wakes the one thread that waits. A wake-up that arrives before the wait is not lost.

    With `Condition.notify`, the woken thread would block again at once on the mutex, which the notifier
    still holds. A separate lock saves these context switches.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def set(self) -> None:
        """Wake the waiting thread. Preferably called without holding the mutex."""
        with contextlib.suppress(RuntimeError):  # it is set already
            self._lock.release()

    def wait(self, timeout: float | None = None) -> None:
        """Wait until `set` is called, or for at most `timeout` seconds."""
        self._lock.acquire(timeout=-1 if timeout is None else timeout)
