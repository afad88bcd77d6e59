"""Waking a thread that waits for work."""

from __future__ import annotations

import contextlib
import threading


class Wakeup:
    """Wakes the one thread that waits. A wake-up that comes before the wait is kept.

    `Condition.notify` needs the mutex, on which the woken thread blocks again at once. A hand-over through a
    lock of its own saves these context switches.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def set(self) -> None:
        """Let the thread run. Best called without the mutex."""
        with contextlib.suppress(RuntimeError):  # it is set already
            self._lock.release()

    def wait(self, timeout: float | None = None) -> None:
        """Wait until `set` is called, or for at most `timeout` seconds."""
        self._lock.acquire(timeout=-1 if timeout is None else timeout)
