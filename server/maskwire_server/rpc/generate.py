"""Decodes and checks requests to Generate, and encodes the answers."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from maskwire.v1 import training_service_pb2 as pb
from maskwire.v1.values import Limits, ModelInfo
from maskwire_server.batch import Batch, Prompts
from maskwire_server.errors import invalid_field
from maskwire_server.requests import GenerateRequest
from maskwire_server.results import GenerateAnswer, GenerateOptions, Order, SelfCondMode
from maskwire_server.rpc import token_batch, work_limits

_DTYPES = {1: pb.DATA_TYPE_UINT8, 2: pb.DATA_TYPE_UINT16, 4: pb.DATA_TYPE_INT32}


def read_generate(request: pb.GenerateRequest, info: ModelInfo, limits: Limits) -> GenerateRequest:
    """Decode and check a Generate request. Raises Refused."""
    order = _order(request, info)
    prompts = (
        _read_prompts(request, info, limits)
        if request.HasField("prompts")
        else _empty_prompts(request, info, limits)
    )
    rows = prompts.ids.shape[0]
    if request.row_seeds and len(request.row_seeds) != rows:
        raise invalid_field(
            "row_seeds",
            f"row_seeds must have one seed per row ({rows}) or none, got {len(request.row_seeds)}",
        )
    if not request.row_seeds and request.seed > 2**63 - rows:
        raise invalid_field(
            "seed",
            f"seed must be at most 2^63 - {rows}, so that each of the {rows} rows has a seed below 2^63, got "
            f"{request.seed}",
        )
    options = GenerateOptions(
        row_seeds=tuple(request.row_seeds) or tuple(range(request.seed, request.seed + rows)),
        steps=_steps(request.steps, prompts, limits),
        order=order,
        temperature=(
            _at_least_0("temperature", request.temperature) if request.HasField("temperature") else 1.0
        ),
        start_temperature=_start_temperature(request),
        top_k=_top_k(request, info),
        top_p=_top_p(request.top_p) if request.HasField("top_p") else 1.0,
        choice_temperature=(
            _at_least_0("choice_temperature", request.choice_temperature)
            if request.HasField("choice_temperature")
            else None
        ),
        remasking=request.remasking,
        self_cond_mode=_self_cond_mode(request.self_cond_mode),
        raw_weights=request.raw_weights,
    )
    _check_work(prompts, options, info, limits)
    return GenerateRequest(prompts, options, every_step=request.stream_steps)


def _check_work(prompts: Prompts, options: GenerateOptions, info: ModelInfo, limits: Limits) -> None:
    unknown = prompts.unknown.sum(-1)
    rows, columns = prompts.ids.shape
    passes = int(unknown.max())
    passes = min(options.steps or passes, passes)
    work_limits.check(
        "count",
        f"{rows} x {columns} tokens with {passes} unmasking passes",
        work_limits.generation_tokens(unknown.tolist(), columns, options, info),
        limits,
        "request fewer rows, shorter ones or fewer steps",
    )


def _order(request: pb.GenerateRequest, info: ModelInfo) -> Order:
    if request.order == pb.GENERATION_ORDER_UNSPECIFIED:
        order = Order.RANDOM
    elif int(request.order) in set(Order):
        order = Order(request.order)
    else:
        raise invalid_field("order", f"order must be a value of GenerationOrder, got {request.order}")
    if order is Order.CRITIC and not info.has_critic:
        raise invalid_field(
            "order",
            "order 'critic' needs a critic, but this model has none: choose another order, or serve a model "
            "that was trained with objective.critic",
        )
    if request.remasking and order not in (Order.CONFIDENCE, Order.CRITIC):
        raise invalid_field(
            "remasking",
            f"remasking requires order 'confidence' or 'critic', got {order.name.lower()!r}: it ranks the "
            "revealed positions by probability or by the critic's score; choose one of these orders, or "
            "leave remasking out",
        )
    return order


def _self_cond_mode(sent: int) -> SelfCondMode:
    if sent == pb.SELF_COND_MODE_UNSPECIFIED:
        return SelfCondMode.TWO_PASS
    if sent not in set(SelfCondMode):
        raise invalid_field("self_cond_mode", f"self_cond_mode must be a value of SelfCondMode, got {sent}")
    return SelfCondMode(sent)


def _empty_prompts(request: pb.GenerateRequest, info: ModelInfo, limits: Limits) -> Prompts:
    """Make prompts in which no position is given, so that all are sampled. Raises Refused."""
    if request.count < 1:
        raise invalid_field("count", f"count must be at least 1 without prompts, got {request.count}")
    if not 0 <= request.length <= info.max_seq_len:
        raise invalid_field(
            "length",
            f"length must be 1 to {info.max_seq_len} (max_seq_len), or 0 for the maximum, got "
            f"{request.length}",
        )
    length = request.length or info.max_seq_len
    if request.count * length > limits.max_batch_tokens:
        raise invalid_field(
            "count",
            f"count times length must be at most {limits.max_batch_tokens} (serve.max_batch_tokens), got "
            f"{request.count} x {length}",
            tokens=request.count * length,
            max_batch_tokens=limits.max_batch_tokens,
        )
    return Prompts.nothing(request.count, length)


def _read_prompts(request: pb.GenerateRequest, info: ModelInfo, limits: Limits) -> Prompts:
    """Decode and check prompts, in which some positions are given and the others are sampled."""
    batch = request.prompts
    flat, rows, columns, lengths = token_batch.read_ids("prompts", batch, info, limits)
    if batch.segment_ids:
        raise invalid_field(
            "prompts.segment_ids", "prompts.segment_ids must be empty: send each document as a separate row"
        )
    if not 0 <= request.count <= rows:
        raise invalid_field(
            "count",
            f"count must be 1 to {rows}, the number of prompts, or 0 for all of them, got {request.count}",
        )
    bits = token_batch.read_prompt_bits("prompts", batch.prompt_mask, rows, columns)
    ids, valid, given = Batch(flat, rows, columns, lengths, bits).dense(info.pad_id)
    known = given if bits else valid & (ids != info.mask_id)
    # The ids at unknown positions are not used, so any value is valid there: check an ordinary id instead.
    datum = next(id_ for id_ in range(3) if id_ not in (info.mask_id, info.pad_id))
    sent = known.ravel() if lengths is None else known[valid]
    ordinary, padded = np.where(sent, flat, datum), lengths is None
    token_batch.check_ids("prompts", ordinary, columns, lengths, info, padded=padded)
    prompts = _first_rows(Prompts(np.where(known, ids, 0), valid, known, lengths), request.count or rows)
    if request.length:
        prompts = _pad_columns(prompts, request.length, info, limits)
    if not prompts.unknown.any():
        raise invalid_field(
            "prompts",
            "prompts must have at least one position to sample, got none: every position is given or padding",
        )
    return prompts


def _first_rows(prompts: Prompts, count: int) -> Prompts:
    """The first `count` rows, cut to the length of the longest of these rows."""
    lengths = None if prompts.lengths is None else prompts.lengths[:count]
    columns = prompts.ids.shape[1] if lengths is None else int(lengths.max())
    part = (slice(count), slice(columns))
    return Prompts(prompts.ids[part], prompts.valid[part], prompts.known[part], lengths)


def _pad_columns(prompts: Prompts, width: int, info: ModelInfo, limits: Limits) -> Prompts:
    """The same rows, padded to `width` columns. Raises Refused if `width` is out of range."""
    rows, columns = prompts.ids.shape
    if not columns <= width <= info.max_seq_len:
        raise invalid_field(
            "length",
            f"length must be {columns} (the length of the prompts) to {info.max_seq_len} (max_seq_len), or 0 "
            f"for the length of the prompts, got {width}",
        )
    if rows * width > limits.max_batch_tokens:
        raise invalid_field(
            "length",
            f"length times the number of prompts must be at most {limits.max_batch_tokens} "
            f"(serve.max_batch_tokens), got {width} x {rows}",
            tokens=rows * width,
            max_batch_tokens=limits.max_batch_tokens,
        )
    wider = ((0, 0), (0, width - columns))
    return Prompts(
        np.pad(prompts.ids, wider),
        np.pad(prompts.valid, wider),
        np.pad(prompts.known, wider),
        np.full(rows, columns, dtype=np.int32) if prompts.lengths is None else prompts.lengths,
    )


def _steps(sent: int, prompts: Prompts, limits: Limits) -> int:
    max_steps = limits.max_generation_steps
    if not 0 <= sent <= max_steps:
        raise invalid_field(
            "steps",
            f"steps must be 1 to {max_steps} (serve.max_generation_steps), or 0 for one position per step, "
            f"got {sent}",
        )
    longest = int(prompts.unknown.sum(-1).max())
    if not sent and longest > max_steps:
        raise invalid_field(
            "steps",
            f"steps must be 1 to {max_steps} (serve.max_generation_steps): one position per step would take "
            f"{longest} steps; set steps, to sample several positions per step, or request shorter rows",
            unknown=longest,
            max_generation_steps=max_steps,
        )
    return sent


def _at_least_0(field: str, value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise invalid_field(field, f"{field} must be finite and at least 0, got {value}")
    return value


def _start_temperature(request: pb.GenerateRequest) -> float | None:
    if not request.HasField("start_temperature"):
        return None
    value = _at_least_0("start_temperature", request.start_temperature)
    if request.HasField("temperature"):
        raise invalid_field(
            "start_temperature",
            f"start_temperature and temperature exclude each other, got {value} and {request.temperature}: "
            "leave out temperature if the temperature should fall from start_temperature to 0, or leave out "
            "start_temperature if it should stay constant",
        )
    return value


def _top_k(request: pb.GenerateRequest, info: ModelInfo) -> int:
    """The number of most probable ids to sample from, according to top_k and filter_thres; 0 for all ids."""
    top_k = request.top_k
    if top_k < 0:
        raise invalid_field("top_k", f"top_k must be at least 1, or 0 for no limit, got {top_k}")
    if not request.HasField("filter_thres"):
        return top_k
    dropped = request.filter_thres
    if not 0 <= dropped < 1:
        raise invalid_field("filter_thres", f"filter_thres must be at least 0 and below 1, got {dropped}")
    kept = kept_by(dropped, info.num_tokens)
    return min(top_k or kept, kept)


def kept_by(filter_thres: float, num_tokens: int) -> int:
    """The number of most probable ids, out of `num_tokens`, that `filter_thres` keeps.

    It is rounded as in x-transformers: a filter_thres of 0.7 keeps 4 of 10 ids, because 1 - 0.7 is above 0.3
    in fp64.
    """
    return math.ceil((1 - filter_thres) * num_tokens)


def _top_p(value: float) -> float:
    if not 0 < value <= 1:
        raise invalid_field("top_p", f"top_p must be above 0 and at most 1, got {value}")
    return value


def answer(value: GenerateAnswer, lengths: npt.NDArray[np.int32] | None) -> pb.GenerateResponse:
    """Encode the rows after an unmasking pass. `lengths` are the lengths of the prompts, if they have any."""
    state = value.state
    ids, columns = state.ids, state.ids.shape[1]
    if lengths is not None:
        ids, columns = ids[np.arange(columns) < lengths[:, None]], int(lengths.max())
    return pb.GenerateResponse(
        tokens=pb.TokenBatch(
            data=ids.astype(ids.dtype.newbyteorder("<"), copy=False).tobytes(),
            shape=(state.ids.shape[0], columns),
            dtype=_DTYPES[state.ids.itemsize],
            lengths=() if lengths is None else lengths.tolist(),
        ),
        unmasking_step=state.unmasking_step,
        done=state.done,
        step=value.step,
        digest=value.digest,
        still_masked=state.still_masked,
        ema_weights=state.ema_weights,
    )
