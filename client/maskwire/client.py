"""The blocking client: `connect` returns a Trainer, `attach` a Client."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar, Unpack

import grpc

from maskwire import results
from maskwire.arguments import check_function
from maskwire.credentials import CredentialOptions, Endpoint
from maskwire.driver import Background, Driver, blocking, iterating, result_of
from maskwire.errors import UnavailableError
from maskwire.protocol.effects import Operation, Work
from maskwire.protocol.fit import Fitting, ResultOf
from maskwire.protocol.fit import fit as training_loop
from maskwire.protocol.option_types import StepOptions
from maskwire.protocol.retry import RetryPolicy
from maskwire.protocol.sessionless_calls import Calls
from maskwire.protocol.trainer_properties import TrainerProperties
from maskwire.protocol.writer import Writer
from maskwire.signatures import keep_signature, refuse_unknown_keywords
from maskwire.step_spans import step_spans

log = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")

CLOSE_TIMEOUT = 2.0  # seconds
EXIT_GRACE = 1.0  # seconds for the steps in flight when an exception leaves the `with` block


@refuse_unknown_keywords
def connect(
    target: str,
    *,
    name: str | None = None,
    takeover: bool = False,
    retry_for: float = 300.0,
    timeout: float = 60.0,
    window: int = 4,
    on_wait: Callable[[str], None] | None = None,
    on_takeover: Callable[[str], None] | None = None,
    **credentials: Unpack[CredentialOptions],
) -> Trainer:
    """Open a training session with the server at `target`, and return a Trainer.

    target: HOST:PORT, or unix:PATH for a Unix socket.
    name: Identifies this job. A job that is restarted with the same name takes over its previous session at
        once. The default name is unique to this process. When this process has ended, another process
        on this machine takes over the session at once.
    takeover: Take over the session of any other client, and resume a HALTED run.
    retry_for: How long to retry calls while the server does not answer, in seconds.
    timeout: Deadline of one attempt of a call, in seconds.
    window: The maximum number of steps in flight.
    on_wait: Called with a message that says what the client is waiting for. By default the message is
        logged as a warning.
    on_takeover: Called with a message that says whose session was taken over. By default the message is
        logged as a warning.
    credentials: Options for TLS and the bearer token; see `maskwire.credentials.CredentialOptions`.

    Raises the errors of `maskwire.errors`, ValueError and TypeError for wrong arguments, and OSError for
    unreadable files.
    """
    check_function("on_takeover", on_takeover)
    writer = Writer(
        target,
        RetryPolicy(retry_for, timeout),
        on_wait or log.warning,
        time.monotonic,
        name,
        window,
        step_spans(target),
    )
    trainer = Trainer(Endpoint.of(target, **credentials), writer, threads=window)
    try:
        trainer._drive(writer.open(takeover=takeover))
        if writer.takeover_message:
            (on_takeover or log.warning)(writer.takeover_message)
    except BaseException:
        trainer.close()
        raise
    return trainer


@refuse_unknown_keywords
def attach(
    target: str,
    *,
    retry_for: float = 300.0,
    timeout: float = 60.0,
    on_wait: Callable[[str], None] | None = None,
    **credentials: Unpack[CredentialOptions],
) -> Client:
    """Return a Client without a session, to evaluate, save, list and download while another client trains.

    target, retry_for, timeout, on_wait: As in `connect`.
    credentials: Options for TLS and the bearer token; see `maskwire.credentials.CredentialOptions`.

    Nothing is sent before the first call. Raises ValueError and TypeError for wrong arguments, and OSError
    for unreadable files.
    """
    calls = Calls(target, RetryPolicy(retry_for, timeout), on_wait or log.warning, time.monotonic)
    return Client(Endpoint.of(target, **credentials), calls)


@refuse_unknown_keywords
class Client(Driver):
    """The blocking client for the calls that need no session, made by `attach`.

    Several threads may use it. It belongs to the process that made it: in a forked child process, its calls
    raise ForkError.
    """

    eval_loss = blocking(Calls.eval_loss)
    evaluate = blocking(Calls.evaluate)
    generate = blocking(Calls.generate)
    generate_steps = iterating(Calls.generate_steps)
    checkpoint = blocking(Calls.checkpoint)
    checkpoints = blocking(Calls.checkpoints)
    list_steps = iterating(Calls.list_steps)
    steps_page = blocking(Calls.steps_page)
    delete = blocking(Calls.delete)
    restore = blocking(Calls.restore)
    download = blocking(Calls.download)
    tokenizer_of_run = blocking(Calls.tokenizer_of_run)
    status = blocking(Calls.status)

    def close(self) -> None:
        """Close the connection. Does nothing in a forked child: the connection belongs to the parent."""
        if not self._inherited:
            self._disconnect()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _fitting(method: Callable[Concatenate[Any, P], Fitting[T]]) -> Callable[Concatenate[Trainer, P], T]:
    """Turn a training loop, a generator of actions, into a blocking method that performs them."""

    @keep_signature(method)
    def call(self: Trainer, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return run_fit(self, method(self, *args, **kwargs))

    return call


def run_fit(trainer: Any, fitting: Fitting[T]) -> T:
    """Perform the actions that a training loop yields, and return the result of the loop."""
    reply: Any = None
    raised: BaseException | None = None
    while True:
        try:
            action = fitting.send(reply) if raised is None else fitting.throw(raised)
        except StopIteration as done:
            value: T = done.value
            return value
        reply = raised = None
        try:
            if isinstance(action, ResultOf):
                trainer._check_process()  # in a child process that a callback forked, no answer would come
                reply = result_of(action.future, action.timeout)
            else:
                reply = action.function() if isinstance(action, Work) else action()
                if inspect.iscoroutine(reply):
                    reply.close()
                    raise TypeError(
                        "a callback returned a coroutine, which the blocking client does not await: make the "
                        "callback a plain function (def), or use the asyncio client (maskwire.aio)"
                    )
        except BaseException as error:
            raised = error


@refuse_unknown_keywords
class Trainer(TrainerProperties, Client):
    """The blocking client that trains one run, made by `connect`.

    Several threads may use it. Leaving its `with` block waits for the steps in flight and ends the session.
    After an exception, it waits at most 1 s for the steps and 2 s for the session to end; after Ctrl-C, it
    does not wait for the steps. Ctrl-C during a step leaves the step in flight: the step is acknowledged in
    the background, and the next call trains the step after it.
    """

    def __init__(self, endpoint: Endpoint, writer: Writer, *, threads: int) -> None:
        super().__init__(endpoint, writer)
        self._writer: Writer = writer
        self._background = Background()
        self._threads = ThreadPoolExecutor(threads + 1, thread_name_prefix="maskwire-step")

    settle = blocking(Writer.settle)
    use_tokenizer = blocking(Writer.use_tokenizer)
    keep_tokenizer = blocking(Writer.keep_tokenizer)
    use_data = blocking(Writer.use_data)
    mark_evaluated = blocking(Writer.mark_evaluated)
    fit = _fitting(training_loop)

    @keep_signature(Writer.restore)
    def restore(self, name: str, *, expected_step: int | None = None) -> results.RestoreResult:
        # It runs in the background, because an interrupt must not leave the trainer without a session.
        return result_of(self._start(self._writer.restore(name, expected_step=expected_step)))

    def train_step(self, tokens: Any = None, **options: Unpack[StepOptions]) -> results.StepResult:
        """Train on one batch, and return its StepResult once the step is durable.

        tokens: Integer ids as an array, a list or a torch tensor of shape [rows, columns], a list of rows
            that may differ in length, or a `maskwire.Batch`. None if `batches` are given.

        The rows of all `batches` form one batch: the step, its losses and its digest are those of a call with
        all the rows, and the limits of one batch apply to the rows of all `batches` together.

        Raises TypeError or ValueError for arguments that are not a batch, InvalidRequestError for a batch
        that the server refuses, such as an id outside the vocabulary, ConflictError if the step's number is
        taken, HaltedError after three steps in a row that were not finite, FencedError if another writer took
        over, and DigestMismatchError or HistoryLostError if server and client disagree about what was
        trained.
        """
        self._check_process()
        pending = self._writer.new_step(tokens, **options)
        try:
            self._drive(self._writer.enter(pending))
            return self._drive(self._writer.finish(pending))
        except BaseException:
            # Ctrl-C: a step that may have been sent is finished in the background.
            if not self._withdraw(pending):
                self._start(self._writer.finish(pending))
            raise

    def submit(
        self, tokens: Any = None, *, step: int | None = None, **options: Unpack[StepOptions]
    ) -> Future[results.StepResult]:
        """Submit a batch for a training step, and return a future of its StepResult.

        tokens: As in `train_step`.
        step: The number that the step must have. None: the next number.

        Steps are numbered in the order of submission. If a step is refused, the step after it gets its
        number; a step that was submitted with `step` raises ConflictError instead. The call waits while the
        window is full, and while another step gets the number of a refused one. The future cannot be
        cancelled: a step that was sent may be applied, and only the server's answer says whether it was. The
        future raises the errors of `train_step`.
        """
        self._check_process()
        pending = self._writer.new_step(tokens, step, **options)
        try:
            self._drive(self._writer.enter(pending))
            return self._start(self._writer.finish(pending))
        except BaseException:
            self._withdraw(pending)
            raise

    def close(self, grace: float | None = None) -> None:
        """Wait for the steps in flight, then end the session and the connection.

        grace: The maximum time to wait for the steps, in seconds. None: no limit. Steps that are still in
            flight after that time may or may not be applied.
        """
        self._close(grace, patient=True)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            # After an exception, wait only briefly: the server may be down. After Ctrl-C, do not wait.
            interrupted = issubclass(kind, KeyboardInterrupt | SystemExit)
            self._close(0 if interrupted else EXIT_GRACE, patient=False)

    def _close(self, grace: float | None, *, patient: bool) -> None:
        """Wait for the steps in flight, at most `grace` seconds; then end the session and the connection.

        If the server is unreachable, the steps are awaited only if `patient`.
        """
        writer = self._writer
        if self._inherited or writer.closed:
            return
        try:
            with self._lock:
                writer.closed = True
                self._wake()
            self._when(
                lambda: not writer.in_flight or (writer.unreachable and not patient), lambda: None, grace
            )
            if (request := writer.close_request()) is not None:
                self._stub.CloseSession(request, timeout=CLOSE_TIMEOUT, metadata=self._endpoint.metadata)
        except grpc.RpcError:
            log.debug("the session was not closed; it ends by itself when idle", exc_info=True)
        finally:
            self._disconnect()
            self._threads.shutdown(wait=False, cancel_futures=True)

    def _start(self, operation: Operation[T]) -> Future[T]:
        """Perform an operation in a background thread, and return a future of its result."""
        self._check_process()
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()  # from now on it cannot be cancelled
        self._threads.submit(self._finish, operation, future)
        return future

    def _finish(self, operation: Operation[T], future: Future[T]) -> None:
        try:
            future.set_result(self._drive(operation))
        except BaseException as error:
            future.set_exception(error)

    def _withdraw(self, pending: Any) -> bool:
        with self._lock:
            withdrawn = self._inherited or self._writer.withdraw(pending)
            self._wake()
            return withdrawn

    def _pause(self, seconds: float) -> None:
        super()._pause(seconds)
        if self._writer.unreachable and self._exiting():
            raise UnavailableError(
                f"the program ended while {self.target} did not answer, so the outcome of the call is "
                "unknown; check the run with `maskwire status`",
                reason="UNAVAILABLE",
            )

    def _exiting(self) -> bool:
        """Whether the interpreter is exiting: the executor then accepts no more work."""
        try:
            self._threads.submit(int)
        except RuntimeError:
            return True
        return False
