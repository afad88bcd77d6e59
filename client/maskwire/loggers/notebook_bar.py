"""Progress of training in a notebook: a bar that is redrawn in place."""

from __future__ import annotations

import html
import logging
import sys
import time
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)

_DRAW_SECONDS = 0.2
_LINES = 20  # the most lines shown below the bar, the newest ones


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook. Does not import IPython."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and hasattr(shell, "kernel")


class NotebookBar:
    """A bar with steps, loss, tokens per second and the time left; below it, the lines added by `say`."""

    def __init__(self, step: int, until_step: int, elapsed: Callable[[], float]) -> None:
        """Show a bar that starts at `step` and ends at `until_step`.

        `elapsed()` returns the seconds of training so far, without the time in which the server did not
        answer.
        """
        self._first_step, self._until_step, self._elapsed = step, until_step, elapsed
        self._step, self._tokens, self._words = step, 0, ""
        self._lines: list[str] = []
        self._drawn = 0.0
        self._handle: Any = None
        self._draw()

    def update(self, step: int, loss: float, tokens: int, note: str = "") -> None:
        """Show a trained step: its number, its loss in nats, its number of tokens, and a note."""
        self._tokens += tokens
        self._step = step
        elapsed = self._elapsed()
        left = elapsed / max(1, step - self._first_step) * (self._until_step - step)
        self._words = f"loss {loss:.4f} · {self._tokens / elapsed:,.0f} tokens/s · {left:,.0f} s left {note}"
        if time.monotonic() - self._drawn >= _DRAW_SECONDS:
            self._draw()

    def say(self, text: str) -> None:
        """Add a line of text below the bar, where the newest 20 lines are shown."""
        self._lines.append(text)
        self._draw()

    def close(self) -> None:
        """Draw the final state of the bar."""
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
