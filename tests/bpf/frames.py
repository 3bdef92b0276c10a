# SPDX-License-Identifier: GPL-2.0-only
"""Frames as bytes, built by hand so that a test says exactly what is on the wire."""

from __future__ import annotations

import socket
import struct

BROADCAST = "ff:ff:ff:ff:ff:ff"
IPV4, IPV6, ARP, RARP, VLAN, SERVICE_VLAN = 0x0800, 0x86DD, 0x0806, 0x8035, 0x8100, 0x88A8
TCP, UDP, ICMP6 = 6, 17, 58


def mac(number: int) -> str:
    """A locally administered MAC."""
    return f"02:00:00:00:{number >> 8:02x}:{number & 0xFF:02x}"


def mac_bytes(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def address(text: str) -> bytes:
    """16 bytes, v4-mapped for IPv4."""
    if ":" in text:
        return socket.inet_pton(socket.AF_INET6, text)
    return b"\0" * 10 + b"\xff\xff" + socket.inet_aton(text)


def ethernet(target: str, source: str, kind: int, body: bytes, vlan: int = 0) -> bytes:
    """At least 60 bytes. `vlan` puts an 802.1Q tag in between."""
    plain = (mac_bytes(target) + mac_bytes(source) + struct.pack("!H", kind) + body).ljust(60, b"\0")
    return plain[:12] + struct.pack("!HH", VLAN, vlan) + plain[12:] if vlan else plain


def checksum(data: bytes) -> int:
    """RFC 1071"""
    data += b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def ipv4(source: str, target: str, proto: int, body: bytes, ttl: int = 64) -> bytes:
    addresses = socket.inet_aton(source) + socket.inet_aton(target)
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 1, 0x4000, ttl, proto, 0) + addresses
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + body


def ipv6(source: str, target: str, proto: int, body: bytes, hops: int = 64) -> bytes:
    addresses = address(source) + address(target)
    return struct.pack("!IHBB", 6 << 28, len(body), proto, hops) + addresses + body


def udp(source: int, target: int, data: bytes = b"") -> bytes:
    return struct.pack("!HHHH", source, target, 8 + len(data), 0) + data


def datagram(target: str, source: str, data: bytes = b"", vlan: int = 0, ip: tuple[str, str] | None = None) -> bytes:
    """A UDP datagram in IPv4 in Ethernet."""
    here, there = ip or ("10.0.0.1", "10.0.0.2")
    return ethernet(target, source, IPV4, ipv4(here, there, UDP, udp(1000, 2000, data)), vlan)


def arp(sender: str, sender_ip: str, target_ip: str, *, claimed: str = "", operation: int = 1) -> bytes:
    body = struct.pack("!HHBBH", 1, IPV4, 6, 4, operation) + mac_bytes(claimed or sender)
    body += socket.inet_aton(sender_ip) + b"\0" * 6 + socket.inet_aton(target_ip)
    return ethernet(BROADCAST, sender, ARP, body)


def rarp(sender: str, claimed: str = "") -> bytes:
    """What QEMU sends at a resume, so that switches learn where the guest is."""
    own = mac_bytes(claimed or sender)
    body = struct.pack("!HHBBH", 1, IPV4, 6, 4, 3) + own + b"\0" * 4 + own + b"\0" * 4
    return ethernet(BROADCAST, sender, RARP, body)


def nd(source: str, kind: int, target: str, option: str, *, sender: str, hops: int = 255) -> bytes:
    """Neighbour solicitation (135) or advertisement (136) with one link-layer address option ("" none)."""
    body = struct.pack("!BBHI", kind, 0, 0, 0) + address(target)
    if option:
        body += struct.pack("!BB", 1 if kind == 135 else 2, 1) + mac_bytes(option)
    return ethernet("33:33:00:00:00:01", sender, IPV6, ipv6(source, "ff02::1", ICMP6, body, hops))


def vxlan(identifier: int, mark: int, inner: bytes) -> bytes:
    """The VXLAN header (RFC 7348), with the group policy extension when there is a mark, and the inner frame."""
    head = struct.pack("!BBHI", 0x88 if mark else 0x08, 0, mark, identifier << 8)
    return head + inner


def tunnelled(target: str, source: str, ip: tuple[str, str], identifier: int, mark: int, inner: bytes) -> bytes:
    """An outer frame from ip[0] to ip[1]."""
    body = udp(50000, 4789, vxlan(identifier, mark, inner))
    if ":" in ip[0]:
        return ethernet(target, source, IPV6, ipv6(*ip, UDP, body))
    return ethernet(target, source, IPV4, ipv4(*ip, UDP, body))


def untunnelled(frame: bytes) -> tuple[str, int, int, bytes]:
    """(outer destination, id, mark, inner frame) of what tunnelled() makes."""
    if frame[12:14] == b"\x86\xdd":
        target, start = socket.inet_ntop(socket.AF_INET6, frame[38:54]), 14 + 40
    else:
        target, start = socket.inet_ntoa(frame[30:34]), 14 + 20
    assert frame[start + 2 : start + 4] == struct.pack("!H", 4789)
    flags, _, mark, identifier = struct.unpack_from("!BBHI", frame, start + 8)
    return target, identifier >> 8, mark if flags & 0x80 else 0, frame[start + 16 :]
