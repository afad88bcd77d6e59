"""Progress bars on a terminal, for training, evaluations and downloads."""

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
    """A bar on stderr with steps, loss, tokens per second and the time left."""

    def __init__(
        self, step: int, until_step: int, elapsed: Callable[[], float], console: Console | None = None
    ) -> None:
        """Show a bar that starts at `step` and ends at `until_step`.

        `elapsed()` returns the seconds of training so far, without waits for the server.
        """
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
        """Show a trained step: its number, its loss in nats, its number of tokens, and a note."""
        self._tokens += tokens
        rate = f"{self._tokens / self._elapsed():,.0f}"
        self._progress.update(self._task, completed=step, loss=f"{loss:.4f}", rate=rate, note=note)

    def say(self, text: str) -> None:
        """Show a line of text that stays above the bar."""
        with contextlib.suppress(OSError):  # the terminal was closed
            self._progress.console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        """Stop updating the bar."""
        with contextlib.suppress(OSError):
            self._progress.stop()


@contextmanager
def row_progress(what: str, *, shown: bool) -> Iterator[Callable[[int, int, float], None]]:
    """Yield a function that shows an evaluation's progress: a bar on a terminal, lines on stderr elsewhere.

    Call it with the rows done, the number of all rows, and the nats per token so far. `what` names the work.
    The function shows nothing if `shown` is False.
    """
    columns = (MofNCompleteColumn(), TextColumn("[bold]{task.description}[/bold]"))
    began = time.monotonic()

    def words(done: int, rows: int, bits: str) -> str:
        left = (time.monotonic() - began) / max(1, done) * (rows - done)
        return f"{what}: {done} of {rows} rows  {bits}  {left:.0f} s left"

    with _progress(what, columns, words, shown) as tell:
        yield lambda done, rows, nats: tell(done, rows, f"{nats / math.log(2):.4f} bits per token")


@contextmanager
def byte_progress(what: str, *, shown: bool) -> Iterator[Callable[[int, int], None]]:
    """Yield a function that shows a download's progress: a bar on a terminal, lines on stderr elsewhere.

    Call it with the bytes done and the number of all bytes. `what` names the work. The function shows nothing
    if `shown` is False.
    """

    def words(done: int, total: int, _: str) -> str:
        return f"{what}: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB"

    with _progress(what, (DownloadColumn(), TransferSpeedColumn()), words, shown) as tell:
        yield lambda done, total: tell(done, total, "")


@contextmanager
def _progress(
    what: str, columns: Sequence[ProgressColumn], words: Callable[[int, int, str], str], shown: bool
) -> Iterator[Callable[[int, int, str], None]]:
    """Yield a function that shows progress; call it with the amount done, the total and a remark.

    On a terminal it shows a bar with `columns`. Elsewhere it prints, every few seconds, the line that `words`
    returns for the same arguments. It shows nothing if `shown` is False.
    """
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
