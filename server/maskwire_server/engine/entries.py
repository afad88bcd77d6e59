"""What waits for the device: steps, evaluations, generations, checkpoints, and barriers between steps."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from maskwire_server.engine.generation_stream import Generation
from maskwire_server.errors import Refused
from maskwire_server.requests import EvalRequest, SaveRequest, StepRequest
from maskwire_server.results import CheckpointInfo, EvalAnswer, StepAnswer


@dataclass(eq=False)
class Step:
    """A training step, from admission until it is durable."""

    request: StepRequest
    payload_hash: bytes
    encoded: bytes
    waiters: list[Future[StepAnswer]]
    """One for the request, and one for each retry that joined it."""
    arrived: float
    number: int = 0
    """Its place in the history; 0 until it has one."""
    started: float = 0.0
    ended: float = 0.0

    @property
    def abandoned(self) -> bool:
        """Nobody waits for its answer any more."""
        return all(waiter.cancelled() for waiter in self.waiters)


@dataclass(eq=False)
class Evaluation:
    """Changes nothing; its answer waits until the steps that it saw are durable."""

    request: EvalRequest
    future: Future[EvalAnswer]


@dataclass(eq=False)
class Save:
    """A checkpoint of the state between two steps."""

    request: SaveRequest
    waiters: list[Future[CheckpointInfo]] = field(default_factory=list)
    automatic: bool = False


@dataclass(eq=False)
class Barrier:
    """Something done between two steps, when the device is idle and everything before is durable."""

    act: Callable[[], None]
    refuse: Callable[[Refused], None]


Job = Step | Evaluation | Generation | Save | Barrier
