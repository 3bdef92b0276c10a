"""Tells all hosts where VMs are: one message for all places that changed while the last one was under way.

A message costs the coordinator the same whatever is in it, and there is one a host: of a thousand moves at once each
would tell a thousand hosts. So while many hosts have yet to acknowledge the last message, and as long again as they
took, places of moves wait, at most PACE_S, and go together, each as it is by then: moves themselves have half of the
coordinator's time. Few hosts, or moves that come one by one, wait for nothing. Every message has all that changed up to
its revision, whoever asked for it, so that a host that acknowledges a revision has every place up to it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable

from prometheus_client import Histogram

from migrator._pb import migrator_pb2 as pb
from migrator.coordinator.roster import Roster
from migrator.coordinator.store import Store

BUSY_HOSTS = 32
"""A message is under way while as many hosts have not acknowledged it; to fewer it costs nothing worth waiting for."""
BUSY_SHARE = 10
"""In a large cluster: one host of so many. The last few may be slow, or not there any more."""
PACE_S = 1.0
"""Whoever is slow, no place waits longer than this."""

TOLD = Histogram("migrator_places_told", "Places in a message to all hosts", buckets=(1, 2, 5, 10, 30, 100, 1000))


class Fanout:
    """Places that changed and are still to be told."""

    def __init__(self, store: Store, roster: Roster) -> None:
        self._store, self._roster = store, roster
        self._changed: dict[str, pb.Place] = {}  # name -> the place, or what it was before it was removed
        self._told = 0  # revision of the last message
        self._told_at = 0.0
        self._again_at = 0.0  # not before this is the next message sent
        self._waiting: set[str] = set()  # hosts that have not acknowledged the last one
        self._later: asyncio.TimerHandle | None = None

    def stop(self) -> None:
        """Tell nothing any more that waits."""
        if self._later is not None:
            self._later.cancel()
            self._later = None

    def tell(self, places: Iterable[pb.Place]) -> None:
        """Tell of new, changed or removed places at once, and of all that waits."""
        self._note(places)
        if self._changed:
            self._send()

    def tell_soon(self, places: Iterable[pb.Place]) -> None:
        """Tell of places when the hosts have taken what they were told before."""
        self._note(places)
        if self._later is None:
            self._send_at(self._again_at)

    def acknowledged(self, host: str, revision: int) -> None:
        """The host has taken, or could not set, all up to `revision`."""
        if revision >= self._told:
            self.left(host)

    def left(self, host: str) -> None:
        """The host has answered, or is not there any more."""
        busy = self._busy()
        self._waiting.discard(host)
        if not busy or self._busy():
            return
        took_s = time.monotonic() - self._told_at
        self._again_at = min(self._again_at, self._told_at + 2 * took_s)
        if self._later is not None:
            self._send_at(self._again_at)

    def _note(self, places: Iterable[pb.Place]) -> None:
        self._changed.update((f"{place.network}/{place.mac}", place) for place in places)

    def _busy(self) -> bool:
        return len(self._waiting) >= max(BUSY_HOSTS, len(self._roster) // BUSY_SHARE)

    def _send_at(self, when: float) -> None:
        self.stop()
        after_s = when - time.monotonic()
        if after_s > 0:
            self._later = asyncio.get_running_loop().call_later(after_s, self._send)
        else:
            self._send()

    def _send(self) -> None:
        """Each place as it is now: it may have changed again, or have come back, since it was noted."""
        self.stop()
        known = self._store.catalog.places
        places = [known[name] for name in self._changed if name in known]
        removed = [place for name, place in self._changed.items() if name not in known]
        TOLD.observe(len(self._changed))
        self._changed = {}
        self._told, self._told_at = self._store.revision, time.monotonic()
        update = pb.PlaceUpdate(places=places, removed=removed, revision=self._told)
        self._waiting = set(self._roster.broadcast(places=update))
        self._again_at = self._told_at + (PACE_S if self._busy() else 0.0)
