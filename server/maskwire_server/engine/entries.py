"""The entries of the executor's queue."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from dataclasses import dataclass, field

from maskwire.v1.digest import DigestVersion
from maskwire.v1.values import RestoreResult
from maskwire_server import call_context
from maskwire_server.call_context import CallContext
from maskwire_server.engine.admission_rules import other_step
from maskwire_server.engine.futures import refuse
from maskwire_server.engine.generation_stream import Generation
from maskwire_server.manifest import Manifest
from maskwire_server.requests import EvalRequest, RestoreRequest, SaveRequest, SessionRequest, StepRequest
from maskwire_server.results import CheckpointInfo, EvalAnswer, StepAnswer


@dataclass(eq=False)
class Step:
    """A training step, from admission until it is durable."""

    request: StepRequest
    digest_version: DigestVersion
    """The version of the digest that `payload_hash` is computed with."""
    encoded: bytes
    """The payload as the journal stores it."""
    waiters: list[Future[StepAnswer]]
    """One future for the request, and one for each retry that joined it."""
    arrived: float
    expecting: list[tuple[int, Future[StepAnswer]]] = field(default_factory=list)
    """Retries that asked for a number and joined before the step had its number."""
    number: int = 0
    """The step's number; 0 until the executor takes it from the queue."""
    started: float = 0.0
    ended: float = 0.0
    call: CallContext | None = field(default_factory=call_context.current.get)
    """The call that brought the step."""

    looked_up: bool = False
    """Whether the journal is being searched for the step's record; until then the step is not queued."""
    space_requested: bool = False
    """Whether the committer was asked to free disk space for the step's batch."""
    _hash: bytes | None = None
    _hashing: threading.Lock = field(default_factory=threading.Lock)

    @property
    def payload_hash(self) -> bytes:
        """The payload hash, 32 bytes. The first thread that needs it computes it."""
        with self._hashing:
            if self._hash is None:
                self._hash = self.request.payload.hash(self.digest_version)
            return self._hash

    def use_version(self, version: DigestVersion) -> None:
        """Set the version of the digest, and discard a hash that was computed with another version."""
        with self._hashing:
            if version != self.digest_version:
                self.digest_version, self._hash = version, None

    def refuse_other_numbers(self, number: int) -> None:
        """Refuse retries that asked for a number other than `number`, which is the number of this step."""
        for expected, waiter in self.expecting:
            if expected != number:
                refuse(waiter, other_step(number))

    @property
    def abandoned(self) -> bool:
        """Whether no caller waits for the step any more: each has cancelled, or was answered or refused."""
        return all(waiter.done() for waiter in self.waiters)


@dataclass(eq=False)
class Evaluation:
    """An evaluation. It is answered once the step whose weights it used is durable."""

    request: EvalRequest
    future: Future[EvalAnswer]


@dataclass(eq=False)
class Save:
    """A request to save a checkpoint of the state between two steps."""

    request: SaveRequest
    waiters: list[Future[CheckpointInfo]] = field(default_factory=list)
    automatic: bool = False
    arrived: float | None = None
    """When the request arrived; None if no client asked for the save."""


@dataclass(eq=False)
class SessionOpening:
    """The opening of a session. Its new epoch is already in memory, and is recorded between two steps."""

    epoch: int
    request: SessionRequest


@dataclass(eq=False)
class Restore:
    """A restore of a checkpoint whose files were verified, and which is protected from deletion."""

    request: RestoreRequest
    manifest: Manifest
    future: Future[RestoreResult]


@dataclass(eq=False)
class Drain:
    """The shutdown of the run. It saves a checkpoint if steps were trained since the newest one."""

    future: Future[None]


Entry = Step | Evaluation | Generation | Save | SessionOpening | Restore | Drain
