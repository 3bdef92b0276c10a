"""Check a table's columns against its kind before any map is touched."""

from __future__ import annotations

import numpy as np

from datapath.errors import LoadRejected
from datapath.state.kind import Columns, Kind, Op, Table

_HINT = "the snapshot or its sender is broken; nothing of the table was applied"


def checked(kind: Kind, table: Table) -> Columns:
    """The table's columns with the kind's dtypes, missing optional ones filled with their default.

    Columns the kind does not know are left out. For a delete only key columns are looked at, for an account key and
    accounting columns are, and others as they come. Raises LoadRejected naming the column.
    """
    if table.columns is None:
        raise LoadRejected(f"{kind.name}: a table of columns is needed, not of records", hint=_HINT)
    count = _count(kind, table.columns)
    filled: Columns = {}
    for name, column in kind.columns.items():
        if table.op is Op.DELETE and name not in kind.key:
            continue
        given = table.columns.get(name)
        if given is None:
            if column.default is None and not (table.op is Op.ACCOUNT and name not in kind.key):
                raise LoadRejected(f"{kind.name}: column {name} is missing", hint=_HINT)
            filled[name] = _default(column.default, column.dtype, count)
        elif given.dtype != np.dtype(column.dtype):
            raise LoadRejected(f"{kind.name}: column {name} has dtype {given.dtype}, not {column.dtype}", hint=_HINT)
        else:
            filled[name] = given
    return filled


def _count(kind: Kind, columns: Columns) -> int:
    lengths = {name: array.shape for name, array in columns.items()}
    if any(len(shape) != 1 for shape in lengths.values()) or len({shape[0] for shape in lengths.values()}) > 1:
        raise LoadRejected(f"{kind.name}: columns differ in length: {lengths}", hint=_HINT)
    return next((shape[0] for shape in lengths.values()), 0)


def _default(value: int | bytes | None, dtype: str, count: int) -> np.ndarray:
    if isinstance(value, bytes):
        return np.frombuffer(value * count, dtype)
    return np.full(count, value or 0, dtype)
