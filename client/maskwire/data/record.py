"""The items that a source yields: a text with its position, or the reason why there is no text."""

from __future__ import annotations

import codecs
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEFAULT_FIELD = "text"
EMPTY, NULL, NOT_UNICODE, INVALID = "empty", "null", "not valid Unicode", "cannot be read"
"""Why a record is dropped. An INVALID record is an error, unless invalid records are skipped."""


@dataclass(frozen=True)
class Record:
    """A text, or a prompt and its response."""

    name: str = dataclasses.field(compare=False)
    """Where the record is, for messages, such as "corpus.csv, row 7"."""
    text: bytes | Path
    """The text, or the response to the prompt, in UTF-8; or a file whose bytes are the text."""
    prompt: bytes | None = None

    @property
    def size(self) -> int:
        """The size of the text in bytes, including the prompt."""
        text = self.text.stat().st_size if isinstance(self.text, Path) else len(self.text)
        return text + len(self.prompt or b"")

    def content(self) -> bytes:
        """Return the text for a tokenizer, without a byte order mark. A text in a file is read from it."""
        text = self.text.read_bytes() if isinstance(self.text, Path) else self.text
        return text.removeprefix(codecs.BOM_UTF8)


class InvalidRecordError(ValueError):
    """A record cannot be used, but the records after it can."""

    def __init__(self, message: str, reason: str = INVALID) -> None:
        """Make the error. `reason` is why the record is dropped if invalid records are skipped."""
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Item:
    """A record of a source, or the reason why it was dropped, with the position of the next record."""

    record: Record | None
    dropped: str
    """Why there is no record; empty if there is one."""
    place: int
    """Where reading continues after this record; 0 is the start of the source."""
    done: int
    """Bytes of the source that have been read."""
    error: str = ""
    """What is wrong with a record that is INVALID, and where it is. The records after it can be read."""

    @staticmethod
    def invalid(error: str, place: int, done: int) -> Item:
        """Make the item of a record that cannot be read; `error` says why, and where the record is."""
        return Item(None, INVALID, place, done, error)


@dataclass(frozen=True)
class Fields:
    """The fields of a record that hold its text, or its prompt and response."""

    text: str | None = None
    prompt: str | None = None
    response: str | None = None

    def __post_init__(self) -> None:
        if (self.prompt is None) != (self.response is None):
            one, other = ("prompt", "response") if self.response is None else ("response", "prompt")
            raise ValueError(
                f"{one}_field (--{one}-field) needs {other}_field (--{other}-field), because a prompt is "
                "used only with its response; give both"
            )
        if self.text is not None and self.prompt is not None:
            raise ValueError(
                f"text_field (--text-field) {self.text!r} and prompt_field (--prompt-field) {self.prompt!r} "
                "exclude each other: a record is either a text, or a prompt and its response; give only one"
            )
        if self.prompt is not None and self.prompt == self.response:
            raise ValueError(
                f"prompt_field (--prompt-field) and response_field (--response-field) must differ, got "
                f"{self.prompt!r} for both: a prompt is given to the model, and would reveal the response"
            )
        for name in self.names:
            if not name:
                raise ValueError(
                    "the name of a field must not be empty; give a name, or leave the option out"
                )

    @property
    def given(self) -> bool:
        """Whether the caller named a field. If so, only files of formats with fields are read."""
        return self.text is not None or self.prompt is not None

    @property
    def names(self) -> list[str]:
        """The names of the fields to read. The last one is the text or the response."""
        if self.prompt is not None and self.response is not None:
            return [self.prompt, self.response]
        return [DEFAULT_FIELD if self.text is None else self.text]

    def missing(self, found: list[str]) -> ValueError:
        """Return the error for a record that lacks a field. The caller adds where the record is."""
        wanted = next(field for field in self.names if field not in found)
        option = "--text-field" if self.prompt is None else "--prompt-field and --response-field"
        shown = ", ".join(map(repr, found[:10])) or "none"
        return ValueError(f"there is no field {wanted!r}; the fields are {shown}: select with {option}")

    def item(self, name: str, values: list[Any], place: int, done: int) -> Item:
        """Make the item of a record from the values of its fields, in the order of `names`.

        Raises ValueError for a value that is not text; the caller adds where the record is.
        """
        parts: list[bytes] = []
        for field, value in zip(self.names, values, strict=True):
            if value is None:
                return Item(None, NULL, place, done)
            if isinstance(value, UnicodeDecodeError):
                raise ValueError(f"the field {field!r} is not UTF-8; convert it to UTF-8")
            if not isinstance(value, str):
                raise ValueError(
                    f"the field {field!r} must hold text, got {type(value).__name__} ({str(value)[:40]!r}); "
                    "correct the record, or choose another field"
                )
            try:
                parts.append(value.encode())
            except UnicodeEncodeError:  # half of a surrogate pair, which JSON can contain
                return Item(None, NOT_UNICODE, place, done)
        if not parts[-1]:
            return Item(None, EMPTY, place, done)
        return Item(Record(name, parts[-1], parts[0] if self.prompt is not None else None), "", place, done)
