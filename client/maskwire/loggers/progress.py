"""Progress of training as lines of text, and the choice between lines and a bar.

The bars are in `maskwire.progress_bar` and `maskwire.loggers.notebook_bar`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Protocol

from maskwire.loggers.notebook_bar import NotebookBar, in_notebook
from maskwire.nonfatal_output import PLAIN_EVERY_SECONDS, on_terminal, tell

log = logging.getLogger(__name__)


class TrainingProgress(Protocol):
    """An object that shows the progress of training."""

    def update(self, step: int, loss: float, tokens: int, note: str = "") -> None:
        """Show that a step was trained.

        step: The step's number.
        loss: The step's loss, in nats.
        tokens: The number of tokens sent with the step.
        note: The step's outcome if it was not applied, such as SKIPPED_NON_FINITE; otherwise empty.
        """

    def say(self, text: str) -> None:
        """Show a line of text that stays visible.

        text: The line.
        """

    def close(self) -> None:
        """End the output, because training has ended."""


def check_progress(progress: Any) -> None:
    """Raise TypeError unless `progress` is True, False or a TrainingProgress."""
    if not isinstance(progress, bool) and not all(
        callable(getattr(progress, name, None)) for name in ("update", "say", "close")
    ):
        raise TypeError(
            "progress must be True, False or an object with the methods update, say and close, got "
            f"{progress!r}"
        )


def training_progress(
    wanted: bool, step: int, until_step: int, waited: Callable[[], float] = lambda: 0.0
) -> TrainingProgress:
    """Return the progress output of a training loop: a bar on a terminal or in a notebook, lines elsewhere.

    The output shows nothing if `wanted` is False. `waited()` returns the seconds for which the client has
    waited for the server; the rate and the time left exclude them.
    """
    if not wanted:
        return NoProgress()
    start = time.monotonic() - waited()

    def elapsed() -> float:
        return max(time.monotonic() - waited() - start, 1e-9)

    if in_notebook():
        return NotebookBar(step, until_step, elapsed)
    if on_terminal():
        from maskwire.progress_bar import Bar  # imports rich, which takes a while

        return Bar(step, until_step, elapsed)
    return ProgressLines(step, until_step, elapsed)


def warn(progress: TrainingProgress, words: str) -> None:
    """Show a warning in the progress output, or log it if there is no such output."""
    if isinstance(progress, NoProgress):
        log.warning("%s", words)
    else:
        progress.say(words)


class NoProgress:
    """Progress output that shows nothing."""

    def update(self, step: int, loss: float, tokens: int, note: str = "") -> None:
        """Do nothing."""

    def say(self, text: str) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class ProgressLines:
    """Progress output that prints a line on stderr every few seconds."""

    def __init__(self, step: int, until_step: int, elapsed: Callable[[], float]) -> None:
        self._first_step, self._until_step, self._elapsed = step, until_step, elapsed
        self._printed = time.monotonic()
        self._tokens = 0
        self._unprinted = ""

    def update(self, step: int, loss: float, tokens: int, note: str = "") -> None:
        """Print a line about the step, unless the last line was printed less than 10 seconds ago."""
        self._tokens += tokens
        now = time.monotonic()
        elapsed = self._elapsed()
        left = elapsed / max(1, step - self._first_step) * (self._until_step - step)
        self._unprinted = (
            f"step {step}/{self._until_step}  loss {loss:.4f}  {self._tokens / elapsed:,.0f} tokens/s  "
            f"{left:.0f} s left  {note}".rstrip()
        )
        if now - self._printed >= PLAIN_EVERY_SECONDS:
            self._printed, line, self._unprinted = now, self._unprinted, ""
            tell(line)

    def say(self, text: str) -> None:
        """Print a line of text on stderr."""
        tell(text)

    def close(self) -> None:
        """Print the line about the last step, unless it was printed already."""
        if self._unprinted:
            tell(self._unprinted)
