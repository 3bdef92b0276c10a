"""Tables of one port in memory, one object a kind.

Both sorts keep what was counted here apart from what was carried from hosts before, and the keys that changed.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Collection, Iterator
from itertools import compress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datapath.provider import Loaded
from datapath.state.check import checked_columns, checked_records
from datapath.state.kind import Columns, Kind, Op, Record, Table

DUMP_ROWS = 65_536


class KindTable(abc.ABC):
    """Records of one kind of one port. `port_time` gives the port's clock in nanoseconds."""

    def __init__(self, kind: Kind, limit: int, port_time: Callable[[], int]) -> None:
        self.kind = kind
        self.limit = limit
        self.port_time = port_time
        self.dirty: set[Any] | None = None

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def check(self, table: Table) -> None:
        """Raises LoadRejected where the table is malformed."""

    @abc.abstractmethod
    def load(self, table: Table) -> Loaded: ...

    @abc.abstractmethod
    def dump(self) -> Iterator[Table]: ...

    @abc.abstractmethod
    def drain(self) -> list[Table]: ...

    @abc.abstractmethod
    def settle(self) -> Iterator[Table]: ...

    def _mark(self, keys: Any) -> None:
        if self.dirty is not None:
            self.dirty.update(keys)


class ColumnTable(KindTable):
    """Rows as packed bytes by packed key: loads and dumps are vector operations and dictionary updates in C."""

    def __init__(self, kind: Kind, limit: int, port_time: Callable[[], int]) -> None:
        super().__init__(kind, limit, port_time)
        self._row = np.dtype([(name, column.dtype) for name, column in kind.columns.items()])
        self._key = np.dtype([(name, kind.columns[name].dtype) for name in kind.key])
        counted = [name for name, column in kind.columns.items() if column.accounting]
        self._counted = np.dtype([(name, kind.columns[name].dtype) for name in counted])
        self._identity = np.dtype([("id", kind.columns["id"].dtype)] if "id" in kind.columns else [])
        self._rows: dict[bytes, bytes] = {}
        self._carried: dict[bytes, bytes] = {}
        self.ended: dict[bytes, bytes] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def check(self, table: Table) -> None:
        checked_columns(self.kind, table)

    def load(self, table: Table) -> Loaded:
        columns = checked_columns(self.kind, table)
        keys = _packed(columns, self._key)
        if table.op is Op.DELETE:
            for key in keys:
                self._rows.pop(key, None)
                self._carried.pop(key, None)
            self._mark(keys)
            return Loaded(len(keys))
        if table.op is Op.ACCOUNT:
            self._account(keys, _packed(columns, self._counted), _packed(columns, self._identity))
            return Loaded(len(keys))
        if table.op is Op.FILL:
            absent = np.array([key not in self._rows for key in keys], bool)
            columns = {name: array[absent] for name, array in columns.items()}
            return self._load(list(compress(keys, absent)), columns, self.port_time())
        return self._load(keys, columns, table.port_time_ns)

    def _load(self, keys: list[bytes], columns: Columns, port_time_ns: int) -> Loaded:
        carried = _packed(columns, self._counted)
        own = {**columns, **{name: np.zeros_like(columns[name]) for name in self._counted.names or ()}}
        if "age_ns" in own:
            own["age_ns"] = np.uint64(port_time_ns) - own["age_ns"]  # when seen, in port time, modulo 2^64
        rows = _packed(own, self._row)
        room = self.limit - len(self._rows)
        rejected = 0
        if len(keys) > room:
            fitting = _fitting(keys, self._rows, room)
            fits = [key in fitting for key in keys]
            keys, rows, carried = (list(compress(part, fits)) for part in (keys, rows, carried))
            rejected = len(fits) - len(keys)
        self._rows.update(zip(keys, rows, strict=True))
        self._carried.update(zip(keys, carried, strict=True))
        self._mark(keys)
        return Loaded(len(keys), (("full", rejected),) if rejected else ())

    def _account(self, keys: list[bytes], carried: list[bytes], ids: list[bytes]) -> None:
        """What was counted belongs to a connection, not to its key: another one may have the key by now."""
        for key, value, identity in zip(keys, carried, ids, strict=True):
            row = self._rows.get(key)
            if row is not None and self._id_of(row) == identity:
                self._carried[key] = value
            else:
                self.ended[key + identity] = value

    def _id_of(self, row: bytes) -> bytes:
        if not self._identity.names:
            return b""
        start = int(self._row.fields["id"][1]) if self._row.fields else 0
        return row[start : start + self._identity.itemsize]

    def relabel(self, columns: Columns) -> int:
        """Give rows that are there with these ids other values of the columns that are neither key nor id."""
        given = {name: array for name, array in columns.items() if name not in (*self.kind.key, "id")}
        keys, ids, changed = _packed(columns, self._key), _packed(columns, self._identity), []
        for number, (key, identity) in enumerate(zip(keys, ids, strict=True)):
            if key not in self._rows or self._id_of(self._rows[key]) != identity:
                continue
            row = np.frombuffer(self._rows[key], dtype=self._row).copy()
            for name, array in given.items():
                row[name] = array[number]
            self._rows[key] = row.tobytes()
            changed.append(key)
        self._mark(changed)
        return len(changed)

    def dump(self) -> Iterator[Table]:
        keys = list(self._rows)
        for start in range(0, len(keys), DUMP_ROWS):
            yield self._table([key for key in keys[start : start + DUMP_ROWS] if key in self._rows])

    def _table(self, keys: list[bytes]) -> Table:
        now = self.port_time()
        rows = np.frombuffer(b"".join(map(self._rows.__getitem__, keys)), dtype=self._row)
        columns: Columns = {name: rows[name].copy() for name in self._row.names or ()}
        if "age_ns" in columns:
            columns["age_ns"] = np.uint64(now) - columns["age_ns"]
        if self._counted.names:
            none = bytes(self._counted.itemsize)
            carried = np.frombuffer(b"".join(self._carried.get(key, none) for key in keys), dtype=self._counted)
            for name in self._counted.names:
                columns[name] += carried[name]
        return Table(self.kind.name, columns=columns, port_time_ns=now)

    def drain(self) -> list[Table]:
        dirty, self.dirty = self.dirty or set(), set()
        here = [key for key in dirty if key in self._rows]
        gone = np.frombuffer(b"".join(key for key in dirty if key not in self._rows), dtype=self._key)
        tables = [self._table(here)] if here else []
        if len(gone):
            columns: Columns = {name: gone[name].copy() for name in self.kind.key}
            tables.append(Table(self.kind.name, Op.DELETE, columns=columns, port_time_ns=self.port_time()))
        return tables

    def settle(self) -> Iterator[Table]:
        if not self._counted.names:
            return
        optional = {"id", "age_ns"} & set(self.kind.columns)
        wanted = {*self.kind.key, *self._counted.names, *optional}
        for table in self.dump():
            columns = {name: array for name, array in (table.columns or {}).items() if name in wanted}
            yield Table(self.kind.name, Op.ACCOUNT, columns=columns, port_time_ns=table.port_time_ns)


def _packed(columns: Columns, dtype: np.dtype[Any]) -> list[bytes]:
    count = len(next(iter(columns.values())))
    if not dtype.names:
        return [b""] * count
    packed: NDArray[Any] = np.zeros(count, dtype=dtype)
    for name in dtype.names:
        if name in columns:
            packed[name] = columns[name]
    plain: list[bytes] = packed.view(f"V{dtype.itemsize}").tolist()
    return plain


def _fitting(keys: list[bytes], rows: Collection[bytes], room: int) -> set[bytes]:
    """Those of `keys` that fit when only new ones take room: the first ones."""
    new = [key for key in dict.fromkeys(keys) if key not in rows]
    return set(keys).difference(new[room:])


class RecordTable(KindTable):
    """Records as dictionaries by key, in the order in which they came."""

    def __init__(self, kind: Kind, limit: int, port_time: Callable[[], int]) -> None:
        super().__init__(kind, limit, port_time)
        self._records: dict[tuple[Any, ...], Record] = {}
        self._live: dict[tuple[Any, ...], Record] = {}
        self.carried: dict[tuple[Any, ...], Record] = {}

    def configured(self) -> list[Record]:
        """The records without what is counted or live."""
        return list(self._records.values())

    def __len__(self) -> int:
        return len(self._records)

    def check(self, table: Table) -> None:
        checked_records(self.kind, table)

    def load(self, table: Table) -> Loaded:
        records = checked_records(self.kind, table)
        for record in records:
            key = self.kind.key_of(record)
            counted = {name: record[name] for name in self.kind.accounting if name in record}
            if table.op is Op.DELETE:
                for part in (self._records, self._live, self.carried):
                    part.pop(key, None)
            elif table.op is Op.ACCOUNT:
                self.carried[key] = counted
            else:
                self._records[key] = self.kind.bare(record)
                self._live.setdefault(key, {}).update({n: record[n] for n in self.kind.live if n in record})
                self.carried[key] = counted or self.carried.get(key, {})
        return Loaded(len(records))

    def dump(self) -> Iterator[Table]:
        records = [
            {**record, **self._live.get(key, {}), **self.carried.get(key, {})} for key, record in self._records.items()
        ]
        if records:
            yield Table(self.kind.name, records=records, port_time_ns=self.port_time())

    def drain(self) -> list[Table]:
        return []

    def settle(self) -> Iterator[Table]:
        records = [
            {**{name: record[name] for name in self.kind.key}, **self.carried[key]}
            for key, record in self._records.items()
            if self.carried.get(key)
        ]
        if records:
            yield Table(self.kind.name, Op.ACCOUNT, records=records, port_time_ns=self.port_time())
