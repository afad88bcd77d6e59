"""Decodes and checks requests: from the proto's messages to the engine's values.

Every field is checked here, before the request reaches the engine. A refusal names the field, its value
and the valid values.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from maskwire.v1 import training_service_pb2 as pb
from maskwire.v1.values import Limits, ModelInfo, TokenizerDescription
from maskwire_server.batch import Batch, Modes, Payload
from maskwire_server.errors import invalid_field
from maskwire_server.position import HistoryPosition
from maskwire_server.requests import (
    AUTOMATIC_NAME,
    CHECKPOINT_NAME,
    DownloadRequest,
    EvalRequest,
    RestoreRequest,
    SaveRequest,
    SessionRef,
    SessionRequest,
    StepRequest,
)
from maskwire_server.results import EvalOptions
from maskwire_server.rpc import work_limits
from maskwire_server.rpc.token_batch import read_batch
from maskwire_server.session_holder import ClientProcess

DEFAULT_DRAWS = 16
MAX_NAME = 128
MAX_DATA_PARTS, MAX_DIGEST_VERSIONS = 16, 16
MAX_SPECIAL_IDS = 64
MAX_LABELS, MAX_LABEL = 32, 256


def read_step(request: pb.TrainStepRequest, info: ModelInfo, limits: Limits) -> StepRequest:
    """Decode and check a TrainStep request. Raises Refused."""
    _check_modes(request, info)
    rate = request.learning_rate if request.HasField("learning_rate") else None
    if rate is not None and not (math.isfinite(rate) and rate >= 0):
        raise invalid_field("learning_rate", f"learning_rate must be finite and at least 0, got {rate}")
    if rate is not None:
        rate += 0.0  # turns -0.0 into 0.0, so that both are hashed and journalled alike
    step = request.step if request.HasField("step") else None
    if step is not None and not 1 <= step < 2**62:
        raise invalid_field("step", f"step must be at least 1 and below 2^62, got {step}", value=step)
    modes = Modes(
        request.only_train_generator,
        request.only_train_critic,
        _temperature(request),
        rate,
    )
    if not request.HasField("batch"):
        raise invalid_field("batch", "batch is missing: send a TokenBatch")
    return StepRequest(
        Payload(read_batch(request.batch, info, limits), modes),
        session=read_session(request.session) if request.HasField("session") else None,
        step=step,
        request_id=_name("request_id", request.request_id),
    )


def read_eval(request: pb.EvalLossRequest, info: ModelInfo, limits: Limits) -> EvalRequest:
    """Decode and check an EvalLoss request. Raises Refused."""
    _check_modes(request, info)
    if request.estimator not in pb.Estimator.values():
        raise invalid_field("estimator", f"estimator must be a value of Estimator, got {request.estimator}")
    default_draws = min(DEFAULT_DRAWS, limits.max_draws)
    if not 0 <= request.draws <= limits.max_draws:
        raise invalid_field(
            "draws",
            f"draws must be 1 to {limits.max_draws} (serve.max_draws), or 0 for the default of "
            f"{default_draws}, got {request.draws}",
            draws=request.draws,
            max_draws=limits.max_draws,
        )
    if not request.HasField("batch"):
        raise invalid_field("batch", "batch is missing: send a TokenBatch")
    batch = read_batch(request.batch, info, limits)
    if request.row_ids and len(request.row_ids) != batch.sequences:
        each = "row" if batch.segment_ids is None else "segment"
        raise invalid_field(
            "row_ids",
            f"row_ids must have one id per {each} ({batch.sequences}) or none, got {len(request.row_ids)}",
        )
    text_bytes = request.text_bytes if request.HasField("text_bytes") else None
    if text_bytes is not None and text_bytes < 1:
        raise invalid_field("text_bytes", f"text_bytes must be at least 1 if it is set, got {text_bytes}")
    chain_rule = request.estimator == pb.ESTIMATOR_CHAIN_RULE
    _check_chain(request, chain_rule=chain_rule)
    draws = request.draws or (1 if chain_rule else default_draws)
    _check_work(request, batch, draws, info, limits, chain_rule=chain_rule)
    options = EvalOptions(
        row_ids=tuple(request.row_ids) or tuple(range(batch.sequences)),
        draws=draws,
        seed=request.seed,
        only_train_generator=request.only_train_generator,
        only_train_critic=request.only_train_critic,
        generator_sample_temperature=_temperature(request),
        raw_weights=request.raw_weights,
        text_bytes=text_bytes,
        chain_rule=chain_rule,
        random_order=request.chain_order == pb.CHAIN_ORDER_RANDOM,
    )
    return EvalRequest(batch, options)


def _check_chain(request: pb.EvalLossRequest, *, chain_rule: bool) -> None:
    order = request.chain_order
    if order not in pb.ChainOrder.values():
        raise invalid_field("chain_order", f"chain_order must be a value of ChainOrder, got {order}")
    if not chain_rule:
        if order != pb.CHAIN_ORDER_UNSPECIFIED:
            raise invalid_field(
                "chain_order",
                f"chain_order needs ESTIMATOR_CHAIN_RULE, got {pb.ChainOrder.Name(order)} with another "
                "estimator; use this estimator, or leave chain_order out",
            )
        return
    if request.only_train_critic:
        raise invalid_field(
            "only_train_critic",
            "only_train_critic must not be set with ESTIMATOR_CHAIN_RULE, which uses no critic; leave it out",
        )
    if order != pb.CHAIN_ORDER_RANDOM and request.draws > 1:
        raise invalid_field(
            "draws",
            f"draws must be 0 or 1 for the left-to-right order (there is only one such order), got "
            f"{request.draws}; set chain_order to CHAIN_ORDER_RANDOM for several draws",
        )


def _check_work(
    request: pb.EvalLossRequest,
    batch: Batch,
    draws: int,
    info: ModelInfo,
    limits: Limits,
    *,
    chain_rule: bool,
) -> None:
    shapes = [(batch.rows, batch.columns)]
    if batch.segment_ids is not None:
        shapes = [(count, size) for size, count in Counter(batch.segments()[1].tolist()).items()]
    tokens = sum(
        work_limits.evaluation_tokens(
            rows,
            columns,
            draws,
            info,
            chain_rule=chain_rule,
            only_train_generator=request.only_train_generator,
        )
        for rows, columns in shapes
    )
    words = f"{batch.rows} x {batch.columns} tokens with {draws} draws"
    work_limits.check(
        "batch.shape",
        f"{words} by the chain rule" if chain_rule else words,
        tokens,
        limits,
        "send fewer rows, shorter ones or fewer draws",
    )


def read_session(session: pb.SessionRef) -> SessionRef:
    """Decode the session that a request names."""
    return SessionRef(session.run_id, session.lineage, session.epoch)


def read_open(request: pb.OpenSessionRequest) -> SessionRequest:
    """Decode and check an OpenSession request. Raises Refused."""
    history = None
    if request.HasField("history"):
        sent = request.history
        if len(sent.digest) != 32:
            raise invalid_field(
                "history.digest", f"history.digest must have 32 bytes, got {len(sent.digest)} bytes"
            )
        history = HistoryPosition(sent.run_id, sent.lineage, sent.step, sent.digest)
    if request.evaluated_step < 0:
        raise invalid_field(
            "evaluated_step", f"evaluated_step must be at least 0, got {request.evaluated_step}"
        )
    return SessionRequest(
        client_name=_name("client_name", request.client_name, required=True) or "",
        nonce=_name("nonce", request.nonce, required=True) or "",
        takeover=request.takeover,
        held_epoch=request.held_epoch if request.HasField("held_epoch") else None,
        history=history,
        tokenizer=_name("tokenizer", request.tokenizer) or "",
        process=_process(request.process) if request.HasField("process") else None,
        gone_epoch=request.gone_epoch if request.HasField("gone_epoch") else None,
        evaluated_step=request.evaluated_step,
        data=_read_fingerprint(request.data),
        allow_changed_data=request.allow_changed_data,
        digest_versions=_digest_versions(request.digest_versions),
    )


def read_tokenizer(request: pb.KeepTokenizerRequest) -> TokenizerDescription:
    """Decode and check a KeepTokenizer request. Raises Refused."""
    sent = request.tokenizer
    for name in ("document_start", "document_end"):
        count = len(getattr(sent, name))
        if count > MAX_SPECIAL_IDS:
            raise invalid_field(
                f"tokenizer.{name}", f"tokenizer.{name} must have at most {MAX_SPECIAL_IDS} ids, got {count}"
            )
    return TokenizerDescription(
        _name("tokenizer.name", sent.name, required=True) or "",
        sent.file,
        tuple(sent.document_start),
        tuple(sent.document_end),
    )


def _digest_versions(sent: Sequence[int]) -> tuple[int, ...]:
    # Version 0.1 of the client sends no versions, and supports digest version 1 only.
    if len(sent) > MAX_DIGEST_VERSIONS:
        raise invalid_field(
            "digest_versions",
            f"digest_versions must have at most {MAX_DIGEST_VERSIONS} entries, got {len(sent)}",
        )
    return tuple(sent) or (1,)


def _process(sent: pb.ClientProcess) -> ClientProcess:
    texts = {
        name: _name(f"process.{name}", getattr(sent, name)) or ""
        for name in ("host", "boot_id", "pid_namespace", "job")
    }
    return ClientProcess(process_id=sent.process_id, start_time_ticks=sent.start_time_ticks, **texts)


def _read_fingerprint(sent: Mapping[str, str]) -> dict[str, str]:
    if len(sent) > MAX_DATA_PARTS:
        raise invalid_field("data", f"data must have at most {MAX_DATA_PARTS} parts, got {len(sent)}")
    for part, value in sent.items():
        _name("data", part, required=True)
        _name("data", value, required=True)
    return dict(sent)


def read_save(request: pb.CheckpointRequest) -> SaveRequest:
    """Decode and check a Checkpoint request. Raises Refused."""
    if len(request.labels) > MAX_LABELS:
        raise invalid_field(
            "labels", f"labels must have at most {MAX_LABELS} entries, got {len(request.labels)}"
        )
    for key, value in request.labels.items():
        if max(len(key), len(value)) > MAX_LABEL:
            raise invalid_field(
                "labels",
                f"keys and values of labels must have at most {MAX_LABEL} characters; "
                f"label {key[:32]!r} is longer",
            )
    name = read_checkpoint_name(request.name) if request.name else None
    if name is not None and AUTOMATIC_NAME.fullmatch(name):
        raise invalid_field(
            "name",
            f"name {name!r} is reserved: the server names its own checkpoints step-NUMBER and best-NUMBER; "
            "choose another name",
        )
    if request.HasField("score") and not math.isfinite(request.score):
        raise invalid_field("score", f"score must be finite, got {request.score}")
    return SaveRequest(
        name=name,
        request_id=_name("request_id", request.request_id),
        labels=dict(request.labels),
        score=request.score if request.HasField("score") else None,
        expected_lineage=request.expected_lineage if request.HasField("expected_lineage") else None,
        expected_step=request.expected_step if request.HasField("expected_step") else None,
    )


def read_restore(request: pb.RestoreCheckpointRequest) -> RestoreRequest:
    """Decode and check a RestoreCheckpoint request. Raises Refused."""
    return RestoreRequest(
        name=read_checkpoint_name(request.name),
        request_id=_name("request_id", request.request_id),
        expected_lineage=request.expected_lineage if request.HasField("expected_lineage") else None,
        expected_step=request.expected_step if request.HasField("expected_step") else None,
    )


def read_download(request: pb.DownloadCheckpointRequest) -> DownloadRequest:
    """Decode and check a DownloadCheckpoint request. Raises Refused."""
    if request.offset_bytes < 0 or (request.offset_bytes and not request.file):
        raise invalid_field(
            "offset_bytes",
            f"offset_bytes must be at least 0, or exactly 0 if file is not set, got {request.offset_bytes}",
        )
    return DownloadRequest(
        name=read_checkpoint_name(request.name),
        weights_only=request.weights_only,
        file=request.file or None,
        offset=request.offset_bytes,
    )


def _check_modes(request: pb.TrainStepRequest | pb.EvalLossRequest, info: ModelInfo) -> None:
    if request.only_train_generator and request.only_train_critic:
        raise invalid_field(
            "only_train_critic",
            "only_train_generator and only_train_critic cannot both be set; set one of them",
        )
    if request.only_train_critic and not info.has_critic:
        raise invalid_field(
            "only_train_critic",
            "only_train_critic needs a critic, which this model lacks: start a run with objective.critic set",
        )


def _temperature(request: pb.TrainStepRequest | pb.EvalLossRequest) -> float | None:
    if not request.HasField("generator_sample_temperature"):
        return None
    value = request.generator_sample_temperature
    if not (math.isfinite(value) and value >= 0):
        raise invalid_field(
            "generator_sample_temperature",
            f"generator_sample_temperature must be finite and at least 0, got {value}",
        )
    return value + 0.0  # turns -0.0 into 0.0, so that both are hashed and journalled alike


def _name(field: str, value: str, *, required: bool = False) -> str | None:
    if not value and not required:
        return None
    if not 1 <= len(value) <= MAX_NAME or not value.isprintable():
        raise invalid_field(
            field, f"{field} must have 1 to {MAX_NAME} printable characters, got {value[:MAX_NAME]!r}"
        )
    return value


def read_checkpoint_name(value: str) -> str:
    """Check the name of a checkpoint and return it. Raises Refused."""
    if CHECKPOINT_NAME.fullmatch(value) is None:
        raise invalid_field(
            "name",
            "name must have 1 to 64 lower-case letters, digits, - and _, and start with a letter or a digit, "
            f"got {value[:80]!r}",
        )
    return value
