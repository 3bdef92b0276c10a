"""What nf_conntrack's netlink interface allows, in a process of its own in the namespace that it is started in.

    python -m bench.netlink raw|pyroute2 COUNT

raw: the kernel's messages copied as they are, and given back as messages that are ready made: no program can be
quicker than that through this interface. pyroute2: its conntrack class, as a Python program would use it.
It prints one line of JSON: for "dump" and "load" seconds, seconds of CPU, peak memory in bytes, and entries.
"""

from __future__ import annotations

import json
import socket
import struct
import sys
from collections.abc import Callable
from typing import Any

from bench.figures import measured

NETLINK_NETFILTER, SUBSYSTEM = 12, 1 << 8
NEW, GET, DELETE = (SUBSYSTEM | number for number in (0, 1, 2))
REQUEST, CREATE, DUMP = 0x1, 0x400, 0x300
DONE, ERROR = 3, 2
KEPT = {1, 2, 3, 4, 7}  # CTA_TUPLE_ORIG, _REPLY, _STATUS, _PROTOINFO, _TIMEOUT
STATUS, SETTABLE = 3, 0x6  # SEEN_REPLY, ASSURED: the kernel sets the others itself
NESTED = 0x3FFF
HEADER = struct.Struct("=IHHII")
FAMILY = bytes((socket.AF_INET, 0, 0, 0))
BATCH = 64 << 10
BUFFER = 1 << 20
PYROUTE2_LOADS = 1_000


def main(arguments: list[str]) -> int:
    how, count = arguments[1], int(arguments[2])
    print(json.dumps({"raw": raw, "pyroute2": by_pyroute2}[how](count)))
    return 0


def raw(count: int) -> dict[str, Any]:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER) as link:
        link.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)  # SO_RCVBUFFORCE
        link.bind((0, 0))
        found: list[bytes] = []
        figures = {"dump": _of(lambda: found.extend(_dump(link)), lambda: count)}
        batches = _batches(found)
        figures["dump"]["entries"] = sum(entries for entries, _ in batches)
        _flush(link)
        figures["load"] = _of(lambda: _load(link, batches), lambda: sum(entries for entries, _ in batches))
        return figures


def by_pyroute2(count: int) -> dict[str, Any]:
    from pyroute2 import Conntrack
    from pyroute2.netlink.nfnetlink.nfctsocket import NFCTAttrTuple

    with Conntrack() as conntrack:
        found: list[Any] = []
        figures = {"dump": _of(lambda: found.extend(conntrack.dump()), lambda: len(found))}
        if count > PYROUTE2_LOADS:
            return figures
        entries = []
        for entry in found:
            tuples = {}
            for name in ("CTA_TUPLE_ORIG", "CTA_TUPLE_REPLY"):
                ip, proto = (entry.get_attr(name).get_attr(part) for part in ("CTA_TUPLE_IP", "CTA_TUPLE_PROTO"))
                tuples[name] = NFCTAttrTuple(
                    saddr=ip.get_attr("CTA_IP_V4_SRC"),
                    daddr=ip.get_attr("CTA_IP_V4_DST"),
                    proto=proto.get_attr("CTA_PROTO_NUM"),
                    sport=proto.get_attr("CTA_PROTO_SRC_PORT"),
                    dport=proto.get_attr("CTA_PROTO_DST_PORT"),
                )
            entries.append(tuples)
        conntrack.flush()

        def load() -> None:
            for both in entries:
                conntrack.entry(
                    "add", timeout=43_200, tuple_orig=both["CTA_TUPLE_ORIG"], tuple_reply=both["CTA_TUPLE_REPLY"]
                )

        figures["load"] = _of(load, lambda: len(entries))
        return figures


def _of(work: Callable[[], object], entries: Callable[[], int]) -> dict[str, float]:
    took, _ = measured(work)
    return {"wall_s": took.wall_s, "cpu_s": took.cpu_s, "peak": took.peak, "entries": entries()}


def _dump(link: socket.socket) -> list[bytes]:
    link.send(HEADER.pack(20, GET, REQUEST | DUMP, 1, 0) + FAMILY)
    parts: list[bytes] = []
    while True:
        data = link.recv(BUFFER)
        parts.append(data)
        if HEADER.unpack_from(data, len(data) - 20)[:2] == (20, DONE):  # alone, or behind the last entries
            return parts


def _batches(parts: list[bytes]) -> list[tuple[int, bytes]]:
    """What was dumped, as messages that make it: in batches, each with how many they are."""
    batches, current, entries = [], bytearray(), 0
    for part in parts:
        at = 0
        while at < len(part):
            length, kind, *_ = HEADER.unpack_from(part, at)
            if kind == ERROR:
                raise OSError(-struct.unpack_from("=i", part, at + 16)[0], "the kernel refuses")
            if kind == NEW:
                body = _attributes(part, at + 20, at + length)
                current += HEADER.pack(20 + len(body), NEW, REQUEST | CREATE, 0, 0) + FAMILY + body
                entries += 1
            at += length + 3 & ~3
            if len(current) > BATCH:
                batches.append((entries, bytes(current)))
                current, entries = bytearray(), 0
    return [*batches, (entries, bytes(current))] if entries else batches


def _attributes(part: bytes, at: int, end: int) -> bytes:
    kept = bytearray()
    while at < end:
        length, kind = struct.unpack_from("=HH", part, at)
        after = at + (length + 3 & ~3)
        if kind & NESTED == STATUS:
            (status,) = struct.unpack_from("!I", part, at + 4)
            kept += struct.pack("=HH", 8, STATUS) + struct.pack("!I", status & SETTABLE | 0x8)
        elif kind & NESTED in KEPT:
            kept += part[at:after]
        at = after
    return bytes(kept)


def _flush(link: socket.socket) -> None:
    link.send(HEADER.pack(20, DELETE, REQUEST | 0x4, 2, 0) + FAMILY)
    link.recv(BUFFER)


def _load(link: socket.socket, batches: list[tuple[int, bytes]]) -> None:
    for _, batch in batches:
        link.send(batch)
    link.setblocking(False)
    try:
        answer = link.recv(BUFFER)  # only what went wrong is answered
    except BlockingIOError:
        return
    raise OSError(-struct.unpack_from("=i", answer, 16)[0], "the kernel refuses an entry")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
