"""Live progress bars, on a terminal."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from maskwire.nonfatal_output import PLAIN_EVERY_SECONDS, on_terminal
from maskwire.nonfatal_output import tell as tell_line


class Bar:
    """Steps, loss, tokens per second and the time left, in one line on stderr."""

    def __init__(
        self, step: int, until_step: int, elapsed: Callable[[], float], console: Console | None = None
    ) -> None:
        """`elapsed()` returns the seconds of training so far, without waits for the server."""
        self._tokens, self._elapsed = 0, elapsed
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss [bold]{task.fields[loss]}"),
            TextColumn("{task.fields[rate]} tokens/s"),
            TimeRemainingColumn(),
            TextColumn("[yellow]{task.fields[note]}"),
            console=console or Console(stderr=True),
        )
        self._task = self._progress.add_task(
            "", total=until_step, completed=step, loss="…", rate="…", note=""
        )
        self._progress.start()

    def update(self, step: int, loss: float, tokens: int, note: str = "") -> None:
        """Show that a step was trained."""
        self._tokens += tokens
        rate = f"{self._tokens / self._elapsed():,.0f}"
        self._progress.update(self._task, completed=step, loss=f"{loss:.4f}", rate=rate, note=note)

    def say(self, text: str) -> None:
        """Show a line that stays above the bar."""
        with contextlib.suppress(OSError):  # the terminal was closed
            self._progress.console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        """Stop updating the bar."""
        with contextlib.suppress(OSError):
            self._progress.stop()


@contextmanager
def row_progress(what: str, *, shown: bool) -> Iterator[Callable[[int, int, float], None]]:
    """Yield a function of (rows done, all rows, nats per token) that shows a bar, or lines in a log."""
    columns = (MofNCompleteColumn(), TextColumn("[bold]{task.description}[/bold]"))
    began = time.monotonic()

    def words(done: int, rows: int, bits: str) -> str:
        left = (time.monotonic() - began) / max(1, done) * (rows - done)
        return f"{what}: {done} of {rows} rows  {bits}  {left:.0f} s left"

    with _progress(what, columns, words, shown) as tell:
        yield lambda done, rows, nats: tell(done, rows, f"{nats / math.log(2):.4f} bits per token")


@contextmanager
def byte_progress(what: str, *, shown: bool) -> Iterator[Callable[[int, int], None]]:
    """Yield a function of (bytes done, all bytes) that shows a bar, or lines in a log."""

    def words(done: int, total: int, _: str) -> str:
        return f"{what}: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB"

    with _progress(what, (DownloadColumn(), TransferSpeedColumn()), words, shown) as tell:
        yield lambda done, total: tell(done, total, "")


@contextmanager
def _progress(
    what: str, columns: Sequence[ProgressColumn], words: Callable[[int, int, str], str], shown: bool
) -> Iterator[Callable[[int, int, str], None]]:
    """Yield a function of (done, total, remark): a bar with these columns on a terminal, else `words`."""
    if not shown:
        yield lambda *_: None
    elif on_terminal():
        layout = (TextColumn(what), BarColumn(), *columns, TimeRemainingColumn())
        with Progress(*layout, console=Console(stderr=True)) as bar:
            task = bar.add_task("", total=None)
            yield lambda done, total, remark: bar.update(
                task, completed=done, total=total, description=remark
            )
    else:
        told = time.monotonic()

        def tell(done: int, total: int, remark: str) -> None:
            nonlocal told
            if time.monotonic() - told >= PLAIN_EVERY_SECONDS:
                told = time.monotonic()
                tell_line(words(done, total, remark))

        yield tell
