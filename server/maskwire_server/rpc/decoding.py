"""Between the proto's messages and the engine's values: reading checks, writing copies.

Everything a request can be wrong in is found here, on the CPU, before the device hears of it. A
refusal names the field, the first offending position, the value, and what would be right.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from maskwire.v1 import training_service_pb2 as pb
from maskwire_server.batch import Batch, Modes, Payload
from maskwire_server.errors import invalid_field
from maskwire_server.holder import ClientProcess
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
from maskwire_server.results import EvalOptions, Limits, ModelInfo
from maskwire_server.rpc import work_limits

DEFAULT_DRAWS = 16
MAX_NAME = 128
MAX_DATA_PARTS = 16
MAX_LABELS, MAX_LABEL = 32, 256

_DTYPES: dict[int, np.dtype[np.integer]] = {
    pb.DATA_TYPE_UINT8: np.dtype("<u1"),
    pb.DATA_TYPE_UINT16: np.dtype("<u2"),
    pb.DATA_TYPE_INT32: np.dtype("<i4"),
    pb.DATA_TYPE_INT64: np.dtype("<i8"),
}
_DTYPE_NAMES = ", ".join(pb.DataType.Name(number) for number in _DTYPES)


def read_step(request: pb.TrainStepRequest, info: ModelInfo, limits: Limits) -> StepRequest:
    """A TrainStep request, checked."""
    _check_modes(request, info)
    rate = request.learning_rate if request.HasField("learning_rate") else None
    if rate is not None and not (math.isfinite(rate) and rate >= 0):
        raise invalid_field("learning_rate", f"learning_rate must be finite and at least 0, got {rate}")
    step = request.step if request.HasField("step") else None
    if step is not None and not 1 <= step < 2**62:
        raise invalid_field("step", f"step must be at least 1, got {step}: steps count from 1", value=step)
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
    """An EvalLoss request, checked."""
    _check_modes(request, info)
    if request.estimator not in pb.Estimator.values():
        raise invalid_field("estimator", f"estimator must be one of Estimator, got {request.estimator}")
    default_draws = min(DEFAULT_DRAWS, limits.max_draws)
    if not 0 <= request.draws <= limits.max_draws:
        raise invalid_field(
            "draws",
            f"draws must be 1 to {limits.max_draws} (serve.max_draws), or 0 for {default_draws}, "
            f"got {request.draws}",
            draws=request.draws,
            max_draws=limits.max_draws,
        )
    if not request.HasField("batch"):
        raise invalid_field("batch", "batch is missing: send a TokenBatch")
    batch = read_batch(request.batch, info, limits)
    if request.row_ids and len(request.row_ids) != batch.rows:
        raise invalid_field(
            "row_ids", f"row_ids must be one a row, {batch.rows}, or none, got {len(request.row_ids)}"
        )
    text_bytes = request.text_bytes if request.HasField("text_bytes") else None
    if text_bytes is not None and text_bytes < 1:
        raise invalid_field("text_bytes", f"text_bytes must be at least 1 where given, got {text_bytes}")
    chain_rule = request.estimator == pb.ESTIMATOR_CHAIN_RULE
    _check_chain(request, chain_rule=chain_rule)
    draws = request.draws or (1 if chain_rule else default_draws)
    _check_work(request, batch, draws, info, limits, chain_rule=chain_rule)
    options = EvalOptions(
        row_ids=tuple(request.row_ids) or tuple(range(batch.rows)),
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
        raise invalid_field("chain_order", f"chain_order must be one of ChainOrder, got {order}")
    if not chain_rule:
        if order != pb.CHAIN_ORDER_UNSPECIFIED:
            raise invalid_field(
                "chain_order",
                f"chain_order must be left out without ESTIMATOR_CHAIN_RULE, got {pb.ChainOrder.Name(order)}",
            )
        return
    if request.only_train_critic:
        raise invalid_field(
            "only_train_critic", "only_train_critic must be left out of a chain rule, which has no critic"
        )
    if order != pb.CHAIN_ORDER_RANDOM and request.draws > 1:
        raise invalid_field(
            "draws",
            f"draws must be 0 or 1 from left to right, there is one such order, got {request.draws}; several "
            "draws need CHAIN_ORDER_RANDOM",
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
    tokens = work_limits.evaluation_tokens(
        batch.rows,
        batch.columns,
        draws,
        info,
        chain_rule=chain_rule,
        only_train_generator=request.only_train_generator,
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
    """A session, as the client sent it back."""
    return SessionRef(session.run_id, session.lineage, session.epoch)


def read_open(request: pb.OpenSessionRequest) -> SessionRequest:
    """An OpenSession request, checked."""
    history = None
    if request.HasField("history"):
        sent = request.history
        if len(sent.digest) != 32:
            raise invalid_field(
                "history.digest", f"history.digest must have 32 bytes, got {len(sent.digest)}"
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
    )


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
    """A Checkpoint request, checked."""
    if len(request.labels) > MAX_LABELS:
        raise invalid_field("labels", f"labels must be at most {MAX_LABELS}, got {len(request.labels)}")
    for key, value in request.labels.items():
        if max(len(key), len(value)) > MAX_LABEL:
            raise invalid_field(
                "labels", f"labels must have at most {MAX_LABEL} characters, {key[:32]!r} has more"
            )
    name = read_checkpoint_name(request.name) if request.name else None
    if name is not None and AUTOMATIC_NAME.fullmatch(name):
        raise invalid_field(
            "name",
            "name: step-NUMBER and best-NUMBER are what the server calls its own, choose another than "
            f"{name!r}",
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
    """A RestoreCheckpoint request, checked."""
    return RestoreRequest(
        name=read_checkpoint_name(request.name),
        request_id=_name("request_id", request.request_id),
        expected_lineage=request.expected_lineage if request.HasField("expected_lineage") else None,
        expected_step=request.expected_step if request.HasField("expected_step") else None,
    )


def read_download(request: pb.DownloadCheckpointRequest) -> DownloadRequest:
    """A DownloadCheckpoint request, checked."""
    if request.offset_bytes < 0 or (request.offset_bytes and not request.file):
        raise invalid_field(
            "offset_bytes",
            f"offset_bytes must be at least 0, and 0 without a file, got {request.offset_bytes}",
        )
    return DownloadRequest(
        name=read_checkpoint_name(request.name),
        weights_only=request.weights_only,
        file=request.file or None,
        offset=request.offset_bytes,
    )


def read_batch(batch: pb.TokenBatch, info: ModelInfo, limits: Limits) -> Batch:
    """A TokenBatch, checked; `data` is viewed, not copied."""
    ids, rows, columns, lengths = read_ids("batch", batch, info, limits)
    check_ids("batch", ids, columns, lengths, info)
    if lengths is None:
        ids = ids.reshape(rows, columns)
    read = Batch(ids, rows, columns, lengths, read_prompt_bits("batch", batch.prompt_mask, rows, columns))
    _check_something_maskable(read, info)
    return read


def read_ids(
    field: str, batch: pb.TokenBatch, info: ModelInfo, limits: Limits
) -> tuple[npt.NDArray[np.integer], int, int, npt.NDArray[np.int32] | None]:
    """A TokenBatch's flat ids as sent, its rows, columns and lengths; the ids themselves are not checked.

    `field` is the batch's name in the request.
    """
    rows, columns = _shape(field, batch.shape, info, limits)
    if batch.dtype not in _DTYPES:
        raise invalid_field(
            f"{field}.dtype",
            f"{field}.dtype must be one of {_DTYPE_NAMES}, got {batch.dtype}",
            value=batch.dtype,
        )
    lengths = _lengths(field, batch.lengths, rows, columns)
    dtype = _DTYPES[batch.dtype]
    count = rows * columns if lengths is None else int(lengths.sum())
    if len(batch.data) != count * dtype.itemsize:
        raise invalid_field(
            f"{field}.data",
            f"{field}.data must have {count * dtype.itemsize} bytes ({count} ids of {dtype.itemsize} bytes), "
            f"got {len(batch.data)}",
            expected_bytes=count * dtype.itemsize,
            bytes=len(batch.data),
        )
    return np.frombuffer(batch.data, dtype=dtype), rows, columns, lengths


def _shape(field: str, shape: Sequence[int], info: ModelInfo, limits: Limits) -> tuple[int, int]:
    # Counted before it is looked at: a message can hold millions where there should be two.
    if len(shape) != 2:
        raise invalid_field(
            f"{field}.shape", f"{field}.shape must be [rows, columns], got {len(shape)} dimensions"
        )
    sizes = list(shape)
    for name, size in zip(("rows", "columns"), sizes, strict=True):
        if size < 1:
            raise invalid_field(f"{field}.shape", f"{field}.shape: {name} must be at least 1, got {size}")
    rows, columns = sizes
    if columns > info.max_seq_len:
        raise invalid_field(
            f"{field}.shape",
            f"{field}.shape: a row must have at most {info.max_seq_len} tokens (max_seq_len), got {columns}",
            columns=columns,
            max_seq_len=info.max_seq_len,
        )
    if rows * columns > limits.max_batch_tokens:  # Python's integers do not overflow
        raise invalid_field(
            f"{field}.shape",
            f"{field}.shape: rows times columns must be at most {limits.max_batch_tokens} "
            f"(serve.max_batch_tokens), got {rows} x {columns}",
            tokens=rows * columns,
            max_batch_tokens=limits.max_batch_tokens,
        )
    return rows, columns


def _lengths(field: str, sent: Sequence[int], rows: int, columns: int) -> npt.NDArray[np.int32] | None:
    if not sent:
        return None
    if len(sent) != rows:
        raise invalid_field(
            f"{field}.lengths", f"{field}.lengths must be one a row, {rows}, or none, got {len(sent)}"
        )
    lengths = np.array(sent, dtype=np.int32)
    wrong = (lengths < 1) | (lengths > columns)
    if wrong.any():
        row = int(wrong.argmax())
        raise invalid_field(
            f"{field}.lengths",
            f"{field}.lengths: row {row} must have 1 to {columns} tokens, got {lengths[row]}",
            row=row,
            value=int(lengths[row]),
        )
    if lengths.max() != columns:
        raise invalid_field(
            f"{field}.lengths",
            f"{field}.lengths: the longest row must have {field}.shape's {columns} columns, "
            f"got {lengths.max()}",
            longest=int(lengths.max()),
            columns=columns,
        )
    return lengths


def check_ids(
    field: str,
    ids: npt.NDArray[np.integer],
    columns: int,
    lengths: npt.NDArray[np.int32] | None,
    info: ModelInfo,
) -> None:
    """Raise Refused at the first id that is no datum; `ids` are flat, as sent."""
    refused_pad = info.pad_id if lengths is not None else None
    wrong = ids == info.mask_id
    if refused_pad is not None:
        wrong |= ids == refused_pad
    if ids.min() < 0 or ids.max() >= info.num_tokens:
        wrong |= (ids < 0) | (ids >= info.num_tokens)
    elif not wrong.any():
        return
    at = int(wrong.argmax())
    value = int(ids[at])
    if lengths is None:
        row, column = divmod(at, columns)
    else:
        ends = lengths.cumsum()
        row = int(np.searchsorted(ends, at, side="right"))
        column = at - int(ends[row] - lengths[row])
    if value == info.mask_id:
        right = "the mask id stands for masked positions: reserve an id for it that no data has"
    elif value == refused_pad:
        right = "the pad id is no datum: with lengths, leave padding out"
    else:
        right = (
            f"ids must be 0 to {info.num_tokens - 1} (num_tokens is {info.num_tokens}), without the mask id"
        )
    raise invalid_field(
        f"{field}.data",
        f"{field}.data: row {row}, column {column} is {value}; {right}",
        row=row,
        column=column,
        value=value,
    )


def read_prompt_bits(field: str, bits: bytes, rows: int, columns: int) -> bytes:
    """The bits of a prompt mask as sent, empty for none; raises Refused if they do not fit."""
    if not bits:
        return b""
    positions = rows * columns
    size = (positions + 7) // 8
    if len(bits) != size:
        raise invalid_field(
            f"{field}.prompt_mask",
            f"{field}.prompt_mask must have {size} bytes (one bit for each of {rows} x {columns} positions), "
            f"got {len(bits)}",
            expected_bytes=size,
            bytes=len(bits),
        )
    if positions % 8 and bits[-1] >> (positions % 8):
        raise invalid_field(
            f"{field}.prompt_mask",
            f"{field}.prompt_mask: the last {8 - positions % 8} bits of its last byte must be 0, "
            f"got {bits[-1]:#04x}",
        )
    return bits


def _check_something_maskable(batch: Batch, info: ModelInfo) -> None:
    if not batch.prompt_bits and (info.pad_id is None or batch.lengths is not None):
        return
    _, valid, prompt = batch.dense(info.pad_id)
    if not (valid & ~prompt).any():
        what = "batch.prompt_mask" if batch.prompt_bits else "batch.data"
        raise invalid_field(
            what,
            f"{what}: every position of every row is prompt or padding; leave at least one to predict",
        )


def _check_modes(request: pb.TrainStepRequest | pb.EvalLossRequest, info: ModelInfo) -> None:
    if request.only_train_generator and request.only_train_critic:
        raise invalid_field(
            "only_train_critic", "only_train_generator and only_train_critic exclude each other, got both"
        )
    if request.only_train_critic and not info.has_critic:
        raise invalid_field(
            "only_train_critic",
            "only_train_critic needs a critic, this model has none: serve one with objective.critic",
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
    return value


def _name(field: str, value: str, *, required: bool = False) -> str | None:
    if not value and not required:
        return None
    if not 1 <= len(value) <= MAX_NAME or not value.isprintable():
        raise invalid_field(
            field, f"{field} must have 1 to {MAX_NAME} printable characters, got {value[:MAX_NAME]!r}"
        )
    return value


def read_checkpoint_name(value: str) -> str:
    """A checkpoint's name, checked."""
    if CHECKPOINT_NAME.fullmatch(value) is None:
        raise invalid_field(
            "name",
            "name must be 1 to 64 lower-case letters, digits, - and _, the first a letter or a digit, "
            f"got {value[:80]!r}",
        )
    return value
