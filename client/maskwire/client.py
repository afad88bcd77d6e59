"""The blocking client: one object that drives a run, with steps in flight where wanted."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack

import grpc

from maskwire import results
from maskwire.arguments import call_back
from maskwire.credentials import Door, DoorOptions
from maskwire.errors import MaskwireError, UnavailableError, read_failure
from maskwire.ownership import ProcessBound
from maskwire.protocol import codec
from maskwire.protocol.calls import (
    Asking,
    Call,
    Effect,
    EvalOptions,
    GenerateOptions,
    Give,
    ListOptions,
    Next,
    Pause,
    RetryPolicy,
    StepOptions,
    Stream,
    Talk,
    Until,
    Work,
    new_id,
)
from maskwire.protocol.download import Progress
from maskwire.protocol.evaluation import Progress as Evaluating
from maskwire.protocol.writer import Position, Writing
from maskwire.v1 import training_service_pb2_grpc as pb_grpc

if TYPE_CHECKING:
    from maskwire.protocol.fit import FitResult

log = logging.getLogger(__name__)
T = TypeVar("T")

CLOSE_TIMEOUT = 2.0  # seconds
EXIT_GRACE = 1.0  # for the steps in flight when an exception leaves the `with` block
_LOOK_UP = 0.5


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
    **door: Unpack[DoorOptions],
) -> Trainer:
    """Open a session with the server at `target` and return its trainer.

    `target` is HOST:PORT, or unix:PATH for a Unix socket. `name` identifies this job: started again
    under the same name it takes its own session over at once. By default it is the process's own; the
    session of another process of this machine is then taken over once that has ended. `takeover` takes
    over from any client, and goes on after HALTED. `timeout` is the deadline of one attempt of a call and
    `retry_for` how long a server that does not answer is asked again, both in seconds; `window` is the
    most steps in flight. `on_wait` is told, in words, what is being waited for, and `on_takeover` whose open
    session was taken over; both are logged as warnings by default. `door` has TLS and the
    token (`maskwire.credentials.DoorOptions`). Raises what `maskwire.errors` has, ValueError and OSError.
    """
    talk = Writing(
        target, RetryPolicy(retry_for, timeout), on_wait or log.warning, time.monotonic, name, window
    )
    trainer = Trainer(Door.of(target, **door), talk, threads=window)
    try:
        trainer._drive(talk.open(takeover=takeover))
        if talk.took_over:
            (on_takeover or log.warning)(talk.took_over)
    except BaseException:
        trainer.close()
        raise
    return trainer


def attach(
    target: str,
    *,
    retry_for: float = 300.0,
    timeout: float = 60.0,
    on_wait: Callable[[str], None] | None = None,
    **door: Unpack[DoorOptions],
) -> Client:
    """A client without a session: it evaluates, saves, lists and downloads beside the run's writer.

    The arguments are those of `connect`; nothing is sent before the first call.
    """
    talk = Asking(target, RetryPolicy(retry_for, timeout), on_wait or log.warning, time.monotonic)
    return Client(Door.of(target, **door), talk)


def result_of(future: Future[T], timeout: float | None = None) -> T:
    """The future's result.

    Looks up twice a second: the system may give a signal to another thread, and the main thread, which
    handles it, would sleep on.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    while True:
        left = _LOOK_UP if deadline is None else min(_LOOK_UP, deadline - time.monotonic())
        if future.done() or left <= 0:
            return future.result(0)
        wait([future], left)


class Client(ProcessBound):
    """The calls that need no session. Safe to use from several threads; made by `attach`.

    Belongs to the process that made it: ForkError in a forked child.
    """

    def __init__(self, door: Door, talk: Asking) -> None:
        super().__init__()
        self.target = door.target
        self._talk = talk
        self._metadata = door.metadata
        self._channel = door.channel()
        self._stub = pb_grpc.TrainingServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._changed = threading.Condition()  # held by whoever runs a conversation
        self._ended = threading.Event()  # set once the connection is closed

    def eval_loss(self, tokens: Any, **options: Unpack[EvalOptions]) -> results.EvalResult:
        """Evaluate one batch; changes nothing. `tokens` as in `Trainer.train_step`."""
        return self._drive(self._talk.eval_loss(tokens, **options))

    def evaluate(
        self,
        data: Any,
        *,
        rows: int | None = None,
        batch_size: int | None = None,
        on_progress: Evaluating | None = None,
        **options: Unpack[EvalOptions],
    ) -> results.EvalResult:
        """Evaluate a whole data set over as many calls as it takes; changes nothing.

        `data` is a `maskwire.data.TokenData`, of which every token is evaluated once, or with `rows` so many
        rows evenly spread over it; or rows as in `eval_loss`. Each call has `batch_size` rows, or as
        many as make a call short, and no more than the server's limits allow; the result is the same
        however many they are. `row_ids` are the rows'
        places in the data unless given. `on_progress(done, rows, nats_per_token)` is told how far it is.
        Raises StepMovedError when the run was trained on meanwhile.
        """
        return self._drive(
            self._talk.evaluate(data, rows=rows, batch_size=batch_size, on_progress=on_progress, **options)
        )

    def generate(self, prompts: Any = None, **options: Unpack[GenerateOptions]) -> results.GenerateResult:
        """Sample rows; changes nothing.

        `prompts`: integers [rows, columns] or a list of rows, with the mask id in the gaps that are to be
        filled, or with a `prompt_mask`; None: `count` rows of `length` of which nothing is given. More
        rows than one call may have take several; StepMovedError is raised when the run was trained on
        between them.
        """
        return self._drive(self._talk.generate(prompts, **options))

    def generate_steps(
        self, prompts: Any = None, **options: Unpack[GenerateOptions]
    ) -> Iterator[results.GenerateResult]:
        """Sample rows as `generate` does, with a result for each unmasking pass, the last one `done`.

        A reader that is slower than the device can miss passes, never the last. Leaving the iterator
        (`close`, or its end by an exception) frees the device.
        """
        return self._iterate(self._talk.generate_steps(prompts, **options))

    def checkpoint(
        self,
        name: str = "",
        *,
        labels: Mapping[str, str] | None = None,
        score: float | None = None,
        expected_lineage: int | None = None,
        expected_step: int | None = None,
    ) -> results.CheckpointInfo:
        """Save the run's state, and return once the checkpoint is durable and verified.

        `score` is what the state is worth, lower is better; of the scored ones without a name the
        server keeps the best. Refused with `expected_lineage` or `expected_step` if the state is of
        another one: a score belongs to the step that it was measured at.
        """
        return self._drive(self._talk.checkpoint(name, labels, score, expected_lineage, expected_step))

    def checkpoints(self) -> list[results.CheckpointInfo]:
        """The run's whole checkpoints, newest first."""
        return self._drive(self._talk.checkpoints())

    def list_steps(self, **options: Unpack[ListOptions]) -> Iterator[results.RecordedStep]:
        """The recorded steps of one lineage, in order; asks for a page at a time.

        `lineage` is the newest by default; `first_step` and `last_step` bound the range.
        """
        return self._iterate(self._talk.list_steps(**options))

    def steps_page(
        self, *, page_size: int = 0, page_token: str = "", **options: Unpack[ListOptions]
    ) -> results.StepsPage:
        """One page of `list_steps`, which also tells where the lineage began."""
        return self._drive(self._talk.steps_page(page_size, page_token, **options))

    def delete(self, name: str) -> None:
        """Delete a checkpoint; refused while something needs it."""
        return self._drive(self._talk.delete(name))

    def restore(self, name: str, *, expected_step: int | None = None) -> results.RestoreResult:
        """Go back to a checkpoint, on a new lineage; the run's writer must connect again.

        Refused with `expected_step` if the run is at another step.
        """
        return self._drive(self._talk.restore(name, expected_step))

    def download(
        self,
        name: str,
        folder: str | Path,
        *,
        weights: bool = False,
        ema: bool = False,
        on_progress: Progress | None = None,
    ) -> Path:
        """Fetch a checkpoint into `folder`.

        All of it; with `weights` the weights, and their moving average if one is kept; with `ema` the
        moving average alone.

        What an earlier attempt brought is kept; each file is checked against its SHA-256.
        `maskwire_server.load` reads the folder. `on_progress(here, total)` counts bytes.
        """
        return self._drive(
            self._talk.download(name, Path(folder), weights=weights, ema=ema, on_progress=on_progress)
        )

    def status(self) -> results.Status:
        """Is it stuck or working?"""
        return self._drive(self._talk.status())

    def close(self) -> None:
        """End the connection. Does nothing in a forked child: the connection is the parent's."""
        if not self._inherited:
            self._hang_up()

    def _hang_up(self) -> None:
        self._ended.set()
        self._channel.close()  # ends the calls that are left

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _drive(self, talk: Talk[T], effect: Effect | None = None) -> T:
        """Do what a conversation yields until it ends; `effect` is what it yielded last."""
        try:
            while True:
                reply = None if effect is None or isinstance(effect, Until) else self._do(effect)
                try:
                    effect = self._advance(talk, effect, reply)
                except StopIteration as done:
                    value: T = done.value
                    return value
        except BaseException:
            self._end(talk, effect.stream if isinstance(effect, Next) else None)
            raise

    def _iterate(self, talk: Talk[None]) -> Iterator[Any]:
        """What a conversation gives."""
        effect: Effect | None = None
        stream: Stream | None = None
        try:
            while True:
                reply = None if effect is None else self._do(effect)
                try:
                    effect = self._advance(talk, effect, reply)
                except StopIteration:
                    return
                if isinstance(effect, Next):
                    stream = effect.stream
                elif isinstance(effect, Give):
                    yield effect.value
        finally:
            self._end(talk, stream)

    def _advance(self, talk: Talk[Any], effect: Effect | None, reply: Any) -> Effect:
        """Run a conversation up to its next effect.

        Code that ran since the last one (a callback, or the reader of an iterator) may have forked.
        """
        self._check_process()
        with self._changed:
            if isinstance(effect, Until):
                while not self._changed.wait_for(effect.holds, _LOOK_UP):
                    pass  # as in result_of
            try:
                return talk.send(reply)
            finally:
                self._changed.notify_all()

    def _end(self, talk: Talk[Any], stream: Stream | None = None) -> None:
        """End a conversation that may have more to do. Does nothing in a forked child: it is the parent's."""
        if self._inherited:
            return
        with self._changed:
            talk.close()
            self._changed.notify_all()
        if stream is not None:
            stream.hang_up()

    def _do(self, effect: Effect) -> Any:
        if isinstance(effect, Pause):
            return self._pause(effect.seconds)
        if isinstance(effect, Work):
            return call_back("a callback", effect.act)
        if isinstance(effect, Give):
            return None
        if self._ended.is_set():
            raise MaskwireError("this client is closed; make another one")
        if isinstance(effect, Next):
            return self._next(effect.stream)
        assert isinstance(effect, Call)
        method = getattr(self._stub, effect.method)
        try:
            answer = method(effect.request, timeout=effect.timeout, metadata=self._metadata)
            if effect.take is None:
                return answer
            for message in answer:
                call_back("a callback", effect.take, message)
        except grpc.RpcError as error:
            return read_failure(error)
        return None

    def _pause(self, seconds: float) -> None:
        if self._ended.wait(seconds):
            raise UnavailableError(
                f"the client was closed while {self.target} did not answer: the outcome is unknown",
                reason="CANCELLED",
            )

    def _next(self, stream: Stream) -> Any:
        try:
            if stream.call is None:
                method = getattr(self._stub, stream.method)
                stream.call = method(stream.request, timeout=stream.timeout, metadata=self._metadata)
            return next(stream.call, None)
        except grpc.RpcError as error:
            return read_failure(error)


class Trainer(Position, Client):
    """Drives one run. Safe to use from several threads; made by `connect`.

    Leaving its `with` block ends the session: after the steps in flight, or, if an exception leaves it,
    within a second or two. An interrupt (Ctrl-C) in a call leaves the step in
    flight: it is acknowledged in the background, and the next one has the next number.
    """

    def __init__(self, door: Door, talk: Writing, *, threads: int) -> None:
        super().__init__(door, talk)
        self._writing = talk
        self._threads = ThreadPoolExecutor(threads + 1, thread_name_prefix="maskwire-step")

    def train_step(self, tokens: Any, **options: Unpack[StepOptions]) -> results.StepResult:
        """Train on one batch, and return once the step is durable.

        `tokens`: integers [rows, columns], or a list of rows that differ in length; an array, a list or
        a torch tensor.
        """
        return result_of(self.submit(tokens, **options))

    def submit(
        self, tokens: Any, *, step: int | None = None, **options: Unpack[StepOptions]
    ) -> Future[results.StepResult]:
        """Hand in one batch as `train_step` does, and return a future of its result.

        Steps are numbered in the order of the calls; one that is refused leaves its number to the next,
        unless that was handed in as a certain `step`, which it then is not. Blocks while a whole window
        is in flight, or another step takes the number of a refused one. The future cannot be cancelled:
        once sent a step may be applied, and only its answer tells.
        """
        self._check_process()
        num_tokens = self._writing.model.num_tokens
        talk = self._writing.train(codec.step_request(new_id(), tokens, num_tokens, **options), step)
        effect: Effect | None = None
        try:
            while effect is None or isinstance(effect, Until):
                effect = self._advance(talk, effect, None)
            return self._apart(talk, effect)
        except BaseException:
            self._end(talk)
            raise

    def _finish(self, talk: Talk[T], effect: Effect | None, future: Future[T]) -> None:
        try:
            future.set_result(self._drive(talk, effect))
        except BaseException as error:
            future.set_exception(error)

    def restore(self, name: str, *, expected_step: int | None = None) -> results.RestoreResult:
        """Go back to a checkpoint, on a new lineage, and go on from there as its writer.

        Steps in flight come first. Refused with `expected_step` if the run is at another step.
        """
        # Apart, so that Ctrl-C leaves no trainer behind whose session a restore has used up.
        return result_of(self._apart(self._writing.restore(name, expected_step)))

    def _apart(self, talk: Talk[T], effect: Effect | None = None) -> Future[T]:
        """Have a conversation go on in the background."""
        self._check_process()
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()
        self._threads.submit(self._finish, talk, effect, future)
        return future

    def settle(self) -> None:
        """Wait until no step is in flight; whether they were refused, their futures tell."""
        self._drive(self._writing.settle())

    def use_tokenizer(self, tokenizer: str) -> None:
        """Keep with the run what its ids stand for; TokenizerError if it was begun with another.

        `fit` does it for data that knows its `tokenizer`.
        """
        self._drive(self._writing.use_tokenizer(tokenizer))

    def use_data(self, fingerprint: Mapping[str, str], *, allow_changed: bool = False) -> None:
        """Keep with the run the fingerprint of its data; DataMismatchError if another one is kept.

        With `allow_changed` it takes the other one's place. `fit` does it for data that has a
        `fingerprint()`.
        """
        self._drive(self._writing.use_data(fingerprint, allow_changed=allow_changed))

    def mark_evaluated(self) -> None:
        """Keep with the run that the present step is evaluated, and the result seen; `fit` does it."""
        self._drive(self._writing.mark_evaluated())

    def fit(self, data: Any, *, until_step: int, **options: Any) -> FitResult:
        """Train on `data.batch(step)` up to an absolute step; see `maskwire.protocol.fit.fit`."""
        from maskwire.protocol.fit import fit

        return fit(self, data, until_step=until_step, **options)

    def close(self, grace: float | None = None) -> None:
        """End the session and the connection.

        Steps in flight are waited for, at most `grace` seconds if given; one that is left then may
        or may not be applied.
        """
        self._close(grace, patient=True)

    def _close(self, grace: float | None, *, patient: bool) -> None:
        """End the session and the connection; unless `patient`, a server out of reach is not waited for."""
        writing = self._writing
        if self._inherited or writing.closed:
            return
        with self._changed:
            writing.closed = True
            self._changed.notify_all()

        def over() -> bool:
            return not writing.in_flight or (writing.out_of_reach and not patient)

        try:
            with self._changed:
                self._changed.wait_for(over, grace)
            farewell = writing.farewell()
            if farewell is not None:
                self._stub.CloseSession(farewell, timeout=CLOSE_TIMEOUT, metadata=self._metadata)
        except grpc.RpcError:
            log.debug("the session was not closed; it ends by itself when idle", exc_info=True)
        finally:
            self._hang_up()
            self._threads.shutdown(wait=False, cancel_futures=True)

    def _pause(self, seconds: float) -> None:
        super()._pause(seconds)
        if self._writing.out_of_reach and self._exiting():
            raise UnavailableError(
                f"the program ended while {self.target} did not answer: the outcome is unknown",
                reason="UNAVAILABLE",
            )

    def _exiting(self) -> bool:
        """Whether the interpreter exits: it joins our threads then, and the executor takes nothing more."""
        try:
            self._threads.submit(int)
        except RuntimeError:
            return True
        return False

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            # The traceback must not wait for a server that may be gone; who interrupts waits for nothing.
            quick = issubclass(kind, KeyboardInterrupt | SystemExit)
            self._close(0 if quick else EXIT_GRACE, patient=False)
