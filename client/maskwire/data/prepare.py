"""`maskwire data prepare`: text to packed token ids, once, so that training only maps them.

OUT/maskwire-data.json   what the ids stand for, and how many there are
OUT/tokens.bin           little-endian ids, one document after another
OUT/documents.npy        where each document ends
OUT/tokenizer.json       a copy of the tokenizer's file, if there is one
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from maskwire.data.documents import Documents
from maskwire.data.file_array import Ids
from maskwire.data.file_discovery import find_files
from maskwire.data.file_types import DOCUMENTS, META, TOKENS
from maskwire.data.token_data import BYTES, Meta

_BATCH_BYTES, _BATCH_FILES = 8 * 2**20, 64  # of text, tokenized on all cores at once

Encode = Callable[[list[Path]], Iterable[Iterable[Ids]]]
"""Makes of some files the ids of each, in one or several parts."""


def prepare(
    paths: str | Path | Iterable[str | Path],
    out: str | Path,
    *,
    tokenizer: str | Path = BYTES,
    pattern: str = "*",
    any_format: bool = False,
    special_tokens: bool = True,
    force: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Meta:
    """Tokenize files and folders into the folder `out`, each file a document; which ones as in `ByteData`.

    `tokenizer` is "bytes", or a `tokenizers` file (tokenizer.json), which needs the extra
    `maskwire[tokenizers]` and UTF-8 text. The mask id is one behind the tokenizer's ids. With
    `special_tokens` each document gets what the tokenizer itself puts around a text, such as BOS and EOS;
    the result's `document_start` and `document_end` say what that is.
    `on_progress(done, total)` counts bytes of text. `out` appears when it is whole; one that is there
    already is replaced only with `force`. Raises ValueError and OSError.
    """
    out = Path(out)
    if out.exists() and not (force and (out / META).is_file()):
        raise ValueError(
            f"{out} exists"
            + (
                "; name another folder, or replace it with --force"
                if (out / META).is_file()
                else "; name another"
            )
        )
    files = find_files(paths, pattern, any_format=any_format)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as room:
        draft, old = Path(room) / "new", Path(room) / "old"
        draft.mkdir()
        meta = _write(files, draft, tokenizer, special_tokens, on_progress or (lambda *_: None))
        if out.exists():
            out.rename(old)
        draft.rename(out)
    return meta


def _write(
    files: list[Path],
    folder: Path,
    tokenizer: str | Path,
    special_tokens: bool,
    tell: Callable[[int, int], None],
) -> Meta:
    total, done = sum(path.stat().st_size for path in files), 0
    encode: Encode = _bytes
    name, mask_id = BYTES, 256
    loaded: _Tokenizer | None = None
    if tokenizer != BYTES:
        loaded = _Tokenizer(Path(tokenizer), special_tokens)
        name, mask_id, encode = loaded.name, loaded.mask_id, loaded.encode
        shutil.copyfile(tokenizer, folder / "tokenizer.json")
    dtype = "uint8" if tokenizer == BYTES else "uint16" if mask_id < 2**16 else "int32"
    sizes: list[int] = []
    with (folder / TOKENS).open("wb") as file:
        for batch in _batches(files):
            for parts in encode(batch):
                sizes.append(0)
                for ids in parts:
                    ids.astype(np.dtype(dtype).newbyteorder("<"), copy=False).tofile(file)
                    sizes[-1] += ids.size
            done += sum(path.stat().st_size for path in batch)
            tell(done, total)
        _flush(file)
    ends = np.cumsum([size for size in sizes if size], dtype=np.int64)
    around = ([], []) if loaded is None else loaded.around
    if not ends.size or around is None:  # special tokens alone are nothing to train on
        raise ValueError("the tokenizer made no token of the text")
    with (folder / DOCUMENTS).open("wb") as file:
        np.save(file, ends)
        _flush(file)
    meta = Meta(name, mask_id + 1, mask_id, dtype, int(ends[-1]), ends.size, total, *around)
    with (folder / META).open("w") as text:
        text.write(meta.to_json())
        _flush(text)
    return meta


def _flush(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _batches(files: list[Path]) -> Iterator[list[Path]]:
    batch, size = [], 0
    for path in files:
        batch.append(path)
        size += path.stat().st_size
        if size >= _BATCH_BYTES or len(batch) >= _BATCH_FILES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _bytes(files: list[Path]) -> Iterator[Iterator[Ids]]:
    documents = Documents.files(files)
    return (documents.chunks(index) for index in range(len(documents)))


class _Tokenizer:
    """A tokenizer's file: encodes texts, and learns from them what it puts around each."""

    def __init__(self, path: Path, special_tokens: bool) -> None:
        """Raises ValueError for what is no tokenizer's file, or without the package."""
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise ValueError(
                'a tokenizer file needs the package tokenizers: pip install "maskwire[tokenizers]"'
            ) from None
        if not path.is_file():
            raise ValueError(f"tokenizer must be 'bytes' or a tokenizer.json, there is no file {path}")
        try:
            self._loaded: Any = Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises bare Exception
            raise ValueError(f"{path}: not a tokenizers file ({error})") from error
        self._loaded.no_truncation()
        self._loaded.no_padding()
        self._path, self._special_tokens = path, special_tokens
        self.name = f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
        self.mask_id = max(self._loaded.get_vocab(with_added_tokens=True).values()) + 1
        """The id behind its own."""
        self.around: tuple[list[int], list[int]] | None = None
        """The special ids before and after each text; None until a text has tokens of its own."""

    def encode(self, files: list[Path]) -> Iterator[list[Ids]]:
        """Each file's ids. Raises ValueError for one that cannot be encoded."""
        texts = [_text(file) for file in files]
        try:
            found = self._loaded.encode_batch(texts, add_special_tokens=self._special_tokens)
        except Exception:  # which does not say of which text
            for file, text in zip(files, texts, strict=True):
                self._check(file, text)
            raise
        for one in found:
            if self.around is None:
                self.around = _around(one)
            yield [np.array(one.ids, dtype=np.int64)]

    def _check(self, file: Path, text: str) -> None:
        try:
            self._loaded.encode(text, add_special_tokens=self._special_tokens)
        except Exception as error:
            raise ValueError(
                f"{file}: the tokenizer {self._path} cannot encode it ({error}); use a tokenizer with an "
                "unknown token or of bytes, or leave the file out with --pattern"
            ) from error


def _around(encoding: Any) -> tuple[list[int], list[int]] | None:
    """The special ids before and after a text's own tokens; None for a text that has none."""
    ids, special = encoding.ids, encoding.special_tokens_mask
    own = [place for place, added in enumerate(special) if not added]
    return (ids[: own[0]], ids[own[-1] + 1 :]) if own else None


def _text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 at byte {error.start} ({data[error.start : error.end]!r}); convert it, leave "
            "it out with --pattern, or prepare bytes"
        ) from None
