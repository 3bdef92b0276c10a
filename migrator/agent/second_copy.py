"""A copy that begins again, at the destination: a port keeps what it has until the new copy is complete.

Its guest may run there already. What waits for it, and what it has sent itself, is at the port, so the port stays; and
should the rest not come, a table that is older serves the guest better than an empty one.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import compress
from typing import Any

import numpy as np

from datapath.provider import Driver, PortRef
from datapath.registry import KINDS
from datapath.state.check import checked_columns
from datapath.state.kind import Kind, Op, Table


class SecondCopy:
    """What it has brought so far. `known`: ports and kinds of which an earlier one has brought something."""

    def __init__(self, driver: Driver, known: Collection[tuple[PortRef, str]]) -> None:
        self._driver = driver
        self._brought: dict[tuple[PortRef, str], set[Any]] = {each: set() for each in known}
        self._roomy: set[tuple[PortRef, str]] = set()

    def note(self, ref: PortRef, table: Table) -> None:
        """These records have been loaded."""
        self._brought.setdefault((ref, table.kind), set()).update(_keys(table))

    def make_room(self, ref: PortRef, table: Table) -> bool:
        """The port has no room for the table: what nothing has been heard of yet goes early, once. Does more fit now?

        What of it is still there at the source comes again.
        """
        if (ref, table.kind) in self._roomy:
            return False
        self._roomy.add((ref, table.kind))
        self.note(ref, table)
        return self._drop(ref, table.kind)

    def finish(self) -> None:
        """The copy is complete: what it did not bring has gone at the source."""
        for ref, kind in self._brought:
            self._drop(ref, kind)

    def _drop(self, ref: PortRef, kind: str) -> bool:
        brought, dropped = self._brought[ref, kind], False
        for table in list(self._driver.dump(ref, kind)):
            gone = [key not in brought for key in _keys(table)]
            if any(gone):
                self._driver.load(ref, _without(table, gone))
                dropped = True
        return dropped


def _keys(table: Table) -> Sequence[Any]:
    """What identifies each record of the table, comparable with that of others of its kind."""
    kind = KINDS[table.kind]
    if table.columns is None:
        return [kind.key_of(record) for record in table.records or ()]
    columns = checked_columns(kind, replace(table, op=Op.DELETE))
    packed = np.empty(len(table), _key_type(kind))
    for name in kind.key:
        packed[name] = columns[name]
    keys: list[Any] = packed.view(f"V{packed.dtype.itemsize}").tolist()
    return keys


def _key_type(kind: Kind) -> np.dtype[Any]:
    return np.dtype([(name, kind.columns[name].dtype) for name in kind.key])


def _without(table: Table, gone: Sequence[bool]) -> Table:
    """The table that deletes these records."""
    kind = KINDS[table.kind]
    if table.columns is None:
        records = [{name: record[name] for name in kind.key} for record in compress(table.records or (), gone)]
        return Table(table.kind, Op.DELETE, records=records, port_time_ns=table.port_time_ns)
    columns = {name: np.ascontiguousarray(table.columns[name][np.array(gone)]) for name in kind.key}
    return Table(table.kind, Op.DELETE, columns=columns, port_time_ns=table.port_time_ns)
