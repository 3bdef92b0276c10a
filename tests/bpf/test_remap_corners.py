# SPDX-License-Identifier: GPL-2.0-only
"""Remapping of what is rare: what the reference switch (reference_remap.py) and the programs once disagreed on."""

from __future__ import annotations

import struct

import pytest

from . import frames
from .frames import ICMP6, UDP, checksum
from .lab import Lab, Wire, wait_for
from .model import MODEL
from .test_acl_reject import pseudo_sum
from .test_remap import (
    DCCP,
    ICMP,
    INSIDE,
    INSIDE6,
    OUTSIDE,
    OUTSIDE6,
    PEER,
    PEER6,
    RULES,
    TCP,
    UDPLITE,
    A,
    B,
    body_of,
    crossed,
    error,
    framed,
    load,
    packet,
    wires,
)
from .test_remap_neighbours import NOBODY, arp, guarded, nd

__all__ = ["wires"]  # the fixture

FAMILIES = pytest.mark.parametrize(
    ("inside", "outside", "peer"), [(INSIDE, OUTSIDE, PEER), (INSIDE6, OUTSIDE6, PEER6)], ids=["ipv4", "ipv6"]
)


@pytest.mark.parametrize("proto", [UDPLITE, DCCP])
def test_padding_has_no_checksum(lab: Lab, wires: tuple[Wire, Wire], proto: int) -> None:
    """The packet ends before its checksum; the frame does not."""
    ports = struct.pack("!HH", 1000, 2000)
    wires[0].send(framed(B, A, frames.ipv4(INSIDE, PEER, proto, ports)))
    wires[1].send(framed(A, B, frames.ipv4(PEER, OUTSIDE, proto, ports)))
    wait_for(lambda: lab.drops(1) == {MODEL.DROP_REMAP: 2}, "the drops")


@FAMILIES
def test_what_is_behind_an_error_is_not_of_it(wires: tuple[Wire, Wire], inside: str, outside: str, peer: str) -> None:
    """Of the segment in it there are 8 bytes: no checksum. What stands at its place is padding."""
    trailer = b"padding of a network card"
    seen, sent = (
        packet(ours, peer, TCP, body_of(TCP, 1000, 999))[: (40 if ":" in peer else 20) + 8]
        for ours in (outside, inside)
    )
    wires[1].send(framed(A, B, error(peer, outside, seen)) + trailer)
    assert wires[0].receive().hex() == (framed(A, B, error(peer, inside, sent)) + trailer).hex()


@pytest.mark.parametrize(("outside", "peer"), [(OUTSIDE, PEER), (OUTSIDE6, PEER6)], ids=["ipv4", "ipv6"])
def test_what_is_behind_an_error_is_not_what_it_is_about(
    lab: Lab, wires: tuple[Wire, Wire], outside: str, peer: str
) -> None:
    about = packet(outside, peer, UDP, body_of(UDP, 1000, 999))
    size = 40 if ":" in peer else 20
    for within in (0, size, size + 7):
        wires[1].send(framed(A, B, error(peer, outside, about[:within])) + about[within:])
    wait_for(lambda: lab.drops(1) == {MODEL.DROP_REMAP: 3}, "the drops")


def test_no_connection_is_found_behind_an_error(lab: Lab, wires: tuple[Wire, Wire]) -> None:
    guarded(lab, {"direction": "from"})
    lab.change_port(1, features=0)
    there = packet(INSIDE, PEER, UDP, body_of(UDP, 1000, 2000))
    crossed(wires, 0, there, there)
    wires[1].send(framed(A, B, error(PEER, INSIDE, there[:24])) + there[24:])
    wait_for(lambda: lab.drops(1) == {MODEL.DROP_CT_INVALID: 1}, "the drop")


@pytest.mark.parametrize("direction", [0, 1])
def test_errors_about_dhcp_are_left_alone_as_it_is(wires: tuple[Wire, Wire], direction: int) -> None:
    """DHCP is spoken with the inside address: so is what is told of it."""
    if direction:
        same = error(PEER, INSIDE, packet(INSIDE, PEER, UDP, body_of(UDP, 68, 67)))
    else:
        same = error(INSIDE, PEER, packet(PEER, INSIDE, UDP, body_of(UDP, 67, 68)))
    crossed(wires, direction, same, same)


@FAMILIES
def test_errors_about_icmp_that_asks_nothing(wires: tuple[Wire, Wire], inside: str, outside: str, peer: str) -> None:
    """A host unreachable for a router's solicitation (RFC 1256, RFC 4861): it is about an address, not a query."""
    proto, kind = (ICMP6, 133) if ":" in peer else (ICMP, 10)
    body = struct.pack("!BBHI", kind, 0, 0, 0)
    seen, sent = (packet(ours, peer, proto, body) for ours in (outside, inside))
    crossed(wires, 1, error(peer, outside, seen), error(peer, inside, sent))


def test_a_rejected_message_is_answered_from_outside(lab: Lab, wires: tuple[Wire, Wire]) -> None:
    guarded(lab, {"direction": "to", "action": "reject"})
    sent = packet(PEER, OUTSIDE, ICMP, struct.pack("!BBHI", 10, 0, 0, 0))
    wires[1].send(framed(A, B, sent))
    answer = wires[1].receive()[14:]
    assert answer[12:20] == sent[16:20] + sent[12:16]
    assert answer[28:56] == sent
    assert checksum(answer[20:56]) == 0


def test_errors_about_icmp_that_asks_nothing_have_no_connection(lab: Lab, wires: tuple[Wire, Wire]) -> None:
    """ICMPv6's type 0 is none (RFC 4443): not the ping with the number 0, either."""
    guarded(lab, {"direction": "from"})
    ping = body_of(ICMP6, 0, 0)
    crossed(wires, 0, packet(INSIDE6, PEER6, ICMP6, ping), packet(OUTSIDE6, PEER6, ICMP6, ping))
    nothing = packet(OUTSIDE6, PEER6, ICMP6, bytes(8))
    wires[1].send(framed(A, B, error(PEER6, OUTSIDE6, nothing)))
    wait_for(lambda: lab.drops(1) == {MODEL.DROP_CT_INVALID: 1}, "the drop")


@FAMILIES
def test_udplite_has_always_a_checksum(wires: tuple[Wire, Wire], inside: str, outside: str, peer: str) -> None:
    """RFC 3828, 3.1: one that comes to zero is sent as all ones."""
    port = next(p for p in range(1024, 65_536) if not _sum(packet(outside, peer, UDPLITE, body_of(UDPLITE, p, 999))))
    there = body_of(UDPLITE, port, 999)
    crossed(wires, 0, packet(inside, peer, UDPLITE, there), packet(outside, peer, UDPLITE, there))


def _sum(made: bytes) -> int:
    """The checksum of a packet as it is computed, before it is written as all ones."""
    start = 40 if made[0] >> 4 == 6 else 20
    field = start + 6
    blank = made[:field] + bytes(2) + made[field + 2 :]
    return checksum(struct.pack("!H", pseudo_sum(blank, len(blank) - start)) + blank[start:])


@pytest.mark.parametrize("hardware", [6, 15])
def test_arp_of_other_hardware(wires: tuple[Wire, Wire], hardware: int) -> None:
    """IEEE 802 networks are Ethernet (RFC 1042); frame relay (RFC 2390) is not, whatever its addresses look like."""
    asked = arp(1, (B, PEER), (NOBODY, OUTSIDE))
    asked = asked[:14] + struct.pack("!H", hardware) + asked[16:]
    answer = arp(2, (A, OUTSIDE), (B, PEER), B)
    wires[1].send(asked)
    if hardware == 6:
        assert wires[1].receive().hex() == (answer[:14] + asked[14:16] + answer[16:]).hex()
    else:
        assert wires[0].receive() == asked


SOLICITED_NODE = ("33:33:ff:00:00:10", B)


def test_a_solicitation_with_a_code_is_none(wires: tuple[Wire, Wire]) -> None:
    """RFC 4861, 7.1.1"""
    frame = nd(135, SOLICITED_NODE, PEER6, "ff02::1:ff00:10", OUTSIDE6)
    wires[1].send(frame[:55] + b"\1" + frame[56:])
    assert wires[0].receive() == frame[:55] + b"\1" + frame[56:]


@pytest.mark.parametrize("hops", [255, 64])
def test_a_solicitation_to_an_address_is_a_packet_to_it(lab: Lab, wires: tuple[Wire, Wire], hops: int) -> None:
    """For an address without rules, or through a router: nothing is answered, and its destination is remapped."""
    asked = "fd00::77" if hops == 255 else OUTSIDE6
    before, after = (with_hops(nd(135, (A, B), PEER6, own, asked, option=1), hops) for own in (OUTSIDE6, INSIDE6))
    wires[1].send(before)
    assert wires[0].receive().hex() == after.hex()
    wires[1].send(after)
    wait_for(lambda: lab.drops(1) == {MODEL.DROP_REMAP: 1}, "the drop of what came to the inside address")


def with_hops(frame: bytes, hops: int) -> bytes:
    return frame[:21] + bytes([hops]) + frame[22:]


def test_what_is_behind_an_advertisement_is_not_its_target(wires: tuple[Wire, Wire]) -> None:
    """It has none: nothing is changed but its source."""
    cut, trailer = struct.pack("!BBHI", 136, 0, 0, 0), frames.address(INSIDE6)
    before, after = (framed(B, A, packet(own, PEER6, ICMP6, cut)) for own in (INSIDE6, OUTSIDE6))
    wires[0].send(before + trailer)
    assert wires[1].receive().hex() == (after + trailer).hex()


def test_what_would_leave_as_anothers_port_is_dropped(lab: Lab, wires: tuple[Wire, Wire]) -> None:
    """The answer would come to the inside port of the rule for that outside port."""
    forwarded = {"outside": OUTSIDE, "inside": INSIDE, "protocol": "tcp", "outside_port": 443, "inside_port": 9443}
    load(lab, 1, [*RULES, forwarded])
    wires[0].send(framed(B, A, packet(INSIDE, PEER, TCP, body_of(TCP, 443, 999))))
    wait_for(lambda: lab.drops(1) == {MODEL.DROP_REMAP: 1}, "the drop")


@pytest.mark.parametrize("direction", [0, 1])
def test_an_ipv4_address_is_no_target(wires: tuple[Wire, Wire], direction: int) -> None:
    """RFC 4291, 2.5.5.2: in IPv6's form it is no address of a wire, and no rule is for it."""
    if direction:
        same = nd(135, SOLICITED_NODE, PEER6, "ff02::1:ff00:10", f"::ffff:{OUTSIDE}")
    else:
        same = nd(135, ("33:33:ff:00:00:10", A), "::", "ff02::1:ff00:10", f"::ffff:{INSIDE}")
    wires[direction].send(same)
    assert wires[1 - direction].receive() == same
