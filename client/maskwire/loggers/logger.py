"""Loggers: callbacks that record a run's history, without gaps and each step once.

`fit` runs each logger in a thread of its own (`maskwire.loggers.log_thread`), so that a slow disk or network
does not slow training down. A logger of your own derives from `Logger`.
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
    """Raise ImportError, with what to install, unless a package is installed. Does not import it."""
    if importlib.util.find_spec(module) is None:
        raise ImportError(
            f"this logger needs the package {module}: pip install 'maskwire[{extra}]'", name=module
        )


def check_further(
    call: str, given: Iterable[str], init: Callable[..., Any], set_here: Iterable[str], also: Iterable[str]
) -> None:
    """Raise TypeError for an option that a package's `init` does not have, or that the logger sets itself.

    call: The name of the logger's class.
    given: The names of the options.
    init: The function that they are passed to.
    set_here: Its arguments that the logger sets.
    also: The logger's own arguments.
    """
    known = [name for name in inspect.signature(init).parameters if name not in set_here]
    check_options(call, given, known, also)


class Logger(ABC):
    """Writes the records of a run. All methods are called on one thread, and may block.

    An exception in a method is reported and ends the logging of that call of `fit`, not its training. The
    next call writes the missing records, from the last place that `open` returns.
    """

    path: Path | None = None
    """The file or folder that it writes, if there is one."""
    open_seconds: float = 30.0
    """How long `fit` waits for `open` before it trains without this logger."""
    close_seconds: float = 10.0
    """How long `fit` waits at its end for records that are not written yet."""

    @property
    @abstractmethod
    def label(self) -> str:
        """Name of this log in messages, such as its path."""

    @abstractmethod
    def open(self, place: Place) -> Place | None:
        """Open or resume the log of a run, and return the last place in the log.

        place: The place that the run has reached.

        Returns None if the log has nothing of this run and will start at `place`. Raises ValueError if the
        file or folder holds something else, TypeError for a wrong argument, ImportError if a package is
        missing, and FileNotFoundError, PermissionError, IsADirectoryError or NotADirectoryError if it cannot
        be written there: `fit` raises these before it trains. Any other exception, such as the OSError of a
        network, is reported, and `fit` trains without this logger.
        """

    @abstractmethod
    def write(self, record: Record) -> None:
        """Write a record. Records arrive in the order of the history.

        record: A dict of values that JSON can hold; `maskwire.loggers.records` describes its kinds.
        """

    def flush(self) -> None:  # noqa: B027
        """Pass on what was written, so that it survives the end of this process."""

    def close(self) -> None:  # noqa: B027
        """Finish. Nothing is written after it. Also called if `open` or `write` failed."""
