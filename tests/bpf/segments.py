# SPDX-License-Identifier: GPL-2.0-only
"""A frame taken apart by the RFCs, for the reference model: nothing here knows the switch's C."""

from __future__ import annotations

import struct
from dataclasses import dataclass

FROM, TO = 0, 1
TCP, UDP, ICMP, ICMPV6 = 6, 17, 1, 58
HOP_BY_HOP, ROUTING, FRAGMENT, DESTINATION = 0, 43, 44, 60
EXTENSIONS_MAX = 8
MAPPED = bytes(10) + b"\xff\xff"
ERRORS = {ICMP: (3, 4, 5, 11, 12), ICMPV6: (1, 2, 3, 4)}  # RFC 792, RFC 4443
_REQUESTS = {ICMP: (8, 13, 15, 17), ICMPV6: (128,)}  # RFC 792, RFC 950, RFC 4443; the answer is the next number
_REPLIES = {ICMP: {0: 8, 14: 13, 16: 15, 18: 17}, ICMPV6: {129: 128}}


class Malformed(Exception):
    """The frame is cut off, or its headers contradict each other."""


@dataclass
class Packet:
    """What a frame is, seen from the guest. Addresses are 16 bytes, v4-mapped for IPv4."""

    family: int = 0  # 4, 6, 0: no IP
    laddr: bytes = bytes(16)
    raddr: bytes = bytes(16)
    lport: int = 0
    rport: int = 0
    proto: int = 0
    part: str = "whole"  # or "first", "later": fragments
    fragment_id: int = 0
    tcp_flags: int = 0
    icmp_type: int = 0
    icmp_code: int = 0
    hops: int = 0
    group: bool = False
    arp: bytes | None = None
    payload: bytes = b""  # from the transport header on, to the frame's end
    header_bytes: int = 0  # of network and transport headers
    network_at: int = 14
    transport_at: int = 0  # from the IP header on
    ethertype: int = 0  # behind tags
    ip_bytes: int = 0
    wire_packets: int = 1
    wire_bytes: int = 0
    wire_frame_bytes: int = 0
    query: str = ""  # "request", "reply"
    asked: int = 0  # type of the request

    @property
    def is_error(self) -> bool:
        return self.icmp_type in ERRORS.get(self.proto, ())

    @property
    def key(self) -> tuple[object, ...]:
        return ("connection", self.laddr, self.raddr, self.lport, self.rport, self.proto)

    @property
    def policy_icmp(self) -> tuple[int, int]:
        """Type and code that a rule is compared with: a query is judged by its request. A later fragment has no type
        of its own: that of the query it belongs to."""
        if self.query:
            return self.asked, 0
        if self.part == "later":
            return (128 if self.proto == ICMPV6 else self.rport & 0xFF or 8), 0
        return self.icmp_type, self.icmp_code

    def inner(self, direction: int) -> Packet | None:
        """The packet that an ICMP error is about, which went in `direction`; None when it cannot be told."""
        inner = Packet()
        rest = self.payload[8 : self.ip_bytes - self.transport_at]
        try:
            at = (_ipv4 if self.family == 4 else _ipv6)(inner, rest, direction, whole=False)
        except Malformed:
            return None
        if inner.part == "later" or at > len(rest):
            return None
        inner.transport_at, data = at, rest[at:]
        if inner.proto in (TCP, UDP, ICMP, ICMPV6):
            if len(data) < 8:
                return None
            if inner.proto in (TCP, UDP):
                _ports(inner, data, direction)
            else:
                inner.icmp_type = data[0]
                _query(inner, data, direction)
        return inner


def parse(frame: bytes, direction: int, gso_size: int = 0, tags: int = 0) -> Packet:
    """Takes a frame apart; up to `tags` VLAN tags are passed over. Raises Malformed."""
    packet = Packet(group=bool(frame[0] & 1))
    at, kind = 14, int.from_bytes(frame[12:14])
    if tags and kind in (0x8100, 0x88A8):
        if len(frame) < 18:
            raise Malformed
        at, kind = 18, int.from_bytes(frame[16:18])
    rest = frame[at:]
    if kind < 0x600 and rest[:2] == b"\xaa\xaa" and rest[3:6] in (bytes(3), b"\0\0\xf8"):
        raise Malformed  # a type behind SNAP (RFC 1042, IEEE 802.1H) is no way around those who look at types
    packet.network_at, packet.ethertype = at, kind
    packet.wire_bytes, packet.wire_frame_bytes = len(rest), len(frame)
    if kind in (0x0806, 0x8035):
        packet.arp = rest
    if kind not in (0x0800, 0x86DD):
        return packet
    packet.family = 4 if kind == 0x0800 else 6
    start = (_ipv4 if packet.family == 4 else _ipv6)(packet, rest, direction, whole=True)
    # ICMP is IPv4's and ICMPv6 is IPv6's: the one in the other is of nobody's protocol stack
    if packet.proto == (ICMPV6 if packet.family == 4 else ICMP):
        raise Malformed
    transport = 0
    packet.transport_at, packet.payload = start, rest[start:]
    if packet.part != "later":
        transport = _transport(packet, rest[start : packet.ip_bytes], direction)
    packet.header_bytes = start + transport
    _wire(packet, len(frame), gso_size)
    return packet


def _wire(packet: Packet, frame_bytes: int, gso_size: int) -> None:
    """What a GSO frame is on the wire: its headers before each piece."""
    packet.wire_bytes, packet.wire_frame_bytes = packet.ip_bytes, frame_bytes
    data = packet.ip_bytes - packet.header_bytes
    if gso_size and data > gso_size:
        more = -(-data // gso_size) - 1
        packet.wire_packets = more + 1
        packet.wire_bytes += more * packet.header_bytes
        packet.wire_frame_bytes += more * (packet.header_bytes + packet.network_at)


def _ipv4(packet: Packet, data: bytes, direction: int, *, whole: bool) -> int:
    """RFC 791. Returns where the transport header begins."""
    if len(data) < 20 or data[0] >> 4 != 4:
        raise Malformed
    words, total, number, offset = data[0] & 0xF, *struct.unpack_from("!HHH", data, 2)
    if words < 5 or total < words * 4 or (whole and total > len(data)):
        raise Malformed
    packet.family, packet.hops, packet.proto = 4, data[8], data[9]
    _addresses(packet, MAPPED + data[12:16], MAPPED + data[16:20], direction)
    packet.fragment_id = number
    if offset & 0x1FFF:
        packet.part = "later"
        if packet.proto == TCP and offset & 0x1FFF == 1:  # RFC 1858: over the flags that were judged
            raise Malformed
    elif offset & 0x2000:
        packet.part = "first"
    packet.ip_bytes = total
    return words * 4


def _ipv6(packet: Packet, data: bytes, direction: int, *, whole: bool) -> int:
    """RFC 8200. Returns where the transport header begins."""
    if len(data) < 40 or data[0] >> 4 != 6:
        raise Malformed
    packet.family, packet.proto, packet.hops = 6, data[6], data[7]
    packet.ip_bytes = 40 + int.from_bytes(data[4:6])
    _addresses(packet, data[8:24], data[24:40], direction)
    if MAPPED in (data[8:20], data[24:36]):  # RFC 4291, 2.5.5.2: an address of an API, not of a wire
        raise Malformed
    at = _extensions(packet, data)
    if whole and (packet.ip_bytes > len(data) or at > packet.ip_bytes):
        raise Malformed
    return at


def _extensions(packet: Packet, data: bytes) -> int:
    at, count = 40, 0
    while packet.proto in (HOP_BY_HOP, ROUTING, DESTINATION, FRAGMENT):
        count += 1
        # behind the fragment header of a fragment none can follow: later fragments could not be told apart
        if count > EXTENSIONS_MAX or packet.part != "whole" or len(data) < at + 8:
            raise Malformed
        following, size = data[at], data[at + 1]
        if packet.proto != FRAGMENT:
            packet.proto, at = following, at + (size + 1) * 8
            continue
        offset, packet.fragment_id = struct.unpack_from("!HI", data, at + 2)
        packet.proto, at = following, at + 8
        if offset >> 3:
            packet.part = "later"
            break
        packet.part = "first" if offset & 1 else "whole"  # RFC 6946: an atomic fragment is a whole packet
    return at


def _addresses(packet: Packet, source: bytes, target: bytes, direction: int) -> None:
    packet.laddr, packet.raddr = (source, target) if direction == FROM else (target, source)


def _ports(packet: Packet, data: bytes, direction: int) -> None:
    source, target = struct.unpack_from("!HH", data)
    packet.lport, packet.rport = (source, target) if direction == FROM else (target, source)


def _query(packet: Packet, data: bytes, direction: int) -> None:
    """Who asks what: both ends may ask with one identifier, and these are two connections."""
    kind = packet.icmp_type
    if kind in _REQUESTS[packet.proto]:
        packet.query, packet.asked = "request", kind
    elif kind in _REPLIES[packet.proto]:
        packet.query, packet.asked = "reply", _REPLIES[packet.proto][kind]
    else:
        return
    guest_asks = (packet.query == "request") == (direction == FROM)
    packet.lport = int.from_bytes(data[4:6])
    packet.rport = (0 if packet.asked in (8, 128) else packet.asked) | (0 if guest_asks else 0x8000)


def _transport(packet: Packet, data: bytes, direction: int) -> int:
    """Length of the transport header, 0 for one that is not looked at. A fragment has all of it or none (RFC 7112)."""
    if packet.proto not in (TCP, UDP, ICMP, ICMPV6):
        return 0
    if len(data) < 8:
        raise Malformed
    if packet.proto in (ICMP, ICMPV6):
        packet.icmp_type, packet.icmp_code = data[0], data[1]
        _query(packet, data, direction)
        return 8
    _ports(packet, data, direction)
    if packet.proto == UDP:
        return 8
    if len(data) < 20 or not 20 <= (data[12] >> 4) * 4 <= len(data):
        raise Malformed
    packet.tcp_flags = data[13]
    return (data[12] >> 4) * 4


def is_link_local(address: bytes) -> bool:
    """RFC 4291, 2.5.6: fe80::/10"""
    return address[0] == 0xFE and address[1] & 0xC0 == 0x80


def options_name(options: bytes, source: bytes) -> bool:
    """Do link-layer address options name the frame's source? RFC 4861, 4.6.1. More than a few are refused."""
    for _ in range(4):
        if len(options) < 8:
            return True
        kind, size = options[0], options[1] * 8
        if not size or (kind in (1, 2) and (size != 8 or options[2:8] != source)):
            return False
        options = options[size:]
    return False
