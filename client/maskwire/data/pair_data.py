"""Prompts with responses: the prompt is given to the model, and the response is trained on."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from maskwire.arguments import check_whole
from maskwire.batch import Batch
from maskwire.data.file_array import Ids
from maskwire.data.token_data import TokenData
from maskwire.data.token_documents import Documents
from maskwire.signatures import refuse_unknown_keywords

log = logging.getLogger(__name__)


@refuse_unknown_keywords
class PairData(TokenData):
    """Pairs of a prompt and a response, one row each.

    A row consists of the prompt, the response, and end ids up to `length`. From the end ids, the model learns
    how long a response is, as in the fine-tuning of LLaDA (Nie et al. 2025, "Large Language Diffusion
    Models"). Therefore, generate rows of the same `length`. A pair is left out if it does not fit into
    `length` tokens together with one end id.
    """

    def __init__(
        self,
        documents: Documents,
        prompts: npt.NDArray[np.integer[Any]],
        *,
        end_id: int,
        length: int,
        batch_size: int,
        seed: int = 0,
        sampling: str = "crops",
        tokenizer: str = "",
    ) -> None:
        """Make data of pairs; `open_data` does so for records with a prompt and a response.

        documents: Documents that each consist of a prompt, its response and `end_id`.
        prompts: Integers of shape [documents]: how many ids of each document are its prompt.
        end_id: The id after a response, which also fills the rest of the row.
        length: Tokens per row.
        batch_size: Rows per batch.
        seed: Seed for the choice of rows.
        sampling: "crops" for pairs drawn with replacement, or "epochs" for each pair once per epoch.
        tokenizer: The tokenizer of the ids: "bytes", "sha256:" and the hash of its file, or "" if unknown.

        Raises ValueError unless each prompt is shorter than its document.
        """
        prompts = check_prompts(prompts, documents)
        self.files = []
        self.end_id = end_id
        """The id after a response."""
        self._prompts = prompts
        self._initialize(
            documents, length=length, batch_size=batch_size, seed=seed, sampling=sampling,
            tokenizer=tokenizer, bytes_per_token=None,
        )  # fmt: skip

    def _initialize(self, documents: Documents, **options: Any) -> None:
        self._fitting = np.flatnonzero(documents.sizes <= options["length"])
        self._told = False
        super()._initialize(documents, **options)

    @property
    def too_long(self) -> int:
        """The number of pairs that are left out because they do not fit into `length` tokens."""
        return len(self._documents) - self._fitting.size

    def fingerprint(self) -> dict[str, str]:
        """The parts that `TokenData.fingerprint` returns, and a hash of the lengths of the prompts."""
        return super().fingerprint() | {"prompts": prompts_hash(self._prompts)}

    def batch(self, step: int) -> Batch:  # type: ignore[override]  # fit takes either
        """Return the batch of a step: tokens and prompt_mask, both of shape [batch_size, length].

        step: The step's number, from 1.
        """
        check_whole("step", step, 1)
        self._check()
        if self._order is not None:
            numbers = self._order.batch(step, self.batch_size)
        else:
            numbers = np.random.default_rng((self.seed, step)).integers(
                self._fitting.size, size=self.batch_size
            )
        return self._batch(numbers)

    def evaluation_rows(self, rows: int | None) -> Batch:
        """Return the rows to evaluate on, with their prompt masks.

        rows: The number of rows, evenly spaced. None: every pair that fits into `length`.
        """
        self._check()
        if rows is not None:
            numbers = (np.arange(rows) + 0.5) / rows * self._fitting.size
            return self._batch(numbers.astype(np.int64))
        count = self._fitting.size
        return Batch(Computed(self._row, count), prompt_mask=Computed(self._mask, count))

    def whole(self) -> Any:
        """Return every pair that fits into `length` tokens, each as one row."""
        return Computed(self._row, self._fitting.size)

    def spread(self, rows: int) -> Any:
        """Return rows that are evenly spread over the data; every call returns the same.

        rows: The number of rows.
        """
        return self.evaluation_rows(rows).tokens

    def _batch(self, numbers: npt.NDArray[np.int64]) -> Batch:
        return Batch(
            np.stack([self._row(number) for number in numbers]),
            prompt_mask=np.stack([self._mask(number) for number in numbers]),
        )

    def _row(self, number: int) -> Ids:
        found = self._documents.crop(int(self._fitting[number]), 0, self.length)
        kind = np.promote_types(found.dtype, np.min_scalar_type(self.end_id))
        row = np.full(self.length, self.end_id, dtype=kind)
        row[: found.size] = found
        return row

    def _mask(self, number: int) -> npt.NDArray[np.bool_]:
        mask: npt.NDArray[np.bool_] = np.arange(self.length) < self._prompts[self._fitting[number]]
        return mask

    def _check(self) -> None:
        """Raise ValueError if no pair fits into `length`. Warn once if some pairs do not fit."""
        if not self._fitting.size:
            raise ValueError(
                f"none of the {len(self._documents):,} pairs fits into rows of length {self.length}: the "
                f"shortest pair has {int(self._documents.sizes.min())} tokens, including its end id; set a "
                "larger length (--length)"
            )
        if self.too_long and not self._told:
            self._told = True
            log.warning(
                "%s of %s pairs are longer than length %s, and are left out",
                f"{self.too_long:,}", f"{len(self._documents):,}", self.length,
            )  # fmt: skip

    def _subset(self, chosen: npt.NDArray[np.bool_], length: int | None = None) -> Self:
        part = object.__new__(type(self))
        part.end_id, part._prompts = self.end_id, self._prompts[chosen]
        return self._fill(part, chosen, length)


def check_prompts(prompts: npt.NDArray[np.integer[Any]], documents: Documents) -> npt.NDArray[np.int64]:
    """Return the lengths of prompts as int64. Raises ValueError unless each is below its document's size."""
    found = np.asarray(prompts, dtype=np.int64)
    fit = found.shape == documents.sizes.shape and bool((found < documents.sizes).all())
    if not fit or (found < 0).any():
        raise ValueError("the lengths of the prompts do not match the documents; prepare the data again")
    return found


def prompts_hash(prompts: npt.NDArray[np.int64]) -> str:
    """Return a hash of the lengths of prompts, such as "sha256:0f3a..."."""
    return f"sha256:{hashlib.sha256(prompts.astype('<i8').tobytes()).hexdigest()}"


class Computed(Sequence[Any]):
    """A sequence whose items are computed on access."""

    def __init__(self, item: Callable[[int], Any], size: int) -> None:
        self._item, self._size = item, size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._item(i) for i in range(*index.indices(self._size))]
        if not -self._size <= index < self._size:
            raise IndexError(f"the index of a row must be from 0 to {self._size - 1}, got {index}")
        return self._item(index % self._size)
