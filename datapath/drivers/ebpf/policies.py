"""Policies in the kernel: tables of a generation, and the word of each port that names its generation.

`policies[slot]` is the word of the port in that slot. Ports with the same rules (by digest) share one generation. A
change puts the new generation's tables in place, flips the word by one store, and deletes the old tables when no port
names them: a program that read the old word meanwhile finds no table and drops the packet as a race, so it is
waited for.
"""

from __future__ import annotations

import ipaddress
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from datapath.drivers.ebpf import layout
from datapath.drivers.ebpf.acl import Compiled, compile_rules
from datapath.drivers.ebpf.clock import barrier
from datapath.drivers.ebpf.kernel import Kernel
from datapath.drivers.ebpf.maps import U32, Outer, Table
from datapath.errors import KernelError
from datapath.state.acl import digest
from datapath.state.kind import Record

_LINK_LOCAL = ipaddress.ip_network("fe80::/10")


@dataclass
class _Generation:
    number: int
    digest: int
    slots: set[int]


class Policies:
    """Thread safe; waits for RCU: never called between a pause and the commit."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._by_digest: dict[int, _Generation] = {}
        self._next = 1
        self._lock = threading.Lock()

    def restore(self, ports: Sequence[tuple[int, Sequence[Record]]]) -> None:
        """Take over generations of an earlier run for (slot, rules), and delete those that no port names."""
        there = set(self._kernel.acl_rows.keys().tolist())
        self._next = max(there, default=0) + 1
        for slot, rules in ports:
            word = int(self._kernel.policies.get(slot) or 0)
            number, known = word & 0xFFFFFFFF, word >> 32
            if known == digest(rules) and (number in there or not rules):
                found = self._by_digest.setdefault(known, _Generation(number, known, set()))
                found.slots.add(slot)
            else:
                self.set(slot, rules)
        for number in there - {one.number for one in self._by_digest.values()}:
            self._delete(number)

    def set(self, slot: int, rules: Sequence[Record]) -> int:
        """Give the port in `slot` these (valid) rules. Returns their digest. Raises UnsupportedKind, KernelError."""
        with self._lock:
            wanted = digest(rules)
            generation = self._by_digest.get(wanted)
            if generation is None:
                generation = _Generation(self._install(rules), wanted, set())
                self._by_digest[wanted] = generation
            self._kernel.policies.set(slot, wanted << 32 | generation.number)
            generation.slots.add(slot)
            self._drop_others(slot, generation)
            return wanted

    def clear(self, slot: int) -> None:
        """The port is gone."""
        with self._lock:
            self._kernel.policies.set(slot, 0)
            self._drop_others(slot, None)

    def _drop_others(self, slot: int, keep: _Generation | None) -> None:
        for known in [one for one in self._by_digest.values() if one is not keep and slot in one.slots]:
            known.slots.discard(slot)
            if not known.slots:
                del self._by_digest[known.digest]
                barrier()
                self._delete(known.number)

    def _outers(self) -> tuple[Outer, ...]:
        kernel = self._kernel
        return kernel.acl_tries, kernel.acl_lines, kernel.acl_rows, kernel.acl_rules, kernel.acl_labels

    def _delete(self, number: int) -> None:
        for outer in self._outers():
            outer.remove(number)

    def _install(self, rules: Sequence[Record]) -> int:
        """Number of a new generation; 0, no tables, for no rules: everything new is dropped."""
        if not rules:
            return 0
        compiled = compile_rules(rules)
        number, self._next = self._next, self._next + 1
        try:
            for outer, fill in zip(self._outers(), (_trie, _line, _rows, _rules, _labels), strict=True):
                if fill is _labels and not compiled.labels.any():
                    continue
                with fill(outer, compiled) as table:
                    outer.put(number, table)
        except KernelError:
            self._delete(number)
            raise
        return number


def _load(outer: Outer, keys: np.ndarray, values: np.ndarray) -> Table:
    table = outer.new(len(keys))
    done = table.load(keys, values)
    if done.refused:
        table.close()
        raise KernelError(f"load {len(keys)} elements for {outer.name}", done.refused[0].errno)
    return table


def _trie(outer: Outer, compiled: Compiled) -> Table:
    keys = np.zeros(len(compiled.prefix_row), layout.ACL_PREFIX)
    keys["length"] = compiled.prefix_length + 32  # the direction comes before the address
    keys["direction"] = compiled.prefix_direction
    keys["addr"] = compiled.prefix_addr.view(">u4")
    return _load(outer, keys, compiled.prefix_row)


def _line(outer: Outer, compiled: Compiled) -> Table:
    intervals = np.zeros(len(compiled.starts), layout.ACL_INTERVAL)
    intervals["start"], intervals["row"] = compiled.starts[:, 0], compiled.starts[:, 1]
    return _load(outer, _indexes(intervals), intervals)


def _rows(outer: Outer, compiled: Compiled) -> Table:
    groups = np.zeros(1 + len(compiled.matrix), layout.ACL_GROUP)
    shape = groups[:1].view(layout.ACL_SHAPE)
    shape[0] = (len(compiled.ids), len(compiled.starts), compiled.groups, 0)
    groups["bits"][1:] = compiled.matrix
    return _load(outer, _indexes(groups), groups)


def _rules(outer: Outer, compiled: Compiled) -> Table:
    rules = np.zeros(len(compiled.ids), layout.ACL_RULE)
    rules["id"], rules["action"], rules["log"] = compiled.ids, compiled.actions, compiled.logs
    rules["label"] = compiled.labels
    return _load(outer, _indexes(rules), rules)


def _labels(outer: Outer, compiled: Compiled) -> Table:
    return _load(outer, _indexes(compiled.label_table), compiled.label_table)


def _indexes(values: np.ndarray) -> np.ndarray:
    return np.arange(len(values), dtype=U32)


def first_ipv4(wanted: Sequence[str]) -> int:
    """port.address: the first IPv4 address, 0 when there is none."""
    return next((int(address) for address in map(ipaddress.ip_address, wanted) if address.version == 4), 0)


def set_addresses(addresses: Table, slot: int, wanted: Sequence[str]) -> None:
    """Make `wanted` the addresses of the port in `slot` (anti-spoofing); other ports' stay.

    Link-local IPv6 addresses are free unless some are wanted: then only these are the port's (address.h).
    """
    own = [text for text in wanted if ipaddress.ip_address(text) in _LINK_LOCAL]
    keys = address_keys(slot, [*wanted, str(_LINK_LOCAL.network_address)] if own else wanted)
    if len(keys):
        addresses.load(keys, np.ones(len(keys), U32))
    there = addresses.keys()
    there = there[there["slot"] == slot]
    gone = [key for key in there if not any(np.array_equal(key["addr"], other["addr"]) for other in keys)]
    for key in gone:
        addresses.delete(key)


def address_keys(slot: int, addresses: Sequence[str]) -> np.ndarray:
    """Keys of the map `addresses`, IPv4 v4-mapped."""
    keys = np.zeros(len(addresses), layout.ADDRESS_KEY)
    for row, text in enumerate(addresses):
        address = ipaddress.ip_address(text)
        packed = address.packed if address.version == 6 else b"\0" * 10 + b"\xff\xff" + address.packed
        keys[row] = (slot, np.frombuffer(packed, ">u4"))
    return keys
