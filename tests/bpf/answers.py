# SPDX-License-Identifier: GPL-2.0-only
"""What a rejected frame is to become: a TCP reset (RFC 9293, 3.5.2), an ICMP error (RFC 792, RFC 4443), or nothing."""

from __future__ import annotations

import struct

from .frames import checksum
from .segments import ICMP, ICMPV6, TCP, UDP, Packet

FROM = 0
SYN, FIN, RST, ACK = 2, 1, 4, 16
CARRIED = 8  # bytes of the transport header that an ICMP error carries


def wrong(packet: Packet, before: bytes, after: bytes, direction: int) -> str:
    """Why `after` is not what the frame `before`, which is `packet`, has to become; "" when it is."""
    if not answerable(packet):
        return "" if after == before else "an answer to what must have none"
    if (
        after[:6] != before[6:12]
        or after[6:12] != before[:6]
        or after[12 : packet.network_at] != before[12 : packet.network_at]
    ):
        return "the answer's Ethernet header"
    body = after[packet.network_at :]
    proto = TCP if packet.proto == TCP else ICMP if packet.family == 4 else ICMPV6
    head = 20 if packet.family == 4 else 40
    receiver, sender = (packet.raddr, packet.laddr) if direction == FROM else (packet.laddr, packet.raddr)
    if _network(packet, body) != (proto, len(body) - head, receiver, sender):
        return "the answer's IP header"
    whole = body[head:]
    pseudo = receiver + sender if packet.family == 6 else receiver[12:] + sender[12:]
    pseudo += struct.pack("!IHBB", len(whole), 0, 0, proto)
    if checksum((b"" if proto == ICMP else pseudo) + whole):
        return "the answer's checksum"
    return _reset(packet, before, whole) if proto == TCP else _error(packet, before, whole)


def answerable(packet: Packet) -> bool:
    """RFC 1122, 3.2.2; RFC 4443, 2.4; RFC 9293, 3.10.7.1. Not with options or extension headers in between."""
    plain = packet.header_bytes - _transport_bytes(packet) == (20 if packet.family == 4 else 40)
    if not plain or packet.group or packet.part == "later" or packet.is_error:
        return False
    if not (_is_station(packet.laddr, packet.family) and _is_station(packet.raddr, packet.family)):
        return False
    if packet.proto == TCP:
        return not packet.tcp_flags & RST
    return len(packet.payload) >= CARRIED


def _transport_bytes(packet: Packet) -> int:
    if packet.proto == TCP:
        return (packet.payload[12] >> 4) * 4
    return 8 if packet.proto in (UDP, ICMP, ICMPV6) else 0


def _is_station(address: bytes, family: int) -> bool:
    if family == 6:
        return address[0] != 0xFF and address != bytes(16)
    return address[12] not in (0, 127) and address[12] < 224


def _network(packet: Packet, body: bytes) -> tuple[int, int, bytes, bytes]:
    """Protocol, length of what follows, source and destination; nonsense for a header that is not right."""
    if packet.family == 4:
        right = body[0] == 0x45 and not checksum(body[:20]) and body[8] >= 32
        mapped = bytes(10) + b"\xff\xff"
        length = int.from_bytes(body[2:4]) - 20
        return (body[9] if right else -1), length, mapped + body[12:16], mapped + body[16:20]
    right = body[0] >> 4 == 6 and body[7] >= 32
    return (body[6] if right else -1), int.from_bytes(body[4:6]), body[8:24], body[24:40]


def _reset(packet: Packet, before: bytes, reset: bytes) -> str:
    segment = packet.payload
    source, target, sequence, acknowledged, words, flags = struct.unpack_from("!HHIIBB", segment)
    data = packet.ip_bytes - (20 if packet.family == 4 else 40) - (words >> 4) * 4
    if flags & ACK:
        expected = (target, source, acknowledged, 0, 5 << 4, RST)
    else:
        length = data + bool(flags & SYN) + bool(flags & FIN)
        expected = (target, source, 0, (sequence + length) & 0xFFFFFFFF, 5 << 4, RST | ACK)
    found = struct.unpack_from("!HHIIBB", reset)
    return "" if (found, len(reset)) == (expected, 20) else f"a reset of {found}, not {expected}, to {before.hex()}"


def _error(packet: Packet, before: bytes, error: bytes) -> str:
    """Port unreachable for a datagram, administratively prohibited for the rest."""
    unreachable = {4: (3, 3) if packet.proto == UDP else (3, 13), 6: (1, 4) if packet.proto == UDP else (1, 1)}
    if tuple(error[:2]) != unreachable[packet.family]:
        return f"an ICMP error of type and code {tuple(error[:2])}"
    at = packet.network_at
    carried = before[at : at + (20 if packet.family == 4 else 40) + CARRIED]
    same = len(carried) - (2 if packet.proto == UDP else 0)  # a datagram's checksum pays for the balance
    return "" if error[8 : 8 + same] == carried[:same] and len(error) == 8 + len(carried) else "what the error carries"
