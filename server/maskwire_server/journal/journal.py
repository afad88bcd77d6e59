"""The journal: what happened in a run, in order, in one SQLite file.

A step exists if and only if its record is durable. Its batch is stored until checkpoints cover the step, so
that the step can be computed again. Records are kept forever, so that a retry can get the recorded answer.
Each record contains its own hash, because SQLite silently drops everything after a flipped bit in the middle
of its write-ahead log.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from maskwire.v1.digest import DigestVersion
from maskwire_server import failpoints
from maskwire_server.errors import RunDirectoryError
from maskwire_server.journal.database import Database
from maskwire_server.journal.fsync import flush_folder
from maskwire_server.journal.outbox import UPLOADED
from maskwire_server.journal.records import (
    Lineage,
    SessionRecord,
    StepRecord,
    Stretch,
    damaged,
    sealed_text,
    text_of,
)
from maskwire_server.journal.schema import FORMAT, TABLES, facts_hash

_SESSION = "epoch, client_name, nonce, takeover, lineage, step, closed, row_hash"
_PAGE = 64  # records read at once


class Journal(Database):
    """Reads and writes the journal's records.

    Methods that write, except `create`, are called within a transaction.
    """

    def create(self, facts: dict[str, Any], digest: bytes) -> None:
        """Start a run: record its facts, and lineage 1, which begins at step 0 with `digest`."""

        def write() -> None:
            for statement in TABLES:
                self._db.execute(statement)
            for key, value in {"format": FORMAT, **facts}.items():
                self._db.execute("INSERT INTO run VALUES (?, ?)", (key, value))
            self._db.execute("INSERT INTO run VALUES ('hash', ?)", (facts_hash(self._db),))
            self.add_lineage(Lineage(1, None, 0, digest, None, None))

        failpoints.passing("journal.creating")
        self.transaction(write)
        failpoints.passing("journal.created")
        flush_folder(self._path.parent)
        self.is_new = False

    def digest_version(self) -> DigestVersion | None:
        """The version of the run's digest; None before the first step."""
        number = self.fact("digest_version")
        return None if number is None else DigestVersion(number, self.fact("num_tokens") or 0)

    def fix_digest_version(self, version: DigestVersion) -> None:
        """Record the version of the run's digest, in the transaction of the run's first step."""
        facts = {"digest_version": version.number, "num_tokens": version.num_tokens}
        self._db.executemany("INSERT INTO run VALUES (?, ?)", facts.items())
        self._db.execute("UPDATE run SET value = ? WHERE key = 'hash'", (facts_hash(self._db),))

    # Events.

    def add_event(self, kind: str, body: dict[str, Any]) -> int:
        """Record an event, which is anything other than a step. Returns the event's id."""
        text = json.dumps(body, sort_keys=True)
        cursor = self._db.execute(
            "INSERT INTO events (at, kind, body) VALUES (?, ?, ?)", (time.time(), kind, sealed_text(text))
        )
        return int(cursor.lastrowid or 0)

    def event(self, event_id: int) -> dict[str, Any]:
        """The body of an event. Raises RunDirectoryError when it is missing or damaged."""
        row = self._row("SELECT body FROM events WHERE id = ?", event_id)
        return _body(event_id, None if row is None else row[0])

    def last_event(self, kind: str) -> tuple[int, dict[str, Any]] | None:
        """The id and the body of the newest event of a kind; None if there is none."""
        row = self._row("SELECT id, body FROM events WHERE kind = ? ORDER BY id DESC LIMIT 1", kind)
        return None if row is None else (row[0], _body(row[0], row[1]))

    def events(self, kind: str) -> list[tuple[float, dict[str, Any]]]:
        """The time and the body of each event of a kind, oldest first."""
        rows = self._rows("SELECT id, at, body FROM events WHERE kind = ? ORDER BY id", kind)
        return [(at, _body(event_id, body)) for event_id, at, body in rows]

    # Steps.

    def add_step(self, record: StepRecord, payload: bytes) -> None:
        """Append a step with its batch, from which the step can be recomputed."""
        self._batch_bytes += len(payload)
        self._db.execute(
            "INSERT INTO steps VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                record.lineage,
                record.step,
                record.request_id,
                record.configuration,
                record.payload_hash,
                int(record.outcome),
                record.numbers(),
                record.digest,
                record.row_hash(),
            ),
        )
        self._db.execute("INSERT INTO payloads VALUES (?, ?, ?)", (record.lineage, record.step, payload))

    def step(self, lineage: int, step: int) -> StepRecord | None:
        """The record of a step; None if the lineage has no such step."""
        row = self._row("SELECT * FROM steps WHERE lineage = ? AND step = ?", lineage, step)
        return None if row is None else StepRecord.read(row)

    def last_step(self, lineage: int) -> StepRecord | None:
        """The record of the newest step of a lineage; None if it has no step."""
        row = self._row("SELECT * FROM steps WHERE lineage = ? ORDER BY step DESC LIMIT 1", lineage)
        return None if row is None else StepRecord.read(row)

    def steps_between(self, lineage: int, first: int, last: int | None, count: int) -> list[StepRecord]:
        """The records of a lineage's steps from `first` through `last`, in order, at most `count` of them."""
        rows = self._rows(
            "SELECT * FROM steps WHERE lineage = ? AND step >= ? AND step <= ? ORDER BY step LIMIT ?",
            lineage,
            first,
            2**63 - 1 if last is None else last,
            count,
        )
        return [StepRecord.read(row) for row in rows]

    def step_of_request(self, request_id: str) -> StepRecord | None:
        """The record of the newest step with a request id; None if there is none.

        A session that numbers its steps may reuse a request id.
        """
        row = self._row(
            "SELECT * FROM steps WHERE request_id = ? ORDER BY lineage DESC, step DESC LIMIT 1", request_id
        )
        return None if row is None else StepRecord.read(row)

    def steps_after(self, lineage: int, step: int) -> Iterator[tuple[StepRecord, bytes | None]]:
        """Yield the record and the batch of each step of a lineage after `step`. A dropped batch is None."""
        while True:
            # One page at a time: a statement left unfinished would keep the file locked after `close`.
            rows = self._rows(
                "SELECT s.*, p.payload FROM steps s LEFT JOIN payloads p USING (lineage, step) "
                "WHERE s.lineage = ? AND s.step > ? ORDER BY s.step LIMIT ?",
                lineage,
                step,
                _PAGE,
            )
            for row in rows:
                yield StepRecord.read(row[:-1]), row[-1]
            if len(rows) < _PAGE:
                return
            step = rows[-1][1]

    def missing_requests(self, lineage: int, count: int = 10_000) -> int:
        """Look up the request ids of a lineage's newest records, and return how many the index lacks.

        The index has no hash of its own. Raises RunDirectoryError if a record is damaged.
        """
        rows = self._rows(
            "SELECT n.*, i.step FROM (SELECT * FROM steps WHERE lineage = ? ORDER BY step DESC LIMIT ?) n "
            "LEFT JOIN steps i INDEXED BY steps_by_request ON i.request_id = n.request_id "
            "AND i.lineage = n.lineage AND i.step = n.step",
            lineage,
            count,
        )
        missed = 0
        for row in rows:
            record = StepRecord.read(row[:-1])
            missed += record.request_id is not None and row[-1] != record.step
        return missed

    def rebuild_request_index(self) -> None:
        """Rebuild the index of request ids from the records."""
        self._db.execute("REINDEX steps_by_request")

    def drop_payloads(self, stretches: Sequence[Stretch], most: int, most_bytes: int) -> bool:
        """Delete the batches of some steps, and keep the steps' records.

        One transaction deletes at most `most` batches, and stops once it has deleted `most_bytes` bytes.
        Returns whether there may be more to delete. Batches that the mirror still lacks are kept.
        """
        failpoints.passing("payloads.dropping")
        uploaded = UPLOADED if self.outbox.active else "TRUE"
        for gone in stretches:
            rows = self._rows(
                "SELECT rowid, length(payload) FROM payloads "
                f"WHERE lineage = ? AND step > ? AND step <= ? AND {uploaded} LIMIT ?",
                gone.lineage,
                gone.after,
                gone.through,
                most - self._dropped,
            )
            for row_id, size in rows:
                if self._dropped_bytes >= most_bytes:
                    return True
                self._db.execute("DELETE FROM payloads WHERE rowid = ?", (row_id,))
                self._dropped += 1
                self._dropped_bytes += size
            if self._dropped >= most:
                return True
        return False

    # The checkpoint catalogue.

    def put_checkpoint(self, name: str, manifest: bytes) -> None:
        """Add a checkpoint to the catalogue, or replace it there."""
        self._db.execute("INSERT OR REPLACE INTO checkpoints VALUES (?, ?)", (name, manifest))

    def remove_checkpoint(self, name: str) -> None:
        """Remove a checkpoint from the catalogue."""
        self._db.execute("DELETE FROM checkpoints WHERE name = ?", (name,))

    def remove_checkpoints(self) -> None:
        """Remove all checkpoints from the catalogue."""
        self._db.execute("DELETE FROM checkpoints")

    def checkpoints(self) -> dict[str, bytes]:
        """The manifest of each checkpoint in the catalogue, by name."""
        # Read as bytes, so that a damaged row does not raise: a start rebuilds the table from the folder.
        rows = self._rows("SELECT CAST(name AS BLOB), CAST(manifest AS BLOB) FROM checkpoints")
        return {(name or b"").decode(errors="replace"): manifest or b"" for name, manifest in rows}

    # Lineages.

    def add_lineage(self, lineage: Lineage) -> None:
        """Record a lineage."""
        self._db.execute(
            "INSERT INTO lineages VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                lineage.lineage,
                lineage.parent,
                lineage.step,
                lineage.digest,
                lineage.request_id,
                lineage.checkpoint,
                time.time(),
                lineage.row_hash(),
            ),
        )

    def lineages(self) -> dict[int, Lineage]:
        """Every recorded lineage, by number."""
        rows = self._rows(
            "SELECT lineage, parent, step, digest, request_id, checkpoint, row_hash FROM lineages "
            "ORDER BY lineage"
        )
        return {row[0]: Lineage.read(row) for row in rows}

    def lineage_at(self, at: float) -> int:
        """The number of the newest lineage at the time `at`, in seconds since the Unix epoch."""
        row = self._row("SELECT max(lineage) FROM lineages WHERE at <= ?", at)
        return int((row and row[0]) or 1)

    def digest_at(self, lineage: int, step: int) -> bytes | None:
        """The digest of a lineage after `step`; None if the lineage has no such step."""
        start = self.lineages().get(lineage)
        if start is not None and step == start.step:
            return start.digest
        record = self.step(lineage, step)
        return None if record is None else record.digest

    # Sessions.

    def add_session(self, session: SessionRecord) -> None:
        """Add the record of a session's epoch, or replace it."""
        self._db.execute(
            "INSERT OR REPLACE INTO sessions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                session.epoch,
                session.client_name,
                session.nonce,
                session.takeover,
                session.lineage,
                session.step,
                session.closed,
                time.time(),
                session.row_hash(),
            ),
        )

    def close_session(self, epoch: int) -> None:
        """Record that a client closed its session."""
        session = self._session("WHERE epoch = ?", epoch)
        if session is not None:
            self.add_session(replace(session, closed=True))

    def last_session(self) -> SessionRecord | None:
        """The record of the newest epoch; None if there is none."""
        return self._session("ORDER BY epoch DESC LIMIT 1")

    def last_takeover(self) -> SessionRecord | None:
        """The record of the newest epoch that was opened with takeover; None if there is none."""
        return self._session("WHERE takeover ORDER BY epoch DESC LIMIT 1")

    def session_of_nonce(self, nonce: str) -> SessionRecord | None:
        """The record of the epoch that was opened with a nonce; None if there is none."""
        return self._session("WHERE nonce = ?", nonce)

    def _session(self, where: str, *values: object) -> SessionRecord | None:
        row = self._row(f"SELECT {_SESSION} FROM sessions {where}", *values)
        return None if row is None else SessionRecord.read(row)

    def damage(self) -> list[str]:
        """Read everything, and return a description of each problem.

        Problems are what SQLite finds, damaged events and sessions, and missing configurations.
        """
        problems = [
            f"journal: {words}" for (words,) in self._rows("PRAGMA integrity_check(20)") if words != "ok"
        ]
        for event_id, body in self._rows("SELECT id, body FROM events"):
            try:
                _body(event_id, body)
            except RunDirectoryError as error:
                problems.append(str(error))
        for row in self._rows(f"SELECT {_SESSION} FROM sessions"):
            try:
                SessionRecord.read(row)
            except RunDirectoryError as error:
                problems.append(str(error))
        missing = self._rows(
            "SELECT DISTINCT configuration FROM steps WHERE configuration NOT IN "
            "(SELECT id FROM events WHERE kind = 'configuration')"
        )
        problems += [f"journal: event {row[0]}, the configuration of steps, is missing" for row in missing]
        return problems


def _body(event_id: int, stored: object) -> dict[str, Any]:
    text = text_of(stored)
    if text is None:
        raise damaged(f"event {event_id} (damaged or missing)")
    return dict(json.loads(text))
