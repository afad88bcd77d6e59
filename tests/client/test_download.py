"""Files of a checkpoint on their way here."""

from __future__ import annotations

import errno
import hashlib
import resource
import zlib
from pathlib import Path

import pytest

from maskwire.protocol.download import PartialFile
from maskwire.results import FileInfo
from maskwire.v1 import training_service_pb2 as pb


def test_a_download_that_finds_no_room_names_its_file_and_goes_on_later(tmp_path: Path) -> None:
    data = bytes(range(250)) * 400
    info = FileInfo(len(data), hashlib.sha256(data).digest())

    def partial_file() -> PartialFile:
        opened = PartialFile("a", tmp_path, "model.safetensors", info, lambda: None)
        opened.open()
        return opened

    def chunk(start: int) -> pb.DownloadCheckpointResponse:
        rest = data[start:]
        return pb.DownloadCheckpointResponse(
            file=pb.CheckpointFile(size_bytes=info.size_bytes, sha256=info.sha256),
            offset_bytes=start, data=rest, crc32=zlib.crc32(rest),
        )  # fmt: skip

    first = partial_file()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(OSError, match="run the same download again: it resumes") as found:
            first.append(chunk(0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert found.value.errno == errno.EFBIG, "the command's exit code depends on it"
    assert found.value.filename == str(tmp_path / f"model.safetensors.{info.sha256.hex()[:12]}.part")
    again = partial_file()
    assert 0 < again.size <= 50_000
    again.append(chunk(again.size))
    assert again.complete
    assert (tmp_path / "model.safetensors").read_bytes() == data
