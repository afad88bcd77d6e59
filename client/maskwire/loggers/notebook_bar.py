"""Progress in a notebook: one bar, which is redrawn in place."""

from __future__ import annotations

import html
import logging
import sys
import time
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)

_DRAW_SECONDS = 0.2
_LINES = 20  # the newest ones, shown below the bar


def in_notebook() -> bool:
    """Whether this is the kernel of a notebook. Imports nothing."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and hasattr(shell, "kernel")


class NotebookBar:
    """Steps, loss, tokens per second and the time left, and below them the lines that stay."""

    def __init__(self, step: int, until_step: int, elapsed: Callable[[], float]) -> None:
        """`elapsed()` returns the seconds spent training so far.

        Time in which the server did not answer is excluded.
        """
        self._first_step, self._until_step, self._elapsed = step, until_step, elapsed
        self._step, self._tokens, self._words = step, 0, ""
        self._lines: list[str] = []
        self._drawn = 0.0
        self._handle: Any = None
        self._draw()

    def update(self, step: int, loss: float, tokens: int, note: str = "") -> None:
        """Show that a step was trained."""
        self._tokens += tokens
        self._step = step
        elapsed = self._elapsed()
        left = elapsed / max(1, step - self._first_step) * (self._until_step - step)
        self._words = f"loss {loss:.4f} · {self._tokens / elapsed:,.0f} tokens/s · {left:,.0f} s left {note}"
        if time.monotonic() - self._drawn >= _DRAW_SECONDS:
            self._draw()

    def say(self, text: str) -> None:
        """Show a line that stays below the bar."""
        self._lines.append(text)
        self._draw()

    def close(self) -> None:
        """Draw the bar as it is at the end."""
        self._draw()

    def _draw(self) -> None:
        from IPython.display import HTML, display

        self._drawn = time.monotonic()
        shown = [*(["…"] if len(self._lines) > _LINES else []), *self._lines[-_LINES:]]
        content = HTML(
            f'<progress value="{self._step}" max="{max(1, self._until_step)}"></progress> '
            f"step {self._step}/{self._until_step} {html.escape(self._words)}"
            + "".join(f"<br>{html.escape(line)}" for line in shown)
        )
        try:
            if self._handle is None:
                self._handle = display(content, display_id=True)
            else:
                self._handle.update(content)
        except Exception:  # such as a kernel whose page was closed: training continues
            log.debug("the notebook's bar could not be drawn", exc_info=True)
