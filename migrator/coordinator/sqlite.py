"""The journal in SQLite: one file, write-ahead log, fsync at each commit that asks for it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from migrator.coordinator.journal import Batch, Entry, MigrationRow
from migrator.errors import JournalFailed, RevisionCompacted

FORMAT = 1
CHANGES_KEPT = 100_000

_TABLES = """
CREATE TABLE IF NOT EXISTS objects (
    sort TEXT NOT NULL, name TEXT NOT NULL, revision INTEGER NOT NULL, body BLOB NOT NULL, PRIMARY KEY (sort, name)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS changes (revision INTEGER PRIMARY KEY, sort TEXT NOT NULL, name TEXT NOT NULL, body BLOB);
CREATE TABLE IF NOT EXISTS counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS migrations (number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, state BLOB NOT NULL);
"""


class SqliteJournal:
    """See `migrator.coordinator.journal.Journal`. One process at a time: the file is locked while it is open."""

    def __init__(self, path: Path | str, *, changes_kept: int = CHANGES_KEPT) -> None:
        self._path = path
        self._changes_kept = changes_kept
        with self._failures("open"):
            self._db = sqlite3.connect(path, isolation_level=None, timeout=1.0)
            try:
                self._prepare()
            except BaseException:
                self._db.close()
                raise
        self._revision = self.counter("revision")

    def _prepare(self) -> None:
        self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        found = self._db.execute("PRAGMA user_version").fetchone()[0]
        if found not in (0, FORMAT):
            raise JournalFailed(
                f"{self._path}: journal format {found}, this version knows {FORMAT}",
                hint="run the version that wrote it",
            )
        with self._transaction():
            for statement in _TABLES.split(";"):
                self._db.execute(statement)
            self._db.execute(f"PRAGMA user_version={FORMAT}")

    @property
    def revision(self) -> int:
        return self._revision

    def write(self, batch: Batch, *, durable: bool) -> Sequence[Entry]:
        with self._failures("write"):
            self._db.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
            entries = [Entry(self._revision + 1 + i, w.sort, w.name, w.body) for i, w in enumerate(batch.objects)]
            with self._transaction():
                self._write_objects(entries)
                self._write_migrations(batch.migrations)
                for name, value in batch.counters.items():
                    self._set_counter(name, value)
        if entries:
            self._revision = entries[-1].revision
        return entries

    def _write_objects(self, entries: Sequence[Entry]) -> None:
        if not entries:
            return
        run = self._db.executemany
        run("DELETE FROM objects WHERE sort=? AND name=?", [(e.sort, e.name) for e in entries])
        newest = {(e.sort, e.name): e for e in entries}
        rows = [(e.sort, e.name, e.revision, e.body) for e in newest.values() if e.body is not None]
        run("INSERT INTO objects (sort, name, revision, body) VALUES (?,?,?,?)", rows)
        run("INSERT INTO changes VALUES (?,?,?,?)", [(e.revision, e.sort, e.name, e.body) for e in entries])
        last = entries[-1].revision
        self._db.execute("DELETE FROM changes WHERE revision<=?", (last - self._changes_kept,))
        self._set_counter("revision", last)

    def _write_migrations(self, rows: Sequence[MigrationRow]) -> None:
        for row in rows:
            if row.state is None:
                self._db.execute("DELETE FROM migrations WHERE id=?", (row.id,))
                continue
            self._db.execute(
                "INSERT INTO migrations (id, state) VALUES (?,?) ON CONFLICT (id) DO UPDATE SET state=excluded.state",
                (row.id, row.state),
            )

    def _set_counter(self, name: str, value: int) -> None:
        self._db.execute(
            "INSERT INTO counters VALUES (?,?) ON CONFLICT (name) DO UPDATE SET value=max(value, excluded.value)",
            (name, value),
        )

    def objects(self) -> Sequence[Entry]:
        return self._entries("SELECT revision, sort, name, body FROM objects ORDER BY revision", ())

    def changes(self, after: int, limit: int) -> Sequence[Entry]:
        with self._failures("read"):
            oldest = self._db.execute("SELECT min(revision) FROM changes").fetchone()[0]
        kept_after = self._revision if oldest is None else oldest - 1
        if not kept_after <= after <= self._revision:
            raise RevisionCompacted(
                f"changes after revision {after} are not here, only those after {kept_after} up to {self._revision}",
                hint="watch from revision 0: it begins with a snapshot",
            )
        query = "SELECT revision, sort, name, body FROM changes WHERE revision>? ORDER BY revision LIMIT ?"
        return self._entries(query, (after, limit))

    def _entries(self, query: str, values: tuple[int, ...]) -> list[Entry]:
        with self._failures("read"):
            return [Entry(*row) for row in self._db.execute(query, values)]

    def counter(self, name: str) -> int:
        with self._failures("read"):
            row = self._db.execute("SELECT value FROM counters WHERE name=?", (name,)).fetchone()
        return int(row[0]) if row else 0

    def migrations(self) -> Sequence[MigrationRow]:
        with self._failures("read"):
            return [MigrationRow(*row) for row in self._db.execute("SELECT id, state FROM migrations ORDER BY number")]

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    @contextmanager
    def _failures(self, action: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            hint = "another coordinator has it open" if "locked" in str(error) else "check the disk and its free space"
            raise JournalFailed(f"journal {self._path}: cannot {action}: {error}", hint=hint) from error
