# SPDX-License-Identifier: GPL-2.0-only
"""Frames that are nearly right: built as a guest or its peers would, then broken in some places."""

from __future__ import annotations

import random
import socket
import struct
from dataclasses import dataclass
from typing import Any

from . import frames
from .frames import ARP, IPV4, IPV6, RARP, checksum

FROM, TO = 0, 1
GUEST_MAC, PEER_MAC = frames.mac(1), frames.mac(2)
MACS = (GUEST_MAC, PEER_MAC, frames.mac(3), frames.mac(4))
GROUPS = (frames.BROADCAST, "01:00:5e:00:00:01", "33:33:00:00:00:01", "01:80:c2:00:00:00", "01:80:c2:00:00:10")
OWN = ("10.0.0.1", "2001:db8::1")
OWN4 = (*["10.0.0.1"] * 12, "10.0.0.9", "0.0.0.0", "255.255.255.255", "127.0.0.1")
PEERS4 = (*["192.0.2.9"] * 6, "192.0.2.77", "198.51.100.3", "10.0.0.1", "224.0.0.5", "255.255.255.255", "0.0.0.0")
OWN6 = (*["2001:db8::1"] * 9, "fe80::1", "fe80::1", "::", "2001:db8::66", "ff02::1", "::ffff:10.0.0.1")
PEERS6 = (*["2001:db8:f::9"] * 8, "fe80::9", "fe80::9", "ff02::1", "ff02::16", "2001:db8::1", "::", "::ffff:192.0.2.9")
PORTS = (22, 53, 67, 68, 80, 443, 546, 547, 40000, 40000, 40001)
FLAGS = (*[2] * 5, *[18] * 5, *[16] * 8, 17, 17, 17, 4, 20, 24, 0, 1, 3, 6, 41, 63, 194, 48)
ICMP4 = (8, 8, 0, 0, 3, 3, 11, 12, 4, 5, 13, 14, 15, 16, 17, 18, 9, 10, 42, 255)
ICMP6 = (128, 128, 129, 129, 1, 2, 3, 4, 130, 131, 132, 143, 133, 134, 135, 135, 136, 136, 137, 150, 0)
ARP_HEADS = (*[(1, IPV4, 6, 4)] * 9, (6, IPV4, 6, 4), (1, IPV6, 6, 4), (1, IPV4, 8, 4), (1, IPV4, 6, 16))
OTHERS = (0x88CC, 0x0600, 0x05DC, 0x9100, IPV4, IPV6)  # ethertypes, with what they do not say
OTHER_BODIES = (
    b"x" * 40,
    *(b"\xaa\xaa\3" + oui + b"\x08\0" + b"E" * 40 for oui in (b"\0\0\0", b"\0\0\xf8", b"\1\0\0")),
)
PROTOCOLS = (*[6] * 8, *[17] * 6, *[1] * 4, *[58] * 4, 47, 50, 132, 59, 0, 255)


@dataclass(frozen=True)
class Sent:
    """One frame and how it comes; `policy` or `remap` is not -1 for a change of these rules instead. `held`: it has to
    wait before it goes on, as in a move."""

    direction: int = FROM
    frame: bytes = b""
    gso_size: int = 0
    policy: int = -1
    remap: int = -1
    held: bool = False


class Generator:
    """Frames of one port. `chance` decides everything."""

    protocols = PROTOCOLS

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self._recent: list[tuple[int, bytes]] = []  # IP packets, for the errors about them

    def one(self) -> Sent:
        chance = self.chance
        if chance.random() < 0.02:
            return Sent(policy=chance.randrange(3))
        direction = chance.randrange(2)
        if chance.random() < 0.02:
            return Sent(direction, chance.randbytes(chance.randrange(15, 120)))
        frame = self._tagged(self._frame(direction))
        if chance.random() < 0.3:
            frame = self._broken(frame)
        gso = chance.choice([0, 0, 0, 0, 0, 0, 0, 0, 8, 100])
        return Sent(direction, frame, gso)

    # ---- Ethernet ----

    def _frame(self, direction: int) -> bytes:
        chance = self.chance
        source, target = (GUEST_MAC, PEER_MAC) if direction == FROM else (PEER_MAC, GUEST_MAC)
        if chance.random() < 0.06:
            source = chance.choice([*MACS, *GROUPS, frames.mac(chance.randrange(5, 40))])
        if chance.random() < 0.2:
            target = chance.choice([*MACS, *GROUPS])
        kind = chance.random()
        if kind < 0.46:
            return frames.ethernet(target, source, IPV4, self._ipv4(direction))
        if kind < 0.9:
            return frames.ethernet(target, source, IPV6, self._ipv6(direction))
        if kind < 0.97:
            return frames.ethernet(target, source, chance.choice([ARP, ARP, ARP, RARP]), self._arp(source))
        return frames.ethernet(
            target, source, chance.choice([0x88CC, 0x0600, 0x05DC, 0x9100, 0x0800, 0x86DD]), b"x" * 40
        )

    def _tagged(self, frame: bytes) -> bytes:
        while self.chance.random() < 0.12:
            tag = struct.pack("!HH", self.chance.choice([0x8100, 0x8100, 0x8100, 0x88A8]), self._tci())
            frame = frame[:12] + tag + frame[12:]
        return frame

    def _tci(self) -> int:
        return self.chance.choice([0, 20, 20, 20, 30, 4095]) | self.chance.choice([0, 0, 0x1000, 0xE000])

    def _arp(self, source: str) -> bytes:
        chance = self.chance
        head = chance.choice(
            [*[(1, IPV4, 6, 4)] * 9, (6, IPV4, 6, 4), (1, IPV6, 6, 4), (1, IPV4, 8, 4), (1, IPV4, 6, 16)]
        )
        claimed = source if chance.random() < 0.85 else chance.choice(MACS)
        sender, target = chance.choice(OWN4), chance.choice([*OWN4, *PEERS4])
        body = struct.pack("!HHBBH", *head, chance.choice([1, 2, 3, 4, 9])) + frames.mac_bytes(claimed)
        return body + socket.inet_aton(sender) + bytes(6) + socket.inet_aton(target)

    # ---- IP ----

    def _pair(self, direction: int, own: tuple[str, ...], peers: tuple[str, ...]) -> tuple[bytes, bytes]:
        chance = self.chance
        pair = (own[0], peers[0]) if chance.random() < 0.7 else (chance.choice(own), chance.choice(peers))
        ends = [socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text) for text in pair]
        return (ends[0], ends[1]) if direction == FROM else (ends[1], ends[0])

    def _ipv4(self, direction: int, *, inner: bool = False) -> bytes:
        chance = self.chance
        proto = chance.choice(self.protocols)
        body = self._transport(proto, direction, v6=False, inner=inner)
        options = chance.choice([b"", b"", b"", b"", b"\x94\4\0\0", b"\1" * 8])
        offset = chance.choice([*[0] * 12, 0x4000, 0x4000, 0x2000, 0x2000, 1, 0x2001, 3, 0x2010, 0x1FFF])
        source, target = self._pair(direction, OWN4, PEERS4)
        words = 5 + len(options) // 4
        number, hops = chance.randrange(3), chance.choice([64, 1, 255])
        head = struct.pack("!BBHHHBBH", 0x40 | words, 0, words * 4 + len(body), number, offset, hops, proto, 0)
        head += source + target + options
        packet = head[:10] + struct.pack("!H", checksum(head)) + head[12:] + body
        self._remember(direction, packet, inner=inner)
        return packet

    def _ipv6(self, direction: int, *, inner: bool = False) -> bytes:
        chance = self.chance
        proto = chance.choice(self.protocols)
        source, target = self._pair(direction, OWN6, PEERS6)
        rest, following = self._transport(proto, direction, v6=True, inner=inner), proto
        for _ in range(chance.choice([0, 0, 0, 0, 0, 0, 1, 1, 2, 3, 7, 8, 9])):
            rest, following = self._extension(following, rest)
        hops = chance.choice([64, 1, 255, 255])
        packet = struct.pack("!IHBB", 6 << 28, len(rest), following, hops) + source + target + rest
        self._remember(direction, packet, inner=inner)
        return packet

    def _extension(self, following: int, rest: bytes) -> tuple[bytes, int]:
        chance = self.chance
        kind = chance.choice([0, 43, 60, 60, 44, 44, 51])
        if kind == 44:
            offset = chance.choice([0, 0, 1, 1, 8, 9, 80, 0xFFF9, 6])
            return struct.pack("!BBHI", following, 0, offset, chance.randrange(3)) + rest, 44
        size = chance.choice([0, 0, 0, 1, 2])
        return struct.pack("!BB", following, size) + bytes(6 + 8 * size) + rest, kind

    def _remember(self, direction: int, packet: bytes, *, inner: bool) -> None:
        if not inner:
            self._recent = [*self._recent[-15:], (direction, packet)]

    # ---- above ----

    def _transport(self, proto: int, direction: int, *, v6: bool, inner: bool) -> bytes:
        chance = self.chance
        data = bytes(chance.choice([0, 0, 4, 20, 300]))
        ports = self._ports()
        ports = ports if direction == FROM else (ports[1], ports[0])
        if proto == 6:
            words = chance.choice([*[5] * 9, 6, 10, 4, 15])
            numbers = (chance.getrandbits(32), chance.getrandbits(32))
            head = struct.pack("!HHIIBBHHH", *ports, *numbers, words << 4, chance.choice(FLAGS), 9, 0, 0)
            return head + bytes(max(words - 5, 0) * 4) + data
        if proto == 17:
            return frames.udp(*(ports if chance.random() < 0.7 else (chance.choice(PORTS), chance.choice(PORTS))), data)
        if proto in (1, 58):
            return self._icmp(proto, direction, v6=v6, inner=inner) + data
        return data

    def _ports(self) -> tuple[int, int]:
        """The guest's and the other."""
        chance = self.chance
        return (chance.choice(PORTS), chance.choice(PORTS)) if chance.random() < 0.3 else (40000, 80)

    def _asked(self) -> str:
        """The target of neighbour discovery."""
        return self.chance.choice([*OWN6, *PEERS6])

    def _icmp(self, proto: int, direction: int, *, v6: bool, inner: bool) -> bytes:
        chance = self.chance
        kind = chance.choice(ICMP6 if proto == 58 else ICMP4)
        head = struct.pack("!BBHHH", kind, chance.choice([0, 0, 0, 1, 3]), 0, chance.randrange(3), 0)
        if kind in (135, 136):
            target = socket.inet_pton(socket.AF_INET6, self._asked())
            return head[:4] + bytes(4) + target + self._options()
        if kind == 133:
            return head + self._options()
        if kind in ((1, 2, 3, 4) if proto == 58 else (3, 4, 5, 11, 12)) and not inner:
            return head + self._about(direction, v6=v6)
        return head

    def _about(self, direction: int, *, v6: bool) -> bytes:
        """The packet that an error is about: often one that was sent just now."""
        chance = self.chance
        known = self._known(1 - direction, v6=v6)
        if known and chance.random() < 0.7:
            packet = chance.choice(known)
        else:
            packet = (self._ipv6 if v6 else self._ipv4)(1 - direction, inner=True)
        return packet[: chance.choice([200, 200, 68, 48, 28, 40, 20])]

    def _known(self, way: int, *, v6: bool) -> list[bytes]:
        """What went this way just now."""
        return [packet for direction, packet in self._recent if direction == way and (packet[0] >> 4 == 6) == v6]

    def _options(self) -> bytes:
        chance = self.chance
        return b"".join(
            struct.pack("!BB", chance.choice([1, 2, 2, 14]), chance.choice([1, 1, 1, 1, 1, 2, 0]))
            + frames.mac_bytes(chance.choice([GUEST_MAC, GUEST_MAC, GUEST_MAC, PEER_MAC]))
            for _ in range(chance.choice([0, 1, 1, 1, 2, 4, 5]))
        )

    # ---- and worse ----

    def _broken(self, frame: bytes) -> bytes:
        chance, made = self.chance, bytearray(frame)
        for _ in range(chance.choice([1, 1, 1, 2, 5])):
            how = chance.randrange(5)
            at = chance.randrange(len(made)) if chance.random() < 0.3 else chance.randrange(min(len(made), 90))
            if how < 2:
                made[at] = chance.choice([0, 1, 0xFF, 0x80, chance.randrange(256), made[at] ^ 1 << chance.randrange(8)])
            elif how == 2:
                made = made[: max(15, chance.randrange(len(made)) + 1)]
            elif how == 3:
                made += chance.randbytes(chance.choice([1, 4, 8, 40]))
            else:
                made[at:at] = chance.randbytes(chance.choice([1, 2, 4, 8]))
        return bytes(made[:1400])


def policies(chance: random.Random) -> list[list[dict[str, Any]]]:
    """Three sets of rules for one port, one of them loose."""
    anything = {"remote": [], "protocol": "any", "action": "allow"}
    loose = [_rule(chance, 900 + to, direction=way, **anything) for to, way in enumerate(("from", "to"))]
    return [
        [_rule(chance, number) for number in range(1, 12)],
        [_rule(chance, number) for number in range(20, 23)] + loose,
        [_rule(chance, number) for number in range(30, 60)],
    ]


def _rule(chance: random.Random, number: int, **fields: Any) -> dict[str, Any]:
    protocols = ["any", "tcp", "tcp", "udp", "udp", "icmp", "icmpv6", 47, 132]
    protocol = fields.get("protocol", chance.choice(protocols))
    remotes = [[], [], ["192.0.2.0/24"], ["192.0.2.9/32", "2001:db8:f::/48"], ["::/0"], ["0.0.0.0/0"], ["fe80::/10"]]
    made = {
        "id": number,
        "direction": chance.choice(["from", "to"]),
        "priority": chance.randrange(100),
        "protocol": protocol,
        "remote": chance.choice(remotes),
        "ports": [],
        "icmp": [],
        "action": chance.choice(["allow", "allow", "allow", "drop", "reject"]),
        "log": False,
    }
    if protocol in ("tcp", "udp") and chance.random() < 0.5:
        made["ports"] = chance.choice([[[80, 80]], [[0, 1023]], [[40000, 65535], [53, 53]]])
    if protocol in ("icmp", "icmpv6") and chance.random() < 0.5:
        made["icmp"] = chance.choice([[8], [8, 0], [128], [128, 0], [13], [42, 1], [150]])
    if not fields and chance.random() < 0.3:
        made |= chance.choice([{"mark": "1/1"}, {"label": "0x30/0xf0"}, {"mark": "0/2", "label": "0"}, {"mark": "3"}])
    if made["action"] == "allow" and chance.random() < 0.5:
        made |= chance.choice([{"set_mark": "3"}, {"set_mark": "1/5"}, {"set_label": "0x30/0xff"}])
    return {**made, **fields}
