"""Live progress bars, on a terminal."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from maskwire.fit import PLAIN_EVERY_SECONDS


class Bar:
    """Steps, loss, tokens per second and the time left, in one line on stderr."""

    def __init__(self, step: int, until_step: int, console: Console | None = None) -> None:
        self._tokens = 0
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
        """A step was trained."""
        self._tokens += tokens
        task = self._progress.tasks[self._task]
        elapsed = task.elapsed or 0.0
        rate = f"{self._tokens / elapsed:,.0f}" if elapsed else "…"
        self._progress.update(self._task, completed=step, loss=f"{loss:.4f}", rate=rate, note=note)

    def say(self, text: str) -> None:
        """A line that stays above the bar."""
        self._progress.console.print(text, highlight=False)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._progress.stop()


@contextmanager
def row_progress(what: str, *, shown: bool) -> Iterator[Callable[[int, int, float], None]]:
    """To be called with (rows done, rows in all, nats a token so far): a bar, or a line now and then."""
    if not shown:
        yield lambda *_: None
    elif sys.stderr.isatty():
        columns = (
            TextColumn(what),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("[bold]{task.fields[bits]}[/bold] bits a token"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("", total=None, bits="…")
            yield lambda done, rows, nats: bar.update(
                task, completed=done, total=rows, bits=f"{nats / math.log(2):.4f}"
            )
    else:
        began = told = time.monotonic()

        def tell(done: int, rows: int, nats: float) -> None:
            nonlocal told
            now = time.monotonic()
            if now - told >= PLAIN_EVERY_SECONDS:
                told = now
                left = (now - began) / max(1, done) * (rows - done)
                words = (
                    f"{what}: {done} of {rows} rows  {nats / math.log(2):.4f} bits a token  {left:.0f} s left"
                )
                print(words, file=sys.stderr, flush=True)

        yield tell


@contextmanager
def byte_progress(what: str, *, shown: bool) -> Iterator[Callable[[int, int], None]]:
    """To be called with (bytes done, bytes in all): a bar on a terminal, a line now and then elsewhere."""
    if not shown:
        yield lambda *_: None
    elif sys.stderr.isatty():
        columns = (
            TextColumn(what),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("", total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
    else:
        told = time.monotonic()

        def tell(done: int, total: int) -> None:
            nonlocal told
            if time.monotonic() - told >= PLAIN_EVERY_SECONDS:
                told = time.monotonic()
                print(f"{what}: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB", file=sys.stderr, flush=True)

        yield tell
