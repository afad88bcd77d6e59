"""Tokenizers that prepare text: bytes, and the files of the package `tokenizers`.

A tokenizer has special ids for the mask, padding and the end of a document. The mask and end ids are those
of the tokenizer's file. If the file has none, they are new ids after its last id. No pad id is added, because
batches carry the lengths of their rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from maskwire.data.automatic_prefix import AutomaticPrefix
from maskwire.data.file_array import Ids
from maskwire.data.prepared_folder import BYTES
from maskwire.data.record import InvalidRecordError, Record
from maskwire.data.token_documents import Documents

MASK_ID_OF_BYTES, END_ID_OF_BYTES = 256, 257
TOKENIZER_FILE = "tokenizer.json"
_CONFIGURATIONS = ("special_tokens_map.json", "tokenizer_config.json")  # the second takes precedence
NOT_ENCODABLE, HAS_MASK, HAS_PAD = "cannot be encoded", "contains the mask token", "contains the pad token"
"""Why a record is dropped if invalid records are skipped."""
_NAMES = {
    "mask": ("[MASK]", "<mask>", "<|mask|>", "<|mdm_mask|>", "<MASK>"),
    "eos": ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|eos|>", "[EOS]", "<EOS>"),
    "pad": ("[PAD]", "<pad>", "<|pad|>", "<|padding|>", "<PAD>"),
}
"""The special tokens of published tokenizers, for files that do not say which token has which role."""


@dataclass(frozen=True)
class Encoded:
    """A record that is encoded as token ids."""

    parts: Iterable[Ids]
    """The ids, in one part or several, because a document may be larger than memory."""
    prompt: int = 0
    """How many of the first ids are the prompt."""


class Tokenizer(Protocol):
    """The interface of the tokenizers that `prepare` uses."""

    name: str
    """"bytes", or "sha256:" and the hash of the tokenizer's file."""
    mask_id: int
    pad_id: int | None
    end_id: int | None
    """The id that ends a document; None if documents have no end id."""
    num_tokens: int
    start: list[int]
    """The special ids before a text."""
    end: list[int]
    """The special ids after a text."""

    def encode(self, records: Sequence[Record]) -> Iterator[Encoded | None]:
        """Yield the ids of each record; None for a record whose text has only special tokens, or none."""


class ByteTokenizer:
    """A tokenizer for which each byte is an id."""

    name, mask_id, pad_id = BYTES, MASK_ID_OF_BYTES, None

    def __init__(self, special_tokens: bool) -> None:
        """Make the tokenizer. With `special_tokens`, each document ends with id 257."""
        self.end_id = END_ID_OF_BYTES if special_tokens else None
        self.num_tokens = (END_ID_OF_BYTES if special_tokens else MASK_ID_OF_BYTES) + 1
        self.start: list[int] = []
        self.end = [END_ID_OF_BYTES] if special_tokens else []

    def encode(self, records: Sequence[Record]) -> Iterator[Encoded]:
        """Yield the bytes of each record as ids."""
        for record in records:
            yield Encoded(self._parts(record), len(record.prompt or b""))

    def _parts(self, record: Record) -> Iterator[Ids]:
        if record.prompt:
            yield np.frombuffer(record.prompt, dtype=np.uint8)
        if isinstance(record.text, Path):
            yield from Documents.from_files([record.text]).chunks(0)
        else:
            yield np.frombuffer(record.text, dtype=np.uint8)
        if self.end:
            yield np.array(self.end)


class FileTokenizer:
    """A tokenizer that is loaded from a tokenizer.json, or from a folder with this file."""

    def __init__(
        self, path: Path, *, special_tokens: bool = True, parse_special_tokens: bool = False
    ) -> None:
        """Load the tokenizer from a file or folder.

        With `special_tokens`, the tokens that the tokenizer adds are put around each text. If it adds none at
        the end, an end-of-document id follows the text. With `parse_special_tokens`, special tokens that a
        text spells out become these tokens; otherwise they are encoded as plain text. Raises ValueError if
        the file is not a tokenizer, or the package `tokenizers` is missing.
        """
        self.path = path / TOKENIZER_FILE if path.is_dir() else path
        if not self.path.is_file():
            raise ValueError(_no_file(path))
        self._load(self.path.read_bytes(), str(self.path), special_tokens, parse_special_tokens)
        known = _special_ids(self._loaded, _configured(self.path.parent) if path.is_dir() else {})
        self.mask_id = known.get("mask", self._vocabulary)
        self._eos = known.get("eos", max(self._vocabulary, self.mask_id + 1))
        pad = known.get("pad")
        self.pad_id = None if pad in (self._eos, self.mask_id) else pad

    @classmethod
    def of(cls, file: bytes, name: str) -> FileTokenizer:
        """Make a tokenizer from the bytes of a tokenizer.json, to encode parts of texts and decode ids."""
        found = object.__new__(cls)
        found._load(file, name, special_tokens=False, parse_special_tokens=False)
        return found

    def _load(self, file: bytes, name: str, special_tokens: bool, parse_special_tokens: bool) -> None:
        try:
            from tokenizers import Tokenizer as Loaded
        except ImportError:
            raise ValueError(
                f'{name} needs the package `tokenizers`: pip install "maskwire[tokenizers]"'
            ) from None
        self.file = file
        try:
            self._loaded: Any = Loaded.from_str(self.file.decode())
        except Exception as error:  # the package raises bare Exception
            raise ValueError(
                f"{name} is not a tokenizer.json of the package `tokenizers`: {error}"
            ) from error
        self._loaded.no_truncation()
        self._loaded.no_padding()
        self._loaded.encode_special_tokens = not parse_special_tokens
        self._special_tokens = special_tokens
        self.name = f"sha256:{hashlib.sha256(self.file).hexdigest()}"
        self.start: list[int] = []
        self.end: list[int] = []
        self._special_ids_known = False
        self._prefix = AutomaticPrefix(self._loaded)
        vocabulary = self._loaded.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise ValueError(f"{name}: the vocabulary of the tokenizer is empty; train the tokenizer first")
        self._vocabulary = max(vocabulary.values()) + 1

    @property
    def end_id(self) -> int | None:
        """The id that ends a document; None if documents have no end id."""
        return self.end[-1] if self.end else self._eos if self._special_tokens else None

    @property
    def num_tokens(self) -> int:
        """The size of the vocabulary, including the ids that maskwire added."""
        return max(self._vocabulary, self.mask_id + 1, (self.end_id or 0) + 1)

    def resume(self, start: list[int], end: list[int]) -> None:
        """Set the special ids around a text to those that were learned before the preparation was stopped."""
        if start or end:
            self.start, self.end, self._special_ids_known = start, end, True

    def encode(self, records: Sequence[Record]) -> Iterator[Encoded | None]:
        """Yield the ids of each record; None for a record whose text has only special tokens, or none.

        Raises InvalidRecordError for a text that cannot be encoded, or contains the mask or the pad token.
        """
        texts = self._encodings(records, [record.content() for record in records])
        with_prompt = [record for record in records if record.prompt is not None]
        prompts = iter(self._encodings(with_prompt, [record.prompt or b"" for record in with_prompt]))
        for record, text in zip(records, texts, strict=True):
            prompt = None if record.prompt is None else self._own(next(prompts))
            # A response continues its prompt.
            own = self._own(text, record.content().decode() if prompt else None)
            if not own:
                yield None
                continue
            for reason, id_ in ((HAS_MASK, self.mask_id), (HAS_PAD, self.pad_id)):
                if id_ in own or (prompt and id_ in prompt):
                    raise InvalidRecordError(self._has_special(record.name, reason, id_), reason)
            given = [*self.start, *(prompt or [])]
            yield Encoded(
                [np.array([*given, *own, *self.end], dtype=np.int64)],
                0 if record.prompt is None else len(given),
            )

    def _has_special(self, name: str, reason: str, id_: int | None) -> str:
        token = self._loaded.id_to_token(id_)
        parsed = not self._loaded.encode_special_tokens
        advice = "leave out --parse-special-tokens to encode it as plain text, or " if parsed else ""
        return (
            f"{name}: it {reason} {token!r} (id {id_}), and training refuses rows with this id; {advice}"
            "remove the token from the text"
        )

    def encode_part(self, text: str, *, continued: bool = False) -> list[int]:
        """Return the ids of a part of a text, without special tokens around it.

        If `continued`, the part continues another one, and gets no automatic prefix of the tokenizer.
        """
        encoding = self._loaded.encode(text, add_special_tokens=False)
        ids: list[int] = encoding.ids
        return self._prefix.remove(text, encoding, 0, len(ids)) if continued else ids

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids to text. Special ids, and ids that the tokenizer's file does not have, are left out."""
        text: str = self._loaded.decode([id_ for id_ in ids if id_ < self._vocabulary])
        return text

    def _encodings(self, records: Sequence[Record], contents: Sequence[bytes]) -> list[Any]:
        texts = [_text(record.name, content) for record, content in zip(records, contents, strict=True)]
        try:
            pairs = self._prefix.symbol and any(record.prompt for record in records)
            encode = self._loaded.encode_batch if pairs else self._loaded.encode_batch_fast  # has no offsets
            found: list[Any] = encode(texts, add_special_tokens=self._special_tokens)
        except Exception:  # the error does not name the text that failed
            for record, text in zip(records, texts, strict=True):
                self._check(record.name, text)
            raise
        return found

    def _check(self, name: str, text: str) -> None:
        try:
            self._loaded.encode(text, add_special_tokens=self._special_tokens)
        except Exception as error:
            raise InvalidRecordError(
                f"{name}: the tokenizer {self.path} cannot encode the text ({error}); use a byte-level "
                "tokenizer or one with an unknown token, or exclude the file with --pattern",
                NOT_ENCODABLE,
            ) from error

    def _own(self, encoding: Any, continued: str | None = None) -> list[int]:
        """Return the ids of a text without the special ids around it.

        The special ids are learned from the first text. `continued` is the text itself if it continues
        another one.
        """
        ids, added = encoding.ids, encoding.special_tokens_mask
        own = [place for place, special in enumerate(added) if not special]
        if not own:
            return []
        first, last = own[0], own[-1] + 1
        if not self._special_ids_known:
            self._special_ids_known = True
            self.start, self.end = ids[:first], ids[last:]
            if self._special_tokens and not self.end:
                self.end = [self._eos]
        found: list[int] = ids[first:last]
        return found if continued is None else self._prefix.remove(continued, encoding, first, last)


def _no_file(path: Path) -> str:
    if path.is_dir():
        return (
            f"{path}: the folder has no {TOKENIZER_FILE}; write one with transformers: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    return (
        "tokenizer must be 'bytes', the path of a tokenizer.json, or the folder of a Hugging Face tokenizer, "
        f"but there is no file {path}"
    )


def _configured(folder: Path) -> dict[str, str]:
    """Return the special tokens, by role, that the configuration files beside a tokenizer.json name."""
    found: dict[str, str] = {}
    for name in _CONFIGURATIONS:
        path = folder / name
        if not path.is_file():
            continue
        try:
            fields = json.loads(path.read_bytes())
            for role in _NAMES:
                token = fields.get(f"{role}_token")
                token = token.get("content") if isinstance(token, dict) else token
                if isinstance(token, str):
                    found[role] = token
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path}: not a JSON object ({error}); save the tokenizer again") from error
    return found


def _special_ids(loaded: Any, configured: dict[str, str]) -> dict[str, int]:
    """Return the ids of the mask, padding and end tokens, by role, as far as the tokenizer has them.

    Raises ValueError for a mask token that is an ordinary token of texts.
    """
    added = loaded.get_added_tokens_decoder()
    special = {token.content: id_ for id_, token in added.items() if token.special}
    mask = loaded.token_to_id(configured["mask"]) if "mask" in configured else None
    if mask is not None and mask not in added:
        raise ValueError(
            f"the mask token (mask_token in {_CONFIGURATIONS[1]}) must be a special token of the tokenizer, "
            f"got {configured['mask']!r}, an ordinary token of its vocabulary (id {mask}); set mask_token to "
            "the tokenizer's mask token, or remove mask_token, so that maskwire adds one"
        )
    found = {}
    for role, names in _NAMES.items():
        id_ = loaded.token_to_id(configured[role]) if role in configured else None
        if id_ is None:
            id_ = next((special[name] for name in names if name in special), None)
        if id_ is not None:
            found[role] = id_
    return found


def _text(name: str, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRecordError(
            f"{name}: not UTF-8 at byte {error.start} ({data[error.start : error.end]!r}); convert the file "
            "to UTF-8, exclude it with --pattern, or use --tokenizer bytes"
        ) from None
