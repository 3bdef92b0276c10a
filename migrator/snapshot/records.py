"""The body of a section of a kind with few records: a list of maps with field names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

import msgpack

from datapath.state.kind import Kind, Op, Record
from migrator.errors import Corrupt, SnapshotError
from migrator.snapshot.format import BODY_BYTES, DEPTH_MAX, ITEMS_MAX, pack

_LIST_HEAD = 5
_SCALARS = (str, int, bool, type(None))
_INT_MIN, _INT_MAX = -(1 << 63), (1 << 64) - 1


def encode_records(kind: Kind, op: Op, records: Sequence[Record]) -> Iterator[tuple[int, bytes]]:
    """Bodies for `records` in order, each with the number of its records. Raises SnapshotError before the first."""
    packed = [pack(_checked(kind, op, record, SnapshotError)) for record in records]
    largest = max(packed, key=len, default=b"")
    if len(largest) > BODY_BYTES - _LIST_HEAD:
        raise SnapshotError(f"one record of kind {kind.name} takes {len(largest)} bytes: at most {BODY_BYTES} fit")
    part: list[bytes] = []
    size = 0
    for item in packed:
        if size + len(item) > BODY_BYTES - _LIST_HEAD or len(part) == ITEMS_MAX:
            yield len(part), _list(part)
            part, size = [], 0
        part.append(item)
        size += len(item)
    if part:
        yield len(part), _list(part)


def _list(items: Sequence[bytes]) -> bytes:
    head: bytes = msgpack.Packer().pack_array_header(len(items))
    return head + b"".join(items)


def decode_records(kind: Kind, op: Op, body: object, count: int) -> list[Record]:
    """Records of a body: unknown fields left out, missing ones that have a default filled in (load only).

    Raises Corrupt.
    """
    if not isinstance(body, list):
        raise Corrupt("records have to be a list", field="body")
    if len(body) != count:
        raise Corrupt(f"{len(body)} records where {count} were announced", field="count")
    return [_decoded(kind, op, record) for record in body]


def _decoded(kind: Kind, op: Op, record: object) -> Record:
    if not isinstance(record, dict):
        raise Corrupt(f"a record of kind {kind.name} has to be a map")
    known = {name: value for name, value in record.items() if name in kind.fields}
    if op.whole:
        known.update({name: deepcopy(value) for name, value in kind.defaults.items() if name not in known})
    return _checked(kind, op, known, Corrupt)


def _checked(kind: Kind, op: Op, record: Mapping[str, Any], error: type[SnapshotError]) -> Record:
    """`record` as it is, with every field of a type that the kind allows and none missing that `op` needs."""
    optional = {*kind.accounting, *kind.since, *kind.defaults}
    needed = kind.fields.keys() - optional if op.whole else kind.key
    for name in sorted(needed):
        if name not in record:
            raise error(f"a record of kind {kind.name} lacks it", field=name)
    for name, value in record.items():
        allowed = kind.fields.get(name)
        if allowed is None:
            raise error(f"kind {kind.name} has no such field", field=name)
        if type(value) not in allowed:
            raise error(f"{type(value).__name__} where {_names(allowed)} belongs", field=name)
        _check_value(name, value, error)
        if name in kind.choices and value not in kind.choices[name]:
            raise error(f"{value[:32]!r} is none of {', '.join(sorted(kind.choices[name]))}", field=name)
    return dict(record)


def _check_value(name: str, value: object, error: type[SnapshotError], depth: int = 0) -> None:
    if isinstance(value, int) and not _INT_MIN <= value <= _INT_MAX:
        raise error("an integer of more than 64 bits", field=name)
    if isinstance(value, _SCALARS):
        return
    if depth == DEPTH_MAX:
        raise error(f"lists and maps nested more than {DEPTH_MAX} deep", field=name)
    if not isinstance(value, (list, dict)):
        raise error(f"{type(value).__name__} cannot be part of a record", field=name)
    if len(value) > ITEMS_MAX:
        raise error(f"{len(value)} elements: at most {ITEMS_MAX} fit", field=name)
    if isinstance(value, dict) and not all(isinstance(key, str) for key in value):
        raise error("the keys of a map have to be text", field=name)
    for item in value.values() if isinstance(value, dict) else value:
        _check_value(name, item, error, depth + 1)


def _names(types: Sequence[type]) -> str:
    return " or ".join(kind.__name__ for kind in types)
