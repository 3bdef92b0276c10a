"""One line of text for an Ethernet frame, much as `tcpdump -e` shows it. Never raises: what is cut off is said."""

from __future__ import annotations

import ipaddress
import struct

_ETHER = {0x0800: "IPv4", 0x86DD: "IPv6", 0x0806: "ARP", 0x8035: "RARP", 0x8100: "802.1Q", 0x88A8: "802.1ad"}
_PROTOCOLS = {1: "ICMP", 2: "IGMP", 6: "TCP", 17: "UDP", 47: "GRE", 50: "ESP", 58: "ICMPv6", 132: "SCTP"}
_TCP_FLAGS = "FSRP.UEW"  # bit 0 upwards, in tcpdump's letters
_EXTENSIONS = frozenset({0, 43, 60})  # hop-by-hop, routing, destination options: RFC 8200
_FRAGMENT = 44


def describe(frame: bytes) -> str:
    """`source > destination, what is in it`. `frame` begins with the destination's MAC."""
    try:
        return _ethernet(frame)
    except (struct.error, IndexError, ValueError):
        return f"cut off: {frame[:32].hex()}"


def _ethernet(frame: bytes) -> str:
    to, source, kind = struct.unpack_from("!6s6sH", frame)
    text, rest = f"{source.hex(':')} > {to.hex(':')}", frame[14:]
    while kind in (0x8100, 0x88A8):
        tag, kind = struct.unpack_from("!HH", rest)
        text, rest = f"{text}, vlan {tag & 0xFFF}", rest[4:]
    name = _ETHER.get(kind, f"ethertype 0x{kind:04x}")
    if kind in (0x0806, 0x8035):
        return f"{text}, {_arp(rest, name)}"
    if kind == 0x0800:
        return f"{text}, {_ipv4(rest)}"
    if kind == 0x86DD:
        return f"{text}, {_ipv6(rest)}"
    return f"{text}, {name}"


def _arp(data: bytes, name: str) -> str:
    operation, sender_mac, sender, _, target = struct.unpack_from("!6xH6s4s6s4s", data)
    asked, says = ipaddress.IPv4Address(target), ipaddress.IPv4Address(sender)
    if operation == 1:
        return f"{name} who-has {asked} tell {says}"
    if operation == 2:
        return f"{name} {says} is-at {sender_mac.hex(':')}"
    return f"{name} operation {operation} of {sender_mac.hex(':')}"


def _ipv4(data: bytes) -> str:
    length, fragment, protocol = struct.unpack_from("!2xH2xHxB", data)
    source, to = ipaddress.IPv4Address(data[12:16]), ipaddress.IPv4Address(data[16:20])
    offset = (fragment & 0x1FFF) * 8
    head = (data[0] & 0xF) * 4
    if offset:
        return f"{source} > {to}: {_name(protocol)}, fragment at {offset}"
    more = ", first fragment" if fragment & 0x2000 else ""
    return _transport(str(source), str(to), protocol, data[head:], max(length - head, 0)) + more


def _ipv6(data: bytes) -> str:
    length, protocol = struct.unpack_from("!4xHB", data)
    source, to = ipaddress.IPv6Address(data[8:24]), ipaddress.IPv6Address(data[24:40])
    rest, more = data[40:], ""
    while protocol in _EXTENSIONS or protocol == _FRAGMENT:
        size = 8 if protocol == _FRAGMENT else (rest[1] + 1) * 8
        if protocol == _FRAGMENT:
            place = struct.unpack_from("!2xH", rest)[0]
            if place >> 3:
                return f"{source} > {to}: {_name(rest[0])}, fragment at {place & 0xFFF8}"
            more = ", first fragment" if place & 1 else ""
        protocol, rest, length = rest[0], rest[size:], length - size
    return _transport(str(source), str(to), protocol, rest, max(length, 0)) + more


def _name(protocol: int) -> str:
    return _PROTOCOLS.get(protocol, f"protocol {protocol}")


def _transport(source: str, to: str, protocol: int, data: bytes, length: int) -> str:
    if protocol == 6:
        return _tcp(source, to, data, length)
    if protocol == 17:
        ports = struct.unpack_from("!HHH", data)
        return f"{source}.{ports[0]} > {to}.{ports[1]}: UDP, length {max(ports[2] - 8, 0)}"
    if protocol in (1, 58):
        kind, code = data[0], data[1]
        echo = {(1, 8): "echo request", (1, 0): "echo reply", (58, 128): "echo request", (58, 129): "echo reply"}
        what = echo.get((protocol, kind), f"type {kind} code {code}")
        detail = f", id {int.from_bytes(data[4:6])}, seq {int.from_bytes(data[6:8])}" if what.startswith("echo") else ""
        return f"{source} > {to}: {_name(protocol)} {what}{detail}"
    return f"{source} > {to}: {_name(protocol)}, length {length}"


def _tcp(source: str, to: str, data: bytes, length: int) -> str:
    sport, dport, sequence, acknowledged, offset, bits = struct.unpack_from("!HHIIBB", data)
    flags = "".join(letter for bit, letter in enumerate(_TCP_FLAGS) if bits >> bit & 1)
    size = max(length - (offset >> 4) * 4, 0)
    ack = f", ack {acknowledged}" if bits & 0x10 else ""
    return f"{source}.{sport} > {to}.{dport}: TCP [{flags}], seq {sequence}{ack}, length {size}"
