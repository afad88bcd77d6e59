"""Token data as a pure function: `batch(step)` depends on the data, the seed and the step alone.

So there is no iterator to save: a job that starts again at step s asks for batch s. And the same ids give
the same batches however they are kept: as files, arrays, packed tokens or rows in memory.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from maskwire.arguments import check_whole
from maskwire.data.documents import Documents, Tiles, load_array
from maskwire.data.file_array import FileArray, Ids
from maskwire.data.file_discovery import find_files
from maskwire.data.file_types import DOCUMENTS, META, TOKENS, refuse_packed, refuse_part
from maskwire.data.fingerprint import content

Rows = Ids | list[Ids]

BYTES = "bytes"
"""The `tokenizer` of data whose ids are bytes."""
PACKED_TYPES = ("uint8", "uint16", "int32")
_OTHER_TYPES = {
    "uint32": "ids below 2^31, which every vocabulary's are, are the same bytes in int32: open the file as "
    "int32 (--dtype int32)",
    "int16": "ids that are not negative are the same bytes in uint16: open the file as uint16 "
    "(--dtype uint16)",
    "int8": "ids that are not negative are the same bytes in uint8: open the file as uint8 (--dtype uint8)",
    **dict.fromkeys(
        ("int64", "uint64"),
        "save them as a .npy file, np.save('ids.npy', np.fromfile(FILE, DTYPE)), which needs no dtype",
    ),
}
_FORMAT = 1
_MOST = 2**28  # tokens in a batch that any server takes


@dataclass(frozen=True)
class Meta:
    """What a folder of `maskwire data prepare` says of itself."""

    tokenizer: str
    """"bytes", or "sha256:" and the hash of the tokenizer's file."""
    num_tokens: int
    """The vocabulary's size, the mask id included."""
    mask_id: int
    dtype: str
    tokens: int
    documents: int
    text_bytes: int
    """Bytes of the text that the tokens encode."""
    document_start: list[int] = field(default_factory=list)
    """The special ids that each document begins with, such as BOS."""
    document_end: list[int] = field(default_factory=list)
    """The special ids that each document ends with, such as EOS."""

    def to_json(self) -> str:
        """The text of the file that `read` reads."""
        return json.dumps({"format": _FORMAT, **dataclasses.asdict(self)}, indent=1) + "\n"

    @staticmethod
    def read(folder: Path) -> Meta:
        """The meta of a prepared folder. Raises ValueError for one that is not whole."""
        try:
            fields = json.loads((folder / META).read_text())
            if fields.pop("format") != _FORMAT:
                raise ValueError("another format")
            meta = Meta(**fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / META}: cannot be read ({error}); prepare the data again") from error
        size = (folder / TOKENS).stat().st_size
        if size != meta.tokens * np.dtype(meta.dtype).itemsize:
            raise ValueError(f"{folder / TOKENS} has {size} bytes, not those of {meta.tokens} tokens")
        return meta


class TokenData:
    """Documents of token ids, and batches of rows cropped from them.

    A row is a random crop of `length` ids of one document, each place in the data equally likely; a
    document that is shorter is a row by itself.
    """

    files: list[Path]
    """Where the documents are from; empty for arrays."""

    def __init__(
        self,
        documents: Sequence[Any],
        *,
        length: int,
        batch_size: int,
        seed: int = 0,
        tokenizer: str = "",
        bytes_per_token: float | None = None,
    ) -> None:
        """`documents` are arrays or lists of ids, of any lengths; empty ones are left out.

        Raises ValueError for a length or batch size below 1, or when there is nothing in the data.
        """
        arrays = [np.asarray(document) for document in documents]
        for array in filter(np.size, arrays):
            if array.ndim != 1 or array.dtype.kind not in "iu":
                raise ValueError(f"a document must be integers [n], got {array.dtype} {list(array.shape)}")
        self.files = []
        self._begin(
            Documents.apart([array for array in arrays if array.size]),
            length=length, batch_size=batch_size, seed=seed, tokenizer=tokenizer,
            bytes_per_token=bytes_per_token,
        )  # fmt: skip

    def _begin(
        self,
        documents: Documents,
        *,
        length: int,
        batch_size: int,
        seed: int,
        tokenizer: str,
        bytes_per_token: float | None,
    ) -> None:
        for name, value in (("length", length), ("batch_size", batch_size)):
            check_whole(name, value, 1, _MOST)
        check_whole("seed", seed, 0)
        if not len(documents):
            raise ValueError("there is nothing in the data")
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.tokenizer = tokenizer
        """What the ids stand for: "bytes", the hash of a tokenizer, or empty when that is not known."""
        self.bytes_per_token = bytes_per_token
        """Bytes of text that a token encodes on average, if known: what bits per byte need."""
        self._documents = documents
        self._content: str | None = None
        self._held_out = 0.0
        self._ends = np.cumsum(np.maximum(1, documents.sizes - length + 1))

    @property
    def size(self) -> int:
        """Tokens in all documents."""
        return int(self._documents.sizes.sum())

    def fingerprint(self) -> dict[str, str]:
        """What batches are made from, in parts: two data sets with the same parts give the same batches.

        The content is a hash of all ids up to 2^24 of them, beyond that of each document's size and of ids
        sampled evenly from all of them. Paths and types of files do not matter.
        """
        if self._content is None:
            self._content = content(self._documents)
        sizes = {
            "length": self.length,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "tokens": self.size,
            "documents": self.documents,
        }
        parts = {name: str(value) for name, value in sizes.items()} | {"content": self._content}
        return parts | ({"held_out": str(self._held_out)} if self._held_out else {})

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return len(self._documents)

    def batch(self, step: int) -> Rows:
        """The batch of a step: integers [batch_size, length], or a list of rows if some are shorter."""
        return self._crops(
            np.random.default_rng((self.seed, step)).integers(self._ends[-1], size=self.batch_size)
        )

    def spread(self, rows: int) -> Rows:
        """Rows evenly spread over the data, always the same: for evaluation."""
        check_whole("rows", rows, 1, _MOST)
        return self._crops((np.arange(rows) + 0.5) / rows * self._ends[-1])

    def whole(self) -> Tiles:
        """All tokens, each once: documents in order, cut into rows of `length`, their last ones shorter."""
        return Tiles(self._documents, self.length)

    def text_bytes(self, rows: Rows) -> int | None:
        """The bytes of text that rows encode, by the average of all data; None when it is not known."""
        if self.bytes_per_token is None:
            return None
        return max(1, round(sum(len(row) for row in rows) * self.bytes_per_token))

    def _crops(self, places: npt.NDArray[np.generic]) -> Rows:
        crops = []
        for place in places.astype(np.int64):
            document = int(np.searchsorted(self._ends, place, side="right"))
            start = int(place) - (int(self._ends[document - 1]) if document else 0)
            crops.append(self._documents.crop(document, start, self.length))
        return np.stack(crops) if len({crop.size for crop in crops}) == 1 else crops

    def split(self, held_out: float) -> tuple[Self, Self]:
        """(training, held out): each document goes by the hash of its ids, so that copies stay together.

        Raises ValueError unless both get a document.
        """
        if not 0 < held_out < 1:
            raise ValueError(f"held_out must be between 0 and 1, got {held_out}")
        if len(self._documents) < 2:
            raise ValueError(
                "one document cannot be split: give the evaluation data of its own (--eval-data), or train "
                "on more files"
            )
        apart = np.array([self._documents.fraction(i) < held_out for i in range(len(self._documents))])
        if apart.all() or not apart.any():
            raise ValueError(
                f"held_out = {held_out} leaves {(~apart).sum()} documents to train on and {apart.sum()} "
                f"held out, of {apart.size}: both need one; use more files, another share, or data of its "
                "own for the evaluation"
            )
        training, evaluation = self._of(~apart), self._of(apart)
        training._held_out = held_out
        return training, evaluation

    def cropped(self, length: int) -> Self:
        """The same documents in rows of another length."""
        every = np.ones(len(self._documents), dtype=bool)
        same = self._of(every, length)
        same._content, same._held_out = self._content, self._held_out
        return same

    def _of(self, chosen: npt.NDArray[np.bool_], length: int | None = None) -> Self:
        part = object.__new__(type(self))
        part.files = [file for file, here in zip(self.files, chosen, strict=False) if here]
        part._begin(
            self._documents.choose(chosen), length=length or self.length, batch_size=self.batch_size,
            seed=self.seed, tokenizer=self.tokenizer, bytes_per_token=self.bytes_per_token,
        )  # fmt: skip
        return part

    def unigram_bits(self) -> float:
        """The entropy of the ids' frequencies, in bits a token: what knowing them alone is worth."""
        counts: npt.NDArray[np.int64] = np.zeros(1, dtype=np.int64)
        for index in range(len(self._documents)):
            for ids in self._documents.chunks(index):
                found = np.bincount(ids, minlength=counts.size)
                found[: counts.size] += counts
                counts = found
        share = counts[counts > 0] / counts.sum()
        return float(-(share * np.log2(share)).sum())


class ByteData(TokenData):
    """Files and folders of bytes, text or not, each byte a token; only what a batch needs is read."""

    def __init__(
        self,
        paths: str | Path | Iterable[str | Path],
        *,
        length: int,
        batch_size: int,
        seed: int = 0,
        pattern: str = "*",
        any_format: bool = False,
    ) -> None:
        """`paths` are files, or folders searched for `pattern`; hidden and empty files are left out.

        So are files that maskwire itself wrote: metrics, run directories, checkpoints, prepared data.
        Raises ValueError for a length or batch size below 1, when no file has anything in it, and unless
        `any_format` for files of a format that is not text: packed ids, arrays, archives, JSON lines.
        """
        files = find_files(paths, pattern, any_format=any_format)
        self._begin(
            Documents.files(files),
            length=length, batch_size=batch_size, seed=seed, tokenizer=BYTES, bytes_per_token=1.0,
        )  # fmt: skip
        self.files = files


class FileTokens(TokenData):
    """Token ids from one file or folder, not held in memory: packed ids, an array, or prepared text."""

    def __init__(
        self, path: str | Path, *, length: int, batch_size: int, seed: int = 0, dtype: str | None = None
    ) -> None:
        """`path` is a folder of `maskwire data prepare`, a `.npy` file, or with `dtype` packed tokens.

        A `.npy` file holds integers [n], one document, or [rows, n], a document a row. Packed tokens
        are little-endian ids of `dtype` (uint8, uint16 or int32) without a header: one document.
        Raises ValueError for anything else.
        """
        path = Path(path)
        tokenizer, bytes_per_token = "", None
        if dtype is not None and holds_tokens(path):
            raise ValueError(f"dtype must be left out for {path}, which says it itself")
        if path.name == DOCUMENTS:
            refuse_part(path)
        if (path / META).is_file():
            meta = Meta.read(path)
            flat = FileArray(path / TOKENS, _little(meta.dtype))
            ends, _ = load_array(path / DOCUMENTS)
            documents = Documents.packed(flat, ends[:].astype(np.int64))
            tokenizer, bytes_per_token = meta.tokenizer, meta.text_bytes / meta.tokens
        elif path.suffix == ".npy":
            documents = Documents.packed(*load_array(path))
        elif dtype in PACKED_TYPES and path.is_file():
            refuse_packed(path)
            if path.stat().st_size % np.dtype(dtype).itemsize or not path.stat().st_size:
                raise ValueError(f"{path} must be whole {dtype} ids, got {path.stat().st_size} bytes")
            flat = FileArray(path, _little(dtype))
            documents = Documents.packed(flat, np.array([flat.size]))
        else:
            cure = f"; {_OTHER_TYPES[dtype]}" if dtype in _OTHER_TYPES else ""
            raise ValueError(
                f"{path}: no .npy file, no folder of `maskwire data prepare`, and dtype is {dtype!r}, not "
                f"one of {', '.join(PACKED_TYPES)}{cure}"
            )
        self._begin(
            documents, length=length, batch_size=batch_size, seed=seed, tokenizer=tokenizer,
            bytes_per_token=bytes_per_token,
        )  # fmt: skip
        self.files = []


def open_data(
    paths: str | Path | Sequence[str | Path],
    *,
    length: int,
    batch_size: int,
    seed: int = 0,
    pattern: str = "*",
    dtype: str | None = None,
    any_format: bool = False,
) -> TokenData:
    """The data of paths, by what they are.

    One folder of `maskwire data prepare`, one `.npy` file, one file of packed ids with its `dtype`
    (uint8, uint16 or int32), or files and folders of text, each byte a token; with `any_format` of
    anything.
    """
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    if dtype is not None or any(holds_tokens(path) for path in paths):
        if len(paths) != 1:
            raise ValueError(
                f"a file or folder of token ids comes alone, got {len(paths)} paths; prepare them as one"
            )
        return FileTokens(paths[0], length=length, batch_size=batch_size, seed=seed, dtype=dtype)
    return ByteData(
        paths, length=length, batch_size=batch_size, seed=seed, pattern=pattern, any_format=any_format
    )


def holds_tokens(path: str | Path) -> bool:
    """Whether a path says itself that it holds token ids: a `.npy` file, or what was prepared."""
    return Path(path).suffix == ".npy" or (Path(path) / META).is_file()


def _little(dtype: str) -> np.dtype[Any]:
    if dtype not in PACKED_TYPES:
        raise ValueError(f"dtype must be one of {', '.join(PACKED_TYPES)}, got {dtype!r}")
    return np.dtype(dtype).newbyteorder("<")
