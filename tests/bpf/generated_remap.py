# SPDX-License-Identifier: GPL-2.0-only
"""Remap rules of a port, and frames for them: most with the addresses that whoever sends them knows."""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from datapath.state.remap import RemapDocument

from . import frames
from .frames import IPV4, IPV6, checksum
from .generated import FROM, GUEST_MAC, OWN4, OWN6, PEERS4, PEERS6, PORTS, PROTOCOLS, TO, Generator, Sent
from .readdressed import CHECK_AT
from .reference_remap import Remapping
from .segments import TCP, UDP, Malformed, Packet, parse

INSIDES = ("10.0.0.1", "10.0.0.1", "10.0.0.9", "2001:db8::1", "2001:db8::1", "2001:db8::66")
OUTSIDES = ("203.0.113.10", "203.0.113.11", "203.0.113.12", "2001:db8:a::10", "2001:db8:a::11", "2001:db8:a::12")
OUTSIDE4, OUTSIDE6 = (tuple(text for text in OUTSIDES if (":" in text) == v6) for v6 in (False, True))
RULE_SETS = 4
_UDPLITE, _DCCP = 136, 33

Rules = Sequence[dict[str, Any]]


def rule_sets(chance: random.Random) -> list[Rules]:
    """As an operator may set them one after the other; the last is none at all."""
    return [*(_rules(chance) for _ in range(RULE_SETS - 1)), []]


def _rules(chance: random.Random) -> Rules:
    """A few that are one to one: each candidate that goes with those before it."""
    found: list[dict[str, Any]] = []
    for _ in range(chance.choice([2, 4, 12, 30])):
        inside, outside = chance.choice(INSIDES), chance.choice(OUTSIDES)
        rule: dict[str, Any] = {"outside": outside, "inside": inside}
        if chance.random() < 0.7:
            ports = {"outside_port": chance.choice(PORTS), "inside_port": chance.choice(PORTS)}
            rule |= {"protocol": chance.choice(["tcp", "udp"]), **ports}
        if (":" in inside) == (":" in outside) and _is_valid([*found, rule]):
            found.append(rule)
    return found


def _is_valid(rules: Rules) -> bool:
    try:
        RemapDocument.model_validate({"rules": rules})
    except ValueError:
        return False
    return True


class RemapGenerator(Generator):
    """Frames for a port that has one of these sets of rules at a time, the first at the beginning."""

    protocols = (*PROTOCOLS, _UDPLITE, _DCCP)

    def __init__(self, chance: random.Random, sets: Sequence[Rules]) -> None:
        super().__init__(chance)
        self._sets = sets
        self._seen_by = FROM  # who sends the frame under way, and knows the guest so
        self._use(0)

    def _use(self, number: int) -> None:
        self._remapping = Remapping(self._sets[number], frames.mac_bytes(GUEST_MAC))

    def one(self) -> Sent:
        if self.chance.random() < 0.015:
            number = self.chance.randrange(len(self._sets))
            self._use(number)
            return Sent(remap=number)
        sent = super().one()
        waits = sent.policy < 0 and not sent.gso_size and self.chance.random() < 0.1
        return replace(sent, held=True) if waits else sent

    def _frame(self, direction: int) -> bytes:
        self._seen_by = direction
        frame = super()._frame(direction)
        if self.chance.random() < 0.03:
            frame = self._about_nothing(frame, direction)
        return _sealed(frame) if self.chance.random() < 0.85 else frame

    def _ipv4(self, direction: int, *, inner: bool = False) -> bytes:
        answer = self._answer(direction, v6=False) if not inner else b""
        return answer or super()._ipv4(direction, inner=inner)

    def _ipv6(self, direction: int, *, inner: bool = False) -> bytes:
        answer = self._answer(direction, v6=True) if not inner else b""
        return answer or super()._ipv6(direction, inner=inner)

    # ---- who is meant ----

    def _pair(self, direction: int, own: tuple[str, ...], peers: tuple[str, ...]) -> tuple[bytes, bytes]:
        rest = OUTSIDE6 if peers is PEERS6 else OUTSIDE4
        if self._seen_by == TO and self.chance.random() < 0.85:
            own = (self.chance.choice(rest), *rest)
        elif self.chance.random() < 0.1:
            own = (*own, *rest)
        return super()._pair(direction, own, peers)

    def _ports(self) -> tuple[int, int]:
        rules = [rule for rule in self._remapping.rules if rule.proto]
        if not rules or self.chance.random() < 0.4:
            return super()._ports()
        rule = self.chance.choice(rules)
        return (rule.inside if self._seen_by == FROM else rule.outside).port, self.chance.choice([80, 80, 22])

    def _arp(self, source: str) -> bytes:
        chance = self.chance
        own, other = (OWN4, PEERS4) if self._seen_by == FROM else (PEERS4, [*OUTSIDE4] * 6)
        sender, target = chance.choice([*own, *OUTSIDE4]), chance.choice([*own, *other, *OWN4])
        body = super()._arp(source)
        operation = chance.choice([1, 1, 1, 2, 2]).to_bytes(2) if chance.random() < 0.8 else body[6:8]
        return body[:6] + operation + body[8:14] + socket.inet_aton(sender) + bytes(6) + socket.inet_aton(target)

    def _asked(self) -> str:
        return self.chance.choice([*OWN6, *PEERS6, *OUTSIDE6 * 4])

    # ---- what was seen before ----

    def _known(self, way: int, *, v6: bool) -> list[bytes]:
        """As the one who sends now has seen it: what goes in an error TO the guest, was sent FROM it and remapped."""
        return [self._remapped(packet, way) for packet in super()._known(way, v6=v6)]

    def _remapped(self, packet: bytes, way: int) -> bytes:
        frame = bytes(12) + struct.pack("!H", IPV6 if packet[0] >> 4 == 6 else IPV4) + packet
        try:
            parsed = parse(frame, way)
        except Malformed:
            return packet
        remap = self._remapping.outward if way == FROM else self._remapping.inward
        return remap(_sealed(frame), parsed)[1][14:] if self.chance.random() < 0.85 else packet

    def _answer(self, direction: int, *, v6: bool) -> bytes:
        """To what came just now, so that there are connections that last."""
        chance = self.chance
        known = self._known(1 - direction, v6=v6) if chance.random() < 0.3 else []
        if not known:
            return b""
        made = bytearray(chance.choice(known))
        proto = made[6 if v6 else 9]
        at, size, start = (8, 16, 40) if v6 else (12, 4, (made[0] & 0xF) * 4)
        made[at : at + 2 * size] = made[at + size : at + 2 * size] + made[at : at + size]
        if proto in (TCP, UDP) and len(made) >= start + 20:
            made[start : start + 4] = made[start + 2 : start + 4] + made[start : start + 2]
            made[start + 13] = chance.choice([16, 16, 18, 17, 4, 24]) if proto == TCP else made[start + 13]
        elif proto in (1, 58) and len(made) > start:
            made[start] = {8: 0, 128: 129}.get(made[start], made[start])
        self._remember(direction, bytes(made), inner=False)
        return bytes(made)

    def _about_nothing(self, frame: bytes, direction: int) -> bytes:
        """A datagram whose checksum comes to zero where it arrives, which is written otherwise (RFC 768)."""
        try:
            packet = parse(frame, direction)
        except Malformed:
            return frame
        start = packet.network_at + packet.transport_at
        if packet.proto not in (UDP, _UDPLITE) or packet.part != "whole" or packet.ip_bytes < packet.transport_at + 10:
            return frame
        blank = _sealed(frame[: start + 8] + bytes(2) + frame[start + 10 :])
        way = self._remapping.outward if direction == FROM else self._remapping.inward
        there = _checksum_at(packet, way(blank, packet)[1])
        return _sealed(blank[: start + 8] + there + blank[start + 10 :])


def _checksum_at(packet: Packet, frame: bytes) -> bytes:
    at = packet.network_at + packet.transport_at + 6
    return frame[at : at + 2]


def _sealed(frame: bytes) -> bytes:
    """The frame with checksums that are right, where it is a packet."""
    try:
        packet = parse(frame, FROM)
    except Malformed:
        return frame
    field = CHECK_AT.get(packet.proto)
    made, start = bytearray(frame), packet.network_at
    if packet.family == 4:
        words = (made[start] & 0xF) * 4
        made[start + 10 : start + 12] = bytes(2)
        made[start + 10 : start + 12] = checksum(bytes(made[start : start + words])).to_bytes(2)
    end, at = start + packet.ip_bytes, start + packet.transport_at
    if not packet.family or field is None or packet.part == "later" or at + field + 2 > end:
        return bytes(made)
    made[at + field : at + field + 2] = bytes(2)
    addresses = made[start + 12 : start + 20] if packet.family == 4 else made[start + 8 : start + 40]
    pseudo = bytes(addresses) + struct.pack("!II", end - at, packet.proto) if packet.proto != 1 else b""
    value = checksum(pseudo + bytes(made[at:end]))
    made[at + field : at + field + 2] = (value or (0xFFFF if packet.proto in (UDP, _UDPLITE) else 0)).to_bytes(2)
    return bytes(made)
