"""Gets the rows and options that a training loop sends for a step, as a function of the step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from maskwire.arguments import call_back, check_real, check_rows
from maskwire.batch import Batch
from maskwire.protocol.option_types import FitOptions
from maskwire.protocol.token_batch import to_array

_MOST_RATE = float(np.finfo(np.float32).max)

LearningRate = float | Callable[[int], float | None] | None


class Data(Protocol):
    """The data that `fit` accepts: any object with the method `batch`.

    If the object also has `tokenizer`, `tokenizer_description`, `fingerprint()` or `files`, `fit` uses these
    as it uses those of a TokenData.
    """

    def batch(self, step: int) -> Any:
        """Return the rows of a step, or a `maskwire.Batch`. The result must depend only on the step.

        step: The step's number, from 1.
        """


@dataclass(frozen=True, eq=False)
class StepInput:
    """The rows and options that are sent for one step."""

    rows: Any
    options: dict[str, Any]
    tokens: int
    """The number of tokens sent, including prompts but not padding."""


class StepInputs:
    """Gets each step's batch from the data, and each step's learning rate from `learning_rate`."""

    def __init__(self, data: Data, options: FitOptions, learning_rate: LearningRate) -> None:
        self._data, self._options, self._learning_rate = data, options, learning_rate
        if not callable(learning_rate):
            _check_rate("learning_rate", learning_rate)

    def of_step(self, step: int) -> StepInput:
        """Return what to send for a step. Raises TypeError or ValueError for an invalid batch or rate."""
        where = f"data.batch({step})"
        found = call_back("data.batch", self._data.batch, step)
        options: dict[str, Any] = dict(self._options)
        if isinstance(found, Batch):
            rows = found.tokens
            options |= self._described(found, where)
        else:
            rows = found
        if rows is None:
            raise TypeError(f"{where} must return rows of token ids, got {found}")
        check_rows(rows, where)
        tokens = _count(rows, options.get("lengths"), where)
        rate = self._rate(step)
        if rate is not None:
            options["learning_rate"] = rate
        return StepInput(rows, options, tokens)

    def _described(self, batch: Batch, where: str) -> dict[str, Any]:
        """Return a batch's lengths, prompt mask and segment ids, as far as it has them.

        Raises ValueError if `fit` was given one of them too.
        """
        names = ("lengths", "prompt_mask", "segment_ids")
        found = {name: value for name in names if (value := getattr(batch, name)) is not None}
        for name in found:
            if self._options.get(name) is not None:
                raise ValueError(
                    f"{name} was given twice: in the Batch that {where} returned, and to fit for every step; "
                    "leave it out of one of these"
                )
        return found

    def _rate(self, step: int) -> float | None:
        """Return the learning rate of a step; None if the server's schedule applies."""
        if not callable(self._learning_rate):
            return self._learning_rate
        found = call_back("learning_rate", self._learning_rate, step)
        _check_rate(f"learning_rate({step})", found)
        return None if found is None else float(found)


def _check_rate(name: str, rate: Any) -> None:
    """Raise TypeError or ValueError unless a learning rate is None or a valid 32-bit number, at least 0."""
    if rate is None:
        return
    check_real(name, rate, ", or None for the server's schedule")
    if not rate >= 0:  # also NaN
        raise ValueError(f"{name} must be finite and at least 0, got {rate!r}")
    if rate > _MOST_RATE:
        raise ValueError(f"{name} must be at most {_MOST_RATE:.1e}, the largest 32-bit number, got {rate!r}")


def _count(rows: Any, lengths: Any, where: str) -> int:
    """Return the number of tokens in rows, without padding. Raises TypeError for ids that are in no row."""
    try:
        whole = sum(len(row) for row in rows)
    except TypeError as error:
        raise TypeError(
            f"{where} must return rows of token ids, got ids that are in no row: "
            "return [row] for a batch of one row"
        ) from error
    return whole if lengths is None else int(to_array(lengths, "lengths").sum())
