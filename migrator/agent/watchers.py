"""Those who watch the state of this host's ports, and what waits for each. Bounded: who is slow is told anew."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from datapath.provider import PortRef
from datapath.registry import KINDS
from datapath.state.kind import Table
from migrator._pb import migrator_pb2 as pb
from migrator.snapshot import encode_table
from migrator.watching.compare import Difference, joined, take
from migrator.watching.match import Filter

BACKLOG_MAX = 100_000
"""Changed records that wait for one watcher. What is whole costs nothing: it is what is kept to compare with."""
ITEMS_MAX = 20_000
"""Messages, of whatever size, that wait for one watcher."""


@dataclass(frozen=True)
class Item:
    """Something to be told. Encoded when it is its turn."""

    what: str
    ref: PortRef | None = None
    table: Table | None = None
    time: float = field(default_factory=time.time)

    def messages(self) -> Iterator[pb.StateUpdate]:
        """Messages of bounded size."""
        head = pb.StateUpdate(what=self.what, time=self.time, last=True)
        if self.ref is not None:
            head.vm, head.mac, head.epoch = self.ref.vm, self.ref.mac, self.ref.epoch
        if self.table is None or self.ref is None:
            yield head
            return
        head.kind = self.table.kind
        head.last = False
        for section in encode_table(self.table, self.ref.mac):
            message = pb.StateUpdate(sections=[section])
            message.MergeFrom(head)
            yield message
        if self.what == "whole":
            head.last = True
            yield head


class Watcher:
    """One stream. `filters`: by kind that is wanted, what a record has to be."""

    def __init__(
        self, filters: Mapping[str, Filter], vms: frozenset[str], macs: frozenset[str], interval_s: float
    ) -> None:
        self.filters = filters
        self.interval_s = interval_s
        self._vms, self._macs = vms, macs
        self._queue: deque[Item] = deque()
        self._news = asyncio.Event()
        self._backlog = 0
        self._here: set[PortRef] = set()
        self._whole: set[tuple[PortRef, str]] = set()
        self._first: set[PortRef] | None = None
        self._current = False

    def wants(self, ref: PortRef) -> bool:
        """Is the port one of those that are watched?"""
        return (not self._vms or ref.vm in self._vms) and (not self._macs or ref.mac in self._macs)

    # ---- what is told ----

    def turn(self, active: set[PortRef], there: set[PortRef]) -> None:
        """Which ports are open now, and which are here at all. All of the first call told, the watcher is current."""
        if self._first is None:
            self._first = {ref for ref in active if self.wants(ref) and not self._all_told(ref)}
        self._first &= there
        self._maybe_current()

    def looked(self, ref: PortRef, kind: str, content: Table, difference: Difference | None) -> None:
        """A kind of a port was looked at. `difference`: from the look before; None: it was the first."""
        if not self.wants(ref) or kind not in self.filters:
            return
        if ref not in self._here:
            self._here.add(ref)
            self._put(Item("here", ref))
        if (ref, kind) not in self._whole or difference is None:
            self._whole.add((ref, kind))
            self._put(Item("whole", ref, self._view(kind, content)))
        else:
            self._tell(ref, kind, difference)
        self._told(ref)

    def gone(self, ref: PortRef) -> None:
        """The port is not open here any more."""
        if ref in self._here:
            self._here.discard(ref)
            self._whole = {(one, kind) for one, kind in self._whole if one != ref}
            self._put(Item("gone", ref))

    def _view(self, kind: str, table: Table) -> Table:
        wanted = self.filters[kind]
        return take(table, wanted.mask(table)) if wanted else table

    def _tell(self, ref: PortRef, kind: str, difference: Difference) -> None:
        """What enters the view is new to the watcher, what leaves it is removed."""
        wanted = self.filters[kind]
        was, is_ = wanted.mask(difference.before), wanted.mask(difference.changed)
        removed = [self._view(kind, difference.removed), take(difference.changed, was & ~is_)]
        now = [take(difference.changed, is_), self._view(kind, difference.added)]
        for what, tables in (("removed", removed), ("now", now)):
            full = [table for table in tables if len(table)]
            if full:
                self._put(Item(what, ref, joined(KINDS[kind], full)))

    def _told(self, ref: PortRef) -> None:
        if self._first and self._all_told(ref):
            self._first.discard(ref)
            self._maybe_current()

    def _all_told(self, ref: PortRef) -> bool:
        return all((ref, kind) in self._whole for kind in self.filters)

    def _maybe_current(self) -> None:
        if not self._first and not self._current:
            self._current = True
            self._put(Item("current"))

    def _put(self, item: Item) -> None:
        if item.what in ("now", "removed"):
            self._backlog += len(item.table or ())
        self._queue.append(item)
        if self._backlog > BACKLOG_MAX or len(self._queue) > ITEMS_MAX:
            self._start_over()
        self._news.set()

    def _start_over(self) -> None:
        """Forget what waits: the next look tells all of it."""
        self._queue.clear()
        self._backlog = 0
        self._first, self._current = None, False
        self._here, self._whole = set(), set()
        self._queue.append(Item("lost"))

    # ---- to the watcher ----

    async def next(self) -> Item:
        """What is to be told next."""
        while not self._queue:
            self._news.clear()
            await self._news.wait()
        item = self._queue.popleft()
        if item.what in ("now", "removed"):
            self._backlog -= len(item.table or ())
        return item
