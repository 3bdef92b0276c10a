"""Hypothesis strategies for tables of any kind, made from the kind itself: a new kind needs none of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from datapath.state.kind import Columns, Kind, Op, Record, Table

MACS = st.binary(min_size=6, max_size=6).map(lambda raw: raw.hex(":"))
INTEGERS = st.integers(-(1 << 63), (1 << 64) - 1)
SCALARS = st.none() | st.booleans() | INTEGERS | st.text(max_size=20)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)
_BY_TYPE: dict[type, st.SearchStrategy[Any]] = {
    str: st.text(max_size=40),
    int: INTEGERS,
    bool: st.booleans(),
    list: st.lists(VALUES, max_size=4),
    dict: st.dictionaries(st.text(max_size=8), VALUES, max_size=4),
}


@st.composite
def columns(draw: st.DrawFn, kind: Kind, op: Op, count: int) -> Columns:
    """Columns of `count` records, those that `op` has, with random bytes, or values of those that are allowed."""
    counted = tuple(name for name, column in kind.columns.items() if column.accounting)
    names = {Op.DELETE: kind.key, Op.ACCOUNT: kind.key + counted}.get(op, tuple(kind.columns))
    made: Columns = {}
    for name in names:
        column = kind.columns[name]
        dtype = np.dtype(column.dtype)
        if column.values:
            chosen = draw(st.lists(st.sampled_from(sorted(column.values)), min_size=count, max_size=count))
            made[name] = np.array(chosen, dtype=dtype)
        else:
            size = count * dtype.itemsize
            made[name] = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), dtype=dtype)
    return made


@st.composite
def record(draw: st.DrawFn, kind: Kind, op: Op) -> Record:
    """A record with every field that `op` has."""
    names = kind.key if op is Op.DELETE else tuple(kind.fields)
    made: Record = {}
    for name in names:
        if name in kind.choices:
            made[name] = draw(st.sampled_from(sorted(kind.choices[name])))
        else:
            made[name] = draw(st.one_of([_BY_TYPE[sort] for sort in kind.fields[name]]))
    return made


@st.composite
def table(draw: st.DrawFn, kind: Kind, op: Op | None = None, most: int = 12) -> Table:
    """A table of up to `most` records."""
    chosen = op or draw(st.sampled_from(list(Op)))
    time_ns = draw(st.integers(0, (1 << 63) - 1))
    count = draw(st.integers(0, most))
    if kind.columns:
        return Table(kind.name, chosen, columns=draw(columns(kind, chosen, count)), port_time_ns=time_ns)
    records = draw(st.lists(record(kind, chosen), min_size=count, max_size=count))
    return Table(kind.name, chosen, records=records, port_time_ns=time_ns)


def same(one: Table, other: Table) -> bool:
    """Are both tables the same records in the same order?"""
    if (one.kind, one.op, one.port_time_ns, one.records) != (other.kind, other.op, other.port_time_ns, other.records):
        return False
    left, right = one.columns or {}, other.columns or {}
    return left.keys() == right.keys() and all(left[name].tobytes() == right[name].tobytes() for name in left)


def joined(tables: list[Table]) -> Table:
    """Tables of one kind and operation as one."""
    first = tables[0]
    if first.columns is None:
        records = [item for part in tables for item in part.records or ()]
        return Table(first.kind, first.op, records=records, port_time_ns=first.port_time_ns)
    whole = {name: np.concatenate([(part.columns or {})[name] for part in tables]) for name in first.columns}
    return Table(first.kind, first.op, columns=whole, port_time_ns=first.port_time_ns)
