"""Where the run stands: its state, and its head, the last step of its history."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from maskwire_server.results import RunState

log = logging.getLogger(__name__)


class Standing:
    """Conditions that together make the state. The engine's thread writes, any thread reads."""

    def __init__(self) -> None:
        self.state = RunState.RECOVERING
        self.since = time.time()
        self.waiting_for = "the trainer"
        self.last_error = ""
        self._conditions = {RunState.RECOVERING}
        self._listeners: list[Callable[[RunState], None]] = []

    def on_change(self, listener: Callable[[RunState], None]) -> None:
        """Call `listener` with every new state."""
        self._listeners.append(listener)

    def set(self, condition: RunState, holds: bool = True, waiting_for: str = "") -> None:
        """A condition begins or ends; the gravest one that holds is the state."""
        (self._conditions.add if holds else self._conditions.discard)(condition)
        state = next((state for state in _GRAVEST_FIRST if state in self._conditions), RunState.SERVING)
        self.waiting_for = waiting_for
        if state is self.state:
            return
        self.state, self.since = state, time.time()
        log.info("state %s%s", state.name, f", waiting for {waiting_for}" if waiting_for else "")
        for listener in self._listeners:
            listener(state)

    def holds(self, condition: RunState) -> bool:
        """Whether a condition holds, be it the state or not."""
        return condition in self._conditions


_GRAVEST_FIRST = (
    RunState.RECOVERY_FAILED,
    RunState.RECOVERING,
    RunState.DRAINING,
    RunState.HELD,
    RunState.RESTORING,
    RunState.HALTED,
)


class Head:
    """The history's end. The engine's thread writes, any thread reads."""

    def __init__(self) -> None:
        self.run_id = ""
        self.tokenizer = ""
        """What the run's ids stand for; empty: nobody said."""
        self.lineage = 1
        self.step = 0
        """The last computed step."""
        self.digest = b""
        """The digest after it."""
        self.durable: tuple[int, bytes] = (0, b"")
        """The last durable step and the digest after it; one object, so that readers see a pair."""

        self.non_finite = 0
        """Steps in a row, up to the last, that were not finite."""

    def move(self, lineage: int, step: int, digest: bytes) -> None:
        """The history ends at a durable step, after a start or a restore."""
        self.lineage, self.step, self.digest = lineage, step, digest
        self.durable = (step, digest)
        self.non_finite = 0
