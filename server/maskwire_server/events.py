"""The events that the engine and the service publish, and the interface of subscribers.

`time` is the end of the reported activity, in seconds since the Unix epoch; durations are in seconds. No
event contains an access token, and only `Generated` contains token ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from maskwire.v1.values import Losses, Outcome, RunState


@dataclass(frozen=True, slots=True)
class StepCommitted:
    """A step became durable at `time`. It arrived `queue + compute + commit` seconds earlier."""

    time: float
    run_id: str
    lineage: int
    step: int
    outcome: Outcome
    losses: Losses
    gradient_norm: float | None
    learning_rate: float
    tokens: int
    """Maskable and prompt tokens of the batch."""
    queue_seconds: float
    compute_seconds: float
    commit_seconds: float
    request_id: str | None = None
    call: int = 0
    """The number of the call that sent the step, as in `CallEnded`; 0 if no call sent it."""


@dataclass(frozen=True, slots=True)
class StateChanged:
    """The run entered another state."""

    time: float
    state: RunState
    waiting_for: str = ""


@dataclass(frozen=True, slots=True)
class LineageOpened:
    """The process started, or restored a checkpoint: the history continues after `step` on `lineage`.

    Steps after `step` that were published earlier no longer belong to the history.
    """

    time: float
    run_id: str
    lineage: int
    step: int


@dataclass(frozen=True, slots=True)
class CheckpointWritten:
    """A checkpoint is complete and verified. `seconds` covers writing, not copying from the device."""

    time: float
    name: str
    lineage: int
    step: int
    size_bytes: int
    seconds: float
    automatic: bool


@dataclass(frozen=True, slots=True)
class RecoveryPhase:
    """A phase of startup ended; `phase` is one of RECOVERY_PHASES."""

    time: float
    phase: str
    seconds: float


RECOVERY_PHASES = ("build", "open", "load", "replay", "warm_up", "save")


@dataclass(frozen=True, slots=True)
class Committed:
    """The journal made a transaction durable, in which it wrote `commits` queued commits."""

    time: float
    seconds: float
    commits: int


@dataclass(frozen=True, slots=True)
class Evaluated:
    """A call of EvalLoss was answered. A client may divide one evaluation into several calls."""

    time: float
    run_id: str
    lineage: int
    step: int
    seconds: float
    """On the device."""
    nats_per_token: float
    bits_per_byte: float | None
    accuracy: float
    tokens: int
    draws: int
    chain_rule: bool


@dataclass(frozen=True, slots=True, eq=False)
class Generated:
    """A call of Generate finished."""

    time: float
    run_id: str
    lineage: int
    step: int
    seconds: float
    """On the device."""
    rows: int
    passes: int
    samples: tuple[npt.NDArray[np.integer], ...]
    """The ids of the first MOST_SAMPLES rows, without their padding."""


MOST_SAMPLES = 4


OTHER_METHOD = "other"
"""Replaces the method of a rejected call to another service, because a client can send any name."""


@dataclass(frozen=True, slots=True)
class CallEnded:
    """A call of the service ended at `time`: with code OK, or refused with a reason."""

    time: float
    method: str
    code: str
    """The name of the `grpc.StatusCode`."""
    reason: str
    """A key of `errors.REASONS`; empty for OK."""
    seconds: float
    request_id: str = ""
    """Empty if the request has none."""
    call: int = 0
    """The number of the call, counted per process."""
    trace: str = ""
    """The W3C `traceparent` in the call's metadata; empty if there was none."""


Event = (
    StepCommitted
    | StateChanged
    | LineageOpened
    | CheckpointWritten
    | RecoveryPhase
    | Committed
    | Evaluated
    | Generated
    | CallEnded
)


class Subscriber(Protocol):
    """Receives events, one at a time, on a thread of its own."""

    name: str
    """A label of metrics and logs."""
    kinds: frozenset[type[Event]]
    """The types of events that it receives."""

    def receive(self, event: Event) -> None:
        """Handle an event. If this raises an error, the error is logged and the event counts as dropped."""

    def idle(self) -> bool:
        """Called when no event is waiting. Returns whether to call it again after a second without events."""

    def close(self) -> None:
        """Called after the last event."""
