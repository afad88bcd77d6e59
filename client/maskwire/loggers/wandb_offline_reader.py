"""Find the end of a run's log in W&B's offline files, since W&B itself resumes only online runs.

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
"""The text between a run's id and the number of a lineage, in the ids of lineages after the first."""
START = "start_step"
"""The key in a W&B run's config for the step after which the run's log begins."""

_HEADER = b":W&B"
_HEADER_BYTES = 7
_BLOCK = 32768
_CHUNK = struct.Struct("<IHB")  # a chunk is a checksum, the length of its data, its kind, and the data
_WHOLE, _FIRST, _LAST = 1, 2, 4


@dataclass(frozen=True)
class OfflineLog:
    """The last place in a run's offline W&B log."""

    place: Place
    evaluated: bool
    """Whether the last step has an evaluation."""


def offline_log(folder: Path, run_id: str) -> OfflineLog | None:
    """Return the end of a run's newest lineage in W&B's `folder`; None if the run has no log there."""
    name = re.compile(rf"run-{re.escape(run_id)}(?:{LINEAGE}(\d+))?\.wandb")
    lineages: dict[int, list[Path]] = {}
    for path in folder.glob("offline-run-*/run-*.wandb"):
        if match := name.fullmatch(path.name):
            lineages.setdefault(int(match[1] or 1), []).append(path)
    for lineage, paths in sorted(lineages.items(), reverse=True):
        for path in sorted(paths, reverse=True):  # the folder's name contains the start time
            if (found := _end(path)) is not None:
                step, evaluated = found
                return OfflineLog(Place(run_id, lineage, step), evaluated)
    return None


def _end(log: Path) -> tuple[int, bool] | None:
    """Return the last step of a log, and whether that step has an evaluation.

    For a log without steps, returns the step after which it starts; None if the log does not say.
    """
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
    """Whether W&B has finished the log in a run's folder: the log contains its last message."""
    from wandb.proto.wandb_internal_pb2 import Record

    return any(
        Record.FromString(data).HasField("exit")
        for log in folder.glob("*.wandb")
        for data in messages(log.read_bytes())
    )


def messages(content: bytes) -> Iterator[bytes]:
    """Yield the complete messages in the content of an offline log."""
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
