"""Ends the process when a thread of the engine hangs, for example on a device or in the file system.

A hung call cannot be interrupted from Python, so the only remedy is a new process, which recovers the run.
"""

from __future__ import annotations

import faulthandler
import logging
import threading
from collections.abc import Callable, Sequence

from maskwire_server.engine.progress import Progress

log = logging.getLogger(__name__)

_LEAST_INTERVAL, _MOST_INTERVAL = 0.05, 5.0
_GRACE_SECONDS = 60.0
"""A hung call that holds the GIL stops the watchdog's thread too. `faulthandler`, which needs no GIL, then
ends the process this long after the limit."""


class Watchdog:
    """Watches the progress of threads from a thread of its own, and calls `on_hang` once if one hangs."""

    def __init__(
        self,
        watched: Sequence[Progress],
        shortest: float,
        clock: Callable[[], float],
        on_hang: Callable[[str], None],
    ) -> None:
        """`shortest` is the shortest limit in seconds. `on_hang` is called with a description of the hang."""
        self._watched = watched
        self._clock = clock
        self._on_hang = on_hang
        self._looked = clock()
        self._beats = [-1] * len(watched)
        self._silent = [0.0] * len(watched)
        self._interval = min(max(shortest / 10, _LEAST_INTERVAL), _MOST_INTERVAL)
        self._stopped = threading.Event()

    def start(self) -> None:
        """Start watching, on a thread of its own."""
        threading.Thread(target=self._main, name="maskwire-watchdog", daemon=True).start()

    def stop(self) -> None:
        """Stop watching."""
        self._stopped.set()

    def look(self) -> str:
        """Check all threads once. Returns a text that says what hangs, or "" if nothing hangs.

        A pause of more than two intervals between two checks counts as two intervals, because the process or
        the machine was suspended.
        """
        now = self._clock()
        passed = min(now - self._looked, 2 * self._interval)
        self._looked = now
        for at, progress in enumerate(self._watched):
            doing, beats, limit = progress.doing, progress.beats, progress.limit
            if not doing or beats != self._beats[at]:
                self._beats[at], self._silent[at] = beats, 0.0
            else:
                self._silent[at] += passed
            if doing and self._silent[at] >= limit:
                return f"{doing} has made no progress for {limit:g} s"
        return ""

    def _main(self) -> None:
        while not self._stopped.wait(self._interval):
            words = self.look()
            if words:
                self._on_hang(words)
                return
            longest = max((progress.limit for progress in self._watched if progress.doing), default=0.0)
            if longest:
                faulthandler.dump_traceback_later(longest + _GRACE_SECONDS, exit=True)
            else:
                faulthandler.cancel_dump_traceback_later()
        faulthandler.cancel_dump_traceback_later()
