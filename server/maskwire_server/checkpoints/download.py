"""Downloads of checkpoints: read files in chunks, and check them against the manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from maskwire.v1.values import unsharded_name
from maskwire_server.checkpoints.files import describe
from maskwire_server.checkpoints.store import Checkpoints
from maskwire_server.errors import Refused, invalid_field, is_shortage
from maskwire_server.manifest import MANIFEST, Manifest
from maskwire_server.requests import DownloadRequest
from maskwire_server.results import FROZEN_FILE, WEIGHT_FILES, Chunk, FileInfo

CHUNK_BYTES = 2**20


def read(checkpoints: Checkpoints, request: DownloadRequest) -> Iterator[Chunk]:
    """Yield the requested files in chunks. The checkpoint is kept until the iterator ends or is closed.

    Raises Refused with CHECKPOINT_NOT_FOUND, CHECKPOINT_DAMAGED or INVALID_FIELD.
    """
    with checkpoints.reading(request.name) as manifest:
        for file in _chosen(checkpoints, manifest, request):
            yield from _chunks(checkpoints, manifest, file, request.offset)


def _chosen(checkpoints: Checkpoints, manifest: Manifest, request: DownloadRequest) -> list[FileInfo]:
    files = [*manifest.info.files, describe(checkpoints.path(manifest.info.name) / MANIFEST)]
    if request.file is not None:
        found = [file for file in files if file.name == request.file]
        if not found:
            raise Refused(
                "CHECKPOINT_NOT_FOUND",
                f"checkpoint {request.name!r} has no file {request.file!r}; request one of its files: "
                f"{', '.join(file.name for file in files)}",
                name=request.name,
                file=request.file,
            )
        if request.offset > found[0].size_bytes:
            raise invalid_field(
                "offset_bytes",
                f"offset_bytes must be at most {found[0].size_bytes}, the file's size, got {request.offset}",
            )
        return found
    if request.weights_only:
        return [file for file in files if unsharded_name(file.name) in (*WEIGHT_FILES, FROZEN_FILE, MANIFEST)]
    return files


def _chunks(checkpoints: Checkpoints, manifest: Manifest, file: FileInfo, offset: int) -> Iterator[Chunk]:
    path = checkpoints.path(manifest.info.name) / file.name
    sha = hashlib.sha256() if offset == 0 else None
    try:
        with path.open("rb") as opened:
            opened.seek(offset)
            while data := opened.read(CHUNK_BYTES):
                if sha is not None:
                    sha.update(data)
                yield Chunk(file, offset, data)
                offset += len(data)
    except OSError as error:
        if is_shortage(error):
            raise
        raise _damaged(checkpoints, manifest, file, str(error.strerror)) from error
    if offset != file.size_bytes or (sha is not None and sha.digest() != file.sha256):
        raise _damaged(checkpoints, manifest, file, "does not match the manifest's size and SHA-256")


def _damaged(checkpoints: Checkpoints, manifest: Manifest, file: FileInfo, problem: str) -> Refused:
    name = manifest.info.name
    checkpoints.doubt(name)
    return Refused(
        "CHECKPOINT_DAMAGED",
        f"checkpoint {name!r} is damaged: {file.name}: {problem}; download another checkpoint",
        name=name,
        problem=f"{file.name} {problem}",
    )
