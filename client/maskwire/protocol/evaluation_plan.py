"""Evaluations that need several calls: how rows are divided among calls, and how results are combined.

A row's result depends only on the row, its id, the seed and the draws, and each call returns sums, so the
result does not depend on how rows are batched. With a row's nats L and its number of maskable tokens n, these
are the results over all rows:

    nats per token      r = sum L / sum n
    standard error      sqrt(R/(R-1) sum (L - r n)^2) / sum n     for R rows with n > 0
    Monte Carlo error   sqrt(sum (L' - L'')^2) / (2 sum n)        L', L'' from the two halves of the draws
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from maskwire.arguments import check_whole
from maskwire.data.token_data import TokenData
from maskwire.errors import StepMovedError
from maskwire.protocol import codec, token_batch
from maskwire.protocol.limits import Bounds, too_long
from maskwire.results import EvalResult, FractionResult, Losses, LossSums, RowResult
from maskwire.signatures import refuse_unknown_keywords
from maskwire.v1 import training_service_pb2 as pb

EvaluationProgress = Callable[[int, int, float], None]

_POSITIONS = 2**18  # computed per call: seconds on a CPU, so that progress is shown and Ctrl-C acts soon
_MOST_ROWS = 4096


class EvaluationPlan:
    """The calls that evaluate all rows of a data set.

    Raises ValueError for options that do not match the rows.
    """

    def __init__(self, data: Any, *, rows: int | None, batch_size: int | None, **options: Any) -> None:
        self.text_bytes: int | None = options.pop("text_bytes", None)
        for name, value in (("rows", rows), ("batch_size", batch_size), ("text_bytes", self.text_bytes)):
            if value is not None:
                check_whole(name, value, 1, cure=", or None")
        self._rows: Any
        if isinstance(data, TokenData):
            chosen = data.evaluation_rows(rows)
            self._rows = chosen.tokens
            if chosen.prompt_mask is not None:
                options.setdefault("prompt_mask", chosen.prompt_mask)
            if self.text_bytes is None and data.bytes_per_token is not None:
                tokens = data.size if rows is None else sum(len(row) for row in self._rows)
                self.text_bytes = max(1, round(tokens * data.bytes_per_token))
            longest = data.length
        else:
            if rows is not None:
                raise ValueError(
                    "the argument rows needs a maskwire.data.TokenData: leave it out, and pass fewer rows"
                )
            self._rows = data
            longest = max((len(row) for row in data), default=1)
        self.rows = len(self._rows)
        """The number of rows."""
        if not self.rows:
            raise ValueError("there is nothing to evaluate: the data has no rows; pass at least one row")
        if options.get("segment_ids") is not None:
            raise ValueError(
                "segment_ids is not an option of evaluate: pass each document as a row, or call eval_loss"
            )
        self._by_row = {name: options.pop(name, None) for name in ("row_ids", "lengths", "prompt_mask")}
        for name, values in self._by_row.items():
            if values is not None and len(values) != self.rows:
                raise ValueError(f"{name} must have one value per row ({self.rows} rows), got {len(values)}")
        if self._by_row["row_ids"] is None:
            self._by_row["row_ids"] = range(self.rows)
        token_batch.to_array(self._by_row["row_ids"], "row_ids")
        codec.eval_request([[0]], **options)  # raises errors about invalid options before the first call
        self._options = options
        lengths = self._by_row["lengths"]
        self._batch_size = batch_size
        self._longest = longest if lengths is None else max(int(length) for length in lengths)
        covered = self._covered()
        self._evaluated = [row for row in range(self.rows) if row not in covered]
        ids = self._by_row["row_ids"]
        self.prompt_only_rows = [RowResult(int(ids[row]), 0.0, 0) for row in sorted(covered)]
        """The results of rows that consist of a prompt only, and so have nothing to predict."""

    def _covered(self) -> set[int]:
        prompts, lengths = self._by_row["prompt_mask"], self._by_row["lengths"]
        if prompts is None:
            return set()
        ends = [len(row) for row in self._rows] if lengths is None else lengths
        # Checked here, because the error of a call would name the row's position in the call only.
        for row, end in enumerate(ends):
            mask = _host(prompts[row])
            if mask.dtype != np.bool_ or mask.ndim != 1 or mask.size < end:
                raise ValueError(
                    f"prompt_mask: row {row} must have type bool and shape [{end}], one value per token, got "
                    f"{mask.dtype} and {list(mask.shape)}"
                )
        return {row for row in range(self.rows) if bool(np.all(_host(prompts[row])[: int(ends[row])]))}

    def calls(self, bounds: Bounds) -> Iterator[pb.EvalLossRequest]:
        """Yield the requests, in the order of the rows. Each is short and within the server's limits.

        Raises RequestError if the message for a single row is too long.
        """
        size = self._batch_size or self._rows_a_call(bounds)
        most = bounds.rows(self._longest, bounds.evaluation_work(self._longest, self._options))
        size = size if most is None else min(size, most)
        for start in range(0, len(self._evaluated), size):
            yield from self._sendable(self._evaluated[start : start + size], bounds)

    def _rows_a_call(self, bounds: Bounds) -> int:
        passes = bounds.passes(self._longest, self._options)
        return min(_MOST_ROWS, max(1, _POSITIONS // max(1, self._longest * passes)))

    def _sendable(self, chosen: list[int], bounds: Bounds) -> Iterator[pb.EvalLossRequest]:
        request = self._request(chosen)
        if bounds.takes(request):
            yield request
        elif len(chosen) > 1:
            yield from self._sendable(chosen[: len(chosen) // 2], bounds)
            yield from self._sendable(chosen[len(chosen) // 2 :], bounds)
        else:
            limit = bounds.limits.max_message_bytes
            raise too_long(f"row {chosen[0]}", request.ByteSize(), limit, "evaluate shorter rows")

    def _request(self, chosen: list[int]) -> pb.EvalLossRequest:
        options = dict(self._options)
        for name, values in self._by_row.items():
            if values is not None:
                options[name] = _take(values, chosen)
        options["row_ids"] = [int(row) for row in options["row_ids"]]
        return codec.eval_request(_take(self._rows, chosen), **options)


def _take(values: Any, chosen: list[int]) -> Any:
    taken = [values[row] for row in chosen]
    # An array must stay an array, because a list would count as rows that differ in length.
    return taken if isinstance(values, Sequence) else np.stack([_host(value) for value in taken])


def _host(values: Any) -> Any:
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)


class EvaluationSum:
    """Combines the results of several evaluations into one result."""

    def __init__(self, prompt_only_rows: Sequence[RowResult] = ()) -> None:
        self._found: list[EvalResult] = []
        self._prompt_only_rows = list(prompt_only_rows)
        self._nats, self._tokens = 0.0, 0
        self.rows = len(self._prompt_only_rows)
        """Rows evaluated so far."""

    def add(self, found: EvalResult) -> None:
        """Add the result of a call.

        Raises StepMovedError if the result is of another step than the earlier results, and ValueError if
        the draws, or the kind of weights (trained or averaged), differ.
        """
        if self._found:
            first = self._found[0]
            if (found.step, found.digest) != (first.step, first.digest):
                raise StepMovedError(
                    f"the run went from step {first.step} to step {found.step} during the evaluation: "
                    "evaluate while no client is training, or inside the training loop (`evaluate` of fit), "
                    "or evaluate fewer rows"
                )
            for name in ("draws", "ema_weights"):
                if getattr(found, name) != getattr(first, name):
                    raise ValueError(
                        f"evaluations with different {name} cannot be combined: evaluate all rows with the "
                        "same options"
                    )
        self._found.append(found)
        self.rows += len(found.rows)
        self._tokens += found.tokens
        self._nats += found.nats_per_token * found.tokens

    @property
    def nats_per_token(self) -> float:
        """The nats per token of the rows evaluated so far; 0 if there are none."""
        return self._nats / max(1, self._tokens)

    def result(self, text_bytes: int | None = None) -> EvalResult:
        """Return the combined evaluation of all rows.

        `text_bytes` is the number of bytes of text that the rows encode; without it there are no bits per
        byte. Raises ValueError if no result was added.
        """
        if not self._found:
            raise ValueError("there is nothing to evaluate: no row has a token outside its prompt")
        first = self._found[0]
        rows = sorted(
            [*self._prompt_only_rows, *(row for found in self._found for row in found.rows)],
            key=lambda row: row.row_id,
        )
        tokens = sum(row.tokens for row in rows)
        # fsum rounds exactly, so the order of the calls does not matter.
        nats = math.fsum(row.nats for row in rows)
        per_token = nats / tokens
        fractions = tuple(
            _add_fractions(parts)
            for parts in zip(*(found.by_masked_fraction for found in self._found), strict=True)
        )
        predicted = sum(part.masked_tokens for part in fractions)
        right = sum(_count(part.accuracy, part.masked_tokens) for part in fractions)
        sums = _add_sums([found.sums for found in self._found])
        return EvalResult(
            losses=_losses(sums, first.losses),
            nats_per_token=per_token,
            bits_per_token=per_token / math.log(2),
            perplexity=math.exp(min(per_token, 700.0)),
            standard_error=_standard_error(rows, per_token, tokens),
            monte_carlo_error=_monte_carlo_error(rows, tokens),
            accuracy=right / predicted if predicted else first.accuracy,
            critic_accuracy=(
                None
                if first.critic_accuracy is None
                else sum(_count(f.critic_accuracy, f.tokens * f.draws) for f in self._found)
                / (tokens * first.draws)
            ),
            by_masked_fraction=fractions,
            rows=tuple(rows),
            bits_per_byte=nats / math.log(2) / text_bytes if text_bytes else None,
            tokens=tokens,
            step=first.step,
            digest=first.digest,
            ema_weights=first.ema_weights,
            draws=first.draws,
            sums=sums,
        )


@refuse_unknown_keywords
def combine(found: Sequence[EvalResult], text_bytes: int | None = None) -> EvalResult:
    """Combine evaluations of different rows into one. In `maskwire.protocol.evaluation_plan`.

    found: The results of `eval_loss` or `evaluate`, of the same step and with the same options.
    text_bytes: The bytes of text that all rows encode; None: the result has no bits per byte.

    Raises StepMovedError if the results are of different steps, and ValueError if there are none, or if their
    draws or weights differ.
    """
    if not found:
        raise ValueError("found must have at least one result, got none")
    total = EvaluationSum()
    for one in found:
        total.add(one)
    return total.result(text_bytes)


def _count(share: float | None, of: int) -> int:
    """Return the count from which `share`, a share of the number `of`, was computed."""
    return 0 if share is None else round(share * of)


def _add_fractions(parts: Sequence[FractionResult]) -> FractionResult:
    masked = sum(part.masked_tokens for part in parts)
    nats = math.fsum((part.nats_per_masked_token or 0.0) * part.masked_tokens for part in parts)
    right = sum(_count(part.accuracy, part.masked_tokens) for part in parts)
    return FractionResult(
        parts[0].low,
        parts[0].high,
        nats / masked if masked else None,
        right / masked if masked else None,
        masked,
    )


def _add_sums(parts: Sequence[LossSums]) -> LossSums:
    has_critic = parts[0].critic_nats is not None
    return LossSums(
        math.fsum(part.generator_nats for part in parts),
        math.fsum(part.generator_weight for part in parts),
        math.fsum(part.critic_nats or 0.0 for part in parts) if has_critic else None,
        math.fsum(part.critic_weight or 0.0 for part in parts) if has_critic else None,
        parts[0].critic_loss_weight,
    )


def _losses(sums: LossSums, shown: Losses) -> Losses:
    """Return the losses that the sums give. A loss that is None in `shown`, the first result, stays None."""
    generator = sums.generator_nats / sums.generator_weight if sums.generator_weight else 0.0
    if sums.critic_nats is None or not sums.critic_weight:
        return Losses(generator, generator, None)
    critic = sums.critic_nats / sums.critic_weight
    if shown.generator_loss is None:
        return Losses(critic, None, critic)
    return Losses(generator + sums.critic_loss_weight * critic, generator, critic)


def _standard_error(rows: Sequence[RowResult], per_token: float, tokens: int) -> float | None:
    count = sum(row.tokens > 0 for row in rows)
    if count < 2:
        return None
    residual = math.fsum((row.nats - per_token * row.tokens) ** 2 for row in rows)
    return math.sqrt(count / (count - 1) * residual) / tokens


def _monte_carlo_error(rows: Sequence[RowResult], tokens: int) -> float | None:
    apart = [row.half_difference for row in rows if row.tokens]
    if any(value is None for value in apart):
        return None
    return math.sqrt(math.fsum((value or 0.0) ** 2 for value in apart)) / (2 * tokens)
