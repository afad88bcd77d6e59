"""The blocking client: one object that drives a run, with steps in flight where wanted."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TypedDict, Unpack

import grpc

from maskwire import protocol, results
from maskwire.errors import FencedError, MaskwireError, UnavailableError, read_failure
from maskwire.protocol import Ledger, RetryPolicy
from maskwire.v1 import training_service_pb2 as pb
from maskwire.v1 import training_service_pb2_grpc as pb_grpc

if TYPE_CHECKING:
    from maskwire.fit import FitResult

log = logging.getLogger(__name__)

_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.max_reconnect_backoff_ms", 1_000),
]
_CLOSE_TIMEOUT = 2.0  # seconds
_RENUMBER_WAIT = 0.02


class StepOptions(TypedDict, total=False):
    """What a step may be told beside its tokens."""

    lengths: Any
    """Integers [rows]: what lies behind a row's length is padding."""
    prompt_mask: Any
    """bool [rows, columns]: True where a position is given and never masked."""
    only_train_generator: bool
    """Compute and train the generator alone."""
    only_train_critic: bool
    """Train the critic alone."""
    generator_sample_temperature: float | None
    """Of the critic's input, 0 for the most probable token; None: drawn from [0, 1) for each step."""
    learning_rate: float | None
    """Of this step, in place of the schedule's."""


class _Call(Protocol):
    def __call__(self, request: Any, timeout: float) -> Any: ...


class _Pending:
    """A step that was handed in and not acknowledged yet."""

    def __init__(self, request: pb.TrainStepRequest) -> None:
        self.request = request
        self.payload = protocol.hash_of(request)


def connect(
    target: str,
    *,
    name: str | None = None,
    takeover: bool = False,
    retry_for: float = 300.0,
    timeout: float = 60.0,
    window: int = 4,
    on_wait: Callable[[str], None] | None = None,
) -> Trainer:
    """Open a session with the server at `target` (HOST:PORT) and return its trainer.

    `name` identifies this job: started again under the same name it takes its own session over at
    once. `takeover` takes over from a client of another name too, and goes on after HALTED.
    `timeout` is the deadline of one attempt of a call and `retry_for` how long a server that does not
    answer is asked again, both in seconds; `window` is the most steps in flight. `on_wait` is told,
    in words, what is being waited for. Raises the errors of `maskwire.errors`.
    """
    trainer = Trainer(
        target,
        name=name or f"{socket.gethostname()}-{os.getpid()}",
        policy=RetryPolicy(retry_for=retry_for, attempt_timeout=timeout),
        window=window,
        on_wait=on_wait or log.warning,
    )
    try:
        trainer._open(takeover=takeover)
    except BaseException:
        trainer.close()
        raise
    return trainer


class Trainer:
    """Drives one run. Safe to use from several threads; made by `connect`.

    Leaving its `with` block ends the session.
    """

    def __init__(
        self,
        target: str,
        *,
        name: str,
        policy: RetryPolicy,
        window: int,
        on_wait: Callable[[str], None],
    ) -> None:
        self.target = target
        self.name = name
        self.model: results.ModelInfo
        """What is served."""
        self.limits: results.Limits
        """The server's bounds on one request."""
        self._policy = policy
        self._on_wait = on_wait
        self._window = window
        self._channel = grpc.insecure_channel(target, options=_OPTIONS)
        self._stub = pb_grpc.TrainingServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._threads = ThreadPoolExecutor(max(1, window), thread_name_prefix="maskwire-step")
        self._ledger = Ledger()
        self._nonce = protocol.new_id()
        self._changed = threading.Condition()
        self._pending: deque[_Pending] = deque()  # in order; the first is step ledger.step + 1
        self._reopening = threading.Lock()
        self._stale = False  # the server may have been restarted since the session was confirmed
        self._closed = False

    # What the run is.

    @property
    def run_id(self) -> str:
        """The run."""
        return self._ledger.session.run_id

    @property
    def lineage(self) -> int:
        """One more after each restore."""
        return self._ledger.session.lineage

    @property
    def step(self) -> int:
        """The last acknowledged step."""
        return self._ledger.step

    @property
    def digest(self) -> bytes:
        """The digest after it: the same on both sides."""
        return self._ledger.digest

    # Training.

    def train_step(self, tokens: Any, **options: Unpack[StepOptions]) -> results.StepResult:
        """Train on one batch, and return once the step is durable.

        `tokens`: integers [rows, columns], or a list of rows that differ in length; an array, a list or
        a torch tensor.
        """
        return self._run(self._enter(_step_request(tokens, **options)))

    def submit(self, tokens: Any, **options: Unpack[StepOptions]) -> Future[results.StepResult]:
        """Hand in one batch as `train_step` does, and return a future of its result.

        Steps are numbered in the order of the calls. Blocks while a whole window is in flight.
        """
        return self._threads.submit(self._run, self._enter(_step_request(tokens, **options)))

    def fit(self, data: Any, *, until_step: int, **options: Any) -> FitResult:
        """Train on `data.batch(step)` up to an absolute step; see `maskwire.fit.fit`."""
        from maskwire.fit import fit

        return fit(self, data, until_step=until_step, **options)

    def _enter(self, request: pb.TrainStepRequest) -> _Pending:
        pending = _Pending(request)
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._pending) < self._window)
            if self._closed:
                raise MaskwireError("this trainer is closed; connect again")
            self._pending.append(pending)
        return pending

    def _run(self, pending: _Pending) -> results.StepResult:
        try:
            response = self._ask(lambda: self._numbered(pending), self._stub.TrainStep, steps=True)
            with self._changed:
                # Answers are checked in order: each digest builds on the one before.
                self._changed.wait_for(lambda: self._pending[0] is pending)
                self._ledger.acknowledge(response, pending.payload)
            return protocol.read_step(response)
        finally:
            # A step that was refused leaves its number to the one behind it.
            with self._changed:
                self._pending.remove(pending)
                self._changed.notify_all()

    def _numbered(self, pending: _Pending) -> pb.TrainStepRequest:
        with self._changed:
            pending.request.session.CopyFrom(self._ledger.session)
            pending.request.step = self._ledger.step + 1 + self._pending.index(pending)
        return pending.request

    # The other calls.

    def eval_loss(
        self,
        tokens: Any,
        *,
        lengths: Any = None,
        prompt_mask: Any = None,
        row_ids: Sequence[int] = (),
        draws: int = 0,
        seed: int = 0,
        only_train_generator: bool = False,
        only_train_critic: bool = False,
        generator_sample_temperature: float | None = None,
        raw_weights: bool = False,
        text_bytes: int | None = None,
    ) -> results.EvalResult:
        """Evaluate one batch; changes nothing, and needs no session of one's own.

        `row_ids` seed the rows' draws: the same id, seed and draws give the same result in any batch.
        `draws` a row, 0 for 16; `text_bytes` that the batch encodes, to get bits per byte.
        """
        request = pb.EvalLossRequest(
            batch=protocol.encode_batch(tokens, lengths=lengths, prompt_mask=prompt_mask),
            row_ids=row_ids,
            draws=draws,
            seed=seed,
            only_train_generator=only_train_generator,
            only_train_critic=only_train_critic,
            generator_sample_temperature=generator_sample_temperature,
            raw_weights=raw_weights,
            text_bytes=text_bytes,
        )
        return protocol.read_eval(self._ask(lambda: request, self._stub.EvalLoss))

    def checkpoint(
        self, name: str = "", *, labels: Mapping[str, str] | None = None
    ) -> results.CheckpointInfo:
        """Save the run's state, and return once the checkpoint is durable and verified."""
        request = pb.CheckpointRequest(request_id=protocol.new_id(), name=name, labels=labels)
        response = self._ask(lambda: request, self._stub.Checkpoint)
        return protocol.read_checkpoint(response.checkpoint)

    def checkpoints(self) -> list[results.CheckpointInfo]:
        """The run's whole checkpoints, newest first."""
        found: list[results.CheckpointInfo] = []
        request = pb.ListCheckpointsRequest()
        while True:
            response = self._ask(lambda: request, self._stub.ListCheckpoints)
            found += [protocol.read_checkpoint(info) for info in response.checkpoints]
            if not response.next_page_token:
                return found
            request.page_token = response.next_page_token

    def restore(self, name: str, *, expected_step: int | None = None) -> results.RestoreResult:
        """Go back to a checkpoint, on a new lineage, and go on from there as its writer.

        Refused with `expected_step` if the run is at another step.
        """
        request = pb.RestoreCheckpointRequest(
            request_id=protocol.new_id(),
            name=name,
            expected_lineage=self.lineage,
            expected_step=expected_step,
        )
        response = self._ask(lambda: request, self._stub.RestoreCheckpoint)
        with self._changed:
            self._nonce = protocol.new_id()  # the restore used the old epoch up
            self._ledger = Ledger()
        self._open()
        return results.RestoreResult(response.lineage, response.step, response.digest)

    def status(self) -> results.Status:
        """Is it stuck or working?"""
        return protocol.read_status(self._ask(pb.GetStatusRequest, self._stub.GetStatus))

    # The session.

    def _open(self, *, takeover: bool = False) -> None:
        request = pb.OpenSessionRequest(
            client_name=self.name,
            nonce=self._nonce,
            takeover=takeover,
            held_epoch=self._ledger.session.epoch or None,
            history=self._ledger.history(),
        )
        response = self._ask(lambda: request, self._stub.OpenSession)
        with self._changed:
            if not self._ledger.digest:
                self._ledger.open(response)
            elif response.session.epoch != self._ledger.session.epoch:
                raise FencedError(
                    f"the session's epoch {self._ledger.session.epoch} was replaced by "
                    f"{response.session.epoch}; connect again",
                    reason="FENCED",
                )
            self.model = protocol.read_model(response.model)
            self.limits = protocol.read_limits(response.limits)
            self._window = min(self._window, self.limits.window)

    def _reopen(self) -> None:
        """After the server was out of reach: it must still have what it acknowledged."""
        with self._reopening:
            if self._stale:
                self._open()
                self._stale = False

    def close(self) -> None:
        """End the session and the connection; steps in flight are waited for."""
        if self._closed:
            return
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._threads.shutdown(wait=True, cancel_futures=True)
        if self._ledger.digest:
            try:
                self._stub.CloseSession(
                    pb.CloseSessionRequest(session=self._ledger.session), timeout=_CLOSE_TIMEOUT
                )
            except grpc.RpcError:
                log.debug("the session was not closed; it ends by itself when idle", exc_info=True)
        self._channel.close()

    def __enter__(self) -> Trainer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # The one place through which every call goes.

    def _ask(self, make: Callable[[], Any], call: _Call, *, steps: bool = False) -> Any:
        """Call until there is an answer, or an error that asking again does not help."""
        began, attempt, told = time.monotonic(), 0, ""
        while True:
            if steps and self._stale:
                self._reopen()
            acknowledged = self._ledger.step
            try:
                return call(make(), timeout=self._policy.attempt_timeout)
            except grpc.RpcError as raised:
                failure = read_failure(raised)
            error = failure.error
            if steps and error.reason == "GAP" and self._renumbers(error, acknowledged):
                continue
            elapsed = time.monotonic() - began
            wait = protocol.wait_before_retry(failure, attempt, elapsed, self._policy)
            if wait is None:
                if failure.retryable:
                    raise UnavailableError(
                        f"{self.target} did not answer for {elapsed:.0f} s ({error}); is the server running "
                        "and the address right? `maskwire status` tells",
                        reason=error.reason,
                        metadata=error.metadata,
                    ) from None
                raise error from None
            if failure.unreachable:
                self._stale = True
            message = f"waiting for {self.target}: {error}"
            if attempt and message != told:  # the first failure is often the last
                self._on_wait(message)
                told = message
            attempt += 1
            time.sleep(wait)

    def _renumbers(self, error: MaskwireError, acknowledged: int) -> bool:
        """Whether a step that was ahead of its turn can be numbered again.

        So it can while the server expects one of the steps that were in flight: a server that expects
        less than was `acknowledged` when the step was sent, or more, has another history.
        """
        expected = int(error.metadata.get("expected_step", 0))
        with self._changed:
            # The refusal of the step before it may still be on its way to us.
            self._changed.wait(_RENUMBER_WAIT)
            return acknowledged < expected <= self._ledger.step + len(self._pending)


def _step_request(
    tokens: Any, *, lengths: Any = None, prompt_mask: Any = None, **modes: Any
) -> pb.TrainStepRequest:
    batch = protocol.encode_batch(tokens, lengths=lengths, prompt_mask=prompt_mask)
    return pb.TrainStepRequest(request_id=protocol.new_id(), batch=batch, **modes)
