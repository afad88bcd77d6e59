"""The draft of a prepared folder, from which a preparation that was killed can resume.

The draft is a hidden folder, `.NAME.part`, beside the final one. Its files are only appended to.
`progress.json` records how many of their bytes are valid, and the position in the sources; it is replaced
only after the files have been flushed to disk. After a kill, the next call truncates the files to what
`progress.json` records, and then writes the same bytes that an unbroken run would have written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from maskwire.data.file_array import Ids
from maskwire.data.prepared_folder import (
    DOCUMENTS,
    METADATA,
    PIECES,
    PROMPTS,
    ROWS,
    TOKENS,
    PreparedMetadata,
)
from maskwire.data.row_packing import OPEN_ROWS, RowPacker

_PROGRESS, _LOCK = "progress.json", "lock"
_BUFFER = 2**20


@dataclass
class Progress:
    """The progress of a preparation: how much was written, and the position in the sources."""

    identity: str
    """Identifies sources and options: if they changed, preparing restarts from the beginning."""
    source: int = 0
    place: int = 0
    """The position in source number `source` at which reading continues."""
    tokens: int = 0
    documents: int = 0
    text_bytes: int = 0
    longest: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    start: list[int] = field(default_factory=list)
    end: list[int] = field(default_factory=list)

    def drop(self, reason: str) -> None:
        """Count a record that was left out, under the reason."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1


def draft_path(out: Path) -> Path:
    """The path of the draft of the folder `out`."""
    return out.parent / f".{out.name}.part"


class DraftFolder:
    """A draft to which documents are appended, with the progress. Use it in a `with` statement."""

    def __init__(
        self, out: Path, identity: str, dtype: str, *, prompts: bool, refused: Collection[str] = ()
    ) -> None:
        """Open the draft of the folder `out`, or start a new one.

        An existing draft is deleted if it has another `identity`, which stands for the sources and options,
        or if it dropped a record for a reason in `refused`. Raises ValueError if another process has the
        draft open.
        """
        self.path = draft_path(out)
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._prompts = prompts
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / _LOCK).open("wb")
        _lock(self._lock, self.path)
        found = self._saved()
        self.resumed = (
            found is not None and found.identity == identity and not set(refused) & found.dropped.keys()
        )
        """Whether this continues the draft of an earlier call that was stopped."""
        self.progress = found if found is not None and self.resumed else Progress(identity)
        if not self.resumed:
            for path in self.path.iterdir():
                if path.name != _LOCK:  # a draft with other options may have other files
                    path.unlink()
        self._files = {
            TOKENS: self._open(TOKENS, self.progress.tokens * self._dtype.itemsize),
            DOCUMENTS: self._open(f"{DOCUMENTS}.raw", self.progress.documents * 8),
        }
        if prompts:
            self._files[PROMPTS] = self._open(f"{PROMPTS}.raw", self.progress.documents * 8)

    def _saved(self) -> Progress | None:
        """The progress that an earlier call saved; None if it saved none, or if a file is too short."""
        try:
            found = Progress(**json.loads((self.path / _PROGRESS).read_bytes()))
            whole = (self.path / TOKENS).stat().st_size >= found.tokens * self._dtype.itemsize
            for name in (DOCUMENTS, PROMPTS) if self._prompts else (DOCUMENTS,):
                whole = whole and (self.path / f"{name}.raw").stat().st_size >= found.documents * 8
        except (OSError, ValueError, TypeError):
            return None
        return found if whole else None

    def _open(self, name: str, size: int) -> IO[bytes]:
        path = self.path / name
        path.touch()
        file = path.open("r+b", buffering=_BUFFER)
        file.truncate(size)
        file.seek(size)
        return file

    def add(self, parts: Iterable[Ids], prompt: int = 0) -> None:
        """Append a document, given as parts of its ids. The first `prompt` ids are its prompt."""
        size = 0
        for ids in parts:
            self._files[TOKENS].write(ids.astype(self._dtype, copy=False).tobytes())
            size += ids.size
        self.progress.tokens += size
        self.progress.documents += 1
        self.progress.longest = max(self.progress.longest, size)
        self._files[DOCUMENTS].write(self.progress.tokens.to_bytes(8, "little"))
        if self._prompts:
            self._files[PROMPTS].write(prompt.to_bytes(8, "little"))

    def save(self) -> None:
        """Flush the documents to disk, and then record the progress."""
        for file in self._files.values():
            _flush(file)
        draft = self.path / f"{_PROGRESS}.new"
        with draft.open("w") as text:
            json.dump(dataclasses.asdict(self.progress), text)
            _flush(text)
        draft.replace(self.path / _PROGRESS)

    def pack(self, length: int) -> tuple[int, int]:
        """Pack the documents into rows of `length` tokens. Returns (rows, documents that were cut).

        The rows depend only on the sizes of the documents, so packing that was stopped is repeated.
        """
        self.save()
        packer, rows, pieces = RowPacker(length, OPEN_ROWS), 0, 0
        paths = [self.path / f"{name}.raw" for name in (ROWS, PIECES)]
        with paths[0].open("wb", _BUFFER) as ends, paths[1].open("wb", _BUFFER) as numbers:
            for row in packer.rows(self._sizes()):
                rows, pieces = rows + 1, pieces + len(row)
                ends.write(pieces.to_bytes(8, "little"))
                numbers.write(np.array(row, dtype="<i8").tobytes())
        self._to_array(ROWS, rows)
        self._to_array(PIECES, pieces)
        return rows, packer.cut

    def _sizes(self) -> Iterator[int]:
        """Yield the number of tokens of each document. The file of the documents' ends is read in parts."""
        before = 0
        with (self.path / f"{DOCUMENTS}.raw").open("rb") as file:
            while part := file.read(_BUFFER):
                ends = np.frombuffer(part, dtype="<i8")
                yield from np.diff(ends, prepend=before).tolist()
                before = int(ends[-1])

    def complete(self, metadata: PreparedMetadata, out: Path, copies: dict[str, bytes]) -> None:
        """Write the remaining files, and move the draft to `out`, replacing a folder that exists there.

        After an error before the move, a later call can still resume from the draft.
        """
        self.save()
        for name in self._files:
            if name != TOKENS:
                self._to_array(name, self.progress.documents)
        for name, content in copies.items():
            with (self.path / name).open("wb") as copy:
                copy.write(content)
                _flush(copy)
        with (self.path / METADATA).open("w") as text:
            text.write(metadata.to_json())
            _flush(text)
        self._close()
        old = self.path.with_suffix(".old")
        if old.exists():  # an earlier call was killed before it deleted this folder
            shutil.rmtree(old)
        if out.exists():
            out.rename(old)
        self.path.rename(out)
        for path in [*out.glob("*.raw"), out / _PROGRESS, out / _LOCK]:
            path.unlink(missing_ok=True)
        shutil.rmtree(old, ignore_errors=True)

    def _to_array(self, name: str, count: int) -> None:
        """Write the `.npy` file `name` from its `.raw` file, which holds `count` int64 numbers."""
        raw = self.path / f"{name}.raw"
        with raw.open("rb") as source, (self.path / name).open("wb") as file:
            header = {"descr": "<i8", "fortran_order": False, "shape": (count,)}
            np.lib.format.write_array_header_1_0(file, header)
            shutil.copyfileobj(source, file, _BUFFER)
            _flush(file)

    def _close(self) -> None:
        for file in [*self._files.values(), self._lock]:
            file.close()

    def __enter__(self) -> DraftFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """After an error, keep the draft if its saved progress has documents; otherwise delete it."""
        with contextlib.suppress(OSError):
            self._close()
        saved = None if kind is None else self._saved()
        if saved is None or not saved.documents:
            shutil.rmtree(self.path, ignore_errors=True)


def _lock(file: IO[bytes], folder: Path) -> None:
    """Lock a file until it is closed or the process ends. On Windows, which has no fcntl, do nothing."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(
            f"{folder}: another process is preparing the same folder; wait for it, or choose another folder"
        ) from None


def _flush(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())
