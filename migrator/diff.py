"""What differs between two snapshots: records added, removed and changed, by key."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from datapath.registry import KINDS
from datapath.state.kind import Columns, Kind, Op, Record, Table
from migrator.snapshot import SnapshotReader


@dataclass(frozen=True)
class Difference:
    """What differs in one kind of one port.

    `before` and `after` are the changed records, in the same order; `fields` counts in how many each field differs.
    """

    port: str
    kind: str
    added: Table
    removed: Table
    before: Table
    after: Table
    fields: Mapping[str, int]

    def __bool__(self) -> bool:
        return bool(len(self.added) or len(self.removed) or len(self.before))

    def counts(self) -> dict[str, int]:
        """{"added", "removed", "changed"}, in records."""
        return {"added": len(self.added), "removed": len(self.removed), "changed": len(self.before)}


def diff(a: BinaryIO, b: BinaryIO, *, ignore: Collection[str] = (), accounting: bool = True) -> list[Difference]:
    """What differs from snapshot `a` to snapshot `b`, by port and kind; [] when nothing does.

    `ignore` names fields that do not count as changed, as ages; `accounting` False leaves out what is only counted.
    Both are held in memory. Raises Corrupt, Incompatible.
    """
    one, other = _whole(a), _whole(b)
    found = []
    for port, name in sorted({*one, *other}):
        kind = KINDS[name]
        left_out = {*ignore, *(() if accounting else _counted(kind))}
        both = one.get((port, name), []), other.get((port, name), [])
        compare = _compare_columns if kind.columns else _compare_records
        found.append(compare(port, kind, *both, left_out))
    return [difference for difference in found if difference]


def _counted(kind: Kind) -> set[str]:
    return {*kind.accounting, *(name for name, column in kind.columns.items() if column.accounting)}


def _whole(stream: BinaryIO) -> dict[tuple[str, str], list[Table]]:
    tables: dict[tuple[str, str], list[Table]] = {}
    for section in SnapshotReader(stream):
        if section.table and section.op is Op.LOAD:
            tables.setdefault((section.port, section.kind), []).append(section.table)
    return tables


def _compare_columns(port: str, kind: Kind, a: Sequence[Table], b: Sequence[Table], ignore: set[str]) -> Difference:
    one, other = _joined(kind, a), _joined(kind, b)
    keys_one, keys_other = _keys(kind, one), _keys(kind, other)
    _, i, j = np.intersect1d(keys_one, keys_other, assume_unique=True, return_indices=True)
    differs = {name: _bytes(one[name][i]) != _bytes(other[name][j]) for name in one if name not in ignore}
    by_field = {name: rows.any(axis=1) for name, rows in differs.items()}
    changed = np.logical_or.reduce(list(by_field.values()), axis=0) if by_field else np.zeros(len(i), dtype=bool)
    return Difference(
        port,
        kind.name,
        added=_part(kind, other, np.delete(np.arange(len(keys_other)), j)),
        removed=_part(kind, one, np.delete(np.arange(len(keys_one)), i)),
        before=_part(kind, one, i[changed]),
        after=_part(kind, other, j[changed]),
        fields={name: int(rows.sum()) for name, rows in by_field.items() if rows.any()},
    )


def _joined(kind: Kind, tables: Sequence[Table]) -> Columns:
    empty = {name: np.zeros(0, dtype=column.dtype) for name, column in kind.columns.items()}
    parts = [empty, *(table.columns or {} for table in tables)]
    return {name: np.concatenate([part[name] for part in parts]) for name in kind.columns}


def _bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(array).view(np.uint8).reshape(len(array), array.dtype.itemsize)


def _keys(kind: Kind, columns: Columns) -> NDArray[Any]:
    raw = np.ascontiguousarray(np.concatenate([_bytes(columns[name]) for name in kind.key], axis=1))
    return raw.view(f"V{raw.shape[1]}").ravel()


def _part(kind: Kind, columns: Columns, rows: NDArray[Any]) -> Table:
    return Table(kind.name, columns={name: array[rows] for name, array in columns.items()})


def _compare_records(port: str, kind: Kind, a: Sequence[Table], b: Sequence[Table], ignore: set[str]) -> Difference:
    one, other = _by_key(kind, a), _by_key(kind, b)
    fields: Counter[str] = Counter()
    changed = []
    for key in one.keys() & other.keys():
        before, after = one[key], other[key]
        names = [n for n in sorted({*before, *after} - ignore) if before.get(n) != after.get(n)]
        fields.update(names)
        changed += [key] if names else []
    order = sorted(changed, key=repr)
    return Difference(
        port,
        kind.name,
        added=Table(kind.name, records=[record for key, record in other.items() if key not in one]),
        removed=Table(kind.name, records=[record for key, record in one.items() if key not in other]),
        before=Table(kind.name, records=[one[key] for key in order]),
        after=Table(kind.name, records=[other[key] for key in order]),
        fields=dict(fields),
    )


def _by_key(kind: Kind, tables: Sequence[Table]) -> dict[tuple[Any, ...], Record]:
    return {tuple(record[name] for name in kind.key): record for table in tables for record in table.records or ()}
