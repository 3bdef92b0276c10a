"""The journal together with what is in memory of it, and the word that something changed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from google.protobuf.message import DecodeError

from migrator.coordinator.catalog import Catalog
from migrator.coordinator.journal import Batch, Entry, Journal
from migrator.errors import JournalFailed, PeerLost


@contextmanager
def readable(row: str) -> Iterator[None]:
    """Raises JournalFailed that names the row when what it holds cannot be read.

    The coordinator does not start then: without the row it would tell agents that something is gone which is not.
    """
    try:
        yield
    except (DecodeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise JournalFailed(
            f"journal: {row} cannot be read: {type(error).__name__}: {error}",
            hint="nothing was changed, VMs run on without a coordinator: put a backup of journal.sqlite back, or run"
            " the version that wrote it; only if neither is there delete the row with sqlite3 and apply it again",
        ) from error


class Store:
    """Everything is written to the journal first, then seen in `catalog`, then told to those who wait."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.catalog = Catalog()
        for entry in journal.objects():
            with readable(f"object {entry.sort} {entry.name!r}, revision {entry.revision}"):
                self.catalog.take([entry])
        self._changed = asyncio.Event()
        self._closed = False

    @property
    def revision(self) -> int:
        return self.journal.revision

    def commit(self, batch: Batch, *, durable: bool = True) -> Sequence[Entry]:
        """Write a batch. Raises JournalFailed, and then nothing of it is so."""
        entries = self.journal.write(batch, durable=durable)
        self.catalog.take(entries)
        if entries:
            self._changed.set()
            self._changed = asyncio.Event()
        return entries

    async def wait_after(self, revision: int) -> None:
        """Return once there is a change after `revision`. Raises PeerLost when the coordinator stops."""
        while self.revision <= revision:
            if self._closed:
                raise PeerLost("the coordinator stops", hint=f"later, go on from revision {revision}")
            await self._changed.wait()

    def close(self) -> None:
        """Wake up everybody who waits for a change: none will come."""
        self._closed = True
        self._changed.set()
