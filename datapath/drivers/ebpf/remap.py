"""Kind `remap` in the kernel: rules as elements of the map `remaps` (datapath/bpf/lib/remap_rule.h reads them)."""

from __future__ import annotations

import socket
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from datapath.drivers.ebpf.instances import Instance
from datapath.drivers.ebpf.kindtable import KindTable
from datapath.drivers.ebpf.layout import REMAP_ENTRY, REMAP_KEY, C
from datapath.drivers.ebpf.maps import Records
from datapath.errors import LoadRejected
from datapath.state.kind import Record
from datapath.state.remap import COUNTERS, PROTOCOLS, REMAP, ByAddress, problems

if TYPE_CHECKING:
    from datapath.drivers.ebpf.running import Running

Elements = tuple[Records, Records]
_End = tuple[str, int, int]  # address, protocol, port
_Row = tuple[_End, _End, int]  # of one side: its end, the other side's, enum remap_flag
_NONE: Elements = (np.zeros(0, REMAP_KEY), np.zeros(0, REMAP_ENTRY))
_RULE = np.dtype([("key", REMAP_KEY), ("addr", ">u4", 4), ("port", ">u2"), ("flags", "u1")])
_PARTS = {"from": ("inside", "REMAP_OUT"), "to": ("outside", "REMAP_IN")}


def elements(slot: int, records: Sequence[Record]) -> Elements:
    """Keys and values for both directions: 2 a rule, and 1 for each address of which only ports have rules."""
    inside, outside = _ends(records, "inside"), _ends(records, "outside")
    sides = ((C.REMAP_OUT, _rows(inside, outside)), (C.REMAP_IN, _rows(outside, inside)))
    rows = [(side, *row) for side, found in sides for row in found]
    keys, values = np.zeros(len(rows), REMAP_KEY), np.zeros(len(rows), REMAP_ENTRY)
    if rows:
        numbers, ends, others, flags = zip(*rows, strict=True)
        _fill(keys, ends)
        _fill(values, others)
        keys["slot"], keys["side"] = slot, numbers
        keys["proto"] = [proto for _, proto, _ in ends]
        values["flags"] = flags
    return keys, values


def _ends(records: Sequence[Record], side: str) -> list[_End]:
    return [(r[side], PROTOCOLS[r["protocol"]], r[f"{side}_port"]) for r in records]


def _rows(ends: list[_End], others: list[_End]) -> list[_Row]:
    """Of one side: a row for each rule, and one for each address that has rules by port only."""
    by_port: dict[str, str] = {}
    for end, other in zip(ends, others, strict=True):
        if end[1]:  # of several addresses one, whatever the order of the rules
            by_port[end[0]] = min(other[0], by_port.get(end[0], other[0]))
    beside = {address for address, proto, _ in others if proto}
    rule, ports, aside = int(C.REMAP_F_RULE), int(C.REMAP_F_PORTS), int(C.REMAP_F_BESIDE)
    rows: list[_Row] = []
    for end, other in zip(ends, others, strict=True):
        flags = rule
        if not end[1]:
            flags |= (ports if end[0] in by_port else 0) | (aside if other[0] in beside else 0)
        rows.append((end, other, flags))
    whole = {address for address, proto, _ in ends if not proto}
    partial = [(address, other) for address, other in by_port.items() if address not in whole]
    return rows + [((address, 0, 0), (other, 0, 0), ports) for address, other in partial]


def _fill(records: Records, ends: Sequence[_End]) -> None:
    packed = b"".join(_packed(address) for address, _, _ in ends)
    records["addr"] = np.frombuffer(packed, ">u4").reshape(len(ends), 4)
    records["port"] = [port for _, _, port in ends]


def _packed(text: str) -> bytes:
    """16 bytes, IPv4 v4-mapped, as records.address_bytes, which takes seconds for ten thousand rules."""
    return socket.inet_pton(socket.AF_INET6, text if ":" in text else f"::ffff:{text}")


class RemapTable(KindTable):
    """The rules of all ports are in one map; this remembers how many elements of it are each port's."""

    kind = REMAP

    def __init__(self, parts: Running) -> None:
        super().__init__(parts)
        self._map = parts.kernel.remaps
        self._lock = threading.Lock()  # of what follows
        self._sizes: dict[int, int] | None = None
        self._addresses: dict[int, tuple[Sequence[Record], ByAddress]] = {}  # by slot: of which rules, and it

    # ---- make ----

    def apply(self, instance: Instance, records: Sequence[Record], before: Sequence[Record]) -> None:  # noqa: ARG002
        self._change(instance.slot, records, self._there(instance.slot), records)

    def amend(
        self,
        instance: Instance,
        records: Sequence[Record],
        before: Sequence[Record],
        *,
        gone: Sequence[Record],
        new: Sequence[Record],
    ) -> None:
        """What rules that share no address with the changed ones are is no matter, and their elements stay."""
        slot = instance.slot
        if not before:
            self.apply(instance, records, before)
            return
        made_of, addresses = self._addresses.pop(slot, ((), None))
        if addresses is None or made_of is not before:
            addresses = ByAddress(before)
        here = elements(slot, addresses.near((*gone, *new)))
        addresses.change(gone, new)
        self._change(slot, addresses.near((*gone, *new)), here, records)
        self._addresses[slot] = (records, addresses)

    def _change(self, slot: int, new: Sequence[Record], here: Elements, records: Sequence[Record]) -> None:
        """Of the port's `records` these are to be written: in place of the elements that are here of them."""
        found = problems(new)
        if found:
            raise LoadRejected(f"remap: {'; '.join(found[:5])}", hint="rules are one to one; nothing was changed")
        wanted = elements(slot, new)
        fresh = ~_among(_rules(wanted), _rules(here))
        self._write((wanted[0][fresh], wanted[1][fresh]), here)
        self._enable(slot, bool(records))
        self._map.delete_many(here[0][~_among(here[0], wanted[0])])
        self._grow(slot, len(wanted[0]) - len(here[0]))

    def _write(self, fresh: Elements, here: Elements) -> None:
        """What is there keeps its counters. Raises LoadRejected; then nothing has changed."""
        keys, values = fresh
        old = _among(keys, here[0])
        room = self._room()
        if int((~old).sum()) > room:
            raise LoadRejected(
                f"remap: {len(keys)} elements are to be written, and this host has room for {room} more",
                hint="remove remap rules of other ports of this host",
            )
        for index in np.flatnonzero(old):
            there = self._map.get(keys[index])
            if there is not None:
                values["packets"][index], values["bytes"][index] = there["packets"], there["bytes"]
        done = self._map.load(keys, values)
        if done.refused:
            self._map.delete_many(keys[~old])
            raise LoadRejected(f"remap: {len(done.refused)} elements were refused by the kernel", hint="see its memory")

    def _enable(self, slot: int, on: bool) -> None:
        self._parts.words.feature(slot, add=C.FEATURE_REMAP if on else 0, drop=C.FEATURE_REMAP)

    def clear(self, slot: int) -> None:
        self._enable(slot, on=False)
        self._addresses.pop(slot, None)
        keys, _ = self._there(slot)
        self._map.delete_many(keys)
        self._grow(slot, -len(keys))

    def _there(self, slot: int) -> Elements:
        """What the kernel has of a slot."""
        with self._lock:
            if not self._counted_sizes().get(slot):
                return _NONE
        keys, values = self._map.read()
        mine = keys["slot"] == slot
        return keys[mine], values[mine]

    def _counted_sizes(self) -> dict[int, int]:
        """By slot; counted once, what an earlier run left. The caller has the lock."""
        if self._sizes is None:
            self._sizes = dict(Counter(self._map.read()[0]["slot"].tolist()))
        return self._sizes

    def _room(self) -> int:
        with self._lock:
            return self._map.entries - sum(self._counted_sizes().values())

    def _grow(self, slot: int, number: int) -> None:
        with self._lock:
            sizes = self._counted_sizes()
            sizes[slot] = sizes.get(slot, 0) + number

    # ---- count ----

    def dump(self, instance: Instance, records: Sequence[Record]) -> list[Record]:
        counted = self._counted(instance, records)
        return [{**record, **counts} for record, counts in zip(records, counted, strict=True)]

    def counted(self, instance: Instance, records: Sequence[Record]) -> list[Record]:
        counted = self._counted(instance, records)
        keys = [{name: record[name] for name in REMAP.key} for record in records]
        return [{**key, **counts} for key, counts in zip(keys, counted, strict=True) if any(counts.values())]

    def _counted(self, instance: Instance, records: Sequence[Record]) -> list[Record]:
        """Here and before, a record of counters for each rule."""
        carried = instance.entry.carried.get(REMAP.name, {})
        counts = np.zeros((len(records), len(COUNTERS)), np.uint64)
        for row, record in zip(counts, records, strict=True):
            row[:] = carried.get(_text(record), 0)
        keys, values = self._map.read()
        for column, (side, direction) in enumerate(_PARTS.values()):
            mine = (keys["slot"] == instance.slot) & (keys["side"] == getattr(C, direction))
            found = dict(zip(_ends_of(keys[mine]), values[mine], strict=True))
            for row, end in zip(counts, _ends(records, side), strict=True):
                entry = found.get((_packed(end[0]), *end[1:]))
                if entry is not None:
                    row[column] += entry["packets"]
                    row[column + 2] += entry["bytes"]
        return [dict(zip(COUNTERS, row.tolist(), strict=True)) for row in counts]

    def account(self, instance: Instance, records: Sequence[Record]) -> None:
        if records:
            carried = dict(instance.entry.carried.get(REMAP.name, {}))
            carried |= {_text(record): [record.get(name, 0) for name in COUNTERS] for record in records}
            instance.entry = instance.entry.with_carried(REMAP.name, carried)
            self._parts.ledger.save_carried(instance.entry)

    def obstacles(self, records: Sequence[Record]) -> list[str]:
        needed, room = len(elements(0, records)[0]), self._room()
        return [f"remap: {needed} elements are needed, and there is room for {room}"] if needed > room else []


def _text(record: Record) -> str:
    """A rule's key in the ledger."""
    return "/".join(str(record[name]) for name in REMAP.key)


def _ends_of(keys: Records) -> Iterable[tuple[bytes, int, int]]:
    packed = np.ascontiguousarray(keys["addr"]).tobytes()
    addresses = (packed[start : start + 16] for start in range(0, len(packed), 16))
    return zip(addresses, keys["proto"].tolist(), keys["port"].tolist(), strict=True)


def _rules(some: Elements) -> Records:
    """Keys and what they lead to, without what is counted."""
    keys, values = some
    rules = np.zeros(len(keys), _RULE)
    rules["key"] = keys
    for name in ("addr", "port", "flags"):
        rules[name] = values[name]
    return rules


def _among(some: Records, others: Records) -> NDArray[np.bool_]:
    """Which of `some` are in `others`, by their bytes."""
    there = set(_split(others))
    return np.fromiter((one in there for one in _split(some)), bool, len(some))


def _split(records: Records) -> Iterable[bytes]:
    size, packed = records.dtype.itemsize, np.ascontiguousarray(records).tobytes()
    return (packed[start : start + size] for start in range(0, len(packed), size))
