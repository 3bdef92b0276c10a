"""What changed between two looks at one kind of one port.

A record is known by its key and, where its kind has a column `id` beside the key, by that too: another connection
between the same ends is another record. Ages and counters are told with a change but make none.

Columns are compared by vector operations: 100,000 connections take some ten milliseconds, most of them without
Python's lock, so that whoever moves another VM meanwhile does not wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datapath.registry import KINDS
from datapath.state.kind import Columns, Kind, Record, Table, empty_columns

Rows = NDArray[np.intp]

_ODD = np.random.default_rng().integers(0, 1 << 63, 64, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
"""Of this process alone, so that no guest can choose connections that fall together."""
_SHIFT = np.uint64(31)


@dataclass(frozen=True)
class Difference:
    """Row by row, `before` is what `changed` was."""

    added: Table
    changed: Table
    before: Table
    removed: Table

    def __len__(self) -> int:
        return len(self.added) + len(self.changed) + len(self.removed)


def identity(kind: Kind) -> tuple[str, ...]:
    """Fields that tell one record from another."""
    return (*kind.key, *(("id",) if "id" in kind.columns and "id" not in kind.key else ()))


def told(kind: Kind) -> tuple[str, ...]:
    """Fields whose changes are told."""
    known = set(identity(kind))
    if kind.columns:
        steady = (name for name, column in kind.columns.items() if not (column.accounting or column.volatile))
        return tuple(name for name in steady if name not in known)
    return tuple(name for name in kind.fields if name not in {*known, *kind.accounting, *kind.live})


def compare(before: Table, after: Table) -> Difference:
    """What changed from one whole table of a kind to another."""
    kind = KINDS[before.kind]
    old, new = matched(before, after)
    differ = _differ(kind, before, old, after, new)
    return Difference(
        added=take(after, _others(len(after), new)),
        changed=take(after, new[differ]),
        before=take(before, old[differ]),
        removed=take(before, _others(len(before), old)),
    )


def matched(one: Table, other: Table) -> tuple[Rows, Rows]:
    """Rows of two tables of a kind that are of the same record, side by side, in the order of `other`."""
    kind = KINDS[one.kind]
    if not kind.columns:
        places = {kind.key_of(record): row for row, record in enumerate(one.records or ())}
        pairs = [
            (places[key], row)
            for row, record in enumerate(other.records or ())
            if (key := kind.key_of(record)) in places
        ]
        found = np.array(pairs, np.intp).reshape(-1, 2)
        return found[:, 0], found[:, 1]
    names = identity(kind)
    return _matched_words(_words(kind, one, names), _words(kind, other, names))


def take(table: Table, rows: Rows | NDArray[np.bool_]) -> Table:
    """Some rows of a table, in the order of `rows`."""
    if table.columns is not None:
        columns = {name: array[rows] for name, array in table.columns.items()}
        return Table(table.kind, columns=columns, port_time_ns=table.port_time_ns)
    records = table.records or ()
    chosen = np.flatnonzero(rows) if rows.dtype == np.bool_ else rows
    return Table(table.kind, records=[records[row] for row in chosen.tolist()], port_time_ns=table.port_time_ns)


def joined(kind: Kind, tables: Sequence[Table]) -> Table:
    """One table of several of a kind; empty of none. Columns that one of them lacks are its zeroes."""
    time = max((table.port_time_ns for table in tables), default=0)
    if not kind.columns:
        return Table(kind.name, records=[one for table in tables for one in table.records or ()], port_time_ns=time)
    parts = [_full(kind, table) for table in tables]
    if len(parts) == 1:
        return Table(kind.name, columns=parts[0], port_time_ns=time)
    whole = {name: np.concatenate([part[name] for part in parts]) for name in kind.columns} if parts else None
    return Table(kind.name, columns=whole or empty_columns(kind), port_time_ns=time)


def _full(kind: Kind, table: Table) -> Columns:
    given = table.columns or {}
    return {name: given.get(name, np.zeros(len(table), column.dtype)) for name, column in kind.columns.items()}


def _differ(kind: Kind, before: Table, old: Rows, after: Table, new: Rows) -> NDArray[np.bool_]:
    names = told(kind)
    if kind.columns:
        differ = np.zeros(len(new), bool)
        for name in names:
            differ |= (before.columns or {})[name][old] != (after.columns or {})[name][new]
        return differ
    one, other = before.records or (), after.records or ()
    pairs = zip(old.tolist(), new.tolist(), strict=True)
    return np.array([_fields(one[i], names) != _fields(other[j], names) for i, j in pairs], bool)


def _fields(record: Record, names: Sequence[str]) -> list[Any]:
    return [record.get(name) for name in names]


def _others(count: int, rows: Rows) -> Rows:
    rest = np.ones(count, bool)
    rest[rows] = False
    return np.flatnonzero(rest)


# ---- rows of columns by what they are known by ----


def _words(kind: Kind, table: Table, names: Sequence[str]) -> NDArray[np.uint64]:
    """The fields `names` of each row as a row of 64-bit words."""
    sizes = [np.dtype(kind.columns[name].dtype).itemsize for name in names]
    offsets = np.cumsum([0, *sizes[:-1]]).tolist()
    width = -(-sum(sizes) // 8) * 8
    formats = [kind.columns[name].dtype for name in names]
    packed = np.zeros(len(table), {"names": list(names), "formats": formats, "offsets": offsets, "itemsize": width})
    for name in names:
        packed[name] = (table.columns or {})[name]
    return packed.view("<u8").reshape(len(table), width // 8)


def _matched_words(one: NDArray[np.uint64], other: NDArray[np.uint64]) -> tuple[Rows, Rows]:
    if not len(one) or not len(other):
        return np.zeros(0, np.intp), np.zeros(0, np.intp)
    sums, wanted = _sums(one), _sums(other)
    order, turn = np.argsort(sums), np.argsort(wanted)  # both sorted: looking up goes through memory once
    sums, wanted = sums[order], wanted[turn]
    if (sums[1:] == sums[:-1]).any() or (wanted[1:] == wanted[:-1]).any():
        return _matched_bytes(one, other)
    places = np.minimum(np.searchsorted(sums, wanted), len(sums) - 1)
    same = sums[places] == wanted
    found, rows = order[places[same]], turn[same]
    if (one[found] != other[rows]).any():
        return _matched_bytes(one, other)
    there = np.full(len(other), -1, np.intp)
    there[rows] = found
    rows = np.flatnonzero(there >= 0)
    return there[rows], rows


def _sums(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    total = np.zeros(len(words), np.uint64)
    for number in range(words.shape[1]):
        total = (total ^ words[:, number]) * _ODD[number % len(_ODD)]
        total ^= total >> _SHIFT
    return total


def _matched_bytes(one: NDArray[np.uint64], other: NDArray[np.uint64]) -> tuple[Rows, Rows]:
    """The same without sums: two rows have fallen together, or one is there twice."""
    places = {row.tobytes(): number for number, row in enumerate(one)}
    pairs = {}
    for number, row in enumerate(other):
        if (place := places.get(row.tobytes())) is not None:
            pairs[place] = number
    rows = sorted((number, place) for place, number in pairs.items())
    found = np.array(rows, np.intp).reshape(-1, 2)
    return found[:, 1], found[:, 0]
