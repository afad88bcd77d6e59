"""Rows that each hold several documents, packed by `maskwire data prepare --pack`."""

from __future__ import annotations

import hashlib
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from maskwire.arguments import check_whole
from maskwire.batch import Batch
from maskwire.data.epoch_order import EpochOrder
from maskwire.data.file_array import Ids
from maskwire.data.pair_data import Computed, check_prompts, prompts_hash
from maskwire.data.token_data import TokenData, stacked
from maskwire.data.token_documents import Documents
from maskwire.signatures import refuse_unknown_keywords

Numbers = npt.NDArray[np.int64]


@refuse_unknown_keywords
class PackedData(TokenData):
    """Batches of packed rows, with segment ids that tell the documents of a row apart.

    Each document is one segment; a document longer than a row is cut into pieces, and each piece is a
    segment. With `sampling="crops"` rows are drawn with replacement, every row is equally likely, and none
    is cropped. With "epochs" each row comes once per epoch. Evaluations treat each segment as a separate row,
    which gives the same losses. `split` keeps all documents of a row, and all pieces of a document, on the
    same side.
    """

    def __init__(
        self,
        documents: Documents,
        pieces: Numbers,
        row_ends: Numbers,
        *,
        length: int,
        batch_size: int,
        seed: int = 0,
        sampling: str = "crops",
        tokenizer: str = "",
        bytes_per_token: float | None = None,
        prompts: npt.NDArray[np.integer[Any]] | None = None,
    ) -> None:
        """Make packed data from documents and their rows; `open_data` does so for a packed folder.

        documents: Documents of integer ids.
        pieces: Integers of shape [pieces]: the numbers of the pieces in each row, one row after another.
            Pieces are numbered in the order of the documents.
        row_ends: Integers of shape [rows]: where each row ends in `pieces`.
        length: Tokens per row.
        batch_size: Rows per batch.
        seed: Seed for the choice of rows.
        sampling: "crops" for rows drawn with replacement, or "epochs" for each row once per epoch.
        tokenizer: The tokenizer of the ids: "bytes", "sha256:" and the hash of its file, or "" if unknown.
        bytes_per_token: Average bytes of text per token. None: evaluations give no bits per byte.
        prompts: Integers of shape [documents]: how many ids of each document are its prompt.

        Raises ValueError unless each piece is in exactly one row, and each row fits into `length`.
        """
        self.files = []
        self._prompts = None if prompts is None else check_prompts(prompts, documents)
        self._pieces, self._row_ends = pieces, row_ends
        self._initialize(
            documents, length=length, batch_size=batch_size, seed=seed, sampling=sampling,
            tokenizer=tokenizer, bytes_per_token=bytes_per_token,
        )  # fmt: skip
        self._check()

    def _initialize(self, documents: Documents, **options: Any) -> None:
        super()._initialize(documents, **options)
        self._every = self.whole()
        if self._order is not None:
            self._order = EpochOrder(max(1, self.rows), self.seed)

    def _check(self) -> None:
        count = len(self._every)
        ends = np.concatenate(([0], self._row_ends))
        fit = bool((np.diff(ends) >= 1).all()) and ends[-1] == self._pieces.size == count
        fit = fit and int(self._pieces.min()) >= 0 and int(self._pieces.max()) < count
        fit = fit and bool((np.bincount(self._pieces, minlength=count) == 1).all())
        if fit:
            sizes = self._every.sizes[self._pieces]
            fit = int(np.add.reduceat(sizes, ends[:-1]).max()) <= self.length
        if not fit:
            raise ValueError("the packed rows do not match the documents; prepare the data again")

    @property
    def packed_length(self) -> int:
        """The maximum number of tokens per row."""
        return self.length

    @property
    def rows(self) -> int:
        """The number of packed rows."""
        return int(self._row_ends.size)

    def fingerprint(self) -> dict[str, str]:
        """The parts that `TokenData.fingerprint` returns, and a hash of which documents share a row."""
        found = hashlib.sha256(self._row_ends.astype("<i8").tobytes())
        found.update(self._pieces.astype("<i8").tobytes())
        parts = super().fingerprint() | {"packing": f"sha256:{found.hexdigest()}"}
        return parts if self._prompts is None else parts | {"prompts": prompts_hash(self._prompts)}

    def batch(self, step: int) -> Batch:  # type: ignore[override]  # fit takes either
        """Return the batch of a step: tokens, segment_ids, and a prompt_mask if the data has prompts.

        step: The step's number, from 1.
        """
        check_whole("step", step, 1)
        if self._order is not None:
            numbers = self._order.batch(step, self.batch_size)
        else:
            numbers = np.random.default_rng((self.seed, step)).integers(self.rows, size=self.batch_size)
        tokens, segments, masks = [], [], []
        for row in numbers:
            pieces = self._row(int(row))
            parts = [self._every[piece] for piece in pieces]
            tokens.append(np.concatenate(parts))
            places = np.arange(len(parts), dtype=np.int32)
            segments.append(np.repeat(places, [part.size for part in parts]))
            if self._prompts is not None:
                masks.append(np.concatenate([self._mask(piece) for piece in pieces]))
        return Batch(
            stacked(tokens),
            segment_ids=stacked(segments),
            prompt_mask=None if self._prompts is None else stacked(masks),
        )

    def _row(self, row: int) -> list[int]:
        """The numbers of the pieces in a row."""
        start = int(self._row_ends[row - 1]) if row else 0
        found: list[int] = self._pieces[start : int(self._row_ends[row])].tolist()
        return found

    def _mask(self, piece: int) -> npt.NDArray[np.bool_]:
        """The prompt mask of a pair of prompt and response, which is always one piece."""
        assert self._prompts is not None
        mask: npt.NDArray[np.bool_] = np.arange(self._documents.sizes[piece]) < self._prompts[piece]
        return mask

    def evaluation_rows(self, rows: int | None) -> Batch:
        """Return the rows to evaluate on: one segment per row, in the order of the documents.

        rows: The number of segments, evenly spaced. None: all of them.
        """
        count = len(self._every)
        chosen = range(count) if rows is None else self._spread(rows)
        if self._prompts is None:
            return Batch(self._every if rows is None else self.spread(rows))
        return Batch(
            Computed(lambda place: self._every[chosen[place]], len(chosen)),
            prompt_mask=Computed(lambda place: self._mask(chosen[place]), len(chosen)),
        )

    def spread(self, rows: int) -> list[Ids]:
        """Return segments that are evenly spread over the data; every call returns the same.

        rows: The number of segments.
        """
        return [self._every[piece] for piece in self._spread(rows)]

    def _spread(self, rows: int) -> list[int]:
        found: list[int] = ((np.arange(rows) + 0.5) / rows * len(self._every)).astype(np.int64).tolist()
        return found

    def _fractions(self) -> npt.NDArray[np.float64]:
        """Return, for each document, a hash of the row with its last piece, as a number in [0, 1).

        Every other piece fills a row alone. So documents share a row if and only if their numbers are equal.
        """
        own = super()._fractions()
        last = self._every.ends - 1  # the last piece of each document
        places = np.empty(self._pieces.size, dtype=np.int64)
        places[self._pieces] = np.arange(self._pieces.size)
        row_of = np.searchsorted(self._row_ends, places[last], side="right")
        order = np.argsort(places[last])
        bounds = np.flatnonzero(np.diff(row_of[order], prepend=-1))
        found = np.empty_like(own)
        for members in np.split(order, bounds[1:]):
            digest = hashlib.sha256(own[members].astype("<f8").tobytes()).digest()
            found[members] = int.from_bytes(digest[:4], "little") / 2**32
        return found

    def cropped(self, length: int) -> Self:
        """Return the same rows: packed rows cannot be cropped to another length.

        length: Must be the length of the packed rows.

        Raises ValueError for another length.
        """
        check_length(length, self.length)
        return super().cropped(length)

    def _subset(self, chosen: npt.NDArray[np.bool_], length: int | None = None) -> Self:
        part = object.__new__(type(self))
        part._prompts = None if self._prompts is None else self._prompts[chosen]
        sizes = np.diff(self._every.ends, prepend=0)
        kept = np.repeat(chosen, sizes)  # indexed by piece
        numbers = np.cumsum(kept) - 1  # the new number of each piece that is kept
        inside = kept[self._pieces]
        part._pieces = numbers[self._pieces[inside]]
        starts = np.concatenate(([0], self._row_ends[:-1]))
        whole = inside[starts]
        part._row_ends = np.cumsum(np.diff(self._row_ends, prepend=0)[whole])
        return self._fill(part, chosen, length)


def check_length(length: int | None, packed: int) -> None:
    """Raise ValueError if a length is given that differs from `packed`, the length of the packed rows."""
    if length is not None and length != packed:
        raise ValueError(
            f"length (--length) must be {packed}, or left out, for data that is packed into rows of {packed} "
            f"tokens, got {length}; for other rows prepare the data again with --pack {length}"
        )
