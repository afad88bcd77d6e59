"""What a training loop sends for each step, as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from maskwire.arguments import call_back, check_rows
from maskwire.batch import Batch
from maskwire.protocol.option_types import FitOptions
from maskwire.protocol.token_batch import to_array

LearningRate = float | Callable[[int], float | None] | None


class Data(Protocol):
    """What `fit` needs of data: any object with this method.

    If it also has `tokenizer`, `tokenizer_description`, `fingerprint()` or `files`, they are used as those of
    a TokenData are.
    """

    def batch(self, step: int) -> Any:
        """Return the rows of a step, or a `maskwire.Batch`. Must depend on nothing but the step.

        step: The step's number, from 1.
        """


@dataclass(frozen=True, eq=False)
class StepInput:
    """One step's rows and options."""

    rows: Any
    options: dict[str, Any]
    tokens: int
    """Tokens sent, prompts included and padding excluded."""


class StepInputs:
    """Asks the data for its batch, and `learning_rate` for its value, at each step."""

    def __init__(self, data: Data, options: FitOptions, learning_rate: LearningRate) -> None:
        self._data, self._options, self._learning_rate = data, options, learning_rate

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
        """What a batch says about its rows."""
        names = ("lengths", "prompt_mask", "segment_ids")
        found = {name: value for name in names if (value := getattr(batch, name)) is not None}
        for name in found:
            if self._options.get(name) is not None:
                raise ValueError(
                    f"{name} was given twice: in the Batch that {where} returned, and to fit for every step; "
                    "leave it out of one of the two"
                )
        return found

    def _rate(self, step: int) -> float | None:
        """The learning rate of a step; None for the schedule's."""
        if not callable(self._learning_rate):
            return self._learning_rate
        found = call_back("learning_rate", self._learning_rate, step)
        if found is None:
            return None
        if isinstance(found, bool) or not isinstance(found, int | float | np.integer | np.floating):
            raise TypeError(
                f"learning_rate({step}) must return a number, or None to use the server's schedule, got "
                f"{found!r}"
            )
        if not math.isfinite(found) or found < 0:
            raise ValueError(f"learning_rate({step}) must be finite and at least 0, got {found!r}")
        return float(found)


def _count(rows: Any, lengths: Any, where: str) -> int:
    """The number of tokens in rows, padding excluded."""
    try:
        whole = sum(len(row) for row in rows)
    except TypeError as error:
        raise TypeError(
            f"{where} must return rows of token ids, got ids that are in no row: "
            "return [row] for a batch of one row"
        ) from error
    return whole if lengths is None else int(to_array(lengths, "lengths").sum())
