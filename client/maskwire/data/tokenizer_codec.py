"""Encode prompts to ids, and decode sampled ids to text, with the tokenizer of a run's data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from maskwire.data.prepared_folder import BYTES
from maskwire.data.tokenizer import FileTokenizer
from maskwire.results import ModelInfo
from maskwire.v1.values import TokenizerDescription

_BYTES = 256


class TextCodec(Protocol):
    """The interface for encoding parts of a text to ids, and decoding ids to text."""

    start: tuple[int, ...]
    """The special ids before a text."""
    end: tuple[int, ...]
    """The special ids after a text."""

    def encode(self, text: str, *, continued: bool = False) -> list[int]:
        """Return the ids of a part of a text. `continued` says that it is not the first part."""

    def decode(self, ids: Sequence[int], *, continued: bool = False) -> str:
        """Return the text of ids, without special ids. `continued` says that other ids precede them."""


class ByteCodec:
    """A codec for which each byte is an id. Bytes that are not UTF-8 become replacement characters."""

    def __init__(self, start: tuple[int, ...] = (), end: tuple[int, ...] = ()) -> None:
        self.start, self.end = start, end

    def encode(self, text: str, *, continued: bool = False) -> list[int]:  # noqa: ARG002
        """Return the bytes of a part of a text, including bytes of the command line that are not UTF-8."""
        return list(text.encode(errors="surrogateescape"))

    def decode(self, ids: Sequence[int], *, continued: bool = False) -> str:  # noqa: ARG002
        """Decode the ids below 256 as UTF-8. Other ids are left out."""
        return bytes(id_ for id_ in ids if id_ < _BYTES).decode(errors="replace")


class FileCodec:
    """A codec that uses the tokenizer file that a run keeps."""

    def __init__(self, description: TokenizerDescription) -> None:
        """Load the tokenizer. Raises ValueError if the package `tokenizers` is missing."""
        self.start, self.end = description.document_start, description.document_end
        self._tokenizer = FileTokenizer.of(description.file, "the run's tokenizer")

    def encode(self, text: str, *, continued: bool = False) -> list[int]:
        """Return the ids of a part of a text. Raises ValueError if the part cannot be encoded."""
        try:
            return self._tokenizer.encode_part(text, continued=continued)
        except Exception as error:  # the package raises bare Exception
            raise ValueError(
                f"the run's tokenizer cannot encode {text!r}: {error}; change the text"
            ) from error

    def decode(self, ids: Sequence[int], *, continued: bool = False) -> str:
        """Decode ids to text. Special ids, and ids that the tokenizer does not have, are left out.

        Many tokenizers drop the space before the first word of a text. With `continued`, this space is kept;
        if the first id continues a word, there is no space.
        """
        text = self._tokenizer.decode(ids)
        if not continued or not ids:
            return text
        before = self._tokenizer.decode(ids[:1])  # any token would do
        both = self._tokenizer.decode([ids[0], *ids])
        return both.removeprefix(before) if both.startswith(before) else text


def is_byte_model(model: ModelInfo) -> bool:
    """Whether the vocabulary is that of a model of bytes: 256 ids and the mask id."""
    return model.num_tokens == _BYTES + 1 and model.mask_id == _BYTES


def codec_of(model: ModelInfo, description: TokenizerDescription | None) -> TextCodec | None:
    """Return the codec for a run's texts; None if the run keeps no tokenizer and has no model of bytes."""
    if description is not None and description.name != BYTES:
        return FileCodec(description)
    if description is not None:
        return ByteCodec(description.document_start, description.document_end)
    return ByteCodec() if is_byte_model(model) else None
