# SPDX-License-Identifier: GPL-2.0-only
"""Packets by hand between a VM and a peer, on addresses that no kernel answers for: every packet is the test's own."""

from __future__ import annotations

from dataclasses import dataclass

from migrator.lab.machines import Machine
from migrator.lab.processes import wait_until
from migrator.lab.workers import frames

from .world import SERVICE

GUEST, PEER = True, False


class Wire:
    """Sends frames as the guest or the peer and sees whether they come out at the other end."""

    def __init__(self, vm: Machine, peer: Machine) -> None:
        self.machines = {GUEST: vm, PEER: peer}
        self.raw = {side: machine.worker("raw") for side, machine in self.machines.items()}
        for raw in self.raw.values():
            raw.call("capture")

    def address(self, side: bool, *, ipv6: bool) -> str:
        return self.machines[side].ports[0].silent[ipv6]

    def ip(self, side: bool, protocol: int, body: bytes, *, ipv6: bool = False, **fragment: int | bool) -> bytes:
        """A frame from `side` to the other."""
        source, destination = self.address(side, ipv6=ipv6), self.address(not side, ipv6=ipv6)
        macs = (self.machines[side].ports[0].mac, self.machines[not side].ports[0].mac)
        return frames.ethernet(*macs, frames.ip(source, destination, protocol, body, **fragment))

    def send(self, side: bool, frame: bytes) -> None:
        self.raw[side].call("send", frames=[frame.hex()])

    def arrived(self, side: bool, frame: bytes) -> bool:
        """Has a frame that `side` sent come in at the other?"""
        return any(way == "in" for _, way, _ in self.raw[not side].call("captured", contains=frame.hex())["frames"])

    def pass_through(self, side: bool, frame: bytes) -> None:
        """Send it and wait until it is there."""
        self.send(side, frame)
        wait_until("a frame by hand arrives", lambda: self.arrived(side, frame), explain=frame.hex)

    def blocked(self, side: bool, frame: bytes, after: bytes) -> bool:
        """Send it and then one that passes: True when only that one came."""
        self.send(side, frame)
        self.pass_through(side, after)
        return not self.arrived(side, frame)


SYN, ACK, FIN, RST, PSH = frames.SYN, frames.ACK, frames.FIN, frames.RST, frames.PSH

# state -> what was said to get there, and what the next word is: (who, flags)
Said = tuple[bool, int]
OPENING: tuple[Said, ...] = ((GUEST, SYN), (PEER, SYN | ACK), (GUEST, ACK))
STATES: dict[str, tuple[tuple[Said, ...], Said]] = {
    "SYN_SENT": (OPENING[:1], (PEER, SYN | ACK)),
    "SYN_SENT2": (((GUEST, SYN), (PEER, SYN)), (GUEST, SYN | ACK)),
    "SYN_RECV": (OPENING[:2], (GUEST, ACK)),
    "ESTABLISHED": (OPENING, (PEER, ACK | PSH)),
    "FIN_WAIT": ((*OPENING, (GUEST, FIN | ACK)), (PEER, ACK)),
    "CLOSE_WAIT": ((*OPENING, (GUEST, FIN | ACK), (PEER, ACK)), (PEER, FIN | ACK)),
    "LAST_ACK": ((*OPENING, (GUEST, FIN | ACK), (PEER, ACK), (PEER, FIN | ACK)), (GUEST, ACK)),
    "TIME_WAIT": ((*OPENING, (GUEST, FIN | ACK), (PEER, ACK), (PEER, FIN | ACK), (GUEST, ACK)), (PEER, FIN | ACK)),
}


@dataclass
class Conversation:
    """One TCP connection said by hand, with sequence numbers that fit."""

    wire: Wire
    port: int  # of the guest
    ipv6: bool
    next: dict[bool, int]

    @classmethod
    def to_state(cls, wire: Wire, state: str, port: int, *, ipv6: bool) -> Conversation:
        made = cls(wire, port, ipv6, {GUEST: 1000 * port, PEER: 7_000_000})
        for side, flags in STATES[state][0]:
            made.say(side, flags)
        return made

    def say(self, side: bool, flags: int) -> None:
        """Send the next segment of a side and see it arrive."""
        data = b"by hand!" if flags & PSH else b""
        if self.repeats(side, flags):
            self.next[side] -= 1
        source, destination = self.wire.address(side, ipv6=self.ipv6), self.wire.address(not side, ipv6=self.ipv6)
        ports = (self.port, SERVICE) if side is GUEST else (SERVICE, self.port)
        ack = self.next[not side] if flags & ACK else 0
        segment = frames.tcp(source, destination, *ports, flags, self.next[side], ack, data)
        self.next[side] += len(data) + bool(flags & (SYN | FIN))
        self.wire.pass_through(side, self.wire.ip(side, frames.TCP, segment, ipv6=self.ipv6))

    def repeats(self, side: bool, flags: int) -> bool:
        """A SYN or FIN that was sent before is sent again under its own number (simultaneous open, lost last ACK)."""
        mark = flags & (SYN | FIN)
        begun = self.said.setdefault((side, mark), 0)
        self.said[side, mark] = begun + 1
        return bool(mark) and begun > 0

    def __post_init__(self) -> None:
        self.said: dict[tuple[bool, int], int] = {}
