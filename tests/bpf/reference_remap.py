# SPDX-License-Identifier: GPL-2.0-only
"""Remapping as docs/remap.md has it, for the reference model: which end of a frame becomes which, and what is answered.

A rule joins an inside end (what the guest calls itself) and an outside one (what the network calls it). An end leads
where the most exact rule for it says, and only if the same rule leads back: else an answer would come from, or go to,
another end than was asked.
"""

from __future__ import annotations

import socket
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .frames import address, checksum
from .readdressed import ICMP_HEADER, CutOff, End, readdressed
from .segments import ICMPV6, MAPPED, TCP, UDP, Packet

FROM, TO = 0, 1
SIDES = ("inside", "outside")  # where what goes FROM and TO the guest comes from
PROTOCOLS = {"": 0, "tcp": TCP, "udp": UDP}
ARP, REQUEST, REPLY = 0x0806, 1, 2
SOLICIT, ADVERTISE = 135, 136
ND_BYTES, SOLICITED, OVERRIDE = 24, 1 << 30, 1 << 29
ALL_NODES, ALL_NODES_MAC = socket.inet_pton(socket.AF_INET6, "ff02::1"), b"\x33\x33\0\0\0\1"
SOLICITED_NODE = socket.inet_pton(socket.AF_INET6, "ff02::1:ff00:0")[:13]


class Unreachable(Exception):
    """The network and the guest do not agree on who is meant."""


@dataclass(frozen=True)
class Rule:
    """`proto` 0: the address as a whole, without ports."""

    proto: int
    inside: End
    outside: End

    def end(self, side: str) -> End:
        return self.inside if side == "inside" else self.outside


def _rule(record: Mapping[str, Any]) -> Rule:
    ends = {side: End(address(record[side]), record.get(f"{side}_port", 0)) for side in SIDES}
    inside = replace(ends["inside"], port=ends["inside"].port or ends["outside"].port)
    return Rule(PROTOCOLS[record.get("protocol", "")], inside, ends["outside"])


class Remapping:
    """The rules of a port, and how often each changed a packet."""

    def __init__(self, records: Sequence[Mapping[str, Any]], mac: bytes) -> None:
        self.mac = mac
        self.rules = [_rule(record) for record in records]
        self.outside = frozenset(rule.outside.address for rule in self.rules)
        self.counted: Counter[tuple[int, int]] = Counter()  # packets by (number of the rule, direction)
        self.counted_bytes: Counter[tuple[int, int]] = Counter()

    # ---- ends ----

    def _leads(self, side: str, end: End, proto: int) -> Rule | None:
        exact = [rule for rule in self.rules if end.port and (rule.proto, rule.end(side)) == (proto, end)]
        whole = [rule for rule in self.rules if (rule.proto, rule.end(side)) == (0, End(end.address))]
        return next(iter(exact + whole), None)

    def _whole(self, side: str, asked: bytes) -> Rule | None:
        return self._leads(side, End(asked), 0)

    def _other(self, packet: Packet, direction: int, used: set[Rule]) -> End | None:
        """What the guest's end of a packet becomes; None: it stays. Raises Unreachable."""
        if packet.family == 4 and (packet.proto, packet.lport, packet.rport) == (UDP, 68, 67):
            return None  # DHCP is about the inside address
        here, there = SIDES[direction], SIDES[1 - direction]
        end = End(packet.laddr, packet.lport if packet.proto in (TCP, UDP) else 0)
        rule = self._leads(here, end, packet.proto)
        if rule is None:
            return None if direction == FROM else self._without_rule(packet, end)
        other = End(rule.end(there).address, rule.end(there).port or end.port)
        if self._leads(there, other, packet.proto) is not rule:
            raise Unreachable
        used.add(rule)
        return other

    def _without_rule(self, packet: Packet, end: End) -> End | None:
        leads_to = {rule.inside.address for rule in self.rules if rule.outside.address == end.address}
        if leads_to and packet.part == "later":  # of a packet to a port, as its first said
            return End(leads_to.pop())
        if leads_to or self._leads("inside", end, packet.proto):
            raise Unreachable
        return None

    # ---- frames ----

    def outward(self, frame: bytes, packet: Packet) -> tuple[str, bytes]:
        """A frame that the guest sends, as the network sees it: reason and frame."""
        if not self.rules:
            return "", frame
        if packet.ethertype == ARP:
            return "", self._arp(frame, packet, (14, 24), "inside")
        return self._ip(frame, packet, FROM)

    def inward(self, frame: bytes, packet: Packet) -> tuple[str, bytes]:
        """A frame from the network, as the guest sees it; when it is "answered", the answer."""
        if not self.rules:
            return "", frame
        if packet.ethertype == ARP:
            return self._arp_inward(frame, packet)
        if _is_solicitation(frame, packet):
            target = packet.payload[8:24]
            if target in self.outside:
                return "answered", self._advertisement(frame, packet, target)
            if self._whole("inside", target):
                return "remap", frame
        return self._ip(frame, packet, TO)

    def _ip(self, frame: bytes, packet: Packet, direction: int) -> tuple[str, bytes]:
        if not packet.family:
            return "", frame
        ip = frame[packet.network_at :][: packet.ip_bytes]
        used: set[Rule] = set()
        try:
            if packet.is_error and packet.part != "later":
                ip = self._error(ip, packet, direction, used)
            else:
                asked = self._asked(ip, packet) if direction == FROM else None
                ip = _at(ip, packet, direction, self._other(packet, direction, used), asked=asked)
        except (Unreachable, CutOff):
            return "remap", frame
        for rule in used:
            self.counted[self.rules.index(rule), direction] += packet.wire_packets
            self.counted_bytes[self.rules.index(rule), direction] += packet.wire_bytes
        return "", frame[: packet.network_at] + ip + frame[packet.network_at + len(ip) :]

    def _error(self, ip: bytes, packet: Packet, direction: int, used: set[Rule]) -> bytes:
        """An ICMP error, to who sent the packet in it: that went the other way, and its guest's end is the other."""
        inner = packet.inner(1 - direction)
        if inner is None or (inner.laddr != packet.laddr if direction == TO else inner.raddr != packet.raddr):
            raise Unreachable
        within = self._other(inner, direction, used)
        carried = _at(ip[packet.transport_at + ICMP_HEADER :], inner, 1 - direction, within, cut=True)
        if inner.laddr == packet.laddr:
            outer = None if within is None else End(within.address)
        else:  # a guest that forwards tells from another address of its own
            outer = self._other(packet, direction, used)
        return _at(ip, packet, direction, outer, carried=carried)

    # ---- who asks for an address ----

    def _arp(self, frame: bytes, packet: Packet, fields: Sequence[int], side: str) -> bytes:
        """What is said of an address is said of the other one. `fields`: where it may be."""
        body = packet.arp or b""
        if not _is_arp_of_ipv4(body):
            return frame
        for at in fields:
            rule = self._whole(side, MAPPED + body[at : at + 4])
            if rule:
                other = rule.outside if side == "inside" else rule.inside
                start = packet.network_at + at
                frame = frame[:start] + other.address[12:] + frame[start + 4 :]
        return frame

    def _arp_inward(self, frame: bytes, packet: Packet) -> tuple[str, bytes]:
        body = packet.arp or b""
        if not _is_arp_of_ipv4(body) or body[6:8] != REQUEST.to_bytes(2):
            return "", self._arp(frame, packet, (24,), "outside")
        target = body[24:28]
        if MAPPED + target in self.outside:  # RFC 826: sender and target change places
            answer = body[:6] + REPLY.to_bytes(2) + self.mac + target + body[8:18]
            head = body[8:14] + self.mac + frame[12 : packet.network_at]
            return "answered", head + answer + frame[packet.network_at + 28 :]
        return ("remap" if self._whole("inside", MAPPED + target) else ""), frame

    def _asked(self, ip: bytes, packet: Packet) -> bytes | None:
        """The target of what the guest asks or says by neighbour discovery becomes this; None: it stays."""
        message = ip[packet.transport_at :]
        kinds = (SOLICIT, ADVERTISE) if packet.proto == ICMPV6 and packet.part != "later" else ()
        if packet.icmp_type not in kinds or not _has_target(message):
            return None
        rule = self._whole("inside", message[8:24])
        return rule.outside.address if rule else None

    def _advertisement(self, frame: bytes, packet: Packet, target: bytes) -> bytes:
        """RFC 4861, 7.2.4: to all nodes when who asks has no address yet."""
        named = packet.raddr != bytes(16)
        to, mac = (packet.raddr, frame[6:12]) if named else (ALL_NODES, ALL_NODES_MAC)
        flags = OVERRIDE | (SOLICITED if named else 0)
        message = struct.pack("!BBHI", ADVERTISE, 0, 0, flags) + target + b"\2\1" + self.mac
        total = checksum(target + to + struct.pack("!II", len(message), ICMPV6) + message)
        message = message[:2] + total.to_bytes(2) + message[4:]
        head = struct.pack("!IHBB", 6 << 28, len(message), ICMPV6, 255) + target + to
        return mac + self.mac + frame[12 : packet.network_at] + head + message


def _at(ip: bytes, packet: Packet, direction: int, end: End | None, **fields: Any) -> bytes:
    """The packet with another end of the guest's: its source when it goes FROM the guest."""
    return readdressed(ip, packet, **{"source" if direction == FROM else "target": end}, **fields)


def _is_arp_of_ipv4(body: bytes) -> bool:
    """RFC 826 on Ethernet (1; 6 for IEEE 802 networks, RFC 1042)."""
    return len(body) >= 28 and body[:2] in (b"\0\1", b"\0\6") and body[2:6] == b"\x08\0\6\4"


def _is_solicitation(frame: bytes, packet: Packet) -> bool:
    """What a node may take for one: RFC 4861, 7.1.1 (but for its checksum, which may be left to the device)."""
    if (packet.proto, packet.icmp_type, packet.part, packet.hops) != (ICMPV6, SOLICIT, "whole", 255):
        return False
    message = frame[packet.network_at :][packet.transport_at : packet.ip_bytes]
    return _has_target(message) and packet.icmp_code == 0


def _has_target(message: bytes) -> bool:
    """RFC 4291, 2.5.5.2: an IPv4 address in IPv6's form is no address of a wire."""
    return len(message) >= ND_BYTES and message[8:20] != MAPPED
