"""The body of a section of a kind with columns: a map of `{field: {"dtype", "bytes"}}`.

Packing copies each column once; unpacking gives read-only views on the bytes. Nothing loops over records.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datapath.state.kind import Column, Columns, Kind, Op
from migrator.errors import Corrupt, Incompatible, SnapshotError
from migrator.snapshot.format import BODY_BYTES, Fields, pack

ROWS_MAX = 1 << 20
"""Records in one section: what a forged count can make a reader set aside for columns that are not there."""

_OVERHEAD = 64  # a column's name, dtype and lengths


def columns_of(kind: Kind, op: Op) -> dict[str, Column]:
    """Columns that a table of `op` may have: deletions have keys, accounting has keys and what is counted (and ids)."""
    if op is Op.DELETE:
        return {name: kind.columns[name] for name in kind.key}
    return dict(kind.columns)


def required_of(kind: Kind, op: Op) -> set[str]:
    """Columns that a table of `op` must have."""
    names = set(kind.columns) if op.whole else set(kind.key)
    return {name for name in names if kind.columns[name].default is None}


def check_columns(kind: Kind, op: Op, columns: Mapping[str, NDArray[Any]]) -> int:
    """Number of records in `columns`. Raises SnapshotError where they are not what `kind` says."""
    known = columns_of(kind, op)
    lengths = {len(array) for array in columns.values()}
    if len(lengths) > 1:
        raise SnapshotError(f"columns of different lengths: {sorted(lengths)}")
    for name, array in columns.items():
        if name not in known:
            raise SnapshotError(f"kind {kind.name} has no such column in a table to {op}", field=name)
        if array.dtype != np.dtype(known[name].dtype) or array.ndim != 1:
            raise SnapshotError(f"{array.dtype.str} where {known[name].dtype} belongs", field=name)
    missing = required_of(kind, op) - set(columns)
    if missing:
        raise SnapshotError(f"kind {kind.name} needs the column", field=min(missing))
    return lengths.pop() if lengths else 0


def encode_columns(kind: Kind, op: Op, columns: Mapping[str, NDArray[Any]]) -> Iterator[tuple[int, bytes]]:
    """Bodies for `columns`, each with the number of its records. Raises SnapshotError before the first one."""
    count = check_columns(kind, op, columns)
    columns = {name: array for name, array in columns.items() if not _is_void(kind.columns[name], array)}
    width = sum(array.dtype.itemsize for array in columns.values())
    rows = min((BODY_BYTES - _OVERHEAD * (len(columns) + 1)) // max(width, 1), ROWS_MAX)
    for start in range(0, count, rows):
        part = {
            name: {"dtype": kind.columns[name].dtype, "bytes": array[start : start + rows].tobytes()}
            for name, array in columns.items()
        }
        yield min(rows, count - start), pack(part)


def _is_void(column: Column, array: NDArray[Any]) -> bool:
    return column.sparse and not np.ascontiguousarray(array).view(np.uint8).any()


def decode_columns(kind: Kind, op: Op, body: object, count: int) -> Columns:
    """Columns of a body: unknown ones left out, missing ones that have a default filled in (load; else keys only).

    Raises Corrupt, or Incompatible for a known column of another dtype.
    """
    if not isinstance(body, dict):
        raise Corrupt("columns have to be a map", field="body")
    if count > ROWS_MAX:
        raise Corrupt(f"{count} records: at most {ROWS_MAX} fit a section", field="count")
    known = columns_of(kind, op)
    columns: Columns = {}
    for name, column in body.items():
        if not isinstance(column, dict):
            raise Corrupt("a column has to be a map", field=name)
        fields = Fields(column, f"{name}.")
        dtype, data = fields.text("dtype"), fields.take("bytes", bytes)
        if name in known:
            columns[name] = _view(name, known[name], dtype, data, count)
    _fill(kind, op, columns, count)
    return columns


def _view(name: str, column: Column, dtype: str, data: bytes, count: int) -> NDArray[Any]:
    expected = np.dtype(column.dtype)
    if dtype != column.dtype:
        raise Incompatible(f"dtype {dtype!r} where {column.dtype!r} belongs", field=name)
    if len(data) != count * expected.itemsize:
        raise Corrupt(f"{len(data)} bytes for {count} records of {expected.itemsize}", field=name)
    array = np.frombuffer(data, dtype=expected)
    if not column.admits(array):
        raise Corrupt("holds a value that it cannot have", field=name)
    return array


def _fill(kind: Kind, op: Op, columns: Columns, count: int) -> None:
    missing = required_of(kind, op) - set(columns)
    if missing:
        raise Corrupt("the column is missing", field=min(missing))
    for name in kind.columns if op.whole else kind.key:
        if name not in columns:
            columns[name] = _default(kind.columns[name], count)


def _default(column: Column, count: int) -> NDArray[Any]:
    array = np.zeros(count, dtype=column.dtype)
    if isinstance(column.default, bytes):
        array[:] = np.void(column.default)
    elif column.default:
        array[:] = column.default
    array.flags.writeable = False
    return array
