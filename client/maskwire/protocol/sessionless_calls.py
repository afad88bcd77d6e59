"""The calls of a client that need no session, as operations.

The methods of the blocking and the asyncio client take their signatures and docstrings from here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, Unpack

from maskwire import arguments, results
from maskwire.errors import CheckpointError, Failure, UnavailableError, UnimplementedError
from maskwire.protocol import codec, status_codec
from maskwire.protocol.download import Download, DownloadProgress
from maskwire.protocol.effects import Emit, Operation, Pause, Receive, Work
from maskwire.protocol.evaluation_plan import EvaluationPlan, EvaluationProgress, EvaluationSum
from maskwire.protocol.generation_plan import GeneratedRows, GenerationPlan, rows_of
from maskwire.protocol.limits import Bounds
from maskwire.protocol.option_types import EvalOptions, GenerateOptions, ListOptions
from maskwire.protocol.retried_calls import RetriedCalls, new_id
from maskwire.v1 import training_service_pb2 as pb

T = TypeVar("T")


def _same(value: T) -> T:
    return value


class Calls(RetriedCalls):
    """Operations of a client without a session. Each call is retried until the server answers."""

    def eval_loss(self, tokens: Any, **options: Unpack[EvalOptions]) -> Operation[results.EvalResult]:
        """Evaluate one batch. Does not change the run.

        tokens: Rows of token ids, as in `Trainer.train_step`.

        Raises DivergedError if the weights give losses that are not finite, and RequestError with the reason
        READ_TOO_LONG if a training step or a save had to wait too long for the evaluation.
        """
        return (yield from self._evaluated(codec.eval_request(tokens, **options)))

    def _evaluated(self, request: pb.EvalLossRequest) -> Operation[results.EvalResult]:
        return codec.read_eval((yield from self._ask("EvalLoss", lambda: request)))

    def evaluate(
        self,
        data: Any,
        *,
        rows: int | None = None,
        batch_size: int | None = None,
        on_progress: EvaluationProgress | None = None,
        **options: Unpack[EvalOptions],
    ) -> Operation[results.EvalResult]:
        """Evaluate a data set with as many calls as it needs. Does not change the run.

        data: A `maskwire.data.TokenData`, or rows as in `eval_loss`.
        rows: Evaluate only this many rows, spread evenly over a TokenData; None: evaluate every token once.
        batch_size: The number of rows per call, up to the server's limits; None: as many as keep a call
            short. The result does not depend on it.
        on_progress: `on_progress(rows_done, rows, nats_per_token)` is called after each call. The asyncio
            client calls it on another thread.

        By default, `row_ids` are the rows' positions in the data. Raises StepMovedError if the run's step
        changes meanwhile, ValueError if every row consists of a prompt only, and the errors of `eval_loss`.
        """
        if not hasattr(data, "batch"):  # a TokenData has one
            arguments.check_rows(data, "data")
        plan = EvaluationPlan(data, rows=rows, batch_size=batch_size, **options)
        total = EvaluationSum(plan.prompt_only_rows)
        requests = plan.calls((yield from self._bounds()))
        # Reading the data takes time, and the callback may call the client.
        while (request := (yield Work(partial(next, requests, None)))) is not None:
            total.add((yield from self._evaluated(request)))
            if on_progress is not None:
                yield Work(partial(on_progress, total.rows, plan.rows, total.nats_per_token))
        return total.result(plan.text_bytes)

    def generate(
        self, prompts: Any = None, **options: Unpack[GenerateOptions]
    ) -> Operation[results.GenerateResult]:
        """Sample rows, or fill the gaps in prompts. Does not change the run.

        prompts: Integers [rows, columns] or a list of rows that may differ in length, with the mask id at the
            positions to fill or with a `prompt_mask`. None: `count` rows of `length` tokens are sampled.

        If the rows exceed what the server accepts in one call, several calls are made, and StepMovedError is
        raised if the run's step changes between them. Raises DivergedError if the weights give logits that
        are not finite, and RequestError with the reason READ_TOO_LONG if a training step or a save had to
        wait too long for the generation.
        """
        return (yield from self._sample(codec.generate_request(prompts, **options)))

    def generate_steps(
        self, prompts: Any = None, **options: Unpack[GenerateOptions]
    ) -> Operation[results.GenerateResult]:
        """Generate as `generate` does, and iterate over the rows after each unmasking pass.

        prompts: As in `generate`.

        Only the last result has `done` set. A reader that is slower than the device can miss passes, but
        never the last one. The server stops sampling when the iterator is closed.
        """
        return (yield from self._sample(codec.generate_request(prompts, stream_steps=True, **options)))

    def _sample(self, request: pb.GenerateRequest) -> Operation[results.GenerateResult]:
        """Sample the rows of a request with as many calls as the server's limits require."""
        plan = None
        if rows_of(request) > 1:
            bounds = yield from self._bounds()
            if 0 <= request.length <= bounds.model.max_seq_len:
                plan = GenerationPlan(request, bounds)
        if plan is None or plan.fits:
            return (yield from self._generate(request, _same))
        rows = GeneratedRows(plan)
        for part in plan.parts():
            found = yield from self._generate(part.request, partial(rows.take, part))
        return found

    def _generate(
        self,
        request: pb.GenerateRequest,
        merge: Callable[[results.GenerateResult], results.GenerateResult],
    ) -> Operation[results.GenerateResult]:
        """Make one call of a generation. `merge` adds the call's rows to the rows of the other calls."""
        # Only the wait for the first message may be retried: afterwards the weights may have changed.
        stream, response = yield from self._ask("Generate", lambda: request, stream=True)
        while response is not None:
            found = merge(codec.read_generation(response))
            if request.stream_steps:
                yield Emit(found)
            if response.done:
                return found
            response = yield Receive(stream)
            if isinstance(response, Failure):
                raise response.error
        raise UnavailableError(f"{self.target} ended the generation before its last pass; repeat the call")

    def checkpoint(
        self,
        name: str = "",
        *,
        labels: Mapping[str, str] | None = None,
        score: float | None = None,
        expected_lineage: int | None = None,
        expected_step: int | None = None,
    ) -> Operation[results.CheckpointInfo]:
        """Save a checkpoint of the run, and return its description once it is durable and verified.

        name: At most 64 lower-case letters, digits, _ and -. Empty: the server names the checkpoint after the
            step, and may delete it once newer ones exist.
        labels: Texts to store with the checkpoint, by name: at most 32 entries of at most 256 characters.
        score: A rating of the state, where lower is better. The server keeps the checkpoint with the best
            score among those without a name.
        expected_lineage, expected_step: Raise WrongRunError if the run is at another lineage or step. This
            ensures that a score is saved with the step at which it was measured.

        Raises CheckpointError if the name is taken, or if the checkpoint could not be written.
        """
        arguments.check_str("name", name)
        arguments.check_labels(labels)
        arguments.check_expected(expected_lineage=expected_lineage, expected_step=expected_step)
        if score is not None:
            arguments.check_real("score", score, ", or None")
        request = pb.CheckpointRequest(
            request_id=new_id(),
            name=name,
            labels=labels,
            score=score,
            expected_lineage=expected_lineage,
            expected_step=expected_step,
        )
        response = yield from self._ask("Checkpoint", lambda: request)
        return codec.read_checkpoint(response.checkpoint)

    def checkpoints(self) -> Operation[list[results.CheckpointInfo]]:
        """List the run's complete checkpoints, newest first."""
        found: list[results.CheckpointInfo] = []
        request = pb.ListCheckpointsRequest()
        while True:
            response = yield from self._ask("ListCheckpoints", lambda: request)
            found += [codec.read_checkpoint(info) for info in response.checkpoints]
            if not response.next_page_token:
                return found
            request.page_token = response.next_page_token

    def list_steps(self, **options: Unpack[ListOptions]) -> Operation[results.RecordedStep | None]:
        """Iterate over the recorded steps of one lineage, in order. Requests one page at a time.

        Raises WrongRunError if `run_id` is given and the server has another run, and UnimplementedError if
        the server is too old to list steps.
        """
        token = ""
        while True:
            page = yield from self.steps_page(page_token=token, **options)
            for step in page.steps:
                yield Emit(step)
            token = page.next_page_token
            if not token:
                return None

    def steps_page(
        self, *, page_size: int = 0, page_token: str = "", **options: Unpack[ListOptions]
    ) -> Operation[results.StepsPage]:
        """Return one page of the steps that `list_steps` iterates over, and where their lineage started.

        page_size: The most steps to return, at most 250; 0: 100.
        page_token: The `next_page_token` of the previous page; empty: the first page.
        """
        request = pb.ListStepsRequest(page_size=page_size, page_token=page_token, **options)
        return codec.read_steps((yield from self._ask("ListSteps", lambda: request)))

    def delete(self, name: str) -> Operation[None]:
        """Delete a checkpoint.

        name: The checkpoint's name.

        Raises CheckpointError if there is no such checkpoint, or while the checkpoint is needed for recovery,
        by a lineage or by a download.
        """
        arguments.check_str("name", name)
        yield from self._ask("DeleteCheckpoint", lambda: pb.DeleteCheckpointRequest(name=name))

    def restore(self, name: str, *, expected_step: int | None = None) -> Operation[results.RestoreResult]:
        """Restore a checkpoint as the start of a new lineage. The run's writer must then connect again.

        name: The checkpoint's name.
        expected_step: Raise WrongRunError if the run is at another step; None: restore at any step.

        Raises CheckpointError if there is no such checkpoint, or if it is damaged.
        """
        arguments.check_str("name", name)
        arguments.check_expected(expected_step=expected_step)
        request = pb.RestoreCheckpointRequest(request_id=new_id(), name=name, expected_step=expected_step)
        response = yield from self._ask("RestoreCheckpoint", lambda: request)
        return results.RestoreResult(response.lineage, response.step, response.digest)

    def download(
        self,
        name: str,
        folder: str | Path,
        *,
        weights: bool = False,
        ema: bool = False,
        on_progress: DownloadProgress | None = None,
    ) -> Operation[Path]:
        """Download a checkpoint into a folder, which `maskwire_server.load` can read, and return the folder.

        name: The checkpoint's name.
        folder: The folder to write to, which is created if it does not exist.
        weights: Download only the weights, and their moving average if the run keeps one.
        ema: Download only the moving average of the weights.
        on_progress: `on_progress(bytes_done, bytes_total)` is called for each chunk.

        An interrupted download resumes where it stopped. Each file is checked against its SHA-256. Raises
        CheckpointError if there is no such checkpoint or a file is damaged, and OSError if the folder cannot
        be written to.
        """
        arguments.check_str("name", name)
        arguments.check_function("on_progress", on_progress)
        listed = yield from self.checkpoints()
        info = next((info for info in listed if info.name == name), None)
        if info is None:
            names = ", ".join(info.name for info in listed[:3]) or "none"
            raise CheckpointError(
                f"no checkpoint is named {name!r}; the newest are: {names}", reason="CHECKPOINT_NOT_FOUND"
            )
        download = Download(info, Path(folder), weights=weights, ema=ema, on_progress=on_progress)
        try:
            for file in (yield Work(download.missing)):
                while not file.complete:
                    before = file.size
                    yield from self._ask(
                        "DownloadCheckpoint",
                        file.request,
                        on_message=file.append,
                        progress=partial(getattr, file, "size"),
                    )
                    if file.size == before:
                        raise CheckpointError(
                            f"{self.target} sent no further bytes of {file.name}; download again to resume"
                        )
        finally:
            download.finish()
        return download.folder

    def tokenizer_of_run(self) -> Operation[results.TokenizerDescription | None]:
        """Return the tokenizer stored with the run; None if there is none, or if the server is too old."""
        try:
            response = yield from self._ask("GetTokenizer", pb.GetTokenizerRequest)
        except UnimplementedError:
            return None
        return codec.read_tokenizer(response)

    def status(self) -> Operation[results.Status]:
        """Return the run's state, its progress and what it is waiting for."""
        return status_codec.read_status((yield from self._ask("GetStatus", pb.GetStatusRequest)))

    def _bounds(self) -> Operation[Bounds]:
        """Return the server's limits on one call. Waits until the server has built its model."""
        began = self._clock()
        while True:
            found = yield from self.status()
            if found.model is not None:
                return Bounds(found.limits, found.model)
            if self._clock() - began >= self._policy.retry_for:
                raise UnavailableError(
                    f"{self.target} is still building the model; wait, then call again", reason="RECOVERING"
                )
            yield Pause(self._policy.longest_wait)
