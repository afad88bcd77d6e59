"""Detect the type of a file from its name and first bytes, and refuse what is not text.

Training on the bytes of a packed or compressed file raises no error, and the model learns nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

HEAD_BYTES = 4096
"""How much of a file's beginning is read to detect its type."""
_TEXTS = "open it with maskwire.open_data or `maskwire data prepare`, which read the field of its texts"
_ARRAY = "save the ids as one array with np.save, as a .npy file"


@dataclass(frozen=True)
class FileType:
    """A type of file that is not text, and what to do with such a file."""

    name: str
    remedy: str


_NPY = FileType("a NumPy array", "give a .npy file alone: it holds token ids")
_NPZ = FileType("a NumPy archive (.npz)", _ARRAY)
_TORCH = FileType("a PyTorch file", _ARRAY)
_PICKLE = FileType("a pickle", _ARRAY)
_SAFETENSORS = FileType("a safetensors file", _ARRAY)
_PACKED = FileType(
    "a file of packed ids", "give it alone, with --dtype uint16, or uint8 or int32 if its ids have that type"
)
_HDF5 = FileType("an HDF5 file", _ARRAY)
_JSON_LINES = FileType("a JSON Lines file", _TEXTS)
_PARQUET = FileType("a Parquet file", _TEXTS)
_ARROW = FileType("an Arrow file", _TEXTS)
_RECORDS = FileType("a TFRecord file", _TEXTS)
_SQLITE = FileType("an SQLite database", "select the text files with --pattern, such as '*.txt'")
_ZIP = FileType(
    "a ZIP archive, or a format based on ZIP (.npz, .pt, .docx)", "unpack it, or save the ids as .npy"
)
_ARCHIVE = FileType("an archive or a compressed file", "unpack it")
_UTF16 = FileType("UTF-16 text", "convert it to UTF-8")
ZERO_BYTES = FileType("a file with zero bytes, such as UTF-16 text or a damaged file", "convert it to UTF-8")
_PDF = FileType("a PDF document", "convert it to text")
_IMAGE = FileType("an image", "select the text files with --pattern, such as '*.txt'")
_TWO_BYTES = FileType(
    "a file of 16-bit values",
    "give packed ids alone, with --dtype uint16; convert UTF-16 text to UTF-8",
)
_FOUR_BYTES = FileType(
    "a file of 32-bit values", "give packed ids alone, with --dtype int32 (also for uint32 ids below 2^31)"
)
_EIGHT_BYTES = FileType(
    "a file of 64-bit values",
    "save packed ids with np.save, as a .npy file, or as int32 to use --dtype int32",
)

_SUFFIXES = {
    **dict.fromkeys((".npy",), _NPY),
    **dict.fromkeys((".npz",), _NPZ),
    **dict.fromkeys((".pt", ".pth", ".ckpt"), _TORCH),
    **dict.fromkeys((".pkl", ".pickle"), _PICKLE),
    **dict.fromkeys((".safetensors",), _SAFETENSORS),
    **dict.fromkeys((".bin",), _PACKED),
    **dict.fromkeys((".h5", ".hdf5"), _HDF5),
    **dict.fromkeys((".jsonl", ".ndjson"), _JSON_LINES),
    **dict.fromkeys((".parquet",), _PARQUET),
    **dict.fromkeys((".arrow", ".feather"), _ARROW),
    **dict.fromkeys((".tfrecord", ".tfrecords"), _RECORDS),
    **dict.fromkeys((".sqlite", ".sqlite3"), _SQLITE),
    **dict.fromkeys((".zip",), _ZIP),
    **dict.fromkeys((".pdf",), _PDF),
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".gif"), _IMAGE),
    **dict.fromkeys((".tar", ".gz", ".tgz", ".zst", ".xz", ".bz2", ".7z", ".lz4", ".zstd", ".rar"), _ARCHIVE),
}
_MAGIC = {
    b"\x93NUMPY": _NPY,
    b"PK\x03\x04": _ZIP,
    b"PK\x05\x06": _ZIP,
    b"PAR1": _PARQUET,
    b"ARROW1": _ARROW,
    b"FEA1": _ARROW,
    b"\x89HDF\r\n\x1a\n": _HDF5,
    b"SQLite format 3\x00": _SQLITE,
    b"\x1f\x8b\x08": _ARCHIVE,
    b"\x28\xb5\x2f\xfd": _ARCHIVE,
    b"\xfd7zXZ\x00": _ARCHIVE,
    b"7z\xbc\xaf\x27\x1c": _ARCHIVE,
    b"\x04\x22\x4d\x18": _ARCHIVE,
    b"Rar!\x1a\x07": _ARCHIVE,
    b"\x80\x02}": _PICKLE,
    b"\x80\x03}": _PICKLE,
    b"\x80\x04\x95": _PICKLE,
    b"\x80\x05\x95": _PICKLE,
    b"\x80\x02\x8a\x0al\xfc\x9cF\xf9": _TORCH,
    b"%PDF-": _PDF,
    b"\x89PNG\r\n\x1a\n": _IMAGE,
    b"\xff\xd8\xff": _IMAGE,
    b"GIF87a": _IMAGE,
    b"GIF89a": _IMAGE,
    b"\xff\xfe": _UTF16,
    b"\xfe\xff": _UTF16,
}
RECORD_TYPES = (None, _JSON_LINES, _PARQUET, _ARROW)
"""What `detect` returns for files with one text per record; None is for CSV, which it takes for text."""
_BZIP2 = re.compile(rb"BZh[1-9]1AY&SY")
_TAR, _TAR_AT = b"ustar", 257


def detect(name: str, head: bytes, size: int) -> FileType | None:
    """Return the type of a file that is not text; None for text, and for bytes of no known type."""
    named = _SUFFIXES.get(PurePosixPath(name).suffix.lower())
    if head.startswith(b"PK") and named in (_NPZ, _TORCH):
        return named
    for magic, found in _MAGIC.items():
        if head.startswith(magic):
            return found
    if _BZIP2.match(head) or head[_TAR_AT:].startswith(_TAR):
        return _ARCHIVE
    if head[8:10] == b'{"' and 0 < int.from_bytes(head[:8], "little") < size:
        return _SAFETENSORS
    return named or _packed(head)


def _packed(head: bytes) -> FileType | None:
    """Detect integers wider than a byte: their high bytes are zero, and text contains no zero bytes."""
    if len(head) < 64 or b"\0" not in head:
        return None
    zero = np.frombuffer(head[: len(head) // 8 * 8], np.uint8).reshape(-1, 8) == 0
    columns = zero.mean(axis=0)
    if columns[0] == 1:  # all zeros, or big-endian: undecidable
        return None
    if (columns[4:] == 1).all():
        return _EIGHT_BYTES
    if (columns[1::2] > 0.9).all() and (columns[::2] < 0.5).all():
        return _TWO_BYTES
    if (columns[[3, 7]] == 1).all():
        return _FOUR_BYTES
    return None


def unsupported(found: dict[str, FileType]) -> ValueError:
    """The error for files that are not text. It says what to do with each of the first three."""
    shown = [f"{path} is {each.name}: {each.remedy}" for path, each in list(found.items())[:3]]
    more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
    return ValueError(
        f"{'; '.join(shown)}{more}. Only text can be read here: select text files with --pattern, such as "
        "'*.txt', or read files of any type as bytes, one token per byte, with --any-format (any_format=True)"
    )


def refuse_other_than_packed(path: Path) -> None:
    """Raise ValueError for a file whose name says that it does not hold packed ids."""
    named = _SUFFIXES.get(path.suffix.lower(), _PACKED)
    if named is not _PACKED:
        raise ValueError(f"{path} is {named.name}, not packed ids, so dtype does not apply: {named.remedy}")
