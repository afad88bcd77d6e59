"""Token data whose `batch(step)` depends on nothing but the data, the seed and the step.

There is no iterator state to save: a job that restarts at step s asks for batch s. The same ids give the
same batches, whether they are stored in text files, arrays, packed ids or in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt

from maskwire.arguments import check_whole
from maskwire.batch import Batch
from maskwire.data.epoch_order import EpochOrder
from maskwire.data.file_array import Ids
from maskwire.data.fingerprint import content_hash
from maskwire.data.token_documents import DocumentRows, Documents
from maskwire.signatures import refuse_unknown_keywords
from maskwire.v1.values import TokenizerDescription

Number = TypeVar("Number", bound=np.generic)
Rows = Ids | list[Ids]
SAMPLING = ("crops", "epochs")

_MAX_TOKENS = 2**28  # more than any server accepts in a batch


@refuse_unknown_keywords
class TokenData:
    """Documents of token ids, and batches of rows cropped from them.

    With `sampling="crops"` a row is a random crop of `length` ids from one document, and every position is
    equally likely. A document shorter than `length` is a row by itself. With "epochs" documents are cut into
    adjacent rows, and the last row of a document may be shorter. Each row is used once per epoch, in a random
    order.
    """

    files: list[Path]
    """The files that the documents come from; empty for arrays."""
    tokenizer_description: TokenizerDescription | None = None
    """The description of the tokenizer, which the run keeps; None if the tokenizer is unknown."""

    def __init__(
        self,
        documents: Sequence[Any],
        *,
        length: int,
        batch_size: int,
        seed: int = 0,
        sampling: str = "crops",
        tokenizer: str = "",
        bytes_per_token: float | None = None,
    ) -> None:
        """Make token data from documents of ids in memory.

        documents: One-dimensional arrays or lists of integer ids, of any length. Empty ones are ignored.
        length: Tokens per row.
        batch_size: Rows per batch.
        seed: Seed for the choice of rows.
        sampling: "crops" for rows at random places, or "epochs" for each row once per epoch.
        tokenizer: The tokenizer of the ids: "bytes", "sha256:" and the hash of its file, or "" if unknown.
        bytes_per_token: Average bytes of text per token. None: evaluations give no bits per byte.

        Raises ValueError for a length or batch size below 1, and if no ids are left.
        """
        arrays = [np.asarray(document) for document in documents]
        for index, array in enumerate(arrays):
            if array.size and (array.ndim != 1 or array.dtype.kind not in "iu"):
                raise ValueError(
                    f"documents[{index}] must be a one-dimensional array of integers, got {array.dtype} "
                    f"of shape {list(array.shape)}"
                )
        self.files = []
        self._initialize(
            Documents.from_arrays([array for array in arrays if array.size]),
            length=length, batch_size=batch_size, seed=seed, sampling=sampling, tokenizer=tokenizer,
            bytes_per_token=bytes_per_token,
        )  # fmt: skip

    def _initialize(
        self,
        documents: Documents,
        *,
        length: int,
        batch_size: int,
        seed: int,
        sampling: str,
        tokenizer: str,
        bytes_per_token: float | None,
    ) -> None:
        for name, value in (("length", length), ("batch_size", batch_size)):
            check_whole(name, value, 1, _MAX_TOKENS)
        check_whole("seed", seed, 0)
        if sampling not in SAMPLING:
            raise ValueError(f"sampling must be one of {', '.join(SAMPLING)}, got {sampling!r}")
        if not len(documents):
            raise ValueError("the data is empty: no document has an id; give documents with ids")
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.sampling = sampling
        """How rows are chosen: "crops" (at random places) or "epochs" (without replacement)."""
        self.tokenizer = tokenizer
        """The tokenizer of the ids: "bytes", "sha256:" and the hash of its file, or "" if unknown."""
        self.bytes_per_token = bytes_per_token
        """Average bytes of text per token, if known; needed for bits per byte."""
        self._documents = documents
        self._content: str | None = None
        self._held_out = 0.0
        self._ends = np.cumsum(np.maximum(1, documents.sizes - length + 1))
        self._order: EpochOrder | None = None
        if sampling == "epochs":
            self._every = self.whole()
            self._order = EpochOrder(max(1, len(self._every)), seed)

    @property
    def size(self) -> int:
        """The number of tokens in all documents."""
        return int(self._documents.sizes.sum())

    @property
    def packed_length(self) -> int | None:
        """The length of packed rows, which cannot be changed; None if the data is not packed."""
        return None

    def fingerprint(self) -> dict[str, str]:
        """Return everything that determines the batches: equal fingerprints mean equal batches.

        The part `content` is a hash of the documents' sizes and ids. Of more than 2^24 ids, only evenly
        spread blocks are hashed. Paths and file types do not matter.
        """
        if self._content is None:
            self._content = content_hash(self._documents)
        sizes = {
            "length": self.length,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "tokens": self.size,
            "documents": self.documents,
        }
        parts = {name: str(value) for name, value in sizes.items()} | {"content": self._content}
        parts |= {"sampling": self.sampling} if self.sampling != "crops" else {}
        return parts | ({"held_out": str(self._held_out)} if self._held_out else {})

    @property
    def documents(self) -> int:
        """The number of documents."""
        return len(self._documents)

    @property
    def rows(self) -> int:
        """The number of rows in an epoch: all documents, cut into rows of at most `length` tokens."""
        return len(self.whole())

    def steps_of(self, epochs: int) -> int:
        """Return the step at which the given number of epochs is complete, with `sampling="epochs"`.

        epochs: How often each row is trained on.
        """
        check_whole("epochs", epochs, 1)
        return -(-epochs * self.rows // self.batch_size)

    def batch(self, step: int) -> Rows:
        """Return the batch of a step.

        step: The step's number, from 1.

        The batch is integers of shape [batch_size, length], or a list of rows if some rows are shorter.
        """
        check_whole("step", step, 1)
        if self._order is not None:
            return stacked([self._every[row] for row in self._order.batch(step, self.batch_size)])
        return self._crops(
            np.random.default_rng((self.seed, step)).integers(self._ends[-1], size=self.batch_size)
        )

    def evaluation_rows(self, rows: int | None) -> Batch:
        """Return the rows to evaluate on.

        rows: The number of rows, evenly spaced. None: all, so that every token is evaluated once.
        """
        return Batch(self.whole() if rows is None else self.spread(rows))

    def spread(self, rows: int) -> Rows:
        """Return rows for evaluation that are evenly spread over the data; every call returns the same.

        rows: The number of rows.
        """
        check_whole("rows", rows, 1, _MAX_TOKENS)
        return self._crops((np.arange(rows) + 0.5) / rows * self._ends[-1])

    def whole(self) -> DocumentRows:
        """Return rows with every token once: the documents in order, cut into rows of at most `length`."""
        return DocumentRows(self._documents, self.length)

    def text_bytes(self, rows: Rows) -> int | None:
        """Estimate the bytes of text that rows encode, from the average of all data; None if unknown.

        rows: Integers of shape [rows, columns], or a list of rows.
        """
        if self.bytes_per_token is None:
            return None
        return max(1, round(sum(len(row) for row in rows) * self.bytes_per_token))

    def _crops(self, places: npt.NDArray[np.generic]) -> Rows:
        crops = []
        for place in places.astype(np.int64):
            document = int(np.searchsorted(self._ends, place, side="right"))
            start = int(place) - (int(self._ends[document - 1]) if document else 0)
            crops.append(self._documents.crop(document, start, self.length))
        return stacked(crops)

    def split(self, held_out: float) -> tuple[Self, Self]:
        """Split the data into (training, held out).

        Documents are chosen by a hash of their content, so that copies of a document stay together.

        held_out: The share of documents to hold out, above 0 and below 1.

        Raises ValueError unless both parts get at least one document.
        """
        if not 0 < held_out < 1:
            raise ValueError(
                f"held_out (--held-out) must be above 0 and below 1, such as 0.05 for 5%, got {held_out}"
            )
        if len(self._documents) < 2:
            raise ValueError(
                "one document cannot be split into training and held-out data: give several files, or "
                "evaluate on other data"
            )
        fractions = self._fractions()
        apart = fractions < held_out
        if apart.all() or not apart.any():
            raise ValueError(
                f"held_out={held_out} selected {'all' if apart.all() else 'none'} of the {apart.size} "
                f"documents (each is selected by a hash of its content). {_working_share(fractions)}"
            )
        training, evaluation = self._subset(~apart), self._subset(apart)
        training._held_out = held_out
        return training, evaluation

    def _fractions(self) -> npt.NDArray[np.float64]:
        """For each document, the number in [0, 1) that decides to which part of a split it belongs."""
        return np.array([self._documents.fraction(i) for i in range(len(self._documents))])

    def cropped(self, length: int) -> Self:
        """Return data of the same documents, with rows of another length.

        length: Tokens per row.
        """
        every = np.ones(len(self._documents), dtype=bool)
        same = self._subset(every, length)
        same._content, same._held_out = self._content, self._held_out
        return same

    def _subset(self, chosen: npt.NDArray[np.bool_], length: int | None = None) -> Self:
        return self._fill(object.__new__(type(self)), chosen, length)

    def _fill(self, part: Self, chosen: npt.NDArray[np.bool_], length: int | None) -> Self:
        part.files = [file for file, here in zip(self.files, chosen, strict=False) if here]
        part._initialize(
            self._documents.choose(chosen), length=length or self.length, batch_size=self.batch_size,
            seed=self.seed, sampling=self.sampling, tokenizer=self.tokenizer,
            bytes_per_token=self.bytes_per_token,
        )  # fmt: skip
        part.tokenizer_description = self.tokenizer_description
        return part

    def unigram_bits(self) -> float:
        """The entropy of the ids in bits per token: the loss of a model that knows only their frequencies."""
        counts: npt.NDArray[np.int64] = np.zeros(1, dtype=np.int64)
        for index in range(len(self._documents)):
            for ids in self._documents.chunks(index):
                found = np.bincount(ids, minlength=counts.size)
                found[: counts.size] += counts
                counts = found
        share = counts[counts > 0] / counts.sum()
        return float(-(share * np.log2(share)).sum())


def stacked(rows: list[npt.NDArray[Number]]) -> npt.NDArray[Number] | list[npt.NDArray[Number]]:
    """Stack rows to one array if they have the same length; otherwise return them unchanged."""
    return np.stack(rows) if len({row.size for row in rows}) == 1 else rows


def _working_share(fractions: npt.NDArray[np.float64]) -> str:
    """Return advice for a split: the smallest whole percentage that selects some documents but not all."""
    share = (int(fractions.min() * 100) + 1) / 100
    if share >= 1 or (fractions < share).all():
        return "Give more files, or evaluate on other data."
    return f"Set held_out={share:g}, which selects {(fractions < share).sum()}, or evaluate on other data."
