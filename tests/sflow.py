"""Reads sFlow v5 datagrams strictly by the specification (sflow.org/sflow_version_5.txt), apart from the encoder.

What is not as it must be raises Malformed: a length that is not its content's, padding that is not zero, bytes left.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field


class Malformed(Exception):
    pass


@dataclass
class Flow:
    sequence: int
    source: int
    rate: int
    pool: int
    drops: int
    input: int
    output: int
    frame_length: int = 0
    stripped: int = 0
    header: bytes = b""
    vlans: tuple[int, int] = (-1, -1)
    priorities: tuple[int, int] = (-1, -1)


@dataclass
class Counters:
    sequence: int
    source: int
    values: dict[str, int] = field(default_factory=dict)


@dataclass
class Datagram:
    agent: str
    sub_agent: int
    sequence: int
    uptime_ms: int
    flows: list[Flow] = field(default_factory=list)
    counters: list[Counters] = field(default_factory=list)


_INTERFACE = (
    ("index", 1),
    ("type", 1),
    ("speed", 2),
    ("direction", 1),
    ("status", 1),
    ("in_octets", 2),
    *((f"in_{name}", 1) for name in ("unicast", "multicast", "broadcast", "discards", "errors", "unknown")),
    ("out_octets", 2),
    *((f"out_{name}", 1) for name in ("unicast", "multicast", "broadcast", "discards", "errors")),
    ("promiscuous", 1),
)


class _Xdr:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        if self.at + size > len(self.data):
            raise Malformed(f"{size} bytes wanted at {self.at} of {len(self.data)}")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, words: int = 1) -> int:
        return int.from_bytes(self.take(4 * words), "big")

    def opaque(self) -> bytes:
        length = self.number()
        data = self.take(length)
        if any(self.take(-length % 4)):
            raise Malformed("padding is not zero")
        return data

    def end(self) -> None:
        if self.at != len(self.data):
            raise Malformed(f"{len(self.data) - self.at} bytes are left")


def read(data: bytes) -> Datagram:
    """Raises Malformed."""
    xdr = _Xdr(data)
    if xdr.number() != 5:
        raise Malformed("not version 5")
    size = {1: 4, 2: 16}[xdr.number()]
    agent = str(ipaddress.ip_address(xdr.take(size)))
    made = Datagram(agent, xdr.number(), xdr.number(), xdr.number())
    for _ in range(xdr.number()):
        kind, body = xdr.number(), _Xdr(xdr.opaque())
        if kind == 1:
            made.flows.append(_flow(body))
        elif kind == 2:
            made.counters.append(_counters(body))
        else:
            raise Malformed(f"sample of format {kind}")
        body.end()
    xdr.end()
    return made


def _flow(body: _Xdr) -> Flow:
    made = Flow(*(body.number() for _ in range(7)))
    for _ in range(body.number()):
        kind, record = body.number(), _Xdr(body.opaque())
        if kind == 1:
            if record.number() != 1:
                raise Malformed("header of no Ethernet frame")
            made.frame_length, made.stripped, made.header = record.number(), record.number(), record.opaque()
        elif kind == 1001:
            numbers = [record.number() for _ in range(4)]
            made.vlans, made.priorities = (numbers[0], numbers[2]), (numbers[1], numbers[3])
        else:
            raise Malformed(f"flow record of format {kind}")
        record.end()
    if len(made.header) > made.frame_length - made.stripped:
        raise Malformed("more header than frame")
    return made


def _counters(body: _Xdr) -> Counters:
    made = Counters(body.number(), body.number())
    for _ in range(body.number()):
        kind, record = body.number(), _Xdr(body.opaque())
        if kind != 1:
            raise Malformed(f"counter record of format {kind}")
        made.values = {name: record.number(words) for name, words in _INTERFACE}
        record.end()
    return made
