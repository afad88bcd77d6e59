"""The outbox: the changes of the journal that are not in the mirror yet.

Triggers on every table copy each changed row, with all its columns, into the table `outbox`, in the
transaction that changes the row. The triggers are generated from the tables in the file, so that no table or
column is forgotten. Of a batch, they copy only lineage and step: its bytes stay in their own table until they
are uploaded. Each transaction, and each batch that `Outbox.fill` copies, is followed by a row called a mark.
Changes are uploaded up to a mark, and then deleted from the outbox.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial

from maskwire_server.journal.mirror_segments import DELETE, LAST_TABLE, PUT, RESET, Change
from maskwire_server.journal.schema import FORMAT

BATCHES = "payloads"
"""The table of batches. The outbox has only their keys, without deletions, which the mirror decides."""
_OWN = ("outbox", "mirror")
_COLUMNS = 12
_MARK = "mark"
_PAGE = 1000
_STATE = "CREATE TABLE IF NOT EXISTS mirror (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID"
_CREATE = (
    f"""CREATE TABLE IF NOT EXISTS outbox (
  id INTEGER PRIMARY KEY AUTOINCREMENT, source TEXT NOT NULL, kind TEXT NOT NULL,
  {", ".join(f"c{number}" for number in range(_COLUMNS))})""",
    f"CREATE INDEX IF NOT EXISTS outbox_batches ON outbox (c0, c1) WHERE source = '{BATCHES}'",
    _STATE,
)
UPLOADED = (
    f"NOT EXISTS (SELECT 1 FROM outbox WHERE source = '{BATCHES}' AND c0 = payloads.lineage "
    "AND c1 = payloads.step)"
)
"""The SQL condition that a row of `payloads` is in the mirror."""


@dataclass(frozen=True)
class MirrorState:
    """What the journal has recorded about its mirror."""

    address: str
    number: int = 0
    """The newest segment whose changes were deleted from the outbox."""
    hash: str = ""
    """The SHA-256 of the segment `number`."""
    instances: tuple[str, ...] = ()
    """The server processes of this run directory that may have written a later segment."""
    complete: bool = False
    """Whether every row of the journal is in the outbox or the mirror, also those older than the outbox."""
    fetching: bool = False
    """Whether the journal was restored from the mirror, and checkpoints are still to be fetched."""
    gone: tuple[str, ...] = ()
    """The checkpoints in the mirror that count as deleted, although their objects may still exist."""
    restored: str = ""
    """A description of the point to which the run was last restored; empty if it never was."""
    lost: tuple[int, ...] = ()
    """Restores lost the steps that were acknowledged after these steps, or may have lost them."""
    unmirrored: bool = False
    """Whether the run was served without a mirror, and no later segment says that steps may be missing."""
    journal_format: int = 3
    """The format of the journal that was uploaded; versions that did not record it had 3."""


@dataclass(frozen=True)
class Page:
    """The changes of consecutive transactions, in order."""

    changes: tuple[Change, ...]
    first: int
    """The id of the first change; 0 if there are none."""
    last: int
    """The id of the mark after the last change; 0 if there are none."""
    batches: dict[int, list[tuple[int, bytes]]]
    """The batches among the changes, as (step, batch), by lineage."""
    more: bool
    """Whether more changes follow."""
    position: int = 0
    """The newest mark in the outbox when this page was read."""


class Outbox:
    """The outbox of an open journal. Methods that write, except `fill`, are called within a transaction."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self._widths: dict[str, int] = {"": 0}
        self.active = self._is_there("outbox")
        """Whether changes are copied into the outbox."""
        self.position = 0
        """The newest mark."""
        if self.active:
            self.measure()

    def _is_there(self, table: str) -> bool:
        found = self._db.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?", (table,))
        return found.fetchone() is not None

    # Setup.

    @property
    def is_current(self) -> bool:
        """Whether the triggers exist and match the tables."""
        return self.active and self._triggers() == _triggers(self._db)

    def state(self) -> MirrorState | None:
        """What the journal has recorded about its mirror; None if the run never had one."""
        if not self._is_there("mirror"):
            return None
        row = self._db.execute("SELECT value FROM mirror WHERE key = 'state'").fetchone()
        if row is None:
            return None
        found = json.loads(row[0])
        lists = {name: tuple(found.get(name, ())) for name in ("instances", "gone", "lost")}
        return MirrorState(**{**found, **lists})

    def keep(self, state: MirrorState) -> None:
        """Record the state of the mirror."""
        self._db.execute(_STATE)
        self._db.execute("INSERT OR REPLACE INTO mirror VALUES ('state', ?)", (json.dumps(asdict(state)),))

    def create(self) -> None:
        """Create the outbox's tables and triggers."""
        for statement in _CREATE:
            self._db.execute(statement)
        self._remove_triggers()
        for statement in _triggers(self._db).values():
            self._db.execute(statement)
        self.active = True

    def remove(self) -> None:
        """Drop the outbox, because the run is served without a mirror. The recorded state is kept."""
        self._remove_triggers()
        self._db.execute("DROP TABLE outbox")
        self.active = False

    def _triggers(self) -> dict[str, str]:
        """The SQL statements of the existing triggers, by the trigger's name."""
        found = self._db.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'")
        return {name: sql for name, sql in found.fetchall() if name.startswith("mirror_")}

    def _remove_triggers(self) -> None:
        for name in self._triggers():
            self._db.execute(f"DROP TRIGGER {name}")

    def fill(self, state: MirrorState, transaction: Callable[[Callable[[], object]], None]) -> None:
        """Copy every row of the journal into the outbox, in several transactions.

        After a crash in between, it must be called again. The table `run` is copied last, in one transaction:
        a restore uses the changes after a RESET only if they include this table (`Segment.ends_upload`).
        """
        transaction(partial(self._begin, state))
        for table in sorted(_tables(self._db), key=lambda table: table == LAST_TABLE):
            keys, after = _keys(self._db, table), None
            while (after := self._fill_page(table, keys, after, transaction)) is not None:
                pass
        transaction(partial(self.keep, replace(state, complete=True, journal_format=FORMAT)))

    def _begin(self, state: MirrorState) -> None:
        self.create()
        self._db.execute("DELETE FROM outbox")
        self._db.execute("INSERT INTO outbox (source, kind) VALUES ('', ?)", (RESET,))
        self.keep(replace(state, complete=False))

    def _fill_page(
        self,
        table: str,
        keys: list[str],
        after: tuple[object, ...] | None,
        transaction: Callable[[Callable[[], object]], None],
    ) -> tuple[object, ...] | None:
        """Copy rows after the key `after` into the outbox. Returns the last row's key; None at the end."""
        key = ", ".join(keys)
        where = "" if after is None else f"WHERE ({key}) > ({', '.join('?' * len(keys))})"
        most = -1 if table == LAST_TABLE else _PAGE
        rows = self._db.execute(
            f"SELECT {key} FROM {table} {where} ORDER BY {key} LIMIT {most}", after or ()
        ).fetchall()
        if not rows:
            return None
        columns = _noted(self._db, table)
        into = ", ".join(f"c{number}" for number in range(len(columns)))
        # By key, so that exactly the rows read above are copied, whatever the types of their keys.
        copy = (
            f"INSERT INTO outbox (source, kind, {into}) SELECT '{table}', '{PUT}', {', '.join(columns)} "
            f"FROM {table} WHERE {' AND '.join(f'{name} = ?' for name in keys)}"
        )

        def write() -> None:
            for row in rows:
                self._db.execute(copy, row)
                if table == BATCHES:  # `page` ends at a mark, and reads all batches before it
                    self.mark()

        transaction(write)
        return tuple(rows[-1])

    # Writing to the outbox, while the run is served.

    def mark(self) -> None:
        """Add a mark after the transaction's changes, if there are any."""
        self._db.execute(
            "INSERT INTO outbox (source, kind) SELECT '', ? WHERE "
            "(SELECT kind FROM outbox ORDER BY id DESC LIMIT 1) <> ?",
            (_MARK, _MARK),
        )

    def measure(self) -> None:
        """Set `position` to the newest mark. Called after each transaction."""
        row = self._db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'outbox'").fetchone()
        self.position = row[0] if row else 0

    def page(self, after: int, size: int) -> Page:
        """Read changes after a mark, up to the first mark where they and their batches reach `size` bytes."""
        changes: list[Change] = []
        batches: dict[int, list[tuple[int, bytes]]] = {}
        first = last = written = at = 0
        whole = 0  # the number of changes up to the last mark
        while True:
            at = max(at, after)
            rows = self._db.execute(
                "SELECT * FROM outbox WHERE id > ? ORDER BY id LIMIT ?", (at, _PAGE)
            ).fetchall()
            for at, source, kind, *values in rows:
                if kind == _MARK:
                    last, whole = at, len(changes)
                    if written >= size:
                        more = at < self.position
                        return Page(tuple(changes), first, last, batches, more, self.position)
                    continue
                first = first or at
                count = self._width(source)
                changes.append(Change(source, kind, tuple(values[:count])))
                written += sum(len(v) if isinstance(v, bytes | str) else 8 for v in values[:count])
                if source == BATCHES:
                    written += self._add_batch(batches, *values[:2])
            if len(rows) < _PAGE:
                return Page(tuple(changes[:whole]), first, last, batches, False, self.position)

    def _add_batch(self, batches: dict[int, list[tuple[int, bytes]]], lineage: int, step: int) -> int:
        row = self._db.execute(
            f"SELECT payload FROM {BATCHES} WHERE lineage = ? AND step = ?", (lineage, step)
        ).fetchone()
        if row is None:
            return 0
        batches.setdefault(lineage, []).append((step, row[0]))
        return len(row[0])

    def _width(self, source: str) -> int:
        """The number of columns that the outbox copies from a table."""
        if source not in self._widths:
            self._widths[source] = len(_noted(self._db, source))
        return self._widths[source]

    def holds(self, first: int, last: int, changes: tuple[Change, ...]) -> bool:
        """Whether the outbox has exactly these changes from id `first` to `last`, ignoring new columns."""
        rows = self._db.execute(
            "SELECT * FROM outbox WHERE id BETWEEN ? AND ? AND kind <> ? ORDER BY id", (first, last, _MARK)
        ).fetchall()
        return len(rows) == len(changes) and all(
            Change(source, kind, tuple(values[: len(change.values)])) == change
            for (_, source, kind, *values), change in zip(rows, changes, strict=True)
        )

    def needs_checkpoint(self) -> bool:
        """Whether the outbox has a complete journal, in which some steps lack the batch to recompute them."""
        row = self._db.execute(
            f"SELECT EXISTS (SELECT 1 FROM outbox WHERE source = '{LAST_TABLE}') AND EXISTS ("
            f"SELECT 1 FROM steps LEFT JOIN {BATCHES} USING (lineage, step) WHERE payload IS NULL)"
        ).fetchone()
        return bool(row[0])

    def uploaded(self, last: int, state: MirrorState) -> None:
        """Delete changes up to the mark `last`, which are in the mirror, and record the mirror's state."""
        self._db.execute("DELETE FROM outbox WHERE id <= ?", (last,))
        self.keep(state)

    def last_uploaded_step(self) -> tuple[int, int]:
        """Lineage and number of the newest step in the mirror; (0, 0) if there is none."""
        row = self._db.execute(
            "SELECT lineage, step FROM steps WHERE NOT EXISTS (SELECT 1 FROM outbox WHERE source = 'steps' "
            "AND c0 = steps.lineage AND c1 = steps.step) ORDER BY lineage DESC, step DESC LIMIT 1"
        ).fetchone()
        return (row[0], row[1]) if row else (0, 0)


def apply(db: sqlite3.Connection, change: Change) -> None:
    """Apply a change to another journal. Raises ValueError if the change fits none of its tables."""
    columns = _columns(db, change.table) if change.table in _tables(db) else []
    if change.table == BATCHES:  # their bytes are in objects of their own
        return
    if change.kind not in (PUT, DELETE) or len(columns) != len(change.values):
        raise ValueError(
            f"journal format {FORMAT} has no change {change.kind!r} of {len(change.values)} columns in table "
            f"{change.table!r}; use the version of maskwire that wrote it"
        )
    values = dict(zip(columns, change.values, strict=True))
    if change.kind == PUT:
        marks = ", ".join("?" * len(columns))
        db.execute(f"INSERT OR REPLACE INTO {change.table} VALUES ({marks})", change.values)
    else:
        keys = _keys(db, change.table)
        where = " AND ".join(f"{key} = ?" for key in keys)
        db.execute(f"DELETE FROM {change.table} WHERE {where}", [values[key] for key in keys])


def _tables(db: sqlite3.Connection) -> list[str]:
    """The names of the journal's tables, except those of the outbox."""
    rows = db.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name").fetchall()
    return [name for (name,) in rows if name not in _OWN and not name.startswith("sqlite_")]


def _columns(db: sqlite3.Connection, table: str) -> list[str]:
    return [row[1] for row in db.execute(f"PRAGMA table_info({table})").fetchall()]


def _keys(db: sqlite3.Connection, table: str) -> list[str]:
    rows = [row for row in db.execute(f"PRAGMA table_info({table})").fetchall() if row[5]]
    return [row[1] for row in sorted(rows, key=lambda row: row[5])]


def _noted(db: sqlite3.Connection, table: str) -> list[str]:
    return _keys(db, table) if table == BATCHES else _columns(db, table)


def _triggers(db: sqlite3.Connection) -> dict[str, str]:
    """The SQL statements that create the triggers, by the trigger's name."""
    made = {}
    for table in _tables(db):
        columns = _noted(db, table)
        if len(columns) > _COLUMNS:
            raise ValueError(
                f"table {table} has {len(columns)} columns, but the outbox has {_COLUMNS}; increase _COLUMNS"
            )
        into = ", ".join(f"c{number}" for number in range(len(columns)))
        moments = [("insert", PUT, "NEW")]
        if table != BATCHES:
            moments += [("update", PUT, "NEW"), ("delete", DELETE, "OLD")]
        for moment, kind, row in moments:
            name = f"mirror_{table}_{moment}"
            values = ", ".join(f"{row}.{column}" for column in columns)
            made[name] = (
                f"CREATE TRIGGER {name} AFTER {moment.upper()} ON {table} BEGIN INSERT INTO outbox "
                f"(source, kind, {into}) VALUES ('{table}', '{kind}', {values}); END"
            )
    return made
