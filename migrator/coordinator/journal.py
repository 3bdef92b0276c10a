"""What the coordinator must not forget, behind a small interface: objects, their changes, counters, live migrations.

Everything that happens in one step goes in one `Batch`, which is written completely or not at all. Each change of an
object takes the next number of the one revision counter, so that a watcher can go on from any of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True)
class Write:
    """One object made or changed (`body`, its serialised message) or removed (None)."""

    sort: str
    name: str
    body: bytes | None


@dataclass(frozen=True)
class Entry:
    """One object as it is, or one change of it (`body` None: removed), with the revision of that."""

    revision: int
    sort: str
    name: str
    body: bytes | None


@dataclass(frozen=True)
class MigrationRow:
    """State of a migration that there is still something to do or undo for; `state` None: there is not any more."""

    id: str
    state: bytes | None


@dataclass(frozen=True)
class Batch:
    """What is written together. `counters` are set to the values given; they only ever rise."""

    objects: Sequence[Write] = ()
    migrations: Sequence[MigrationRow] = ()
    counters: Mapping[str, int] = field(default_factory=dict)


class Journal(Protocol):
    """Durable store of one coordinator. All calls are synchronous, from one thread.

    Errors of the store itself (disk full, damaged file) raise JournalFailed; then nothing of the batch is there, and
    the caller must not act on it.
    """

    @property
    def revision(self) -> int:
        """Newest revision; 0 for an empty journal."""

    def write(self, batch: Batch, *, durable: bool) -> Sequence[Entry]:
        """Write all of `batch`; returns its objects with their revisions, in order.

        `durable`: on the disk when the call returns. Otherwise a power cut (not a crash) may take it back, in order.
        """

    def objects(self) -> Sequence[Entry]:
        """All objects there are, in order of revision."""

    def changes(self, after: int, limit: int) -> Sequence[Entry]:
        """Changes with a revision above `after`, oldest first.

        Raises RevisionCompacted when some of them are no longer kept or `after` is yet to come.
        """

    def counter(self, name: str) -> int:
        """Value of a counter, 0 when it was never set."""

    def migrations(self) -> Sequence[MigrationRow]:
        """All rows that were not ended, oldest first."""

    def close(self) -> None: ...
