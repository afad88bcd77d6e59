"""The journal's tables, their format number, and the migrations from older formats."""

from __future__ import annotations

import sqlite3

from maskwire_server.journal.records import Lineage, SessionRecord, damaged, seal, sealed_text

FORMAT = 3

_CHECKPOINTS = "CREATE TABLE checkpoints (name TEXT PRIMARY KEY, manifest BLOB NOT NULL)"
"""The catalogue: each checkpoint with the bytes of its manifest, which include their own hash."""

TABLES = (
    "CREATE TABLE run (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID",
    "CREATE TABLE events (id INTEGER PRIMARY KEY, at REAL NOT NULL, kind TEXT NOT NULL, body TEXT NOT NULL)",
    """CREATE TABLE lineages (
  lineage INTEGER PRIMARY KEY, parent INTEGER, step INTEGER NOT NULL, digest BLOB NOT NULL,
  request_id TEXT UNIQUE, checkpoint TEXT, at REAL NOT NULL, row_hash BLOB)""",
    """CREATE TABLE sessions (
  epoch INTEGER PRIMARY KEY, client_name TEXT NOT NULL, nonce TEXT UNIQUE, takeover INTEGER NOT NULL,
  lineage INTEGER NOT NULL, step INTEGER NOT NULL, closed INTEGER NOT NULL, at REAL NOT NULL,
  row_hash BLOB)""",
    """CREATE TABLE steps (
  lineage INTEGER NOT NULL, step INTEGER NOT NULL, request_id TEXT, configuration INTEGER NOT NULL,
  payload_hash BLOB NOT NULL, outcome INTEGER NOT NULL, numbers BLOB NOT NULL, digest BLOB NOT NULL,
  row_hash BLOB NOT NULL, PRIMARY KEY (lineage, step)) WITHOUT ROWID""",
    "CREATE INDEX steps_by_request ON steps (request_id) WHERE request_id IS NOT NULL",
    """CREATE TABLE payloads (
  lineage INTEGER NOT NULL, step INTEGER NOT NULL, payload BLOB NOT NULL, PRIMARY KEY (lineage, step))""",
    _CHECKPOINTS,
)


def facts_hash(database: sqlite3.Connection) -> bytes:
    """The hash of the facts about a run: the rows of `run`, without the format and the hash itself."""
    rows = database.execute("SELECT key, value FROM run WHERE key NOT IN ('format', 'hash') ORDER BY key")
    return seal(*[(key, value.hex() if isinstance(value, bytes) else value) for key, value in rows])


def _add_row_hashes(database: sqlite3.Connection) -> None:
    """Migrating the journal from format 1 to format 2: each record gets a hash."""
    for table in ("lineages", "sessions"):
        database.execute(f"ALTER TABLE {table} ADD COLUMN row_hash BLOB")
    columns = "lineage, parent, step, digest, request_id, checkpoint"
    for row in database.execute(f"SELECT {columns} FROM lineages").fetchall():
        database.execute(
            "UPDATE lineages SET row_hash = ? WHERE lineage = ?", (Lineage(*row).row_hash(), row[0])
        )
    columns = "epoch, client_name, nonce, takeover, lineage, step, closed"
    for epoch, name, nonce, takeover, lineage, step, closed in database.execute(
        f"SELECT {columns} FROM sessions"
    ).fetchall():
        session = SessionRecord(epoch, name, nonce, bool(takeover), lineage, step, bool(closed))
        database.execute("UPDATE sessions SET row_hash = ? WHERE epoch = ?", (session.row_hash(), epoch))
    for event_id, body in database.execute("SELECT id, body FROM events").fetchall():
        if body.startswith("{"):
            database.execute("UPDATE events SET body = ? WHERE id = ?", (sealed_text(body), event_id))
    database.execute("UPDATE run SET value = 2 WHERE key = 'format'")
    database.execute("INSERT INTO run VALUES ('hash', ?)", (facts_hash(database),))


def _migrate_to_3(database: sqlite3.Connection) -> None:
    """Migrating the journal from format 2 to format 3: it gets the catalogue and the digest's version."""
    database.execute("DROP INDEX steps_by_request")
    database.execute("CREATE INDEX steps_by_request ON steps (request_id) WHERE request_id IS NOT NULL")
    database.execute(_CHECKPOINTS)
    sealed = database.execute("SELECT value FROM run WHERE key = 'hash'").fetchone()
    if sealed is None or sealed[0] != facts_hash(database):  # otherwise the new hash would hide the damage
        raise damaged("the record of the run's identity")
    if database.execute("SELECT EXISTS (SELECT 1 FROM steps)").fetchone()[0]:
        database.execute("INSERT INTO run VALUES ('digest_version', 1)")
        database.execute("UPDATE run SET value = ? WHERE key = 'hash'", (facts_hash(database),))
    database.execute("UPDATE run SET value = 3 WHERE key = 'format'")


MIGRATIONS = {1: _add_row_hashes, 2: _migrate_to_3}
"""From each older format to the next, in one transaction."""
