"""A row of the journal that cannot be read: the coordinator says which, and changes nothing."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from migrator.coordinator.cluster import Cluster
from migrator.coordinator.journal import Batch, MigrationRow, Write
from migrator.coordinator.sqlite import SqliteJournal
from migrator.errors import JournalFailed

MIGRATION = "0c876903-7fe9-4bb5-a1bd-e9d28bcbaa57"
ROWS = [
    pytest.param(Batch([Write("policy", "web", b"\xff\xff\xff")]), "object policy 'web', revision 1", id="object"),
    pytest.param(Batch([Write("colour", "red", b"")]), "object colour 'red', revision 1", id="sort"),
    pytest.param(Batch(migrations=[MigrationRow(MIGRATION, b"\0\xff{")]), f"migration '{MIGRATION}'", id="bytes"),
    pytest.param(Batch(migrations=[MigrationRow(MIGRATION, b"[1]")]), f"migration '{MIGRATION}'", id="shape"),
    pytest.param(Batch(migrations=[MigrationRow(MIGRATION, b"{}")]), f"migration '{MIGRATION}'", id="fields"),
]


@pytest.mark.parametrize(("batch", "row"), ROWS)
def test_a_damaged_row_is_named(tmp_path: Path, batch: Batch, row: str) -> None:
    path = tmp_path / "journal.sqlite"
    journal = SqliteJournal(path)
    journal.write(batch, durable=True)
    before = (list(journal.objects()), list(journal.migrations()))
    try:
        with pytest.raises(JournalFailed) as failed:
            Cluster(journal).start()
        assert row in failed.value.message
        assert "backup" in failed.value.hint
        assert (list(journal.objects()), list(journal.migrations())) == before
    finally:
        journal.close()


def test_an_operator_sees_an_error_and_no_traceback(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    SqliteJournal(path).close()
    with sqlite3.connect(path) as db:
        db.execute("INSERT INTO migrations (id, state) VALUES (?, ?)", (MIGRATION, b"damaged"))
    db.close()
    options = ("--state-dir", str(tmp_path), "--listen", f"unix:{tmp_path}/socket")
    command = [sys.executable, "-m", "migrator.cli.main", "coordinator", *options]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode != 0
    assert MIGRATION in ended.stderr and "Traceback" not in ended.stderr
