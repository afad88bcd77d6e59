"""Segments: numbered objects of a run's mirror, each with the changes of some journal transactions.

    segments/000000000042                          changes of the journal's rows, in order
    batches/000000000042-LINEAGE-FIRST-LAST-HASH   the batches of the steps in that segment

A segment consists of a line with the SHA-256 of the rest, a header as a line of JSON, and one line of JSON
for each change. It contains the SHA-256 of the previous segment, which makes the segments a hash chain, and
the name of the server process that wrote it. It contains no code and no column names: values are in the order
of the columns in the journal's schema.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from maskwire_server.journal.records import Lineage

FORMAT = 1
FOLDER, BATCHES = "segments", "batches"
PUT, DELETE, RESET = "put", "delete", "reset"
"""A row was added or changed; a row was deleted; all rows are deleted, and the complete journal follows."""
LAST_TABLE = "run"
"""The table whose rows are the last of a complete journal."""
_OF_BATCHES = re.compile(rf"{BATCHES}/\d+-(\d+)-(\d+)-(\d+)-[0-9a-f]+")

Value = int | float | str | bytes | None


@dataclass(frozen=True)
class Change:
    """A change of one row of the journal."""

    table: str
    kind: str
    values: tuple[Value, ...]
    """All columns; for a batch, only lineage and step."""


@dataclass(frozen=True)
class BatchObject:
    """An object of the mirror that holds the batches of consecutive steps of one lineage."""

    name: str
    sha256: str
    lineage: int
    steps: tuple[tuple[int, int], ...]
    """Step number and size in bytes of each batch."""


@dataclass(frozen=True)
class Segment:
    """A segment of the mirror: the changes of consecutive journal transactions."""

    run_id: str
    number: int
    """Counted from 1."""
    previous: str
    """The SHA-256 of the previous segment; empty for the first."""
    instance: str
    """The name of the server process that wrote the segment."""
    at: float
    """When the segment was composed, in seconds since the Unix epoch."""
    acknowledge: str
    """The writer's `storage.acknowledge`; with "mirrored" it acknowledged only what was in the mirror."""
    journal_format: int
    first: int
    """The id of the first change in the writer's outbox; 0 if there are no changes."""
    last: int
    """The id of the outbox mark after the last change; 0 if there are no changes."""
    changes: tuple[Change, ...] = ()
    batches: tuple[BatchObject, ...] = ()
    deletes: tuple[str, ...] = ()
    """Objects that are no longer needed. They count as deleted from here on, and are deleted later."""
    lossless: bool | None = None
    """Whether the segments up to this one have every step that was acknowledged before it was composed,
    except those that restores lost, and each later step is acknowledged only once a segment has it. None if
    the version that wrote the segment did not record this."""
    lost: tuple[int, ...] = ()
    """Restores of the run lost what was acknowledged after these steps, or may have; oldest first."""

    @property
    def begins_upload(self) -> bool:
        """Whether this segment is the first of those that contain the complete journal."""
        return bool(self.changes) and self.changes[0].kind == RESET

    @property
    def ends_upload(self) -> bool:
        """Whether this segment ends an upload of the complete journal, if an upload has begun."""
        return any(change.table == LAST_TABLE for change in self.changes)

    def encode(self) -> bytes:
        """The bytes of the segment's object, which `decode` parses."""
        head = {
            **{name: value for name, value in vars(self).items() if name not in ("changes", "batches")},
            "format": FORMAT,
            "batches": [vars(each) for each in self.batches],
        }
        lines = [
            head,
            *([change.table, change.kind, *map(_to_json, change.values)] for change in self.changes),
        ]
        body = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines).encode()
        return hashlib.sha256(body).hexdigest().encode() + b"\n" + body

    @staticmethod
    def decode(data: bytes) -> Segment:
        """Parse the bytes that `encode` returned.

        Raises ValueError if the bytes were changed, or a newer version wrote them.
        """
        stated, _, body = data.partition(b"\n")
        if hashlib.sha256(body).hexdigest().encode() != stated:
            raise ValueError("the segment does not match its hash; restore it from a copy of the mirror")
        first, *rows = body.splitlines()
        head = json.loads(first)
        if head.pop("format") != FORMAT:
            raise ValueError("a newer version of maskwire wrote the segment; use that version")
        batches = [{**each, "steps": tuple(map(tuple, each["steps"]))} for each in head.pop("batches")]
        changes = tuple(
            Change(table, kind, tuple(map(_from_json, values)))
            for table, kind, *values in map(json.loads, rows)
        )
        try:
            return Segment(
                **{**head, "deletes": tuple(head["deletes"]), "lost": tuple(head.get("lost", ()))},
                changes=changes,
                batches=tuple(BatchObject(**each) for each in batches),
            )
        except TypeError as error:
            raise ValueError(f"a newer version of maskwire wrote it ({error}); use that version") from error


def segment_name(number: int) -> str:
    """The name of the object that holds a segment."""
    return f"{FOLDER}/{number:012d}"


def segment_number(name: str) -> int | None:
    """The segment number in an object's name; None if the object is not a segment."""
    found = re.fullmatch(rf"{FOLDER}/(\d{{12}})", name)
    return int(found[1]) if found else None


def hash_of(data: bytes) -> str:
    """The SHA-256 of a segment's bytes, which the next segment contains."""
    return hashlib.sha256(data).hexdigest()


def batch_object(number: int, lineage: int, batches: list[tuple[int, bytes]]) -> tuple[BatchObject, bytes]:
    """Build the object of batches that are given as (step, batch). Returns its description and content."""
    content = b"".join(batch for _, batch in batches)
    digest = hashlib.sha256(content).hexdigest()
    steps = tuple((step, len(batch)) for step, batch in batches)
    # The hash keeps two writers from overwriting each other's batches before one learns that it is fenced.
    name = f"{BATCHES}/{number:012d}-{lineage}-{steps[0][0]}-{steps[-1][0]}-{digest[:16]}"
    return BatchObject(name, digest, lineage, steps), content


def steps_of_batches(name: str) -> tuple[int, int, int] | None:
    """The lineage, first step and last step in a batch object's name; None for any other name."""
    found = _OF_BATCHES.fullmatch(name)
    return (int(found[1]), int(found[2]), int(found[3])) if found else None


def split(batches: BatchObject, content: bytes) -> list[tuple[int, bytes]] | None:
    """Split an object's content into batches, as (step, batch). Returns None if the content was changed."""
    if hashlib.sha256(content).hexdigest() != batches.sha256:
        return None
    found, at = [], 0
    for step, size in batches.steps:
        found.append((step, content[at : at + size]))
        at += size
    return found


def _to_json(value: Value) -> Any:
    return {"base64": base64.b64encode(value).decode()} if isinstance(value, bytes) else value


def _from_json(value: Any) -> Value:
    if isinstance(value, dict):
        return base64.b64decode(value["base64"])
    if isinstance(value, bool) or not isinstance(value, int | float | str | None):
        raise ValueError(f"a value in a segment must be null, a number, text or base64, got {value!r}")
    return value


def restored_checkpoints(changes: Iterable[Change]) -> list[str]:
    """The names of the checkpoints from which lineages start that are among the changes."""
    found = [Lineage.read(each.values[:6] + each.values[7:]) for each in changes if each.table == "lineages"]
    return [lineage.checkpoint for lineage in found if lineage.checkpoint]
