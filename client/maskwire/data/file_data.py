"""Open files and folders as token data: text as bytes, `.npy` arrays, packed ids, prepared text, records."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from maskwire.data.file_array import FileArray, Ids
from maskwire.data.file_discovery import find_files, names
from maskwire.data.file_types import refuse_other_than_packed
from maskwire.data.packed_data import PackedData, check_length
from maskwire.data.pair_data import PairData
from maskwire.data.prepared_folder import (
    BYTES,
    DOCUMENTS,
    METADATA,
    PIECES,
    PROMPTS,
    ROWS,
    TOKENS,
    PreparedMetadata,
    refuse_part,
)
from maskwire.data.record import Fields
from maskwire.data.text_sources import FileSource, Paths, Source, find_sources
from maskwire.data.token_data import TokenData
from maskwire.data.token_documents import Documents, load_array
from maskwire.data.tokenizer import TOKENIZER_FILE, ByteTokenizer
from maskwire.signatures import refuse_unknown_keywords
from maskwire.v1.values import TokenizerDescription

log = logging.getLogger(__name__)

_LARGEST_IN_MEMORY = 2**30  # bytes of text
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


@refuse_unknown_keywords
class ByteData(TokenData):
    """Files as documents whose tokens are their bytes; only what a batch needs is read."""

    def __init__(
        self,
        paths: str | Path | Iterable[str | Path],
        *,
        length: int,
        batch_size: int,
        seed: int = 0,
        sampling: str = "crops",
        pattern: str = "*",
        any_format: bool = False,
    ) -> None:
        """Open files, each of which becomes a document of bytes.

        paths: Files, folders that are searched for files, or globs.
        length: Tokens per row.
        batch_size: Rows per batch.
        seed: Seed for the choice of rows.
        sampling: "crops" for rows at random places, or "epochs" for each row once per epoch.
        pattern: In folders, use only the files whose names match, such as "*.txt".
        any_format: Also read files that are not text: packed ids, arrays, archives, JSON Lines.

        Hidden files, empty files, links to folders, and files that maskwire itself wrote (metrics, run
        directories, checkpoints, prepared data) are skipped with a message. Raises ValueError for a length or
        batch size below 1, if no file is left, and for files that are not text unless `any_format`.
        """
        files = find_files(paths, pattern, any_format=any_format)
        self._open(files, length=length, batch_size=batch_size, seed=seed, sampling=sampling)

    def _open(self, files: list[Path], **options: Any) -> None:
        documents = Documents.from_files(files)
        self._initialize(documents, tokenizer=BYTES, bytes_per_token=1.0, **options)
        self.files = files
        self.tokenizer_description = TokenizerDescription(BYTES)


@refuse_unknown_keywords
class FileTokens(TokenData):
    """Token ids in one file or folder: packed ids, a `.npy` array or prepared text; read batch by batch."""

    def __init__(
        self,
        path: str | Path,
        *,
        length: int,
        batch_size: int,
        seed: int = 0,
        sampling: str = "crops",
        dtype: str | None = None,
    ) -> None:
        """Open a file or folder of token ids.

        path: A folder written by `maskwire data prepare`, a `.npy` file or, with `dtype`, packed ids.
        length: Tokens per row.
        batch_size: Rows per batch.
        seed: Seed for the choice of rows.
        sampling: "crops" for rows at random places, or "epochs" for each row once per epoch.
        dtype: The type of packed ids: uint8, uint16 or int32.

        A `.npy` file holds integers of shape [n], which are one document, or of shape [rows, n], with one
        document per row. Packed ids are little-endian integers of `dtype` without a header, and are one
        document. Raises ValueError for any other file or folder.
        """
        path = Path(path)
        tokenizer, bytes_per_token = "", None
        if dtype is not None and holds_tokens(path):
            raise ValueError(f"{path} records the type of its ids; leave out dtype (--dtype), got {dtype!r}")
        if path.suffix == ".npy":
            refuse_part(path)
        if (path / METADATA).is_file():
            metadata = PreparedMetadata.read(path)
            if metadata.prompts or metadata.row_length:
                kind = "packed rows" if metadata.row_length else "prompts with responses"
                raise ValueError(f"{path} holds {kind}; open it with maskwire.open_data")
            documents = _prepared_documents(path, metadata)
            tokenizer, bytes_per_token = metadata.tokenizer, metadata.text_bytes / metadata.tokens
            self.tokenizer_description = _description(path, metadata)
        elif path.suffix == ".npy":
            documents = Documents.from_packed(*load_array(path))
        elif dtype in PACKED_TYPES and path.is_file():
            refuse_other_than_packed(path)
            size, width = path.stat().st_size, np.dtype(dtype).itemsize
            if size % width or not size:
                raise ValueError(
                    f"{path} has {size:,} bytes, which is not a whole number of {dtype} ids of {width} "
                    "bytes each; check dtype (--dtype)"
                )
            flat = FileArray(path, _little_endian(dtype))
            documents = Documents.from_packed(flat, np.array([flat.size]))
        else:
            raise ValueError(_not_token_ids(path, dtype))
        self._initialize(
            documents, length=length, batch_size=batch_size, seed=seed, sampling=sampling,
            tokenizer=tokenizer, bytes_per_token=bytes_per_token,
        )  # fmt: skip
        self.files = []


@refuse_unknown_keywords
def open_data(
    paths: Paths,
    *,
    length: int | None = None,
    batch_size: int,
    seed: int = 0,
    sampling: str = "crops",
    pattern: str = "*",
    dtype: str | None = None,
    any_format: bool = False,
    text_field: str | None = None,
    prompt_field: str | None = None,
    response_field: str | None = None,
) -> TokenData:
    """Open training data from files, folders, addresses or a data set; the content decides the type.

    paths: One folder written by `maskwire data prepare`, one `.npy` file, one file of packed ids with its
        `dtype` (uint8, uint16 or int32), or texts, whose bytes become the tokens: files, folders, globs, JSON
        Lines, Parquet and Arrow files, fsspec addresses, or a data set of the package `datasets`. The
        texts of records and of addresses are held in memory; prepare larger ones with `maskwire data
        prepare`.
    length: Tokens per row. A folder of packed rows has its own length, and the result is a PackedData.
    batch_size: Rows per batch.
    seed: Seed for the choice of rows.
    sampling: "crops" for rows at random places, or "epochs" for each row once per epoch. Packed rows are
        never cropped: "crops" draws whole rows.
    pattern: In folders, use only the files whose names match, such as "*.txt".
    dtype: The type of packed ids: uint8, uint16 or int32.
    text_field: The field of a record that holds its text; "text" by default.
    prompt_field, response_field: The fields of a record that hold a prompt and its response. With them the
        result is a PairData.
    any_format: Read files of any type as bytes.

    Raises ValueError for other data, and for arguments that do not fit the data.
    """
    fields = Fields(text_field, prompt_field, response_field)
    packed = packed_length(paths)
    if packed is not None:
        check_length(length, packed)
        length = packed
    if length is None:
        raise ValueError("length is missing: give the number of tokens per row, such as length=512")
    options: dict[str, Any] = {
        "length": length, "batch_size": batch_size, "seed": seed, "sampling": sampling,
    }  # fmt: skip
    given = paths if isinstance(paths, list | tuple) else [paths]
    ids = [each for each in given if isinstance(each, str | Path) and holds_tokens(each)]
    if dtype is not None or ids:
        if len(given) != 1:
            raise ValueError(
                f"a file or folder of token ids must be the only path, got {len(given)} paths; prepare the "
                "texts together, into one folder"
            )
        if fields.given:
            raise ValueError(
                f"{given[0]} holds token ids, which have no fields; leave out the options that name fields"
            )
        if dtype is None and packed is not None:
            return _open_packed(Path(given[0]), options)
        if _holds_pairs(Path(given[0])):
            return open_pairs(Path(given[0]), **options)
        return FileTokens(given[0], dtype=dtype, **options)
    sources = find_sources(paths, fields, pattern=pattern, any_format=any_format)
    texts = [source.text_path for source in sources if isinstance(source, FileSource)]
    files = [path for path in texts if path is not None]
    if len(files) == len(sources):
        data = object.__new__(ByteData)
        data._open(files, **options)
        return data
    return _in_memory(sources, fields, options)


def open_pairs(path: Path, **options: Any) -> PairData:
    """Open a prepared folder of prompts and responses as a PairData."""
    metadata = PreparedMetadata.read(path)
    prompts, _ = load_array(path / PROMPTS)
    if metadata.end_id is None:
        raise ValueError(f"{path / METADATA}: the id that ends a response is missing; prepare the data again")
    found = PairData(
        _prepared_documents(path, metadata), prompts[:], end_id=metadata.end_id, tokenizer=metadata.tokenizer,
        **options,
    )  # fmt: skip
    found.tokenizer_description = _description(path, metadata)
    return found


def packed_length(paths: Paths) -> int | None:
    """The tokens per row, if the only path is a folder of packed rows; None for all other paths."""
    given = paths if isinstance(paths, list | tuple) else [paths]
    if len(given) != 1 or not isinstance(given[0], str | Path) or not (Path(given[0]) / METADATA).is_file():
        return None
    return PreparedMetadata.read(Path(given[0])).row_length or None


def _open_packed(path: Path, options: dict[str, Any]) -> PackedData:
    metadata = PreparedMetadata.read(path)
    (pieces, _), (ends, _) = load_array(path / PIECES), load_array(path / ROWS)
    prompts = load_array(path / PROMPTS)[0][:] if metadata.prompts else None
    bytes_per_token = None if metadata.prompts else metadata.text_bytes / metadata.tokens
    found = PackedData(
        _prepared_documents(path, metadata), pieces[:].astype(np.int64), ends[:].astype(np.int64),
        tokenizer=metadata.tokenizer, bytes_per_token=bytes_per_token, prompts=prompts, **options,
    )  # fmt: skip
    found.tokenizer_description = _description(path, metadata)
    return found


def _holds_pairs(path: Path) -> bool:
    return (path / METADATA).is_file() and PreparedMetadata.read(path).prompts


def _prepared_documents(path: Path, metadata: PreparedMetadata) -> Documents:
    flat = FileArray(path / TOKENS, _little_endian(metadata.dtype))
    ends, _ = load_array(path / DOCUMENTS)
    return Documents.from_packed(flat, ends[:].astype(np.int64))


def _description(path: Path, metadata: PreparedMetadata) -> TokenizerDescription | None:
    """The tokenizer's description, for a run to keep; None if the tokenizer's file is not in the folder."""
    file = path / TOKENIZER_FILE
    if metadata.tokenizer != BYTES and not file.is_file():
        return None
    content = b"" if metadata.tokenizer == BYTES else file.read_bytes()
    around = tuple(metadata.document_start), tuple(metadata.document_end)
    return TokenizerDescription(metadata.tokenizer, content, *around)


def _in_memory(sources: list[Source], fields: Fields, options: dict[str, Any]) -> TokenData:
    """Load records and remote files into memory; the bytes of each record or file are one document."""
    tokenizer = ByteTokenizer(special_tokens=fields.prompt is not None)
    arrays: list[Ids] = []
    prompts: list[int] = []
    size, dropped = 0, 0
    for item in (item for source in sources for item in source.read(0)):
        if item.error:
            raise ValueError(item.error)
        if item.record is None:
            dropped += 1
            continue
        for encoded in tokenizer.encode([item.record]):
            arrays.append(
                np.concatenate(list(encoded.parts)).astype(np.uint16 if tokenizer.end else np.uint8)
            )
            prompts.append(encoded.prompt)
        size += item.record.size
        if size > _LARGEST_IN_MEMORY:
            raise ValueError(
                f"the texts have more than {_LARGEST_IN_MEMORY:,} bytes, and records are held in memory; "
                "prepare the texts with `maskwire data prepare`, and train on the folder that it writes"
            )
    if dropped:
        log.warning("%s records without text are left out", f"{dropped:,}")
    if not arrays:
        raise ValueError(
            f"no record in {names([source.name for source in sources])} has text"
            + (
                "; check the name of the text's field"
                if dropped
                else ": there are no records; give other data"
            )
        )
    documents = Documents.from_packed(np.concatenate(arrays), np.cumsum([array.size for array in arrays]))
    if tokenizer.end_id is None:
        data = object.__new__(TokenData)
        data.files = []
        data._initialize(documents, tokenizer=BYTES, bytes_per_token=1.0, **options)
    else:
        data = PairData(documents, np.array(prompts), end_id=tokenizer.end_id, tokenizer=BYTES, **options)
    data.tokenizer_description = TokenizerDescription(BYTES, document_end=tuple(tokenizer.end))
    return data


def holds_tokens(path: str | Path) -> bool:
    """Whether a path is a `.npy` file or a prepared folder, which record the type of their ids."""
    return Path(path).suffix == ".npy" or (Path(path) / METADATA).is_file()


def _little_endian(dtype: str) -> np.dtype[Any]:
    if dtype not in PACKED_TYPES:
        raise ValueError(f"dtype must be one of {', '.join(PACKED_TYPES)}, got {dtype!r}")
    return np.dtype(dtype).newbyteorder("<")


def _not_token_ids(path: Path, dtype: str | None) -> str:
    """The error message for a path that cannot be opened as token ids."""
    if not path.exists():
        return f"{path}: no such file or folder"
    if path.is_dir() or dtype in PACKED_TYPES or dtype is None:
        return (
            f"{path} holds no token ids: give a .npy file, a folder written by `maskwire data prepare`, or a "
            "file of packed ids with dtype (--dtype)"
        )
    advice = f"; {_OTHER_TYPES[dtype]}" if dtype in _OTHER_TYPES else ""
    return f"{path}: dtype must be one of {', '.join(PACKED_TYPES)}, got {dtype!r}{advice}"
