"""What is in a snapshot, for people and as JSON: the same values as text."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, BinaryIO

from numpy.typing import NDArray

from datapath.registry import KINDS
from datapath.state.kind import Column, Record, Table
from migrator.snapshot import SnapshotReader


def inspect(stream: BinaryIO) -> dict[str, Any]:
    """Header, counts and totals of a snapshot, read to its end and wholly checked, as JSON takes it.

    Raises Corrupt, Incompatible.
    """
    reader = SnapshotReader(stream)
    accounts: dict[str, int] = {}
    for section in reader:
        if section.op != "load":
            accounts[section.kind] = accounts.get(section.kind, 0) + section.count
    header, summary = reader.header, reader.summary
    return {
        "vm": header.vm,
        "source": header.source,
        "driver": header.driver,
        "kinds": {
            name: {"version": kind.version, "optional": kind.optional, "known": name in KINDS}
            for name, kind in header.kinds.items()
        },
        "ports": {
            mac: {kind: count for (port, kind), count in summary.counts.items() if port == mac} for mac in header.ports
        },
        "accounting": accounts,
        "needs": {"rules_max": header.rules_max, "connections": header.connections},
        "skipped": summary.skipped,
        "sections": summary.tally.sections,
        "records": summary.tally.records,
        "bytes": summary.tally.bytes,
        "digest": f"{summary.tally.digest:016x}",
    }


def records(stream: BinaryIO, *, kind: str = "", port: str = "", limit: int | None = None) -> Iterator[dict[str, Any]]:
    """Records of a snapshot as `{"port", "kind", "op", "record"}`, of one kind or port only where named.

    Raises Corrupt, Incompatible; what was given until then may be of a damaged snapshot.
    """
    return islice(_records(stream, kind, port), limit)


def _records(stream: BinaryIO, kind: str, port: str) -> Iterator[dict[str, Any]]:
    for section in SnapshotReader(stream):
        if section.table and kind in ("", section.kind) and port in ("", section.port):
            for row in rows(section.table):
                yield {"port": section.port, "kind": section.kind, "op": str(section.op), "record": row}


def rows(table: Table, limit: int | None = None) -> Iterator[Record]:
    """Records of a table as people read them: addresses and MACs as text, names for states, protocols and flags."""
    if table.columns is None:
        return islice((dict(record) for record in table.records or ()), limit)
    kind = KINDS[table.kind]
    shown = {name: _shown(kind.columns[name], array[:limit]) for name, array in table.columns.items()}
    return (dict(zip(shown, values, strict=True)) for values in zip(*shown.values(), strict=True))


def _shown(column: Column, array: NDArray[Any]) -> list[Any]:
    values: list[Any] = array.tolist()
    if column.number:
        return [hex(int.from_bytes(value, "big")) for value in values]
    show = _SHOW.get(column.dtype)
    if show:
        return [show(value) for value in values]
    if column.labels:
        return [column.labels.get(value, value) for value in values]
    if column.bits:
        return [_bits(column.bits, value) for value in values]
    return values


def _address(packed: bytes) -> str:
    address = ipaddress.IPv6Address(packed)
    return str(address.ipv4_mapped or address)


def _mac(packed: bytes) -> str:
    return packed.hex(":")


def _bits(names: Mapping[int, str], value: int) -> list[str]:
    rest = value & ~sum(names)
    return [name for bit, name in names.items() if value & bit] + ([hex(rest)] if rest else [])


_SHOW: dict[str, Callable[[bytes], str]] = {"V16": _address, "V6": _mac}
