# SPDX-License-Identifier: GPL-2.0-only
"""Ethernet frames made by hand, for what no socket would send."""

from __future__ import annotations

import ipaddress
import struct

FIN, SYN, RST, PSH, ACK = 0x01, 0x02, 0x04, 0x08, 0x10
ICMP, TCP, UDP, ICMPV6, FRAGMENT = 1, 6, 17, 58, 44


def checksum(data: bytes) -> int:
    """Internet checksum (RFC 1071)."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def packed(address: str) -> bytes:
    return ipaddress.ip_address(address).packed


def _pseudo(source: str, destination: str, protocol: int, length: int) -> bytes:
    if ":" in source:
        return packed(source) + packed(destination) + struct.pack("!IxxxB", length, protocol)
    return packed(source) + packed(destination) + struct.pack("!xBH", protocol, length)


def ethernet(source: str, destination: str, ip_packet: bytes) -> bytes:
    """A frame around an IPv4 or IPv6 packet."""
    kind = 0x86DD if ip_packet[0] >> 4 == 6 else 0x0800
    return mac(destination) + mac(source) + struct.pack("!H", kind) + ip_packet


def ip(
    source: str,
    destination: str,
    protocol: int,
    body: bytes,
    *,
    identifier: int = 0,
    offset: int = 0,
    more: bool = False,
) -> bytes:
    """An IP packet; with `offset` (bytes) or `more` it is a fragment."""
    if ":" in source:
        if offset or more:
            body = struct.pack("!BxHI", protocol, offset | more, identifier) + body
            protocol = FRAGMENT
        return struct.pack("!IHBB", 6 << 28, len(body), protocol, 64) + packed(source) + packed(destination) + body
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), identifier, more << 13 | offset >> 3, 64, protocol, 0)
    head += packed(source) + packed(destination)
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + body


def udp(source: str, destination: str, sport: int, dport: int, data: bytes) -> bytes:
    """A UDP datagram with its checksum, without the IP header."""
    head = struct.pack("!HHHH", sport, dport, 8 + len(data), 0)
    total = checksum(_pseudo(source, destination, UDP, 8 + len(data)) + head + data) or 0xFFFF
    return head[:6] + struct.pack("!H", total) + data


def tcp(
    source: str,
    destination: str,
    sport: int,
    dport: int,
    flags: int,
    seq: int,
    ack: int = 0,
    data: bytes = b"",
    window: int = 65535,
) -> bytes:
    """A TCP segment with its checksum, without the IP header."""
    head = struct.pack("!HHIIBBHHH", sport, dport, seq & 0xFFFFFFFF, ack & 0xFFFFFFFF, 5 << 4, flags, window, 0, 0)
    total = checksum(_pseudo(source, destination, TCP, len(head) + len(data)) + head + data)
    return head[:16] + struct.pack("!HH", total, 0) + data


def echo(source: str, destination: str, identifier: int, sequence: int, data: bytes, *, reply: bool = False) -> bytes:
    """An ICMP or ICMPv6 echo message."""
    six = ":" in source
    kind = (129 if reply else 128) if six else (0 if reply else 8)
    head = struct.pack("!BBHHH", kind, 0, 0, identifier, sequence)
    pseudo = _pseudo(source, destination, ICMPV6, len(head) + len(data)) if six else b""
    return head[:2] + struct.pack("!H", checksum(pseudo + head + data)) + head[4:] + data
