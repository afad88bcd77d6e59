"""Text of generated rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from maskwire.v1.values import ModelInfo

_BYTES = 256


def decoder(model: ModelInfo | None, tokenizer: Path) -> Callable[[Sequence[int]], str]:
    """A function from ids to text.

    `tokenizer`: a folder that may hold the `tokenizer.json` of the run. Without it, and unless the ids are
    bytes, the text is the ids themselves.
    """
    if model is not None and model.num_tokens == _BYTES + 1 and model.mask_id == _BYTES:
        return _from_bytes
    path = tokenizer / "tokenizer.json"
    if path.is_file():
        try:
            from tokenizers import Tokenizer
        except ImportError:
            return _ids
        found: Callable[[Sequence[int]], str] = Tokenizer.from_file(str(path)).decode
        return found
    return _ids


def _from_bytes(ids: Sequence[int]) -> str:
    return bytes(id_ for id_ in ids if id_ < _BYTES).decode("utf-8", "replace")


def _ids(ids: Sequence[int]) -> str:
    return " ".join(str(id_) for id_ in ids)


def as_markdown(text: str) -> str:
    """A block of code, which TensorBoard shows as it is. An indented one: no text can end it."""
    lines = "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text).split("\n")
    return "\n".join(f"    {line}" for line in lines)
