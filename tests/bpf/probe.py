# SPDX-License-Identifier: GPL-2.0-only
"""A port for tests of judge(): its table, dirty set and policy, and packets of its guest as frames.

It runs on ct_probe.bpf.c, whose programs return enum drop_reason. Every port takes a slot of its own.
"""

from __future__ import annotations

import ctypes
import itertools
import struct
import time
from typing import Any

import numpy as np

from datapath.drivers.ebpf.acl import Compiled, compile_rules

from . import frames
from .harness import Switch
from .model import MODEL
from .sysbpf import Map

FROM, TO = 0, 1
FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16
ICMP = 1
GUEST_MAC, PEER_MAC = frames.mac(1), frames.mac(2)
GUEST, PEER, OTHER = "10.0.0.1", "192.0.2.9", "192.0.2.77"
GUEST6, PEER6 = "2001:db8::1", "2001:db8:f::9"
TIMEOUTS_MS = {
    "CT_SYN_SENT": 120_000,
    "CT_SYN_RECV": 60_000,
    "CT_ESTABLISHED": 432_000_000,
    "CT_FIN_WAIT": 120_000,
    "CT_CLOSE_WAIT": 60_000,
    "CT_LAST_ACK": 30_000,
    "CT_TIME_WAIT": 120_000,
    "CT_CLOSE": 10_000,
    "CT_SYN_SENT2": 120_000,
    "TIMEOUT_UDP": 30_000,
    "TIMEOUT_UDP_STREAM": 120_000,
    "TIMEOUT_ICMP": 30_000,
    "TIMEOUT_OTHER": 600_000,
    "TIMEOUT_FRAGMENT": 30_000,
}

_slots = itertools.count(1)
_generations = itertools.count(1)


def rule(number: int, direction: str, action: str = "allow", **fields: Any) -> dict[str, Any]:
    """A rule of any protocol, remote and port unless `fields` say more."""
    return {
        "id": number,
        "direction": direction,
        "priority": number,
        "protocol": "any",
        "remote": [],
        "ports": [],
        "icmp": [],
        "action": action,
        "log": False,
        **fields,
    }


FROM_ONLY = [rule(1, "from")]
BOTH = [rule(1, "from"), rule(2, "to")]


def tcp(source: int, target: int, flags: int, data: bytes = b"") -> bytes:
    return struct.pack("!HHIIBBHHH", source, target, 1, 2, 5 << 4, flags, 1024, 0, 0) + data


def icmp(kind: int, code: int = 0, identifier: int = 0, data: bytes = b"") -> bytes:
    return struct.pack("!BBHHH", kind, code, 0, identifier, 0) + data


class Probe:
    """One active port."""

    def __init__(self, switch: Switch, rules: list[dict[str, Any]], *, flags: int = 0, limit: int = 1024) -> None:
        self.switch = switch
        self.slot = next(_slots)
        self.table = switch.inner("conntracks", self.slot, "ct_table", limit)
        self.changes: Map | None = None
        timeouts = (ctypes.c_uint32 * 16)()
        for name, value in TIMEOUTS_MS.items():
            timeouts[getattr(MODEL, name)] = value
        word = 1 << 32 | flags << 8 | MODEL.PORT_ACTIVE
        # an hour of port time has passed, so that entries can be old
        base = time.monotonic_ns() - 3_600_000_000_000
        port = MODEL.port(word=word, slot=self.slot, policy=self.slot, timeouts=timeouts, time_base=base % (1 << 64))
        switch.put("ports", self.slot, port)
        self.digest = self.set_policy(rules)

    # -- set up

    def set_policy(self, rules: list[dict[str, Any]]) -> int:
        """Install the rules as a new generation and flip to it. Returns their digest."""
        compiled = compile_rules(rules)
        generation = next(_generations)
        load_policy(self.switch, generation, compiled)
        self.switch.put("policies", self.slot, compiled.digest << 32 | generation)
        return compiled.digest

    def track(self, limit: int = 4096) -> None:
        """Switch change tracking on."""
        self.changes = self.switch.inner("dirty", self.slot, "dirty_set", limit)

    @property
    def port(self) -> Any:
        return self.switch.get("ports", "port", self.slot)

    def change(self, **fields: int) -> None:
        port = self.port
        for name, value in fields.items():
            setattr(port, name, value % (1 << 64) if name == "time_base" else value)
        self.switch.put("ports", self.slot, port)

    def set_flags(self, flags: int, state: int | None = None) -> None:
        state = MODEL.PORT_ACTIVE if state is None else state
        self.change(word=1 << 32 | flags << 8 | state)

    def pass_time(self, seconds: float) -> None:
        """Port time runs on by that much."""
        self.change(time_base=self.port.time_base - int(seconds * 1e9))

    # -- packets

    def send(self, direction: int, frame: bytes, **fields: int) -> int:
        """The frame through parse() and judge(): enum drop_reason."""
        program = "probe_to" if direction else "probe_from"
        return self.switch.run(program, frame, mark=self.slot, **fields).verdict

    def frame(self, direction: int, proto: int, body: bytes, *, v6: bool = False, peer: str = "") -> bytes:
        own, other = (GUEST6, peer or PEER6) if v6 else (GUEST, peer or PEER)
        source, target = (other, own) if direction else (own, other)
        macs = (GUEST_MAC, PEER_MAC) if direction else (PEER_MAC, GUEST_MAC)
        build = frames.ipv6 if v6 else frames.ipv4
        return frames.ethernet(*macs, frames.IPV6 if v6 else frames.IPV4, build(source, target, proto, body))

    def tcp(self, direction: int, flags: int, lport: int = 40000, rport: int = 80, **options: Any) -> int:
        data = options.pop("data", b"")
        ports = (rport, lport) if direction else (lport, rport)
        return self.send(direction, self.frame(direction, frames.TCP, tcp(*ports, flags, data), **options))

    def udp(self, direction: int, lport: int = 40000, rport: int = 53, **options: Any) -> int:
        data = options.pop("data", b"")
        ports = (rport, lport) if direction else (lport, rport)
        return self.send(direction, self.frame(direction, frames.UDP, frames.udp(*ports, data), **options))

    def icmp(self, direction: int, kind: int, identifier: int = 7, *, v6: bool = False, code: int = 0) -> int:
        proto = frames.ICMP6 if v6 else ICMP
        return self.send(direction, self.frame(direction, proto, icmp(kind, code, identifier), v6=v6))

    # -- the table

    def key(self, proto: int, lport: int = 40000, rport: int = 80, *, v6: bool = False, **fields: Any) -> bytes:
        own, other = (GUEST6, PEER6) if v6 else (GUEST, PEER)
        own, other = fields.get("guest", own), fields.get("peer", other)
        tail = struct.pack("!HHBBBB", lport, rport, proto, fields.get("type", 0), fields.get("side", 0), 0)
        return frames.address(own) + frames.address(other) + tail

    def entry(self, key: bytes) -> Any:
        """struct ct_entry or None."""
        value = self.table.lookup(key)
        return None if value is None else MODEL.ct_entry.from_buffer_copy(value)

    def put(self, key: bytes, state: int, flags: int = 0, **fields: Any) -> None:
        """An entry judged under the policy as it is, seen now, unless `fields` say more."""
        identifier = fields.pop("id", 0x1122334455667788)
        word = (identifier & 0xFFFFFFFF) << 32 | flags << 8 | state
        fields = {"seen": self.now(), "judged": self.digest} | fields
        self.table.update(key, bytes(MODEL.ct_entry(word=word, id=identifier, **fields)))

    def now(self) -> int:
        """Port time."""
        return int((time.monotonic_ns() - self.port.time_base) % (1 << 64))

    def drain(self) -> set[bytes]:
        """Keys marked dirty since the last drain."""
        assert self.changes is not None
        keys = set(self.changes.keys())
        for key in keys:
            self.changes.delete(key)
        return keys

    def hits(self, number: int) -> tuple[int, int]:
        """(packets, bytes) of a rule, 0 the default drop; of all CPUs."""
        value = self.switch.maps["rule_hits"].lookup(struct.pack("=II", self.slot, number))
        counts = np.frombuffer(value or b"\0" * 16, "<u8").reshape(-1, 2).sum(axis=0)
        return int(counts[0]), int(counts[1])

    def counted(self, field: str) -> int:
        value = self.switch.maps["counters"].lookup(struct.pack("=I", self.slot))
        assert value is not None
        size = ctypes.sizeof(MODEL.counters)
        each = [MODEL.counters.from_buffer_copy(value, at) for at in range(0, len(value) // size * size, size)]
        return sum(getattr(one, field) for one in each)


def state(entry: Any) -> int:
    return int(entry.word & 0xFF)


def flags(entry: Any) -> int:
    return int(entry.word >> 8 & 0xFF)


def load_policy(switch: Switch, generation: int, compiled: Compiled) -> None:
    """The tables of a generation into the kernel's maps, in the layout that acl.h reads."""
    trie = switch.inner("acl_tries", generation, "acl_trie", max(1, len(compiled.prefix_row)))
    for direction, length, addr, row in zip(
        compiled.prefix_direction, compiled.prefix_length, compiled.prefix_addr, compiled.prefix_row, strict=True
    ):
        trie.update(struct.pack("=IB3x", 32 + int(length), int(direction)) + addr.tobytes(), struct.pack("=I", row))
    line = switch.inner("acl_lines", generation, "acl_line", len(compiled.starts))
    for index, (start, row) in enumerate(compiled.starts):
        line.update(struct.pack("=I", index), struct.pack("=II", start, row))
    matrix = switch.inner("acl_rows", generation, "acl_matrix", 1 + len(compiled.matrix))
    shape = struct.pack("=III5I", len(compiled.ids), len(compiled.starts), compiled.groups, *[0] * 5)
    matrix.update(struct.pack("=I", 0), shape)
    for index, bits in enumerate(compiled.matrix, 1):
        matrix.update(struct.pack("=I", index), bits.tobytes())
    ranked = switch.inner("acl_rules", generation, "acl_list", max(1, len(compiled.ids)))
    columns = (compiled.ids, compiled.actions, compiled.logs, compiled.labels)
    for index, (number, action, log, label) in enumerate(zip(*columns, strict=True)):
        ranked.update(struct.pack("=I", index), struct.pack("=IBBH", number, action, log, label))
    if compiled.labels.any():
        spoken = switch.inner("acl_labels", generation, "acl_label_list", len(compiled.label_table))
        for index, element in enumerate(compiled.label_table):
            spoken.update(struct.pack("=I", index), element.tobytes())
