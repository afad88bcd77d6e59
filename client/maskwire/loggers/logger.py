"""Base class of loggers, which are callbacks that record a run's history: each step once, without gaps.

`fit` runs each logger on its own thread (`maskwire.loggers.log_thread`), so that a slow disk or network
does not slow training down. To write your own logger, derive a class from `Logger`.
"""

from __future__ import annotations

import importlib.util
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from maskwire.arguments import check_options
from maskwire.loggers.records import Place, Record


def needs(module: str, extra: str) -> None:
    """Raise ImportError, naming what to install, if a package is missing. Does not import the package."""
    if importlib.util.find_spec(module) is None:
        raise ImportError(
            f"this logger needs the package {module}, which is not installed: run pip install "
            f"'maskwire[{extra}]'",
            name=module,
        )


def check_further(
    call: str, given: Iterable[str], init: Callable[..., Any], set_here: Iterable[str], also: Iterable[str]
) -> None:
    """Raise TypeError for an option that a package's `init` does not accept, or that the logger sets itself.

    call: The name of the logger's class.
    given: The names of the options that were given.
    init: The package's function that receives the options.
    set_here: The arguments of `init` that the logger sets itself.
    also: The logger's own arguments.
    """
    known = [name for name in inspect.signature(init).parameters if name not in set_here]
    check_options(call, given, known, also)


class Logger(ABC):
    """Base class of loggers, which write the records of a run.

    All methods are called on one thread, and may block. If a method raises an exception, `fit` reports it and
    continues to train without this logger. The next call of `fit` writes the missing records, starting after
    the place that `open` returns.
    """

    path: Path | None = None
    """The file or folder that this logger writes; None if there is none."""
    open_seconds: float = 30.0
    """Seconds for which `fit` waits for `open` before it trains without this logger."""
    close_seconds: float = 10.0
    """Seconds for which `fit` waits at its end for records that are not written yet."""

    @property
    @abstractmethod
    def label(self) -> str:
        """The name of this log in messages, such as its path."""

    @abstractmethod
    def open(self, place: Place) -> Place | None:
        """Open or resume the log of a run, and return the last place in the log.

        place: The place that the run has reached.

        Returns None if the log has nothing of this run and will start at `place`. Raises ValueError if the
        file or folder holds something else, TypeError for a wrong argument, ImportError if a package is
        missing, and FileNotFoundError, PermissionError, IsADirectoryError or NotADirectoryError if the log
        cannot be written: `fit` raises these before it trains. For any other exception, such as an OSError
        of a network, `fit` reports it and trains without this logger.
        """

    @abstractmethod
    def write(self, record: Record) -> None:
        """Write a record. Records arrive in the order of the history.

        record: A dict that can be written as JSON; `maskwire.loggers.records` describes the kinds of records.
        """

    def flush(self) -> None:  # noqa: B027
        """Store the written records, so that they survive the end of this process."""

    def close(self) -> None:  # noqa: B027
        """Close the log; no record is written afterwards. Also called if `open` or `write` failed."""
