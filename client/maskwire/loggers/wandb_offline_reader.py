"""Find the end of a run's log in W&B's offline files: W&B itself resumes online runs only.

An offline run is a folder with a log of W&B's messages. After a header, the log consists of blocks, and each
message consists of one or more chunks, as in LevelDB's logs (google/leveldb, doc/log_format.md).
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskwire.loggers.records import Place

LINEAGE = "-lineage-"
"""Stands between a run's id and the number of a lineage after the first."""
START = "start_step"
"""The entry of a W&B run's config with the step after which its log begins."""

_HEADER = b":W&B"
_HEADER_BYTES = 7
_BLOCK = 32768
_CHUNK = struct.Struct("<IHB")  # a checksum, the length of the data, the kind of chunk; then the data
_WHOLE, _FIRST, _LAST = 1, 2, 4


@dataclass(frozen=True)
class OfflineLog:
    """The end of a run's offline log."""

    place: Place
    evaluated: bool
    """Whether the last step has an evaluation."""


def offline_log(folder: Path, run_id: str) -> OfflineLog | None:
    """The end of the newest lineage of a run in W&B's folder; None if the run has no log there."""
    name = re.compile(rf"run-{re.escape(run_id)}(?:{LINEAGE}(\d+))?\.wandb")
    lineages: dict[int, list[Path]] = {}
    for path in folder.glob("offline-run-*/run-*.wandb"):
        if match := name.fullmatch(path.name):
            lineages.setdefault(int(match[1] or 1), []).append(path)
    for lineage, paths in sorted(lineages.items(), reverse=True):
        for path in sorted(paths, reverse=True):  # the folder's name has the time
            if (found := _end(path)) is not None:
                step, evaluated = found
                return OfflineLog(Place(run_id, lineage, step), evaluated)
    return None


def _end(log: Path) -> tuple[int, bool] | None:
    """The last step of a log, or the one after which it starts; and whether that step has an evaluation."""
    from wandb.proto.wandb_internal_pb2 import Record

    found: tuple[int, bool] | None = None
    for data in messages(log.read_bytes()):
        record = Record.FromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            names = {item.key or "/".join(item.nested_key) for item in record.history.item}
            found = record.history.step.num, any(name.startswith("eval/") for name in names)
        elif kind in ("run", "config") and found is None:
            config: Any = record.run.config if kind == "run" else record.config
            for item in config.update:
                if (item.key or "/".join(item.nested_key)) == START:
                    found = int(json.loads(item.value_json)), False
    return found


def is_finished(folder: Path) -> bool:
    """Whether W&B's process has written the end of a run's log to the run's folder."""
    from wandb.proto.wandb_internal_pb2 import Record

    return any(
        Record.FromString(data).HasField("exit")
        for log in folder.glob("*.wandb")
        for data in messages(log.read_bytes())
    )


def messages(content: bytes) -> Iterator[bytes]:
    """The complete messages of a log."""
    if not content.startswith(_HEADER):
        return
    position, message = _HEADER_BYTES, b""
    while position + _CHUNK.size <= len(content):
        left = _BLOCK - position % _BLOCK
        if left < _CHUNK.size:  # the rest of a block that no chunk fits into
            position += left
            continue
        _, length, kind = _CHUNK.unpack_from(content, position)
        position += _CHUNK.size
        if position + length > len(content):
            return
        chunk = content[position : position + length]
        position += length
        message = chunk if kind in (_WHOLE, _FIRST) else message + chunk
        if kind in (_WHOLE, _LAST):
            yield message
