"""What a kind of state is, and the table that carries it.

A kind is one sort of state of one port. Its records are portable: no ifindex, map descriptor, slot, policy generation
or absolute time. A kind with few records is a list of maps (`records`), a kind with many is columns: one NumPy array a
field, all of one length, so that packing is a copy and unpacking a view.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datapath.state.document import Document

Columns = dict[str, NDArray[Any]]
"""Field name -> array; all of one length. Integers little-endian, addresses `V16` (network order, IPv4 v4-mapped)."""

Record = dict[str, Any]
"""One record of a kind with few: field name -> str, int, bool, None, or list / map of these."""


class Nature(enum.Flag):
    """When a kind's state has to be at the destination."""

    CONFIGURATION = enum.auto()  # at prepare
    LIVE = enum.auto()  # before the guest runs there
    ACCOUNTING = enum.auto()  # after the switchover, assigned, not added


class Op(enum.StrEnum):
    """What a table asks the destination to do."""

    LOAD = "load"  # make these records so, whatever was there under their key
    DELETE = "delete"  # these keys are gone (key columns only)
    ACCOUNT = "account"  # assign what the source counted (key and accounting columns)
    FILL = "fill"  # make these records so where there is none under their key: what is there is newer and stays

    @property
    def whole(self) -> bool:
        """Its records have all their fields, not keys and counts alone."""
        return self in (Op.LOAD, Op.FILL)


@dataclass(frozen=True)
class Column:
    """One column: NumPy dtype (explicit byte order) and the value that readers take when a snapshot lacks it.

    `default` None: the column is required. `values`: what it may hold, empty for anything. For people: `labels` names
    values, `bits` names bits. `volatile`: it changes by itself or at every packet, so that a watch tells it with other
    changes, but is not told of its own.
    `number`: a `V16` that is no address but a number, big-endian. `sparse`: a section in which all values are zero has
    no such column.
    """

    dtype: str
    default: int | bytes | None = None
    accounting: bool = False
    volatile: bool = False
    number: bool = False
    sparse: bool = False
    values: frozenset[int] = frozenset()
    labels: Mapping[int, str] = field(default_factory=dict)
    bits: Mapping[int, str] = field(default_factory=dict)

    def admits(self, array: NDArray[Any]) -> bool:
        """May the column hold every value of `array`, which is of its dtype?"""
        if not self.values:
            return True
        if self.dtype == "u1":
            return bool(_admitted(self.values)[array].all())
        return bool(np.isin(array, list(self.values)).all())


@cache
def _admitted(values: frozenset[int]) -> NDArray[np.bool_]:
    admitted = np.zeros(256, dtype=bool)
    admitted[list(values)] = True
    return admitted


@dataclass(frozen=True)
class Claim:
    """What only one port may have: the values of `fields` in a record, together. `what` names it for people.

    In the whole cluster, or with `by_network` among the ports of each network.
    """

    fields: tuple[str, ...]
    what: str
    by_network: bool = False

    def of(self, record: Record) -> tuple[Any, ...]:
        """What a record claims."""
        return tuple(record[name] for name in self.fields)


@dataclass(frozen=True)
class Kind:
    """One kind of state.

    `key` names the fields that identify a record. `required`: a destination that does not know the kind must refuse.
    Exactly one of `columns` and `fields` is given. `fields` maps a record's field to its Python types; `defaults` has
    the values that readers take for fields which a snapshot lacks, `accounting` the fields that may be missing
    because they are only counted (they are never filled in), `live` those that the switch changes by itself: where one
    is missing, it stays as it is. `choices` has what a field may hold, where that is a list. `document` is what an
    operator writes for the kind at a port; None: it is not declared so. `announced` is the field with an address that
    the network looks for at the port: where the VM opens it is announced as the port's own are. `part_of` names the
    kind without which a port has nothing of this one. `claim` has what no two ports may declare. `late`: a guest that
    had to begin without gets its records afterwards, by tables to fill. `since` names fields of records that a later
    version than the first brought: a record has them only where they are used, and is then one of that version
    (`version_of`).
    """

    name: str
    version: int
    nature: Nature
    key: tuple[str, ...]
    required: bool = True
    columns: Mapping[str, Column] = field(default_factory=dict)
    fields: Mapping[str, tuple[type, ...]] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    accounting: tuple[str, ...] = ()
    live: tuple[str, ...] = ()
    choices: Mapping[str, frozenset[str]] = field(default_factory=dict)
    document: type[Document] | None = None
    announced: str = ""
    part_of: str = ""
    claim: Claim | None = None
    late: bool = False
    since: Mapping[str, int] = field(default_factory=dict)

    def bare(self, record: Record) -> Record:
        """The record as it is configured: without what is counted and what the switch changes."""
        moving = {*self.accounting, *self.live}
        return {name: value for name, value in record.items() if name not in moving}

    @property
    def optional(self) -> frozenset[str]:
        """Fields that a record to load may lack: what is counted or live, and what not every record uses."""
        return frozenset((*self.accounting, *self.live, *self.since))

    def version_of(self, records: Iterable[Record]) -> int:
        """Version that a reader of these records has to know."""
        if not self.since:
            return self.version
        used = {name for record in records for name in self.since if name in record}
        return max((self.since[name] for name in used), default=min(self.since.values()) - 1)

    def key_of(self, record: Record) -> tuple[Any, ...]:
        """What identifies a record of the kind within its port."""
        return tuple(record[name] for name in self.key)


@dataclass(frozen=True)
class Table:
    """Records of one kind, or their keys. Exactly one of `columns` and `records` is set, as the kind says.

    `port_time_ns` is the port's clock when the table was read; ages in it count back from there.
    """

    kind: str
    op: Op = Op.LOAD
    columns: Columns | None = None
    records: Sequence[Record] | None = None
    port_time_ns: int = 0

    def __len__(self) -> int:
        if self.columns is not None:
            return next((len(a) for a in self.columns.values()), 0)
        return len(self.records or ())


def empty_columns(kind: Kind, count: int = 0) -> Columns:
    """Zeroed columns of a kind for `count` records."""
    return {name: np.zeros(count, dtype=column.dtype) for name, column in kind.columns.items()}
