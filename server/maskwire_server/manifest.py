"""A checkpoint's manifest: its description, and the size and hash of each of its files."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

from maskwire.v1.values import InexactReplay
from maskwire_server.results import CheckpointInfo, FileInfo

WHOLE, SHARDED = 2, 3
"""The formats of checkpoints: files with complete tensors, and files that several ranks wrote."""
MANIFEST = "manifest.json"
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class UnknownFormatError(ValueError):
    """The manifest is intact, but this version does not know its format."""


@dataclass(frozen=True)
class Manifest:
    """The description of a checkpoint, stored beside its files."""

    info: CheckpointInfo
    run_id: str
    automatic: bool
    """Whether retention may delete the checkpoint: the server decided to save it, or a client saved it with a
    score and without a name."""
    request_id: str | None
    configuration: dict[str, Any]
    """The sections [model], [objective] and [optimizer]; not [serve], which concerns only the server."""
    versions: dict[str, str]
    inexact_replays: tuple[InexactReplay, ...] = ()
    """Steps of the checkpoint's history whose replay gave other bytes than the recorded ones."""
    save_id: str | None = None
    """The id under which the journal recorded the save; None if the save was not recorded."""
    format: int = WHOLE
    """`WHOLE` or `SHARDED`."""

    def to_json(self) -> bytes:
        """The bytes of the manifest's file, including its own hash."""
        body = {
            "format": self.format,
            "name": self.info.name,
            "run_id": self.run_id,
            "lineage": self.info.lineage,
            "step": self.info.step,
            "digest": self.info.digest.hex(),
            "created": self.info.created,
            "labels": self.info.labels,
            "score": self.info.score,
            "automatic": self.automatic,
            "request_id": self.request_id,
            "configuration": self.configuration,
            "versions": self.versions,
            "inexact_replays": [vars(replay) for replay in self.inexact_replays],
            "save_id": self.save_id,
            "files": {
                file.name: {"size_bytes": file.size_bytes, "sha256": file.sha256.hex()}
                for file in self.info.files
            },
        }
        return json.dumps({**body, "manifest_sha256": _body_hash(body)}, indent=1, sort_keys=True).encode()

    @staticmethod
    def from_json(data: bytes) -> Manifest:
        """Parse the bytes of a manifest. Raises ValueError if they were changed, or the format is unknown."""
        body = json.loads(data)
        if not isinstance(body, dict) or body.pop("manifest_sha256", None) != _body_hash(body):
            raise ValueError("the manifest does not match its own hash")
        while body["format"] in _MIGRATIONS:
            body = _MIGRATIONS[body["format"]](body)
        if body["format"] not in (WHOLE, SHARDED):
            raise UnknownFormatError(
                f"its format is {body['format']}, but this version reads formats up to {SHARDED}; use the "
                "version that wrote it"
            )
        for name in body["files"]:
            if not _FILE_NAME.fullmatch(name):  # it becomes a path
                raise ValueError(f"the manifest names a file outside the checkpoint: {name!r}")
        files = tuple(
            FileInfo(name, file["size_bytes"], bytes.fromhex(file["sha256"]))
            for name, file in sorted(body["files"].items())
        )
        info = CheckpointInfo(
            body["name"],
            body["lineage"],
            body["step"],
            bytes.fromhex(body["digest"]),
            files,
            body["created"],
            body["labels"],
            body["score"],
        )
        return Manifest(
            info,
            body["run_id"],
            body["automatic"],
            body["request_id"],
            body["configuration"],
            body["versions"],
            tuple(InexactReplay(**replay) for replay in body.get("inexact_replays", [])),
            body.get("save_id"),
            body["format"],
        )


def _score(body: dict[str, Any]) -> dict[str, Any]:
    """Migrate a manifest from format 1, which had no score, to format 2."""
    return {**body, "format": 2, "score": None}


_MIGRATIONS = {1: _score}
"""From each older format to the next, in memory: a checkpoint's files are never rewritten."""


def _body_hash(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
