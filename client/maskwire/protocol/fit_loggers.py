"""Opens the loggers of a training loop, adds the steps that their logs lack, and closes them at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from maskwire.loggers.backfill import catch_up
from maskwire.loggers.log_thread import LogThread
from maskwire.loggers.logger import Logger
from maskwire.loggers.progress import TrainingProgress, warn
from maskwire.loggers.records import Place, Record
from maskwire.protocol.effects import Work
from maskwire.protocol.fit_actions import Fitting
from maskwire.protocol.fit_result import FitResult

_ABANDON_SECONDS = 1.0  # the most time for all loggers together when `fit` is cancelled


class Loggers:
    """Sends each record to all loggers of a training loop, and reports each logger's failure once."""

    def __init__(
        self,
        trainer: Any,
        result: FitResult,
        progress: TrainingProgress,
        loggers: Sequence[Logger],
        metrics: Logger | None,
    ) -> None:
        """`metrics` is the logger, if any, whose failure is also stored in the result's `metrics_failure`."""
        self._trainer, self._result, self._progress = trainer, result, progress
        self._loggers, self._metrics = loggers, metrics
        self._threads: list[LogThread] = []
        self._reported: set[LogThread] = set()

    def open(self) -> Fitting[None]:
        """Open the logs, and add the steps of the run that they lack.

        Raises the errors that the caller of `fit` can mend before training, such as a missing folder.
        """
        trainer = self._trainer
        here = Place(trainer.run_id, trainer.lineage, trainer.step)
        self._threads = [LogThread(logger, here) for logger in self._loggers]
        for thread in self._threads:
            last = yield Work(thread.opened)
            if not thread.failure:
                yield from catch_up(trainer, last, here, thread)
        self._report()

    def write(self, record: Record) -> None:
        """Queue a record for each logger."""
        for thread in self._threads:
            thread.write(record)
        self._report()

    def flush(self) -> Fitting[None]:
        """Wait a bounded time until all records are written.

        Called before an evaluation is marked as finished, so that its record is not lost.
        """
        for thread in self._threads:
            yield Work(thread.flush)
        self._report()

    def close(self) -> Fitting[None]:
        """Write the queued records, for a bounded time; close the logs; report which logs lack records."""
        threads, self._threads = self._threads, []
        for thread in threads:
            yield Work(thread.close)
        self._report(threads)

    def abandon(self) -> None:
        """Close the logs as `close` does, but without actions, and within a second in total.

        The next call of `fit` adds the records that are missing.
        """
        threads, self._threads = self._threads, []
        for thread in threads:
            thread.close(_ABANDON_SECONDS / len(threads))
        self._report(threads)

    def _report(self, threads: Sequence[LogThread] | None = None) -> None:
        for thread in self._threads if threads is None else threads:
            if thread.failure and thread not in self._reported:
                self._reported.add(thread)
                self._result.failures.append(thread.failure)
                if thread.logger is self._metrics:
                    self._result.metrics_failure = thread.failure
                warn(self._progress, thread.failure)
