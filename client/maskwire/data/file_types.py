"""What a file is, from its name and its first bytes: text to train on, another format, or a run's own file.

Other formats must not be taken for text: training on the bytes of a packed or compressed file works without
an error and learns nothing. And what a run writes (metrics, a run directory, checkpoints) must not become
its data, or the batches would change while it trains.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from maskwire.data.own_files import is_artifact

META, TOKENS, DOCUMENTS = "maskwire-data.json", "tokens.bin", "documents.npy"
"""The files of prepared data."""
JOURNAL, CHECKPOINTS, LOCK, MANIFEST = "journal.sqlite", "checkpoints", "lock", "manifest.json"
_RUN_FILES = {LOCK, "computing"}
_RUN_SUFFIXES = {".toml", ".log"}
_PART = re.compile(r"\.[0-9a-f]{12}\.part$|^manifest\.json\.part$")  # of a download
_TENSORS = ".safetensors"
_HEAD = 4096  # bytes that tell a format
_TEXTS = "write each text to a .txt file, then `maskwire data prepare`"
_ARRAY = "save the ids as one array with np.save (.npy)"


@dataclass(frozen=True)
class Format:
    """A format that is not text, and what to do with a file of it."""

    name: str
    cure: str


_NPY = Format("a NumPy array", "give a .npy file alone: it holds token ids")
_NPZ = Format("a NumPy archive (.npz)", _ARRAY)
_TORCH = Format("a PyTorch file", _ARRAY)
_PICKLE = Format("a pickle", _ARRAY)
_SAFETENSORS = Format("a safetensors file", _ARRAY)
_PACKED = Format("packed ids", "give it alone, with --dtype uint16 (or uint8, int32), the type of its ids")
_HDF5 = Format("an HDF5 file", _ARRAY)
_JSON_LINES = Format("JSON lines", _TEXTS)
_PARQUET = Format("a Parquet file", _TEXTS)
_ARROW = Format("an Arrow file", _TEXTS)
_RECORDS = Format("a TFRecord file", _TEXTS)
_SQLITE = Format("an SQLite database", "choose the text files with --pattern, such as '*.txt'")
_ZIP = Format(
    "a ZIP archive, or a format that is one (.npz, .pt, .docx)", "unpack it, or save the ids as .npy"
)
_ARCHIVE = Format("an archive or a compressed file", "unpack it")
_UTF16 = Format("UTF-16 text", "convert it to UTF-8")
_TWO_BYTES = Format(
    "16-bit values", "give packed ids alone, with --dtype uint16; convert UTF-16 text to UTF-8"
)
_FOUR_BYTES = Format(
    "32-bit values", "give packed ids alone, with --dtype int32 (also for uint32: ids are below 2^31)"
)
_EIGHT_BYTES = Format("64-bit values", "save packed ids with np.save (.npy), or as int32 for --dtype int32")

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
    b"\xff\xfe": _UTF16,
    b"\xfe\xff": _UTF16,
}
_BZIP2 = re.compile(rb"BZh[1-9]1AY&SY")
_TAR, _TAR_AT = b"ustar", 257


def read_head(path: Path) -> bytes:
    """The first bytes of a file."""
    with path.open("rb") as file:
        return file.read(_HEAD)


def recognize(path: Path, head: bytes) -> Format | None:
    """What a file is if it is not text; None for text, and for bytes of no known format."""
    named = _SUFFIXES.get(path.suffix.lower())
    if head.startswith(b"PK") and named in (_NPZ, _TORCH):
        return named
    for magic, found in _MAGIC.items():
        if head.startswith(magic):
            return found
    if _BZIP2.match(head) or head[_TAR_AT:].startswith(_TAR):
        return _ARCHIVE
    if head[8:10] == b'{"' and 0 < int.from_bytes(head[:8], "little") < path.stat().st_size:
        return _SAFETENSORS
    return named or _packed(head)


def _packed(head: bytes) -> Format | None:
    """Integers of several bytes: their high bytes are zero, which text has none of."""
    if len(head) < 64 or b"\0" not in head:
        return None
    zero = np.frombuffer(head[: len(head) // 8 * 8], np.uint8).reshape(-1, 8) == 0
    columns = zero.mean(axis=0)
    if columns[0] == 1:  # all zeros, or big-endian: nobody can tell
        return None
    if (columns[4:] == 1).all():
        return _EIGHT_BYTES
    if (columns[1::2] > 0.9).all() and (columns[::2] < 0.5).all():
        return _TWO_BYTES
    if (columns[[3, 7]] == 1).all():
        return _FOUR_BYTES
    return None


def refuse(found: dict[Path, Format]) -> ValueError:
    """The error about files that are not text."""
    shown = [f"{path} is {each.name}: {each.cure}" for path, each in list(found.items())[:3]]
    more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
    return ValueError(
        f"{'; '.join(shown)}{more}. Data is text here: choose files with --pattern, such as '*.txt', or take "
        "every format as it is, each byte a token, with --any-format (any_format=True)"
    )


def refuse_packed(path: Path) -> None:
    """Raise ValueError for a file that is said to hold packed ids, and whose name says otherwise."""
    named = _SUFFIXES.get(path.suffix.lower(), _PACKED)
    if named is not _PACKED:
        raise ValueError(f"{path} is {named.name}, not packed ids, and cannot have a dtype: {named.cure}")


def refuse_part(path: Path) -> None:
    """Raise ValueError for a file of prepared data, which is used by its folder."""
    if path.name in (META, TOKENS, DOCUMENTS) and (path.parent / META).is_file():
        raise ValueError(f"{path} belongs to prepared data: give its folder, {path.parent}")


class RunFiles:
    """Tells the files that maskwire itself writes from data."""

    def __init__(self) -> None:
        self._runs: dict[Path, bool] = {}  # folders that were looked at
        self._checkpoints: dict[Path, bool] = {}
        self._halves: dict[Path, bool] = {}
        self._outputs = set(_outputs())

    def owns(self, path: Path, head: bytes) -> bool:
        """Whether maskwire wrote a file: of a run's directory, a checkpoint, metrics, a log, a result."""
        path = path.absolute()
        if path.name.startswith(JOURNAL) or self._is_checkpoint(path.parent) or self._of_run(path):
            return True
        if _PART.search(path.name) or (path.suffix == _TENSORS and self._is_half(path.parent)):
            return True
        found = path.stat()
        written_now = (found.st_dev, found.st_ino) in self._outputs
        return written_now or is_metrics(head) or is_artifact(path, head)

    def _of_run(self, path: Path) -> bool:
        if self._is_run(path.parent):
            return path.name in _RUN_FILES or path.suffix in _RUN_SUFFIXES
        inner = path
        for folder in path.parents:
            if inner.name == CHECKPOINTS and self._is_run(folder):
                return True
            inner = folder
        return False

    def _is_run(self, folder: Path) -> bool:
        if folder not in self._runs:
            lost = (folder / LOCK).is_file() and (folder / CHECKPOINTS).is_dir()
            self._runs[folder] = lost or (folder / JOURNAL).is_file()
        return self._runs[folder]

    def _is_half(self, folder: Path) -> bool:
        """Whether a checkpoint's download into a folder was begun and not finished."""
        if folder not in self._halves:
            self._halves[folder] = any(_PART.search(path.name) for path in folder.glob("*.part"))
        return self._halves[folder]

    def _is_checkpoint(self, folder: Path) -> bool:
        if folder not in self._checkpoints:
            self._checkpoints[folder] = _holds_manifest(folder / MANIFEST)
        return self._checkpoints[folder]


def _holds_manifest(path: Path) -> bool:
    try:
        return b'"manifest_sha256"' in path.read_bytes()
    except OSError:
        return False


def _outputs() -> Iterator[tuple[int, int]]:
    """The files that this process writes to: `maskwire train . > log.txt`."""
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            found = os.fstat(descriptor)
            yield found.st_dev, found.st_ino


_METRICS_KEYS = (
    {"run_id", "lineage", "step"},
    {"step", "outcome", "digest"},
    {"step", "eval_bits_per_token"},
)
_METRICS_LINE = re.compile(
    rb'\{"(step|run|run_id|lineage)": ("[^"]*"|\d+), "(loss|lineage|step|eval_bits_per_token)": '
)


def is_metrics(head: bytes) -> bool:
    """Whether a file begins with lines that `fit` writes to `metrics`, under whatever name."""
    if b'"step"' not in head:
        return False
    lines = head.splitlines()[:3]  # the first may be cut
    if any(_is_metrics_line(line) for line in lines):
        return True
    whole_file = len(head) < _HEAD  # a line that is cut there was cut by a full disk
    return whole_file and len(lines) == 1 and not _parsed(lines[0]) and bool(_METRICS_LINE.match(lines[0]))


def _is_metrics_line(line: bytes) -> bool:
    found = _parsed(line)
    return isinstance(found, dict) and any(keys <= set(found) for keys in _METRICS_KEYS)


def _parsed(line: bytes) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
