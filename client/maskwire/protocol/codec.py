"""Conversion of requests and answers between Python values and the messages of `maskwire.v1`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC
from typing import Any

import numpy as np
from google.protobuf.descriptor import FieldDescriptor

from maskwire import arguments, results
from maskwire.protocol.token_batch import decode_batch, encode_batch, encode_batches, ids_of
from maskwire.v1 import training_service_pb2 as pb
from maskwire.v1.digest import DigestVersion, payload_hash

_OF_BATCH = ("lengths", "prompt_mask", "segment_ids")


def _names(kind: Any, *own: str) -> list[str]:
    """Return the names of a call's options: its message's fields, except `own`, which the client sets."""
    return [*_OF_BATCH, *(name for name in kind.DESCRIPTOR.fields_by_name if name not in own)]


STEP_OPTIONS = [*_names(pb.TrainStepRequest, "session", "step", "request_id", "batch"), "batches"]
EVAL_OPTIONS = _names(pb.EvalLossRequest, "batch")
GENERATE_OPTIONS = [
    name for name in _names(pb.GenerateRequest, "prompts", "stream_steps") if name != "segment_ids"
]


_NUMBERS = {
    FieldDescriptor.CPPTYPE_INT32,
    FieldDescriptor.CPPTYPE_INT64,
    FieldDescriptor.CPPTYPE_DOUBLE,
}


def _fill(kind: Any, **fields: Any) -> Any:
    """Make a message. Raises TypeError or ValueError, naming the field, if a field cannot hold its value."""
    for name, value in fields.items():
        field = kind.DESCRIPTOR.fields_by_name[name]
        if isinstance(value, bool | np.bool_) and field.cpp_type in _NUMBERS:
            raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        return kind(**fields)
    except (TypeError, ValueError) as error:
        for name, value in fields.items():
            try:
                kind(**{name: value})
            except (TypeError, ValueError):
                raise type(error)(f"{name} cannot be {value!r}: {error}") from None
        raise


def step_request(
    request_id: str,
    tokens: Any,
    num_tokens: int = 0,
    /,
    *,
    batches: Sequence[Any] | None = None,
    lengths: Any = None,
    prompt_mask: Any = None,
    segment_ids: Any = None,
    **modes: Any,
) -> pb.TrainStepRequest:
    """Make the request to train on one batch, or on several batches as one.

    `num_tokens` is the size of the vocabulary, 0 if not known. `modes` are fields of TrainStepRequest. Raises
    TypeError unless either `tokens` or `batches` is given.
    """
    arguments.check_options("train_step", modes, STEP_OPTIONS)
    about = {"lengths": lengths, "prompt_mask": prompt_mask, "segment_ids": segment_ids}
    request: pb.TrainStepRequest = _fill(pb.TrainStepRequest, request_id=request_id, **modes)
    if batches is not None:
        if tokens is not None:
            raise TypeError("train_step() takes tokens or batches, got both: add the tokens to batches")
        arguments.check_not_given("batches", **about)
        encode_batches(batches, num_tokens, request.batch)
    elif tokens is None:
        raise TypeError("train_step() needs token ids, but tokens is None: pass tokens, or batches=[...]")
    else:
        encode_batch(tokens, num_tokens, **about, into=request.batch)
    return request


def eval_request(
    tokens: Any, *, lengths: Any = None, prompt_mask: Any = None, segment_ids: Any = None, **options: Any
) -> pb.EvalLossRequest:
    """Make the request to evaluate one batch; `options` are those of `maskwire.Client.eval_loss`."""
    arguments.check_options("eval_loss", options, EVAL_OPTIONS)
    chosen: dict[str, Any] = {}
    for name, enum in (("estimator", pb.Estimator), ("chain_order", pb.ChainOrder)):
        value = options.pop(name, None)
        if value is not None:
            chosen[name] = _number(name, value, enum)
    batch = encode_batch(tokens, lengths=lengths, prompt_mask=prompt_mask, segment_ids=segment_ids)
    request: pb.EvalLossRequest = _fill(pb.EvalLossRequest, batch=batch, **chosen, **options)
    return request


def generate_request(
    prompts: Any = None,
    *,
    lengths: Any = None,
    prompt_mask: Any = None,
    count: int | None = None,
    order: str = "random",
    self_cond_mode: str = "two_pass",
    stream_steps: bool = False,
    **options: Any,
) -> pb.GenerateRequest:
    """Make the request to sample rows. Raises ValueError or TypeError for unknown values or options."""
    arguments.check_options("generate", options, GENERATE_OPTIONS)
    batch = None
    if prompts is not None:
        batch = encode_batch(prompts, lengths=lengths, prompt_mask=prompt_mask)
        count = count or 0
    elif lengths is not None or prompt_mask is not None:
        raise ValueError(
            "lengths and prompt_mask need prompts, but prompts is None: pass prompts, or leave both out"
        )
    request: pb.GenerateRequest = _fill(
        pb.GenerateRequest,
        prompts=batch,
        count=1 if count is None else count,
        order=_number("order", order, pb.GenerationOrder),
        self_cond_mode=_number("self_cond_mode", self_cond_mode, pb.SelfCondMode),
        stream_steps=stream_steps,
        **options,
    )
    return request


_PREFIXES = {
    "estimator": "ESTIMATOR_",
    "chain_order": "CHAIN_ORDER_",
    "order": "GENERATION_ORDER_",
    "self_cond_mode": "SELF_COND_MODE_",
}


def _number(name: str, value: str, enum: Any) -> Any:
    """Return an enum's number by its name in lower case, without the prefix. Raises ValueError if unknown."""
    prefix = _PREFIXES[name]
    names: list[str] = enum.keys()
    known = [each.removeprefix(prefix).lower() for each in names[1:]]
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    return enum.Value(prefix + value.upper())


def hash_of(request: pb.TrainStepRequest, version: DigestVersion) -> bytes:
    """Return the payload hash of a step request. Raises ValueError for an id that the version cannot hash.

    The server refuses a request with such an id, so a request may be sent before it is hashed.
    """
    batch = request.batch
    return payload_hash(
        ids_of(batch),
        version,
        rows=batch.shape[0],
        columns=batch.shape[1],
        lengths=list(batch.lengths),
        prompt=batch.prompt_mask,
        segments=list(batch.segment_ids),
        only_train_generator=request.only_train_generator,
        only_train_critic=request.only_train_critic,
        temperature=_given(request, "generator_sample_temperature"),
        learning_rate=_given(request, "learning_rate"),
    )


def _given(message: Any, name: str) -> Any:
    return getattr(message, name) if message.HasField(name) else None


def read_losses(losses: pb.Losses) -> results.Losses:
    """Decode losses. A loss that the message does not set is None."""
    return results.Losses(losses.loss, _given(losses, "generator_loss"), _given(losses, "critic_loss"))


def read_step(response: pb.TrainStepResponse) -> results.StepResult:
    """Decode the answer to a step."""
    metrics = response.metrics
    return results.StepResult(
        step=response.step,
        losses=read_losses(response.losses),
        outcome=results.Outcome(response.outcome),
        replayed=response.replayed,
        digest=response.digest,
        metrics=results.StepMetrics(
            gradient_norm=_given(metrics, "gradient_norm"),
            learning_rate=metrics.learning_rate,
            masked_tokens=metrics.masked_tokens,
            maskable_tokens=metrics.maskable_tokens,
            queue_seconds=metrics.queue_seconds,
            compute_seconds=metrics.compute_seconds,
            commit_seconds=metrics.commit_seconds,
        ),
    )


def read_tokenizer(response: pb.GetTokenizerResponse) -> results.TokenizerDescription | None:
    """Decode the tokenizer that is stored with the run; None if there is none."""
    if not response.HasField("tokenizer"):
        return None
    found = response.tokenizer
    return results.TokenizerDescription(
        found.name, found.file, tuple(found.document_start), tuple(found.document_end)
    )


def read_steps(response: pb.ListStepsResponse) -> results.StepsPage:
    """Decode a page of recorded steps."""
    return results.StepsPage(
        run_id=response.run_id,
        lineage=response.lineage,
        parent_lineage=response.parent_lineage,
        start_step=response.start_step,
        checkpoint=response.checkpoint,
        steps=tuple(
            results.RecordedStep(
                response.lineage,
                step.step,
                results.Outcome(step.outcome),
                read_losses(step.losses),
                _given(step, "gradient_norm"),
                step.digest,
            )
            for step in response.steps
        ),
        next_page_token=response.next_page_token,
    )


def read_eval(response: pb.EvalLossResponse) -> results.EvalResult:
    """Decode the answer to an evaluation."""
    return results.EvalResult(
        losses=read_losses(response.losses),
        nats_per_token=response.nats_per_token,
        bits_per_token=response.bits_per_token,
        perplexity=response.perplexity,
        standard_error=_given(response, "standard_error"),
        monte_carlo_error=_given(response, "monte_carlo_error"),
        accuracy=response.accuracy,
        critic_accuracy=_given(response, "critic_accuracy"),
        by_masked_fraction=tuple(
            results.FractionResult(
                part.masked_fraction_min,
                part.masked_fraction_max,
                _given(part, "nats_per_masked_token"),
                _given(part, "accuracy"),
                part.masked_tokens,
            )
            for part in response.by_masked_fraction
        ),
        rows=tuple(
            results.RowResult(row.row_id, row.nats, row.tokens, _given(row, "half_difference_nats"))
            for row in response.rows
        ),
        bits_per_byte=_given(response, "bits_per_byte"),
        tokens=response.tokens,
        step=response.step,
        digest=response.digest,
        ema_weights=response.ema_weights,
        draws=response.draws,
        sums=results.LossSums(
            response.sums.generator_nats,
            response.sums.generator_weight,
            _given(response.sums, "critic_nats"),
            _given(response.sums, "critic_weight"),
            response.sums.critic_loss_weight,
        ),
    )


def read_generation(response: pb.GenerateResponse) -> results.GenerateResult:
    """Decode sampled rows: the finished rows, or the state of the rows after an unmasking pass."""
    return results.GenerateResult(
        tokens=decode_batch(response.tokens),
        unmasking_step=response.unmasking_step,
        done=response.done,
        still_masked=tuple(response.still_masked),
        step=response.step,
        digest=response.digest,
        ema_weights=response.ema_weights,
    )


def read_model(model: pb.ModelInfo) -> results.ModelInfo:
    """Decode the description of the served model."""
    return results.ModelInfo(
        model.num_tokens,
        model.mask_id,
        _given(model, "pad_id"),
        model.max_seq_len,
        model.parameters,
        model.objective,
        model.loss_is_bound,
        model.has_critic,
        model.self_cond,
    )


def read_limits(limits: pb.Limits) -> results.Limits:
    """Decode the server's limits."""
    return results.Limits(
        limits.max_batch_tokens,
        limits.max_message_bytes,
        limits.window,
        limits.max_draws,
        limits.max_generation_steps,
        limits.max_read_tokens,
    )


def read_checkpoint(info: pb.CheckpointInfo) -> results.CheckpointInfo:
    """Decode the description of a complete checkpoint."""
    return results.CheckpointInfo(
        name=info.name,
        lineage=info.lineage,
        step=info.step,
        digest=info.digest,
        size_bytes=info.size_bytes,
        files={file.name: results.FileInfo(file.size_bytes, file.sha256) for file in info.files},
        created=info.create_time.ToDatetime(tzinfo=UTC),
        labels=dict(info.labels),
        score=info.score if info.HasField("score") else None,
    )


def read_inexact_replays(replays: Iterable[pb.InexactReplay]) -> tuple[results.InexactReplay, ...]:
    """Decode the ranges of steps that recovery recomputed with results that were close but not equal."""
    return tuple(
        results.InexactReplay(replay.lineage, replay.first_step, replay.last_step, replay.accepted)
        for replay in replays
    )
