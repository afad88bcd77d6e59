"""The state of a run: its conditions, and the head of its history."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable

from maskwire.v1.digest import DigestVersion
from maskwire.v1.values import InexactReplay, RunState
from maskwire_server.errors import Diverged, Refused, shortage
from maskwire_server.position import HistoryPosition

log = logging.getLogger(__name__)


class Conditions:
    """The conditions that determine the run's state. Written under the run's mutex, read by any thread."""

    def __init__(self) -> None:
        self.state = RunState.RECOVERING
        self.since = time.time()
        self.last_error = ""
        self._holding = {RunState.RECOVERING: "the trainer"}  # what each condition that holds is waiting for
        self._listeners: list[Callable[[RunState], None]] = []

    @property
    def waiting_for(self) -> str:
        """What the run is waiting for; empty if it is not waiting."""
        return self._holding.get(self.state, "")

    def on_change(self, listener: Callable[[RunState], None]) -> None:
        """Call `listener` with every new state. The listener must return quickly."""
        self._listeners.append(listener)

    def set(self, condition: RunState, holds: bool = True, waiting_for: str = "") -> None:
        """Set or clear a condition. The state becomes the most severe condition that holds."""
        self._holding = {
            **{other: words for other, words in self._holding.items() if other is not condition},
            **({condition: waiting_for} if holds else {}),
        }
        state = next((state for state in _MOST_SEVERE_FIRST if state in self._holding), RunState.SERVING)
        if state is self.state:
            return
        self.state, self.since = state, time.time()
        words = self.waiting_for
        log.info("state %s%s", state.name, f", waiting for {words}" if words else "")
        for listener in self._listeners:
            listener(state)

    def holds(self, condition: RunState) -> bool:
        """Whether a condition holds, even if the state is a more severe one."""
        return condition in self._holding

    def failed(self, what: str, error: BaseException) -> Refused:
        """Log an error, and return the refusal to send. A Refused is returned as it is, and not logged.

        The refusal for an unexpected error contains an error id, and none of the error's text. Users can fix
        a shortage of memory or open files, and diverged weights, so the refusals for these say how.
        """
        if isinstance(error, Refused):
            return error
        short = shortage(error)
        if short is not None:
            log.error("%s failed: %s", what, error)
            self.last_error = f"{what} failed: {short.metadata['error']}"
            return short
        if isinstance(error, Diverged):
            self.last_error = f"{what}: {error}"
            log.warning("%s", self.last_error)
            return Refused(
                "DIVERGED",
                f"{what} was refused: {error}; restore a checkpoint from before the weights diverged "
                "(`maskwire checkpoint list`, `maskwire checkpoint restore NAME`) and continue with a lower "
                "learning rate",
            )
        error_id = uuid.uuid4().hex[:12]
        self.last_error = f"{what} failed, error id {error_id}"
        log.error("%s", self.last_error, exc_info=error)
        return Refused(
            "INTERNAL",
            f"{what} failed, and nothing changed; search the server's log for error {error_id}",
            error_id=error_id,
        )


_MOST_SEVERE_FIRST = (
    RunState.RECOVERY_FAILED,
    RunState.RECOVERING,
    RunState.DRAINING,
    RunState.HELD,
    RunState.RESTORING,
    RunState.HALTED,
)


class Head:
    """The newest steps of the run's history. Written under the run's mutex, read by any thread."""

    def __init__(self) -> None:
        self.computed = HistoryPosition("", 1, 0, b"")
        """The newest computed step."""
        self.durable = self.computed
        """The newest durable step."""
        self.digest_version: DigestVersion | None = None
        """The version of the run's digest; None before the first step is computed."""
        self.non_finite = 0
        """Non-finite steps in a row, up to the newest computed step."""
        self.tokenizer = ""
        """The tokenizer of the run's ids; empty if it is not known."""
        self.data: dict[str, str] = {}
        """The fingerprint of the run's data, in named parts; empty if it is not known."""
        self.evaluated = (0, 0)
        """Lineage and number of the newest step that a writer reported as evaluated; (0, 0) if none."""
        self.inexact_replays: tuple[InexactReplay, ...] = ()

    def move(self, position: HistoryPosition) -> None:
        """Set the head to a durable position, after startup or a restore."""
        self.computed = self.durable = position
        self.non_finite = 0
