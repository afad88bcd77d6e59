"""A thread that runs a logger, and the bounded queue of records in front of it.

The training loop never waits for a logger, except for a bounded time before the first step, at an evaluation
and at the end.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from dataclasses import dataclass, field
from typing import TypeVar

from maskwire.loggers.logger import Logger
from maskwire.loggers.records import Place, Record

log = logging.getLogger(__name__)
T = TypeVar("T")

QUEUE_RECORDS = 10_000
"""The most records that wait for a logger."""
_SIGNAL_SECONDS = 0.5  # a signal may reach another thread, so every wait checks for one this often
_FILE_ERRORS = {
    FileNotFoundError: "create the folder first, or choose another place",
    PermissionError: "choose a place that this user may write to",
    IsADirectoryError: "it is a folder: name a file in it",
    NotADirectoryError: "a part of the path is a file: choose another place",
}
"""Errors that the caller of `fit` can mend, and how. Other OSErrors come from a network or a device."""


@dataclass(frozen=True, eq=False)
class _Flush:
    """Queue entry: asks the thread to flush the logger, and to report when earlier records are written."""

    done: queue.SimpleQueue[bool] = field(default_factory=queue.SimpleQueue)


@dataclass(frozen=True, eq=False)
class _Opened:
    """The outcome of a logger's `open`: the last place in its log, or the error that it raised."""

    last: Place | None
    error: BaseException | None = None


class LogThread:
    """Runs one logger on a thread, and queues its records.

    Only one thread at a time may call the methods. No method raises an error, except `opened`.
    """

    def __init__(self, logger: Logger, place: Place) -> None:
        self.logger = logger
        self.failure = ""
        """Why records are missing from the log; empty if none is missing."""
        self._place = place
        # A SimpleQueue has no lock that an interrupt could leave held.
        self._queue: queue.SimpleQueue[Record | _Flush | None] = queue.SimpleQueue()
        self._opened: queue.SimpleQueue[_Opened] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._pid = os.getpid()
        self._flush_timed_out = self._failed_once = self._open_timed_out = False
        self._thread = threading.Thread(target=self._run, name=f"maskwire-log {logger.label}", daemon=True)
        self._thread.start()

    def opened(self) -> Place | None:
        """Wait until the log is open, and return its last place; None if it is empty or did not open.

        Raises an error that the caller can mend: the ValueError, TypeError or ImportError that the logger's
        `open` raised, or an error about a file or folder.
        """
        found = _wait(self._opened, self.logger.open_seconds)
        if found is None:
            self._open_timed_out = True
            self._fail(f"it did not open within {self.logger.open_seconds:g} s")
            return None
        if found.error is not None:
            self._raise_if_mendable(found.error)
            self._failed(found.error)
        return found.last

    def write(self, record: Record) -> None:
        """Queue a record. If the queue is full, this record and all later ones are dropped."""
        if self.failure:
            return
        if self._queue.qsize() >= QUEUE_RECORDS:
            self._fail(f"{QUEUE_RECORDS:,} records are waiting already")
            return
        self._queue.put(record)

    def flush(self) -> None:
        """Wait until all queued records are written, for at most the logger's `close_seconds`.

        Does not wait if the previous wait timed out and records are still queued.
        """
        if self.failure or self._inherited or (self._flush_timed_out and self._queue.qsize()):
            return
        entry = _Flush()
        self._queue.put(entry)
        self._flush_timed_out = _wait(entry.done, self.logger.close_seconds) is None

    def close(self, seconds: float | None = None) -> None:
        """Write the queued records and close the log.

        seconds: How long to wait for this at most; None: the logger's `close_seconds`.
        """
        if self._inherited:
            return
        self._queue.put(None)
        if self._open_timed_out:
            return  # it did not open in time, so it would not finish in time
        seconds = self.logger.close_seconds if seconds is None else seconds
        if _wait(self._done, seconds) is None and not self.failure:
            self._fail(f"it did not finish within {seconds:g} s, and {self._queue.qsize():,} records remain")

    @property
    def _inherited(self) -> bool:
        """Whether this process was forked after the thread started, and so does not have the thread."""
        return os.getpid() != self._pid

    def _fail(self, reason: str) -> None:
        self.failure = (
            f"{self.logger.label}: no more records are written ({reason}); training is not affected"
        )

    def _raise_if_mendable(self, error: BaseException) -> None:
        """Raise the error that the logger's `open` raised, if the caller can mend it before training."""
        for kind, cure in _FILE_ERRORS.items():
            if isinstance(error, kind):
                reason, label = error.strerror or error, self.logger.label
                file = "" if error.filename is None or str(error.filename) in label else f": {error.filename}"
                raise kind(f"the log {label} cannot be opened ({reason}{file}); {cure}") from error
        # Network errors are OSErrors, and some of them, such as those of requests, are also ValueErrors.
        if isinstance(error, ValueError | TypeError | ImportError) and not isinstance(error, OSError):
            raise error

    def _run(self) -> None:
        """Open the log, write the queued records and close the log; the function that the thread runs.

        Also catches SystemExit, which some libraries raise, so that the thread reports it.
        """
        try:
            last = self.logger.open(self._place)
        except BaseException as error:
            self._failed_once = True  # `opened` reports it
            self._opened.put(_Opened(None, error))
        else:
            self._opened.put(_Opened(last))
        while (entry := self._queue.get()) is not None:
            try:
                if isinstance(entry, _Flush):
                    if not self._failed_once:
                        self.logger.flush()
                    entry.done.put(True)
                elif not self._failed_once:  # later records would hide the gap
                    self.logger.write(entry)
            except BaseException as error:
                self._failed(error)
                if isinstance(entry, _Flush):
                    entry.done.put(False)
        try:
            self.logger.close()
        except BaseException as error:
            if not self._failed_once:
                self._failed(error)
        self._done.put(True)

    def _failed(self, error: BaseException) -> None:
        self._failed_once = True
        reason = error.strerror if isinstance(error, OSError) and error.strerror else None
        self._fail(reason or f"{type(error).__name__}: {error}")
        log.debug("%s", self.failure, exc_info=error)


def _wait(answers: queue.SimpleQueue[T], seconds: float) -> T | None:
    """Wait for the next answer and return it, or None after `seconds`. Ctrl-C interrupts the wait."""
    deadline = time.monotonic() + seconds
    while True:
        left = deadline - time.monotonic()
        try:
            return answers.get(timeout=max(0.0, min(_SIGNAL_SECONDS, left)))
        except queue.Empty:
            if left <= 0:
                return None
