"""Where the run stands: its state, and its head, the last step of its history."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from maskwire_server.errors import Diverged, Refused, shortage
from maskwire_server.results import InexactReplay, RunState

log = logging.getLogger(__name__)


class Standing:
    """Conditions that together make the state. The engine's thread writes, any thread reads."""

    def __init__(self) -> None:
        self.state = RunState.RECOVERING
        self.since = time.time()
        self.last_error = ""
        self._conditions = {RunState.RECOVERING: "the trainer"}  # and what each waits for
        self._listeners: list[Callable[[RunState], None]] = []

    @property
    def waiting_for(self) -> str:
        """What the state waits for; empty: nothing."""
        return self._conditions.get(self.state, "")

    def on_change(self, listener: Callable[[RunState], None]) -> None:
        """Call `listener` with every new state."""
        self._listeners.append(listener)

    def set(self, condition: RunState, holds: bool = True, waiting_for: str = "") -> None:
        """A condition begins or ends; the gravest one that holds is the state."""
        self._conditions = {
            **{other: words for other, words in self._conditions.items() if other is not condition},
            **({condition: waiting_for} if holds else {}),
        }
        state = next((state for state in _GRAVEST_FIRST if state in self._conditions), RunState.SERVING)
        if state is self.state:
            return
        self.state, self.since = state, time.time()
        words = self.waiting_for
        log.info("state %s%s", state.name, f", waiting for {words}" if words else "")
        for listener in self._listeners:
            listener(state)

    def failed(self, what: str, error: BaseException) -> Refused:
        """Log an unexpected error, and what is answered for it: an id, and nothing of its text.

        Weights that have diverged are the user's to mend: the answer says so.
        """
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
                f"{what} was refused: {error}; restore a checkpoint from before they did (`maskwire "
                "checkpoint list`, `maskwire checkpoint restore NAME`) and go on with a lower learning rate",
            )
        error_id = uuid.uuid4().hex[:12]
        self.last_error = f"{what} failed, error id {error_id}"
        log.error("%s", self.last_error, exc_info=error)
        return Refused(
            "INTERNAL",
            f"{what} failed and nothing changed; the server's log explains error {error_id}",
            error_id=error_id,
        )

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


@dataclass(frozen=True)
class Place:
    """A step of a run's history, and the digest after it."""

    run_id: str
    lineage: int
    step: int
    digest: bytes


class Head:
    """The history's end. The engine's thread writes, any thread reads."""

    def __init__(self) -> None:
        self.run_id = ""
        self.tokenizer = ""
        """What the run's ids stand for; empty: nobody said."""
        self.data: dict[str, str] = {}
        """The fingerprint of the run's data; empty: nobody said."""
        self.evaluated = (0, 0)
        """Lineage and number of the last step that a writer said it had evaluated; zeros: none."""
        self.inexact_replays: tuple[InexactReplay, ...] = ()
        self.lineage = 1
        self.step = 0
        """The last computed step."""
        self.digest = b""
        """The digest after it."""
        self.durable: tuple[int, bytes] = (0, b"")
        """The last durable step and the digest after it; one object, so that readers see a pair."""

        self.non_finite = 0
        """Steps in a row, up to the last, that were not finite."""

    @property
    def place(self) -> Place:
        """The last computed step, as it is now."""
        return Place(self.run_id, self.lineage, self.step, self.digest)

    def move(self, lineage: int, step: int, digest: bytes) -> None:
        """The history ends at a durable step, after a start or a restore."""
        self.lineage, self.step, self.digest = lineage, step, digest
        self.durable = (step, digest)
        self.non_finite = 0
