# SPDX-License-Identifier: GPL-2.0-only
"""Remapping at a port: what leaves each wire, byte for byte, is the same packet with other ends and right checksums."""

from __future__ import annotations

import ipaddress
import struct
from typing import Any

import pytest

from datapath.drivers.ebpf.remap import elements
from datapath.state.kind import Record
from datapath.state.remap import RemapDocument

from . import frames
from .frames import ICMP6, IPV4, IPV6, TCP, UDP, checksum, mac
from .lab import Lab, Wire
from .model import MODEL

A, B = mac(1), mac(2)
ICMP, UDPLITE, SCTP = 1, 136, 132
CHECK_AT = {TCP: 16, UDP: 6, UDPLITE: 6, ICMP: 2, ICMP6: 2}
INSIDE, OUTSIDE, SERVICE, PEER = "10.0.0.5", "203.0.113.10", "203.0.113.11", "192.0.2.9"
INSIDE6, OUTSIDE6, SERVICE6, PEER6 = "fd00::5", "2001:db8::10", "2001:db8::11", "2001:db8:9::9"
RULES = [
    {"outside": OUTSIDE, "inside": INSIDE},
    {"outside": SERVICE, "inside": INSIDE, "protocol": "tcp", "outside_port": 443, "inside_port": 8443},
    {"outside": SERVICE, "inside": INSIDE, "protocol": "udp", "outside_port": 53, "inside_port": 5353},
    {"outside": OUTSIDE6, "inside": INSIDE6},
    {"outside": SERVICE6, "inside": INSIDE6, "protocol": "tcp", "outside_port": 443, "inside_port": 8443},
]
BOTH = pytest.mark.parametrize("v6", [False, True], ids=["ipv4", "ipv6"])


def load(lab: Lab, slot: int, rules: list[dict[str, Any]]) -> None:
    records: list[Record] = RemapDocument.model_validate({"rules": rules}).records()
    table = lab.switch.maps["remaps"]
    for key, value in zip(*elements(slot, records), strict=True):
        table.update(key.tobytes(), value.tobytes())
    lab.change_port(slot, features=MODEL.FEATURE_REMAP)


@pytest.fixture
def wires(lab: Lab) -> tuple[Wire, Wire]:
    """The guest with RULES at port 1, without a policy, and its peer at port 2."""
    lab.network(1, [(MODEL.L2_PORT, 1, 0), (MODEL.L2_PORT, 2, 0)])
    made = lab.port(1, A), lab.port(2, B)
    lab.place(A, MODEL.L2_PORT, 1)
    lab.place(B, MODEL.L2_PORT, 2)
    load(lab, 1, RULES)
    return made


def packet(source: str, target: str, proto: int, body: bytes) -> bytes:
    """An IP packet with every checksum; a checksum field of 0xffff in `body` of UDP over IPv4 stands for none."""
    v6 = ":" in source
    at = CHECK_AT.get(proto)
    if proto == UDP and not v6 and body[6:8] == b"\xff\xff":
        body = body[:6] + bytes(2) + body[8:]
    elif at is not None:
        pseudo = frames.address(source) + frames.address(target) if v6 else packed(source) + packed(target)
        pseudo += struct.pack("!IHBB", len(body), 0, 0, proto) if proto != ICMP else b""
        if proto == ICMP:
            pseudo = b""
        value = checksum(pseudo + body) or 0xFFFF
        body = body[:at] + struct.pack("!H", value) + body[at + 2 :]
    return frames.ipv6(source, target, proto, body) if v6 else frames.ipv4(source, target, proto, body)


def packed(text: str) -> bytes:
    return ipaddress.ip_address(text).packed


def framed(to: str, source: str, body: bytes) -> bytes:
    return frames.ethernet(to, source, IPV4 if body[0] >> 4 == 4 else IPV6, body)


def body_of(proto: int, source: int, target: int, data: bytes = b"some data of odd size") -> bytes:
    if proto == TCP:
        return struct.pack("!HHIIBBHHH", source, target, 1000, 77, 5 << 4, 0x10, 1024, 0, 0) + data
    if proto in (ICMP, ICMP6):
        return struct.pack("!BBHHH", 8 if proto == ICMP else 128, 0, 0, source, 7) + data
    return struct.pack("!HHHH", source, target, 8 + len(data), 0) + data


def crossed(wires: tuple[Wire, Wire], direction: int, before: bytes, after: bytes) -> None:
    """What one end sends as `before` the other gets as `after`; direction 0 is from the guest."""
    ends = ((B, A), (A, B))[direction]
    wires[direction].send(framed(*ends, before))
    assert wires[1 - direction].receive().hex() == framed(*ends, after).hex()


def names(v6: bool) -> tuple[str, str, str, str]:
    return (INSIDE6, OUTSIDE6, SERVICE6, PEER6) if v6 else (INSIDE, OUTSIDE, SERVICE, PEER)


@BOTH
@pytest.mark.parametrize("proto", [TCP, UDP, UDPLITE, SCTP, ICMP])
def test_a_whole_address_both_ways(lab: Lab, wires: tuple[Wire, Wire], proto: int, v6: bool) -> None:
    inside, outside, _, peer = names(v6)
    proto = ICMP6 if proto == ICMP and v6 else proto
    there, back = body_of(proto, 1000, 2000), body_of(proto, 2000, 1000)
    crossed(wires, 0, packet(inside, peer, proto, there), packet(outside, peer, proto, there))
    crossed(wires, 1, packet(peer, outside, proto, back), packet(peer, inside, proto, back))
    assert lab.drops(1) == {}


@BOTH
def test_a_port_both_ways(lab: Lab, wires: tuple[Wire, Wire], v6: bool) -> None:
    inside, _, service, peer = names(v6)
    crossed(
        wires,
        1,
        packet(peer, service, TCP, body_of(TCP, 999, 443)),
        packet(peer, inside, TCP, body_of(TCP, 999, 8443)),
    )
    crossed(
        wires,
        0,
        packet(inside, peer, TCP, body_of(TCP, 8443, 999)),
        packet(service, peer, TCP, body_of(TCP, 443, 999)),
    )
    assert lab.drops(1) == {}


def test_datagrams_without_checksum_stay_so(wires: tuple[Wire, Wire]) -> None:
    bare = struct.pack("!HHHH", 5353, 999, 12, 0xFFFF) + b"data"
    other = struct.pack("!HHHH", 53, 999, 12, 0xFFFF) + b"data"
    crossed(wires, 0, packet(INSIDE, PEER, UDP, bare), packet(SERVICE, PEER, UDP, other))
