"""Check a table against its kind before anything of it is applied; drivers call this first in `load`."""

from __future__ import annotations

from copy import deepcopy

import numpy as np

from datapath.errors import LoadRejected
from datapath.state.kind import Columns, Kind, Op, Record, Table

_HINT = "the snapshot or its sender is broken; nothing of the table was applied"


def checked_columns(kind: Kind, table: Table) -> Columns:
    """The table's columns, without those that the kind does not know and with defaults for missing optional ones.

    A delete has key columns only. An account has key columns and what else came. Raises LoadRejected naming the column.
    """
    given = table.columns
    _check_op(kind, table.op)
    if given is None:
        raise _rejected(kind, "columns belong in the table")
    shapes = {array.shape for array in given.values()}
    if len(shapes) > 1 or any(len(shape) != 1 for shape in shapes):
        raise _rejected(kind, f"columns have different shapes: {sorted(shapes)}")
    count = next(iter(shapes), (0,))[0]
    columns: Columns = {}
    for name, column in kind.columns.items():
        if name in given and (table.op is not Op.DELETE or name in kind.key):
            if given[name].dtype != np.dtype(column.dtype):
                raise _rejected(kind, f"column {name} is {given[name].dtype.str}, not {column.dtype}")
            if not column.admits(given[name]):
                raise _rejected(kind, f"column {name} holds a value that it cannot have")
            columns[name] = given[name]
        elif name in kind.key or table.op.whole:
            if column.default is None:
                raise _rejected(kind, f"column {name} is missing")
            columns[name] = np.full(count, column.default, dtype=column.dtype)
    return columns


def checked_records(kind: Kind, table: Table) -> list[Record]:
    """The table's records, without fields that the kind does not know and with defaults for missing optional ones.

    Raises LoadRejected naming the record and the field.
    """
    _check_op(kind, table.op)
    if table.records is None:
        raise _rejected(kind, "records belong in the table")
    return [_checked_record(kind, table.op, record, f"record {i}") for i, record in enumerate(table.records)]


def _check_op(kind: Kind, op: Op) -> None:
    if op is Op.FILL and not kind.late:
        raise _rejected(kind, "records of this kind are not brought afterwards")


def _checked_record(kind: Kind, op: Op, record: Record, where: str) -> Record:
    full = {name: value for name, value in record.items() if name in kind.fields}
    if op.whole:
        full.update({name: deepcopy(value) for name, value in kind.defaults.items() if name not in full})
    needed = set(kind.key) if not op.whole else set(kind.fields) - kind.optional
    for name in sorted(needed - set(full)):
        raise _rejected(kind, f"{where} lacks {name}")
    for name, value in full.items():
        if type(value) not in kind.fields[name]:
            raise _rejected(kind, f"{where}: {name} is {type(value).__name__}")
        if name in kind.choices and value not in kind.choices[name]:
            raise _rejected(kind, f"{where}: {name} is none of {', '.join(sorted(kind.choices[name]))}")
    return full


def _rejected(kind: Kind, what: str) -> LoadRejected:
    return LoadRejected(f"{kind.name}: {what}", hint=_HINT)
