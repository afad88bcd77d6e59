"""What a source yields: one text with its place, or the reason why there is none."""

from __future__ import annotations

import codecs
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEFAULT_FIELD = "text"
EMPTY, NULL, NOT_UNICODE, INVALID = "empty", "null", "not valid Unicode", "cannot be read"
"""Why a record is dropped. One that is INVALID is an error, unless invalid records are skipped."""


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
        """Bytes of text, prompt included."""
        text = self.text.stat().st_size if isinstance(self.text, Path) else len(self.text)
        return text + len(self.prompt or b"")

    def content(self) -> bytes:
        """The text for a tokenizer, read from its file if it is in one, without a byte order mark."""
        text = self.text.read_bytes() if isinstance(self.text, Path) else self.text
        return text.removeprefix(codecs.BOM_UTF8)


class InvalidRecordError(ValueError):
    """A record cannot be used, though the ones after it can."""

    def __init__(self, message: str, reason: str = INVALID) -> None:
        """`reason` is why the record is dropped if invalid records are skipped."""
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Item:
    """A record of a source, or why it was dropped, and where the next one starts."""

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
        """The item of a record that cannot be read. An error of the whole source is raised instead."""
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
                f"{one}_field (--{one}-field) needs {other}_field (--{other}-field): a prompt is "
                "trained with its response"
            )
        if self.text is not None and self.prompt is not None:
            raise ValueError(
                f"text_field (--text-field) {self.text!r} and prompt_field (--prompt-field) {self.prompt!r} "
                "exclude each other: a record is either a text, or a prompt and its response"
            )
        if self.prompt is not None and self.prompt == self.response:
            raise ValueError(
                f"prompt_field (--prompt-field) and response_field (--response-field) must differ, got "
                f"{self.prompt!r} for both: the prompt is given to the model, and would be the answer"
            )
        for name in self.names:
            if not name:
                raise ValueError("the name of a field must not be empty")

    @property
    def given(self) -> bool:
        """Whether the caller named a field. If so, only files of formats that have fields are read."""
        return self.text is not None or self.prompt is not None

    @property
    def names(self) -> list[str]:
        """The fields to read, the text or response last."""
        if self.prompt is not None and self.response is not None:
            return [self.prompt, self.response]
        return [DEFAULT_FIELD if self.text is None else self.text]

    def missing(self, found: list[str]) -> ValueError:
        """The error about a record without one of the fields; the caller adds its place."""
        wanted = next(field for field in self.names if field not in found)
        option = "--text-field" if self.prompt is None else "--prompt-field and --response-field"
        shown = ", ".join(found[:10]) or "none"
        return ValueError(f"there is no field {wanted!r}; the fields are {shown}: set {option}")

    def item(self, name: str, values: list[Any], place: int, done: int) -> Item:
        """The item of a record with these values. Raises ValueError for a value that is not text.

        The caller adds the record's place to the error.
        """
        parts: list[bytes] = []
        for field, value in zip(self.names, values, strict=True):
            if value is None:
                return Item(None, NULL, place, done)
            if isinstance(value, UnicodeDecodeError):
                raise ValueError(f"the field {field!r} is not UTF-8; convert it to UTF-8")
            if not isinstance(value, str):
                raise ValueError(
                    f"the field {field!r} must hold text, got {type(value).__name__} ({str(value)[:40]!r})"
                )
            try:
                parts.append(value.encode())
            except UnicodeEncodeError:  # half of a surrogate pair, which JSON can contain
                return Item(None, NOT_UNICODE, place, done)
        if not parts[-1]:
            return Item(None, EMPTY, place, done)
        return Item(Record(name, parts[-1], parts[0] if self.prompt is not None else None), "", place, done)
