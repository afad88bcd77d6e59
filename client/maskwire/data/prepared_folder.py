"""The folder that `maskwire data prepare` writes: the names of its files, and its metadata."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

METADATA, TOKENS, DOCUMENTS = "maskwire-data.json", "tokens.bin", "documents.npy"
PROMPTS = "prompts.npy"
"""How many of each document's first ids are its prompt; only of data with prompts and responses."""
ROWS, PIECES = "rows.npy", "pieces.npy"
"""Where each packed row ends among the pieces, and the numbers of the pieces in it; only of packed data.

A document longer than a row is cut into pieces; every other document is one piece. Pieces are numbered
in the order of the documents. So the sizes of the pieces, and with them the segment ids, follow from
`documents.npy`.
"""
BYTES = "bytes"
"""The `tokenizer` of data whose ids are bytes."""
_FORMAT, _PACKED_FORMAT = 2, 3
_READABLE = (1, 2, 3)
"""Format 1 has no prompts, and no document ends but the tokenizer's own. Only packed data is written in
format 3, so that earlier versions of maskwire can read all other data."""
_OF_PACKED = ("row_length", "rows", "cut")


@dataclass(frozen=True)
class PreparedMetadata:
    """The content of `maskwire-data.json`."""

    tokenizer: str
    """"bytes", or "sha256:" and the hash of the tokenizer's file."""
    num_tokens: int
    """The size of the vocabulary, including the mask id."""
    mask_id: int
    dtype: str
    tokens: int
    documents: int
    text_bytes: int
    """Size of the text that was tokenized, in bytes."""
    document_start: list[int] = field(default_factory=list)
    """The special ids that each document begins with, such as BOS."""
    document_end: list[int] = field(default_factory=list)
    """The special ids that each document ends with, such as EOS."""
    pad_id: int | None = None
    """The tokenizer's pad id, if it has one."""
    end_id: int | None = None
    """The id that ends a document, which is the last of `document_end`; None if documents have no end id."""
    prompts: bool = False
    """Whether the documents are prompts with responses."""
    longest: int = 0
    """The size of the longest document; 0: not recorded."""
    dropped: dict[str, int] = field(default_factory=dict)
    """How many records were left out, by reason."""
    row_length: int = 0
    """The maximum number of tokens in a packed row; 0: the data is not packed."""
    rows: int = 0
    """The number of packed rows."""
    cut: int = 0
    """How many documents were cut into pieces because they are longer than a packed row."""

    @property
    def filled(self) -> float | None:
        """The share of the positions of packed rows that hold tokens; None if the data is not packed."""
        return self.tokens / (self.rows * self.row_length) if self.rows else None

    def to_json(self) -> str:
        """Return the metadata as the text of `maskwire-data.json`."""
        fields = dataclasses.asdict(self)
        if not self.row_length:
            fields = {name: value for name, value in fields.items() if name not in _OF_PACKED}
        version = _PACKED_FORMAT if self.row_length else _FORMAT
        return json.dumps({"format": version, **fields}, indent=1) + "\n"

    @staticmethod
    def read(folder: Path) -> PreparedMetadata:
        """Read the metadata of a folder. Raises ValueError if they are damaged or do not fit the tokens."""
        path = folder / METADATA
        try:
            fields = json.loads(path.read_text())
            if (version := fields.pop("format")) not in _READABLE:
                raise ValueError(f"the format is {version!r}, expected {_READABLE[0]} to {_READABLE[-1]}")
            metadata = PreparedMetadata(**fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: cannot be read ({error}); prepare the data again") from error
        size = (folder / TOKENS).stat().st_size
        expected = metadata.tokens * np.dtype(metadata.dtype).itemsize
        if size != expected:
            raise ValueError(
                f"{folder / TOKENS} has {size:,} bytes, but {metadata.tokens:,} {metadata.dtype} tokens take "
                f"{expected:,}; prepare the data again"
            )
        return metadata


def refuse_part(path: Path) -> None:
    """Raise ValueError for a single file of a prepared folder, which can only be opened as a whole."""
    if (
        path.name in (METADATA, TOKENS, DOCUMENTS, PROMPTS, ROWS, PIECES)
        and (path.parent / METADATA).is_file()
    ):
        raise ValueError(f"{path} is part of prepared data; give the whole folder instead: {path.parent}")
