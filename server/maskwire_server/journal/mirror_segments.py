"""Segments: numbered objects of a run's mirror, each with the changes of some journal transactions.

    segments/000000000042                          changes of the journal's rows, in order
    batches/000000000042-LINEAGE-FIRST-LAST-HASH   the batches of the steps in that segment

A segment is a line with the SHA-256 of what follows, a line of JSON, and one line of JSON for each change.
It contains the SHA-256 of the previous segment, which makes the segments a hash chain, and the instance of
the server that wrote it. It contains no code and no column names: values are in the order of the journal's
schema.
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
    """A change of one row."""

    table: str
    kind: str
    values: tuple[Value, ...]
    """All columns; for a batch, only lineage and step."""


@dataclass(frozen=True)
class BatchObject:
    """The batches of consecutive steps of one lineage, one after another in an object of their own."""

    name: str
    sha256: str
    lineage: int
    steps: tuple[tuple[int, int], ...]
    """Step number and size in bytes of each batch."""


@dataclass(frozen=True)
class Segment:
    """The changes of consecutive transactions."""

    run_id: str
    number: int
    """From 1."""
    previous: str
    """The SHA-256 of the previous segment; empty for the first."""
    instance: str
    """The server process that wrote it."""
    at: float
    """When it was composed, in seconds since the Unix epoch."""
    acknowledge: str
    """The writer's `storage.acknowledge`; with "mirrored" it acknowledged only what was in the mirror."""
    journal_format: int
    first: int
    """The id of the first change in the writer's outbox; 0: no changes."""
    last: int
    """The id of the outbox mark after the last change; 0: no changes."""
    changes: tuple[Change, ...] = ()
    batches: tuple[BatchObject, ...] = ()
    deletes: tuple[str, ...] = ()
    """Objects that are no longer needed: they count as deleted from here on, and are deleted later."""
    lossless: bool | None = None
    """Whether the segments up to this one have every step that was acknowledged before it was composed,
    besides those that restores lost, and every later one is acknowledged only once a segment has it. None: a
    version wrote it that did not record this."""
    lost: tuple[int, ...] = ()
    """Restores of the run lost what was acknowledged after these steps, or may have; oldest first."""

    @property
    def begins_upload(self) -> bool:
        """Whether it is the first of the segments with the complete journal."""
        return bool(self.changes) and self.changes[0].kind == RESET

    @property
    def ends_upload(self) -> bool:
        """Whether it is the last of them, if one of them began."""
        return any(change.table == LAST_TABLE for change in self.changes)

    def encode(self) -> bytes:
        """The bytes of the object."""
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
        """Parse what `encode` wrote. Raises ValueError if it was changed, or if a newer version wrote it."""
        stated, _, body = data.partition(b"\n")
        if hashlib.sha256(body).hexdigest().encode() != stated:
            raise ValueError("its content does not match its hash")
        first, *rows = body.splitlines()
        head = json.loads(first)
        if head.pop("format") != FORMAT:
            raise ValueError("a newer version wrote it; use that version")
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
            raise ValueError(f"a newer version wrote it ({error}); use that version") from error


def segment_name(number: int) -> str:
    """The name of a segment's object."""
    return f"{FOLDER}/{number:012d}"


def segment_number(name: str) -> int | None:
    """The number of a segment's object; None for another object."""
    found = re.fullmatch(rf"{FOLDER}/(\d{{12}})", name)
    return int(found[1]) if found else None


def hash_of(data: bytes) -> str:
    """The hash of a segment that the next segment contains."""
    return hashlib.sha256(data).hexdigest()


def batch_object(number: int, lineage: int, batches: list[tuple[int, bytes]]) -> tuple[BatchObject, bytes]:
    """Describe the object that holds these batches, given as (step, batch), and return its content too."""
    content = b"".join(batch for _, batch in batches)
    digest = hashlib.sha256(content).hexdigest()
    steps = tuple((step, len(batch)) for step, batch in batches)
    # With the hash two writers cannot overwrite each other's batches before one of them learns it is fenced.
    name = f"{BATCHES}/{number:012d}-{lineage}-{steps[0][0]}-{steps[-1][0]}-{digest[:16]}"
    return BatchObject(name, digest, lineage, steps), content


def steps_of_batches(name: str) -> tuple[int, int, int] | None:
    """Lineage, first step and last step, read from the name of a batch object; None for another object."""
    found = _OF_BATCHES.fullmatch(name)
    return (int(found[1]), int(found[2]), int(found[3])) if found else None


def split(batches: BatchObject, content: bytes) -> list[tuple[int, bytes]] | None:
    """The batches in an object, as (step, batch); None if the content was changed."""
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
        raise ValueError(f"a column cannot hold {value!r}")
    return value


def restored_checkpoints(changes: Iterable[Change]) -> list[str]:
    """The checkpoints from which the new lineages among the changes start."""
    found = [Lineage.read(each.values[:6] + each.values[7:]) for each in changes if each.table == "lineages"]
    return [lineage.checkpoint for lineage in found if lineage.checkpoint]
