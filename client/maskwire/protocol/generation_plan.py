"""Generations that need several calls: how rows are divided among calls, and how results are merged.

A row's sample depends on its seed, its prompt and the width at which it is computed. Each call therefore
states the seeds of its rows, and the width that all rows need. All calls must sample from the same weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from maskwire.errors import StepMovedError
from maskwire.protocol import token_batch
from maskwire.protocol.limits import Bounds, too_long
from maskwire.results import GenerateResult
from maskwire.v1 import training_service_pb2 as pb

Row = npt.NDArray[np.int64]


@dataclass(frozen=True)
class GenerationCall:
    """One call of a generation: its request, and the indices of its rows among all rows."""

    request: pb.GenerateRequest
    rows: list[int]


class GenerationPlan:
    """Divides a request for rows into calls that the server's limits allow."""

    def __init__(self, request: pb.GenerateRequest, bounds: Bounds) -> None:
        self._request, self._bounds = request, bounds
        self._given = request.HasField("prompts")
        model = bounds.model
        count = rows_of(request)
        if self._given:
            self.rows = [np.array(row) for row in token_batch.decode_batch(request.prompts)][:count]
            self._known = [self._given_of(index) for index in range(len(self.rows))]
        else:
            length = request.length or model.max_seq_len
            self.rows = [np.full(length, model.mask_id, dtype=np.int64)] * count
            self._known = [np.zeros(length, dtype=bool)] * count
        self._columns = max(request.length, *(len(row) for row in self.rows))
        for row, known in zip(self.rows, self._known, strict=True):
            row[~known] = model.mask_id
        self.unknown = [int((~known).sum()) for known in self._known]
        first_pass = model.self_cond and request.self_cond_mode != pb.SELF_COND_MODE_CARRY
        self._work = [
            bounds.generation_work(
                min(request.steps or unknown, unknown),
                self._columns,
                first_pass=first_pass,
                critic=request.order == pb.GENERATION_ORDER_CRITIC,
            )
            for unknown in self.unknown
        ]

    def _given_of(self, index: int) -> npt.NDArray[np.bool_]:
        """Return a bool per position of a row, True if it needs no sampling: a given token or padding."""
        batch, row = self._request.prompts, self.rows[index]
        known: npt.NDArray[np.bool_] = row != self._bounds.model.mask_id
        if batch.prompt_mask:
            bits = np.unpackbits(np.frombuffer(batch.prompt_mask, dtype=np.uint8), bitorder="little")
            start = index * batch.shape[1]
            known = bits[start : start + len(row)].astype(bool)
        if not batch.lengths and self._bounds.model.pad_id is not None:
            known |= row == self._bounds.model.pad_id
        return known

    @property
    def fits(self) -> bool:
        """Whether one call is enough; also True for an invalid request, which the server refuses."""
        everything = list(range(len(self.rows)))
        if not any(self.unknown) or self._columns > self._bounds.model.max_seq_len:
            return True  # the server refuses the request, and its error gives the reason
        return self._within(everything) and self._bounds.takes(self._request)

    def _within(self, rows: list[int]) -> bool:
        limits = self._bounds.limits
        tokens, work = len(rows) * self._columns, sum(self._work[row] for row in rows)
        return tokens <= (limits.max_batch_tokens or tokens) and work <= (limits.max_read_tokens or work)

    def parts(self) -> list[GenerationCall]:
        """Return the calls. A row that alone exceeds the limits comes first, so that it is refused at once.

        Raises ValueError if the seeds do not match the rows, and RequestError if the message for a single row
        is too long.
        """
        count, seeds, seed = len(self.rows), len(self._request.row_seeds), self._request.seed
        if seeds not in (0, count):
            raise ValueError(
                f"row_seeds must have one seed per row ({count} rows), or be left out, got {seeds} seeds"
            )
        if not seeds and seed > 2**63 - count:
            raise ValueError(
                f"seed must be at most {2**63 - count}, so that the seeds of all {count} rows are below "
                f"2^63, got {seed}"
            )
        groups: list[list[int]] = []
        for row in range(count):
            if self.unknown[row]:
                if groups and self._within([*groups[-1], row]):
                    groups[-1].append(row)
                else:
                    groups.append([row])
        groups.sort(key=self._within)
        return [part for group in groups for part in self._sendable(group)]

    def _sendable(self, rows: list[int]) -> Iterator[GenerationCall]:
        request = self._part(rows)
        if self._bounds.takes(request):
            yield GenerationCall(request, rows)
        elif len(rows) > 1:
            yield from self._sendable(rows[: len(rows) // 2])
            yield from self._sendable(rows[len(rows) // 2 :])
        else:
            limit = self._bounds.limits.max_message_bytes
            raise too_long(f"row {rows[0]}", request.ByteSize(), limit, "give a shorter prompt")

    def _part(self, rows: list[int]) -> pb.GenerateRequest:
        whole = self._request
        part = pb.GenerateRequest()
        part.CopyFrom(whole)
        part.ClearField("row_seeds")
        part.row_seeds.extend(whole.row_seeds[row] if whole.row_seeds else whole.seed + row for row in rows)
        if not self._given:
            part.count = len(rows)
            return part
        chosen = [self.rows[row] for row in rows]
        columns = max(len(row) for row in chosen)
        known = np.zeros((len(rows), columns), dtype=bool)
        for place, row in enumerate(rows):
            known[place, : len(chosen[place])] = self._known[row]
        part.count = 0
        part.length = self._columns if columns < self._columns else 0
        batch = token_batch.encode_batch(chosen, prompt_mask=known if whole.prompts.prompt_mask else None)
        # Without lengths, ids equal to the pad id are padding.
        if whole.prompts.lengths and not batch.lengths:
            batch.lengths.extend(len(row) for row in chosen)
        part.prompts.CopyFrom(batch)
        return part


def rows_of(request: pb.GenerateRequest) -> int:
    """Return the number of rows that a request samples."""
    if not request.HasField("prompts"):
        return request.count
    rows = request.prompts.shape[0]
    return request.count if 0 < request.count <= rows else rows


class GeneratedRows:
    """Collects the results of a generation's calls into one result of all rows."""

    def __init__(self, plan: GenerationPlan) -> None:
        self._rows = list(plan.rows)
        self._left = list(plan.unknown)
        self._steps: list[int] = []
        self._first: GenerateResult | None = None

    def take(self, part: GenerationCall, found: GenerateResult) -> GenerateResult:
        """Merge the result of one call into the rows of all calls, and return the merged result.

        Raises StepMovedError if the call sampled from other weights than the calls before it.
        """
        first = self._first or found
        if (found.step, found.digest) != (first.step, first.digest):
            raise StepMovedError(
                f"the run went from step {first.step} to step {found.step} between the calls of this "
                "generation: generate while no client is training, or request fewer rows (one call is "
                "limited by serve.max_batch_tokens, serve.max_read_tokens and serve.max_message_bytes)"
            )
        self._first = first
        for row, ids, left in zip(part.rows, found.tokens, found.still_masked, strict=True):
            self._rows[row], self._left[row] = ids, left
        if found.done:
            self._steps.append(found.unmasking_step)
        done = not any(self._left)
        even = len({len(row) for row in self._rows}) == 1
        return GenerateResult(
            tokens=np.stack(self._rows) if even else list(self._rows),
            unmasking_step=max(self._steps) if done else found.unmasking_step,
            done=done,
            still_masked=tuple(self._left),
            step=found.step,
            digest=found.digest,
            ema_weights=found.ema_weights,
        )
