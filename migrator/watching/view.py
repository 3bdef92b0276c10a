"""What a watcher knows of ports, and what each message of an agent makes new in it.

A view is kept by whoever watches, over all hosts. When a stream begins, or a port opens at another host, or a watcher
was too slow, its agent tells all that is there: the view says what of it is news. So nothing is told twice, and nothing
that is still there, or was known and is no more, is left out, whichever stream broke and wherever the VM went.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from datapath.registry import KINDS
from datapath.state.kind import Record, Table
from datapath.state.port import PORT
from migrator.errors import Corrupt
from migrator.watching.compare import compare, identity, joined, matched, take, told

Rows = Callable[[Table], Iterator[Record]]
"""Records as people read them."""

OPS = ("added", "changed", "removed", "arrived", "left", "lost")


@dataclass(frozen=True)
class Change:
    """One thing that became otherwise.

    `op`: see OPS. arrived, left: the port; it is open at `host`, or nowhere any more, and all of its records with it.
    lost: at `host`, changes were not kept apart: what follows is what became of them in the end. `was` has the former
    values of fields that changed. `snapshot`: it was so when the watch began.
    """

    op: str
    kind: str
    vm: str = ""
    mac: str = ""
    host: str = ""
    epoch: int = 0
    time: float = 0.0
    record: Record = field(default_factory=dict)
    was: Record = field(default_factory=dict)
    snapshot: bool = False


@dataclass(frozen=True)
class Update:
    """A message of an agent: pb.StateUpdate with its sections decoded. `what`: see proto."""

    what: str
    vm: str = ""
    mac: str = ""
    epoch: int = 0
    kind: str = ""
    tables: tuple[Table, ...] = ()
    last: bool = True
    time: float = 0.0


@dataclass
class _Port:
    host: str
    epoch: int
    contents: dict[str, Table] = field(default_factory=dict)
    coming: dict[str, list[Table]] = field(default_factory=dict)
    fresh: set[str] = field(default_factory=set)  # kinds that the present stream has told in whole


class View:
    """`rows` shows records. `snapshot` is true until the caller says that all there was has been told."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._ports: dict[tuple[str, str], _Port] = {}
        self.snapshot = True

    def take(self, host: str, update: Update) -> Iterator[Change]:
        """Changes that an update of `host` makes. Raises Corrupt for one that does not follow from those before."""
        if update.what == "here":
            yield from self._here(host, update)
            return
        port = self._ports.get((update.vm, update.mac))
        if port is None or (port.host, port.epoch) != (host, update.epoch):
            return  # the VM has gone on: what its last host still says is what it knew before
        if update.kind not in KINDS:
            return  # of a newer agent
        if any(table.kind != update.kind for table in update.tables):
            raise Corrupt(f"records of another kind than {update.kind} of port {update.mac}")
        if update.what == "whole":
            yield from self._whole(port, update)
        elif update.kind not in port.fresh:
            raise Corrupt(f"a change of kind {update.kind} of port {update.mac} before the whole of it")
        elif update.what == "now":
            yield from self._now(port, update)
        elif update.what == "removed":
            yield from self._removed(port, update)

    def leave(self, vm: str, mac: str, host: str = "", epoch: int | None = None, time: float = 0.0) -> Iterator[Change]:
        """A port is no more, or, with `host` and `epoch`, no more there."""
        port = self._ports.get((vm, mac))
        if port is None or (epoch is not None and (port.host, port.epoch) != (host, epoch)):
            return
        del self._ports[vm, mac]
        yield self._change(port, Update("left", vm, mac, time=time), "left", PORT.name, {"mac": mac})

    def ports(self, host: str) -> list[tuple[str, str, int]]:
        """VM, MAC and epoch of each port that is known to be at a host."""
        return [(vm, mac, port.epoch) for (vm, mac), port in self._ports.items() if port.host == host]

    # ---- by what an agent says ----

    def _here(self, host: str, update: Update) -> Iterator[Change]:
        key = (update.vm, update.mac)
        port = self._ports.get(key)
        if port is not None and update.epoch < port.epoch:
            return
        if port is None:
            port = self._ports[key] = _Port(host, update.epoch)
        elif (port.host, port.epoch) == (host, update.epoch):
            port.coming, port.fresh = {}, set()
            return
        else:
            port.host, port.epoch, port.coming, port.fresh = host, update.epoch, {}, set()
        yield self._change(port, update, "arrived", PORT.name, {"mac": update.mac})

    def _whole(self, port: _Port, update: Update) -> Iterator[Change]:
        parts = port.coming.setdefault(update.kind, [])
        parts += update.tables
        if not update.last:
            return
        whole = joined(KINDS[update.kind], port.coming.pop(update.kind))
        before = port.contents.get(update.kind) or joined(KINDS[update.kind], ())
        difference = compare(before, whole)
        port.contents[update.kind] = whole
        port.fresh.add(update.kind)
        yield from self._told(port, update, "removed", difference.removed)
        yield from self._changed(port, update, difference.before, difference.changed)
        yield from self._told(port, update, "added", difference.added)

    def _now(self, port: _Port, update: Update) -> Iterator[Change]:
        news, known = joined(KINDS[update.kind], update.tables), port.contents[update.kind]
        old, new = matched(known, news)
        yield from self._changed(port, update, take(known, old), take(news, new))
        fresh = np.ones(len(news), bool)
        fresh[new] = False
        yield from self._told(port, update, "added", take(news, fresh))
        port.contents[update.kind] = _replaced(known, old, news)

    def _removed(self, port: _Port, update: Update) -> Iterator[Change]:
        gone, known = joined(KINDS[update.kind], update.tables), port.contents[update.kind]
        old, rows = matched(known, gone)
        port.contents[update.kind] = _replaced(known, old)
        yield from self._told(port, update, "removed", take(gone, rows))

    # ---- as people read it ----

    def _told(self, port: _Port, update: Update, op: str, table: Table) -> Iterator[Change]:
        for record in self._rows(table):
            yield self._change(port, update, op, update.kind, record)

    def _changed(self, port: _Port, update: Update, before: Table, after: Table) -> Iterator[Change]:
        names = told(KINDS[update.kind])
        for old, new in zip(self._rows(before), self._rows(after), strict=True):
            was = {name: old.get(name) for name in names if old.get(name) != new.get(name)}
            if was:
                yield self._change(port, update, "changed", update.kind, new, was)

    def _change(
        self, port: _Port, update: Update, op: str, kind: str, record: Record, was: Record | None = None
    ) -> Change:
        where = (update.vm, update.mac, port.host, port.epoch, update.time)
        return Change(op, kind, *where, record, was or {}, self.snapshot and op != "left")


def _replaced(known: Table, rows: Any, news: Table | None = None) -> Table:
    """What is known, without some rows and with others."""
    keep = np.ones(len(known), bool)
    keep[rows] = False
    kind = KINDS[known.kind]
    return joined(kind, [take(known, keep), *([news] if news is not None else [])])


def named(kind: str, record: Record) -> Record:
    """The fields of a record that tell it from another."""
    return {name: record[name] for name in identity(KINDS[kind]) if name in record}
