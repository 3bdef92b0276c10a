"""The journal together with what is in memory of it, and the word that something changed."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from migrator.coordinator.catalog import Catalog
from migrator.coordinator.journal import Batch, Entry, Journal
from migrator.errors import PeerLost


class Store:
    """Everything is written to the journal first, then seen in `catalog`, then told to those who wait."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.catalog = Catalog()
        self.catalog.take(journal.objects())
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
