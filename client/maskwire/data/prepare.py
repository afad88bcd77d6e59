"""Tokenize text once and store the ids, so that training only reads them (`maskwire data prepare`).

OUT/maskwire-data.json   metadata: tokenizer, vocabulary, sizes
OUT/tokens.bin           little-endian ids, one document after another
OUT/documents.npy        where each document ends
OUT/tokenizer.json       a copy of the tokenizer file, if one was used
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

from maskwire.data.file_array import Ids
from maskwire.data.file_discovery import find_files
from maskwire.data.prepared_folder import BYTES, DOCUMENTS, METADATA, TOKENS, PreparedMetadata
from maskwire.data.token_documents import Documents

_BATCH_BYTES, _BATCH_FILES = 8 * 2**20, 64  # tokenized in parallel on all cores

Encode = Callable[[list[Path]], Iterable[Iterable[Ids]]]
"""Tokenizes files; yields the ids of each file, in one part or several."""


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
) -> PreparedMetadata:
    """Tokenize files and folders and write the ids to the folder `out`. Each file becomes a document.

    Files are selected as in `ByteData`. `tokenizer` is "bytes" or the path of a tokenizer.json, which needs
    the extra `maskwire[tokenizers]` and UTF-8 text. The mask id follows the tokenizer's last id. With
    `special_tokens`, each document gets the tokens that the tokenizer adds around a text, such as BOS and
    EOS; `document_start` and `document_end` of the result list them.
    `on_progress(done, total)` receives bytes of text. `out` is created only once it is complete; an existing
    prepared folder is replaced only with `force`. Raises ValueError and OSError.
    """
    out = Path(out)
    prepared = (out / METADATA).is_file()
    if out.exists() and not (force and prepared):
        advice = "choose another folder"
        if prepared:
            advice += ", or replace the prepared data in it with --force (force=True)"
        raise ValueError(f"{out} already exists; {advice}")
    files = find_files(paths, pattern, any_format=any_format)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
        draft, old = Path(temporary) / "new", Path(temporary) / "old"
        draft.mkdir()
        metadata = _write(files, draft, tokenizer, special_tokens, on_progress or (lambda *_: None))
        if out.exists():
            out.rename(old)
        draft.rename(out)
    return metadata


def _write(
    files: list[Path],
    folder: Path,
    tokenizer: str | Path,
    special_tokens: bool,
    report: Callable[[int, int], None],
) -> PreparedMetadata:
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
            report(done, total)
        _flush(file)
    ends = np.cumsum([size for size in sizes if size], dtype=np.int64)
    around = ([], []) if loaded is None else loaded.around
    if not ends.size or around is None:  # special tokens alone are nothing to train on
        raise ValueError("the tokenizer produced no tokens from the text; check that it fits the text")
    with (folder / DOCUMENTS).open("wb") as file:
        np.save(file, ends)
        _flush(file)
    metadata = PreparedMetadata(name, mask_id + 1, mask_id, dtype, int(ends[-1]), ends.size, total, *around)
    with (folder / METADATA).open("w") as text:
        text.write(metadata.to_json())
        _flush(text)
    return metadata


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
    documents = Documents.from_files(files)
    return (documents.chunks(index) for index in range(len(documents)))


class _Tokenizer:
    """A tokenizer file: encodes texts, and records the special tokens that it adds around them."""

    def __init__(self, path: Path, special_tokens: bool) -> None:
        """Raises ValueError if the file is not a tokenizer, or the package `tokenizers` is missing."""
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise ValueError(
                'a tokenizer file needs the package `tokenizers`: pip install "maskwire[tokenizers]"'
            ) from None
        if not path.is_file():
            raise ValueError(
                f"tokenizer must be 'bytes' or the path of a tokenizer.json, but there is no file {path}"
            )
        try:
            self._loaded: Any = Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises bare Exception
            raise ValueError(f"{path}: not a tokenizer.json of the package `tokenizers`: {error}") from error
        self._loaded.no_truncation()
        self._loaded.no_padding()
        self._path, self._special_tokens = path, special_tokens
        self.name = f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
        self.mask_id = max(self._loaded.get_vocab(with_added_tokens=True).values()) + 1
        """The id after the last one of the tokenizer."""
        self.around: tuple[list[int], list[int]] | None = None
        """The special ids before and after each text; None until a text has yielded other tokens."""

    def encode(self, files: list[Path]) -> Iterator[list[Ids]]:
        """Yield the ids of each file. Raises ValueError for a file that cannot be encoded."""
        texts = [_text(file) for file in files]
        try:
            found = self._loaded.encode_batch(texts, add_special_tokens=self._special_tokens)
        except Exception:  # it does not name the text that failed
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
                f"{file}: the tokenizer {self._path} cannot encode it ({error}); use a byte-level tokenizer "
                "or one with an unknown token, or exclude the file with --pattern"
            ) from error


def _around(encoding: Any) -> tuple[list[int], list[int]] | None:
    """The special ids before and after the other tokens; None if there are no other tokens."""
    ids, special = encoding.ids, encoding.special_tokens_mask
    own = [place for place, added in enumerate(special) if not added]
    return (ids[: own[0]], ids[own[-1] + 1 :]) if own else None


def _text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 at byte {error.start} ({data[error.start : error.end]!r}); convert the file, "
            "exclude it with --pattern, or use --tokenizer bytes"
        ) from None
