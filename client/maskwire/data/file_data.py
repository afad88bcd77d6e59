"""Open files and folders as token data: text as bytes, `.npy` arrays, packed ids and prepared text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from maskwire.data.file_array import FileArray
from maskwire.data.file_discovery import find_files
from maskwire.data.file_types import refuse_other_than_packed
from maskwire.data.prepared_folder import (
    BYTES,
    DOCUMENTS,
    METADATA,
    TOKENS,
    PreparedMetadata,
    refuse_part,
)
from maskwire.data.token_data import TokenData
from maskwire.data.token_documents import Documents, load_array

PACKED_TYPES = ("uint8", "uint16", "int32")
_OTHER_TYPES = {
    "uint32": "open it as int32 (--dtype int32): ids below 2^31 have the same bytes in both types",
    "int16": "open it as uint16 (--dtype uint16): non-negative ids have the same bytes in both types",
    "int8": "open it as uint8 (--dtype uint8): non-negative ids have the same bytes in both types",
    **dict.fromkeys(
        ("int64", "uint64"),
        "save the ids as a .npy file, which needs no dtype: np.save('ids.npy', np.fromfile(FILE, DTYPE))",
    ),
}


class ByteData(TokenData):
    """Files as documents whose tokens are their bytes; only what a batch needs is read."""

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
        """`paths` are files, or folders that are searched for files matching `pattern`.

        Hidden and empty files are ignored, and so are files that maskwire itself wrote: metrics, run
        directories, checkpoints, prepared data. Raises ValueError for a length or batch size below 1, if no
        file is left, and unless `any_format` for files that are not text: packed ids, arrays, archives, JSON
        Lines.
        """
        files = find_files(paths, pattern, any_format=any_format)
        self._initialize(
            Documents.from_files(files),
            length=length, batch_size=batch_size, seed=seed, tokenizer=BYTES, bytes_per_token=1.0,
        )  # fmt: skip
        self.files = files


class FileTokens(TokenData):
    """Token ids in one file or folder: packed ids, a `.npy` array or prepared text; read batch by batch."""

    def __init__(
        self, path: str | Path, *, length: int, batch_size: int, seed: int = 0, dtype: str | None = None
    ) -> None:
        """`path` is a folder written by `maskwire data prepare`, a `.npy` file or, with `dtype`, packed ids.

        A `.npy` file holds integers [n], one document, or [rows, n], one document per row. Packed ids are
        little-endian integers of `dtype` (uint8, uint16 or int32) without a header, one document.
        Raises ValueError for anything else.
        """
        path = Path(path)
        tokenizer, bytes_per_token = "", None
        if dtype is not None and holds_tokens(path):
            raise ValueError(f"{path} records the type of its ids; leave out dtype (--dtype), got {dtype!r}")
        if path.name == DOCUMENTS:
            refuse_part(path)
        if (path / METADATA).is_file():
            metadata = PreparedMetadata.read(path)
            flat = FileArray(path / TOKENS, _little_endian(metadata.dtype))
            ends, _ = load_array(path / DOCUMENTS)
            documents = Documents.from_packed(flat, ends[:].astype(np.int64))
            tokenizer, bytes_per_token = metadata.tokenizer, metadata.text_bytes / metadata.tokens
        elif path.suffix == ".npy":
            documents = Documents.from_packed(*load_array(path))
        elif dtype in PACKED_TYPES and path.is_file():
            refuse_other_than_packed(path)
            size, width = path.stat().st_size, np.dtype(dtype).itemsize
            if size % width or not size:
                raise ValueError(
                    f"{path} has {size:,} bytes, which is not a whole number of {dtype} ids ({width} bytes); "
                    "check dtype (--dtype)"
                )
            flat = FileArray(path, _little_endian(dtype))
            documents = Documents.from_packed(flat, np.array([flat.size]))
        else:
            raise ValueError(_not_token_ids(path, dtype))
        self._initialize(
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
    """Open data by what the paths hold.

    `paths` are one folder written by `maskwire data prepare`, one `.npy` file, one file of packed ids with
    its `dtype` (uint8, uint16 or int32), or files and folders of text, whose bytes become the tokens. With
    `any_format`, files of any type are read as bytes. Raises ValueError for anything else.
    """
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    if dtype is not None or any(holds_tokens(path) for path in paths):
        if len(paths) != 1:
            raise ValueError(
                f"a file or folder of token ids must be the only path, got {len(paths)} paths; prepare the "
                "texts together, into one folder"
            )
        return FileTokens(paths[0], length=length, batch_size=batch_size, seed=seed, dtype=dtype)
    return ByteData(
        paths, length=length, batch_size=batch_size, seed=seed, pattern=pattern, any_format=any_format
    )


def holds_tokens(path: str | Path) -> bool:
    """Whether a path is a `.npy` file or a prepared folder, which record the type of their ids."""
    return Path(path).suffix == ".npy" or (Path(path) / METADATA).is_file()


def _little_endian(dtype: str) -> np.dtype[Any]:
    if dtype not in PACKED_TYPES:
        raise ValueError(f"dtype must be one of {', '.join(PACKED_TYPES)}, got {dtype!r}")
    return np.dtype(dtype).newbyteorder("<")


def _not_token_ids(path: Path, dtype: str | None) -> str:
    """The message for a path that cannot be opened as token ids."""
    if not path.exists():
        return f"{path}: no such file or folder"
    if path.is_dir() or dtype in PACKED_TYPES or dtype is None:
        return (
            f"{path} holds no token ids: give a .npy file, a folder written by `maskwire data prepare`, or a "
            "file of packed ids with dtype (--dtype)"
        )
    advice = f"; {_OTHER_TYPES[dtype]}" if dtype in _OTHER_TYPES else ""
    return f"{path}: dtype must be one of {', '.join(PACKED_TYPES)}, got {dtype!r}{advice}"
