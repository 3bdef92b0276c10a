# SPDX-License-Identifier: GPL-2.0-only
"""What the switch must make of a frame, written apart from its C: by the RFCs, nf_conntrack and the policy's text.

`Reference` is one port: it takes the frames that the guest sends (`from_guest`) and that go to it (`to_guest`), says
for which reason each is dropped ("" for none), and keeps a table, counters and rule hits to compare with the kernel's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .reference_remap import Remapping
from .reference_spoof import ZERO, Identity
from .rules import decides
from .segments import Malformed, Packet, is_link_local, parse

FROM, TO = 0, 1
NONE, SYN_SENT, SYN_RECV, ESTABLISHED, FIN_WAIT, CLOSE_WAIT, LAST_ACK, TIME_WAIT, CLOSE, SYN_SENT2 = range(10)
NEW, REPLIED_STATE = 16, 17
REPLIED, ASSURED, INBOUND, LEARNED = 1, 2, 4, 8
TCP, UDP, ICMP, ICMPV6 = 6, 17, 1, 58
FIN, SYN, RST, ACK = 1, 2, 4, 16

# net/netfilter/nf_conntrack_proto_tcp.c, tcp_conntracks: a row a segment, a column a state. i: ignored, -: invalid
_COLUMNS = {"n": NONE, "s": SYN_SENT, "r": SYN_RECV, "e": ESTABLISHED, "f": FIN_WAIT, "c": CLOSE_WAIT, "l": LAST_ACK}
_COLUMNS |= {"t": TIME_WAIT, "x": CLOSE, "2": SYN_SENT2}
_NEXT = {
    "original": {
        "syn": "ssiiiiiss2",
        "synack": "--r------r",
        "fin": "--ffllltx-",
        "ack": "e-eeccttx-",
        "rst": "-xxxxxxxxx",
    },
    "reply": {
        "syn": "-2-----s-2",
        "synack": "-riiiiiiir",
        "fin": "--ffllltx-",
        "ack": "-ireccttxi",
        "rst": "-xxxxxxxxx",
    },
}
_ALLOWED_FLAGS = {SYN, SYN | ACK, RST, RST | ACK, FIN | ACK, ACK}


@dataclass
class Entry:
    """A connection, or (ports instead of a state) what a first fragment left."""

    state: int
    flags: int = 0
    judged: int = 0
    packets: list[int] = field(default_factory=lambda: [0, 0])
    bytes: list[int] = field(default_factory=lambda: [0, 0])
    ports: tuple[int, int] = (0, 0)
    words: tuple[int, int] = (0, 0)  # mark and label


@dataclass
class Setting:
    """How the port is configured. `policies`: each a list of rules, of which the port has one at a time."""

    mac: bytes
    addresses: frozenset[bytes]
    policies: Sequence[Sequence[Mapping[str, Any]]]
    antispoof: bool = True
    learning: bool = False
    trunk: frozenset[int] = frozenset()
    learned_max: int = 16
    known_macs: frozenset[bytes] = frozenset()  # behind other ports of the network
    remaps: Sequence[Sequence[Mapping[str, Any]]] = ((),)  # each a list of rules, of which the port has one at a time


class Reference:
    """One port."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.policy = 0
        self.packet = Packet()  # the last one
        self._ranked = [sorted(rules, key=lambda rule: rule["priority"]) for rules in setting.policies]
        self.table: dict[tuple[Any, ...], Entry] = {}
        self.hits: Counter[int] = Counter()
        self.hit_bytes: Counter[int] = Counter()
        self.would_drop = 0
        self._given = (0, 0)  # mark and label that the last verdict gives to what begins
        self.learned: set[tuple[bool, bytes]] = set()  # in the network of tagged frames?, MAC
        self.passed = [0, 0]
        self.passed_bytes = [0, 0]
        self.remap(0)

    def remap(self, number: int) -> None:
        """The port has these remap rules from now on."""
        self.remapping = Remapping(self.setting.remaps[number], self.setting.mac)
        self._identity = Identity(self.setting.mac, self.setting.addresses, self.remapping.outside)

    # ---- the two ways ----

    def from_guest(self, frame: bytes, gso_size: int = 0) -> tuple[str, bytes]:
        """The reason, and the frame as it goes on: its tag is taken off (IEEE 802.1Q)."""
        reason, frame, tagged = self._untagged(frame)
        return (reason, frame) if reason else self._from_guest(frame, gso_size, tagged=tagged)

    def from_switch(self, frame: bytes) -> tuple[str, bytes]:
        """What the switch says in the guest's stead, to one whom it told so: nobody has to judge it."""
        reason, frame, tagged = self._untagged(frame)
        if not reason:
            reason, frame = self.remapping.outward(frame, parse(frame, FROM))
        return reason or self._forward(frame[:6], tagged=tagged), frame

    def _untagged(self, frame: bytes) -> tuple[str, bytes, bool]:
        kind, vid = frame[12:14], 0
        if kind == b"\x88\xa8":
            return "vlan", frame, False
        if kind == b"\x81\x00":
            if len(frame) < 18 or frame[16:18] in (b"\x81\x00", b"\x88\xa8"):
                return "vlan", frame, False
            vid = int.from_bytes(frame[14:16]) & 0xFFF
            frame = frame[:12] + frame[16:]
        return ("vlan" if vid and vid not in self.setting.trunk else ""), frame, bool(vid)

    def _from_guest(self, frame: bytes, gso_size: int, *, tagged: bool) -> tuple[str, bytes]:
        try:
            packet = self.packet = parse(frame, FROM, gso_size)
        except Malformed:
            return "malformed", frame
        source = frame[6:12]
        reason = self._identity.spoofed(packet, source) if self.setting.antispoof else ""
        reason = reason or ("spoof-mac" if source[0] & 1 else "") or self._judge(packet, FROM)
        if not reason and source != self.setting.mac:
            reason = self._learn(source, tagged=tagged)
        if not reason:
            reason, frame = self.remapping.outward(frame, packet)
        if reason:
            return reason, frame
        self._count(packet, FROM)
        return self._forward(frame[:6], tagged=tagged), frame

    def _forward(self, target: bytes, *, tagged: bool) -> str:
        if target[:5] == b"\x01\x80\xc2\x00\x00" and target[5] < 0x10:  # 802.1Q, 8.6.3: not beyond a bridge
            return "unknown-unicast"
        own = not tagged and target == self.setting.mac
        return "loop" if own or (tagged, target) in self.learned else ""

    def to_guest(self, frame: bytes, gso_size: int = 0) -> tuple[str, bytes]:
        try:
            packet = parse(frame, TO, gso_size, tags=1)
        except Malformed:
            return "malformed", frame
        reason, frame = self.remapping.inward(frame, packet)
        if reason:
            return reason, frame
        packet = self.packet = parse(frame, TO, gso_size, tags=1)
        reason = self._judge(packet, TO)
        if not reason:
            self._count(packet, TO)
        return reason, frame

    def _count(self, packet: Packet, direction: int) -> None:
        self.passed[direction] += packet.wire_packets
        self.passed_bytes[direction] += packet.wire_frame_bytes

    def _learn(self, source: bytes, *, tagged: bool) -> str:
        """IEEE 802.1Q, 8.7, with a limit: a guest fills no table of its neighbours."""
        if (not tagged and source in self.setting.known_macs) or (tagged, source) in self.learned:
            return ""
        if len(self.learned) >= self.setting.learned_max:
            return "learn-limit"
        self.learned.add((tagged, source))
        return ""

    # ---- connections ----

    def _judge(self, packet: Packet, direction: int) -> str:
        if not packet.family:
            return ""
        reason = self._judged(packet, direction)
        if not reason and packet.part == "first":
            key = self._fragment_key(packet, direction)
            self.table.setdefault(key, Entry(NEW)).ports = (packet.lport, packet.rport)
        return reason

    def _judged(self, packet: Packet, direction: int) -> str:
        if packet.part == "later":
            return self._later_fragment(packet, direction)
        if packet.is_error:
            return self._related(packet, direction)
        if _is_discovery(packet, direction) or _is_dhcp_answer(packet, direction):
            return ""
        icmp = packet.proto in (ICMP, ICMPV6)
        if packet.group or (icmp and packet.query == ""):
            return self._verdict(packet, direction)
        return self._tracked(packet, direction)

    def _fragment_key(self, packet: Packet, direction: int) -> tuple[Any, ...]:
        return ("fragment", packet.laddr, packet.raddr, packet.proto, packet.fragment_id, direction)

    def _later_fragment(self, packet: Packet, direction: int) -> str:
        """docs/decisions/0003-fragments.md: with the connection of its first, else not at all."""
        first = self.table.get(self._fragment_key(packet, direction))
        if first is None:
            return "fragment"
        packet.lport, packet.rport = first.ports
        if packet.group:
            return ""
        entry = self.table.get(packet.key)
        if entry is None:
            return "fragment"
        reason = self._allowed(packet, entry)
        if not reason:
            self._touch(entry, packet, direction)
        return reason

    def _related(self, packet: Packet, direction: int) -> str:
        """RFC 792, RFC 4443, RFC 5927: about a packet that the receiver of the error did send."""
        inner = packet.inner(1 - direction)
        if inner is None or (inner.proto in (ICMP, ICMPV6) and not inner.query) or inner.key not in self.table:
            return "ct-invalid"
        same = inner.laddr == packet.laddr if direction == TO else inner.raddr == packet.raddr
        return "" if same else "ct-invalid"

    def _tracked(self, packet: Packet, direction: int) -> str:
        if packet.proto == TCP and packet.tcp_flags & (FIN | SYN | RST | ACK) not in _ALLOWED_FLAGS:
            return "ct-invalid"
        entry = self.table.get(packet.key)
        if entry is None:
            return self._begin(packet, direction)
        reason = self._allowed(packet, entry)
        if reason:
            return reason
        reply = bool(entry.flags & INBOUND) != bool(direction)
        if packet.proto == TCP:
            return self._segment(packet, entry, direction, reply=reply)
        if reply:
            entry.state, entry.flags = REPLIED_STATE, entry.flags | REPLIED
        elif packet.proto == UDP and entry.flags & REPLIED:
            entry.flags |= ASSURED
        self._touch(entry, packet, direction)
        return ""

    def _segment(self, packet: Packet, entry: Entry, direction: int, *, reply: bool) -> str:
        letter = "i"
        if entry.state <= SYN_SENT2:
            letter = _NEXT["reply" if reply else "original"][_segment_kind(packet.tcp_flags)][entry.state]
        if letter == "-" or entry.state > SYN_SENT2:
            if not self.setting.learning:
                return "ct-invalid"
            self.would_drop += 1
            return ""
        if letter == "s" and entry.state in (TIME_WAIT, CLOSE):  # the connection is over, this is another
            return self._begin(packet, direction)
        following = entry.state if letter == "i" else _COLUMNS[letter]
        entry.flags |= REPLIED if reply else 0
        if following == ESTABLISHED and entry.state in (SYN_RECV, ESTABLISHED) and entry.flags & REPLIED:
            entry.flags |= ASSURED
        entry.state = following
        self._touch(entry, packet, direction)
        return ""

    def _touch(self, entry: Entry, packet: Packet, direction: int) -> None:
        entry.packets[direction] += packet.wire_packets
        entry.bytes[direction] += packet.wire_bytes

    def _begin(self, packet: Packet, direction: int) -> str:
        opening = _opening(packet)
        flags, opener = 0, direction
        if self.setting.learning and opening != SYN_SENT:
            opening, flags, opener = self._learn_connection(packet, opening, direction)
            if opening is None:
                return ""
        elif opening is None:
            return "ct-invalid"
        else:
            reason = self._verdict(packet, direction)
            if reason:
                return reason
        entry = Entry(opening, flags | (INBOUND if opener == TO else 0), self.policy, words=self._given)
        self._touch(entry, packet, direction)
        self.table[packet.key] = entry
        return ""

    def _learn_connection(self, packet: Packet, opening: int | None, direction: int) -> tuple[int | None, int, int]:
        """A port that has just come to a running VM drops nothing that may be older than it."""
        opener, middle = direction, opening is None
        refused = self._verdict(packet, opener)
        if middle or refused:
            self.would_drop += 1
        if refused:
            opener = 1 - opener
            refused = self._verdict(packet, opener)
        lasts = packet.proto == TCP and not packet.tcp_flags & (FIN | RST)
        if refused or (middle and not lasts):
            return None, 0, opener
        if packet.proto == TCP:
            return ESTABLISHED, LEARNED | REPLIED | ASSURED, opener
        return NEW, LEARNED, opener

    # ---- the policy ----

    def _allowed(self, packet: Packet, entry: Entry) -> str:
        """A connection from before a change of the policy is judged again, as the direction that opened it."""
        if entry.judged == self.policy:
            return ""
        reason = self._verdict(packet, TO if entry.flags & INBOUND else FROM, entry)
        if not reason:
            entry.judged = self.policy
        elif self.setting.learning:
            self.would_drop += 1
            return ""
        else:
            del self.table[packet.key]
        return reason

    def _verdict(self, packet: Packet, direction: int, again: Entry | None = None) -> str:
        """The first rule in order of priority that matches; without one, dropped. `again`: this connection goes on."""
        rule, self._given = decides(self._ranked[self.policy], packet, direction, again.words if again else (0, 0))
        if again and rule and rule["action"] == "allow":
            return ""
        number = rule["id"] if rule else 0
        self.hits[number] += packet.wire_packets
        self.hit_bytes[number] += packet.wire_bytes
        return {"allow": "", "reject": "reject", "drop": "policy"}[rule["action"] if rule else "drop"]


def _is_discovery(packet: Packet, direction: int) -> bool:
    """What may pass without a policy because no router passes it on: it is of this link."""
    if packet.family != 6 or packet.proto != ICMPV6:
        return False
    sender = packet.laddr if direction == FROM else packet.raddr
    if packet.icmp_type in (130, 131, 132, 143):  # RFC 2710, 3; RFC 3590; RFC 3810, 5
        return packet.hops == 1 and (is_link_local(sender) or sender == ZERO)
    if packet.icmp_type in (134, 137):
        return packet.hops == 255 and direction == TO
    return packet.icmp_type in (133, 135, 136) and packet.hops == 255  # RFC 4861


def _is_dhcp_answer(packet: Packet, direction: int) -> bool:
    ports = {4: (68, 67), 6: (546, 547)}[packet.family]  # RFC 2131, RFC 8415
    return direction == TO and packet.proto == UDP and (packet.lport, packet.rport) == ports


def _opening(packet: Packet) -> int | None:
    if packet.proto == TCP:
        return SYN_SENT if _segment_kind(packet.tcp_flags) == "syn" else None
    if packet.proto in (ICMP, ICMPV6):
        return NEW if packet.query == "request" else None
    return NEW


def _segment_kind(flags: int) -> str:
    if flags & RST:
        return "rst"
    if flags & SYN:
        return "synack" if flags & ACK else "syn"
    return "fin" if flags & FIN else "ack"
