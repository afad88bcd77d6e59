"""What can be made to happen at a failpoint: a kill, an error of the disk, a delay, a wait."""

from __future__ import annotations

import errno
import os
import signal
import sqlite3
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from maskwire_server import failpoints

KINDS = ("kill", "eio", "enospc", "delay")
DELAY_SECONDS = 0.1


@dataclass(frozen=True)
class Fault:
    """A fault the `number`-th time (from 1) that the process passes a place."""

    place: str
    kind: str
    number: int = 1
    path: str = ""
    """Of the kind `hold`: the process waits there as long as this file exists."""

    @staticmethod
    def parse(text: str) -> Fault:
        """PLACE:KIND:NUMBER[:PATH]."""
        place, kind, number, *path = text.split(":", 3)
        return Fault(place, kind, int(number), *path)

    def __str__(self) -> str:
        return f"{self.place}:{self.kind}:{self.number}" + (f":{self.path}" if self.path else "")

    def install(self, fired: Path | None = None) -> None:
        """From now on, in this process; the file `fired` is made when it happens."""
        assert self.place in failpoints.NAMES + failpoints.MIRROR_NAMES, self.place
        left, lock = [self.number], threading.Lock()

        def act(name: str) -> None:
            if name != self.place:
                return
            with lock:
                left[0] -= 1
                due = left[0] == 0
            if due:
                if fired is not None:
                    fired.touch()
                self.strike()

        failpoints.install(act)

    def strike(self) -> None:
        """Do it."""
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)  # nothing is passed while the signal is on its way
        elif self.kind == "delay":
            time.sleep(DELAY_SECONDS)
        elif self.kind == "hold":
            while Path(self.path).exists():
                time.sleep(0.01)
        elif self.kind in ("eio", "enospc"):
            raise self.error()

    def error(self) -> Exception:
        """As the operating system, or SQLite, says it."""
        full = (
            self.kind == "enospc" and self.place != "journal.committed"
        )  # SQLite is full before, or not at all
        if self.place.startswith("journal.") or self.place == "payloads.dropping":
            failed = sqlite3.OperationalError("database or disk is full" if full else "disk I/O error")
            failed.sqlite_errorcode = sqlite3.SQLITE_FULL if full else sqlite3.SQLITE_IOERR
            return failed
        number = errno.ENOSPC if full else errno.EIO
        return OSError(number, os.strerror(number))
