"""Decodes generated rows to text."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from maskwire.v1.values import ModelInfo, TokenizerDescription

log = logging.getLogger(__name__)

_BYTES = 256
Decoder = Callable[[Sequence[int]], str]


def decoder(
    model: ModelInfo | None,
    tokenizer: Path,
    of_data: Callable[[], TokenizerDescription | None] = lambda: None,
) -> Decoder:
    """Choose a function that decodes ids to text.

    If the ids are bytes, they are decoded as UTF-8. Otherwise the function uses the model's `tokenizer.json`
    in the folder `tokenizer` or, without that file, the tokenizer of the run's data, which `of_data` returns.
    Without either, the text is a list of the ids.
    """
    if model is not None and model.num_tokens == _BYTES + 1 and model.mask_id == _BYTES:
        return _from_bytes
    path = tokenizer / "tokenizer.json"
    if path.is_file():
        return _of_file(path.read_bytes())
    description = of_data()
    if description is None:
        return _ids
    return _of_file(description.file) if description.file else _from_bytes


def _of_file(content: bytes) -> Decoder:
    """Make the decoder of a tokenizer.json. It lists the ids if the file or `tokenizers` cannot be loaded."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        return _ids
    try:
        found: Decoder = Tokenizer.from_str(content.decode()).decode
    except Exception as error:  # the package raises Exception itself
        log.warning("samples are shown as ids, because the tokenizer cannot be read: %s", error)
        return _ids
    return found


def _from_bytes(ids: Sequence[int]) -> str:
    return bytes(id_ for id_ in ids if id_ < _BYTES).decode("utf-8", "replace")


def _ids(ids: Sequence[int]) -> str:
    return " ".join(str(id_) for id_ in ids)


def as_markdown(text: str) -> str:
    """Make an indented code block, which TensorBoard shows verbatim and which no text in it can end."""
    lines = "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text).split("\n")
    return "\n".join(f"    {line}" for line in lines)
