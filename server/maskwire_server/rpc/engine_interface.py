"""The methods that the service calls on the engine."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from typing import Protocol

from maskwire.v1.values import Limits, ModelInfo, RestoreResult, TokenizerDescription
from maskwire_server.requests import (
    DownloadRequest,
    EvalRequest,
    GenerateRequest,
    RestoreRequest,
    SaveRequest,
    SessionRef,
    SessionRequest,
    StepRequest,
)
from maskwire_server.results import (
    CheckpointInfo,
    Chunk,
    EvalAnswer,
    GenerateAnswer,
    SessionAnswer,
    StepAnswer,
)
from maskwire_server.run_status import RunStatus
from maskwire_server.step_listing import StepsPage, StepsRequest


class GenerationInterface(Protocol):
    """A running generation. Iterating over it yields its answers."""

    def __iter__(self) -> Iterator[GenerateAnswer]:
        """Yield the answers of the generation. Raises Refused, or CancelledError after `cancel`."""

    def cancel(self) -> None:
        """Stop the generation, for example because the client disconnected."""


class Tokenizer(Protocol):
    """The tokenizer of the run's data, stored with the run."""

    @property
    def digest(self) -> str:
        """The digest of the stored tokenizer; empty if none is stored."""

    def keep(self, given: TokenizerDescription) -> None:
        """Store a tokenizer with the run. Raises Refused unless it is the tokenizer that the run uses."""

    def of_run(self) -> TokenizerDescription | None:
        """The tokenizer stored with the run; None if none is stored, or if the run uses another tokenizer."""


class EngineInterface(Protocol):
    """The engine, as the service sees it. Each method, or the future that it returns, may raise Refused."""

    @property
    def info(self) -> ModelInfo | None:
        """The description of the served model; None until the model is built."""

    @property
    def limits(self) -> Limits:
        """The limits on one request."""

    def train_step(self, request: StepRequest) -> Future[StepAnswer]:
        """Train on one batch."""

    def step_refused(self, session: SessionRef | None, step: int | None) -> None:
        """Report a step that the service refused, so that later steps do not wait for it."""

    def eval_loss(self, request: EvalRequest) -> Future[EvalAnswer]:
        """Evaluate one batch."""

    def generate(self, request: GenerateRequest) -> GenerationInterface:
        """Start a generation, which samples rows."""

    def open_session(self, request: SessionRequest) -> Future[SessionAnswer]:
        """Make the caller the run's writer."""

    def close_session(self, session: SessionRef) -> Future[None]:
        """End the caller's session."""

    def save(self, request: SaveRequest) -> Future[CheckpointInfo]:
        """Save a checkpoint."""

    def restore(self, request: RestoreRequest) -> Future[RestoreResult]:
        """Restore the run from a checkpoint."""

    def delete(self, name: str) -> Future[None]:
        """Delete a checkpoint."""

    def checkpoints(self) -> list[CheckpointInfo]:
        """The complete checkpoints, newest first."""

    def download(self, request: DownloadRequest) -> Iterator[Chunk]:
        """Yield the files of a checkpoint in chunks."""

    def list_steps(self, request: StepsRequest) -> Future[StepsPage]:
        """Read a page of recorded steps."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Access to the tokenizer of the run's data."""

    def status(self) -> RunStatus:
        """The state and progress of the run, and what the run is waiting for."""
