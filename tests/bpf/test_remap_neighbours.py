# SPDX-License-Identifier: GPL-2.0-only
"""Remapped addresses on the link: who asks for an outside address is answered; and what the policy sees of it all."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from datapath.drivers.ebpf.acl import compile_rules

from . import frames
from .frames import ARP, BROADCAST, ICMP6, IPV4, IPV6, TCP, UDP, checksum, mac_bytes
from .lab import Lab, Wire, wait_for
from .model import MODEL
from .probe import RST, SYN, load_policy, rule
from .sysbpf import Map
from .test_remap import (
    INSIDE,
    INSIDE6,
    OUTSIDE,
    OUTSIDE6,
    PEER,
    PEER6,
    SERVICE,
    SERVICE6,
    A,
    B,
    body_of,
    crossed,
    error,
    framed,
    load,
    packed,
    packet,
    wires,
)

__all__ = ["wires"]  # the fixture

NODES, NODES_MAC = "ff02::1", "33:33:00:00:00:01"
SOLICITED, OVERRIDE = 1 << 30, 1 << 29


def arp(operation: int, sender: tuple[str, str], target: tuple[str, str], to: str = BROADCAST) -> bytes:
    """Each end is (MAC, address)."""
    body = struct.pack("!HHBBH", 1, IPV4, 6, 4, operation)
    for own, address in (sender, target):
        body += mac_bytes(own) + packed(address)
    return frames.ethernet(to, sender[0], ARP, body)


def nd(kind: int, macs: tuple[str, str], source: str, to: str, target: str, flags: int = 0, option: int = 0) -> bytes:
    """Neighbour discovery from macs[1] to macs[0]; `option` 1 or 2: with the sender's link-layer address."""
    body = struct.pack("!BBHI", kind, 0, 0, flags) + packed(target)
    if option:
        body += struct.pack("!BB", option, 1) + mac_bytes(macs[1])
    pseudo = packed(source) + packed(to) + struct.pack("!IHBB", len(body), 0, 0, ICMP6)
    body = body[:2] + struct.pack("!H", checksum(pseudo + body)) + body[4:]
    return frames.ethernet(*macs, IPV6, frames.ipv6(source, to, ICMP6, body, 255))


NOBODY = "00:00:00:00:00:00"


@pytest.mark.parametrize("asked", [OUTSIDE, SERVICE])
@pytest.mark.parametrize("to", [BROADCAST, A])
def test_who_asks_by_arp_is_answered(lab: Lab, wires: tuple[Wire, Wire], asked: str, to: str) -> None:
    wires[1].send(arp(1, (B, PEER), (NOBODY, asked), to))
    assert wires[1].receive().hex() == arp(2, (A, asked), (B, PEER), B).hex()
    assert wires[0].waiting() == []
    assert lab.drops(1) == {MODEL.DROP_ANSWERED: 1}


def test_who_asks_for_the_inside_address_is_not(lab: Lab, wires: tuple[Wire, Wire]) -> None:
    wires[1].send(arp(1, (B, PEER), (NOBODY, INSIDE)))
    wires[1].send(nd(135, (A, B), PEER6, INSIDE6, INSIDE6, option=1))
    wait_for(lambda: lab.drops(1) == {MODEL.DROP_REMAP: 2}, "the drops")
    assert wires[0].waiting() == []


def test_what_the_guest_says_by_arp_is_of_its_outside_address(wires: tuple[Wire, Wire]) -> None:
    said = [
        (arp(1, (A, INSIDE), (NOBODY, PEER)), arp(1, (A, OUTSIDE), (NOBODY, PEER))),
        (arp(1, (A, INSIDE), (NOBODY, INSIDE)), arp(1, (A, OUTSIDE), (NOBODY, OUTSIDE))),
        (arp(2, (A, INSIDE), (B, PEER), B), arp(2, (A, OUTSIDE), (B, PEER), B)),
        (arp(1, (A, "10.0.0.77"), (NOBODY, PEER)), arp(1, (A, "10.0.0.77"), (NOBODY, PEER))),
    ]
    for before, after in said:
        wires[0].send(before)
        assert wires[1].receive().hex() == after.hex()


def test_what_it_is_told_by_arp_is_to_its_inside_address(wires: tuple[Wire, Wire]) -> None:
    wires[1].send(arp(2, (B, PEER), (A, OUTSIDE), A))
    assert wires[0].receive().hex() == arp(2, (B, PEER), (A, INSIDE), A).hex()
    wires[1].send(arp(1, (B, PEER), (NOBODY, "10.0.0.77")))
    assert wires[0].receive().hex() == arp(1, (B, PEER), (NOBODY, "10.0.0.77")).hex()


STRANGE = [  # hardware, protocol, sizes
    (1, IPV6, 6, 4),
    (1, IPV4, 8, 4),
    (1, IPV4, 6, 16),
]


@pytest.mark.parametrize("head", [*STRANGE, None])
def test_arp_of_other_protocols_is_left_alone(wires: tuple[Wire, Wire], head: tuple[int, ...] | None) -> None:
    body = struct.pack("!HHBBH", *(head or STRANGE[0]), 1) + packed(OUTSIDE) * 5
    for direction, own in enumerate((A, B)):
        frame = mac_bytes(BROADCAST) + mac_bytes(own) + struct.pack("!H", ARP) + (body if head else body[:8])
        wires[direction].send(frame)
        assert wires[1 - direction].receive() == frame


def test_the_sender_of_which_only_ports_have_rules_stays(lab: Lab, wires: tuple[Wire, Wire]) -> None:
    load(lab, 2, [{"outside": SERVICE, "inside": PEER, "protocol": "tcp", "outside_port": 443}])
    wires[1].send(arp(2, (B, PEER), (A, OUTSIDE), A))
    assert wires[0].receive().hex() == arp(2, (B, PEER), (A, INSIDE), A).hex()


@pytest.mark.parametrize("asked", [OUTSIDE6, SERVICE6])
@pytest.mark.parametrize("option", [0, 1])
def test_who_asks_by_discovery_is_answered(lab: Lab, wires: tuple[Wire, Wire], asked: str, option: int) -> None:
    wires[1].send(nd(135, ("33:33:ff:00:00:10", B), PEER6, "ff02::1:ff00:10", asked, option=option))
    expected = nd(136, (B, A), asked, PEER6, asked, SOLICITED | OVERRIDE, 2)
    assert wires[1].receive().hex() == expected.hex()
    assert wires[0].waiting() == []
    assert lab.drops(1) == {MODEL.DROP_ANSWERED: 1}


def test_a_probe_for_an_outside_address_finds_it_taken(wires: tuple[Wire, Wire]) -> None:
    wires[1].send(nd(135, ("33:33:ff:00:00:10", B), "::", "ff02::1:ff00:10", OUTSIDE6))
    expected = nd(136, (NODES_MAC, A), OUTSIDE6, NODES, OUTSIDE6, OVERRIDE, 2)
    assert wires[1].receive().hex() == expected.hex()


def test_a_solicitation_that_a_router_passed_on_is_not_answered(lab: Lab, wires: tuple[Wire, Wire]) -> None:
    """RFC 4861, 7.1.1: its hop limit is less than 255; the guest drops it."""
    wires[1].send(frames.nd(PEER6, 135, OUTSIDE6, B, sender=B, hops=254))
    assert wires[0].receive()[12:14] == b"\x86\xdd"
    assert lab.drops(1) == {}


def test_other_solicitations_are_the_guests(lab: Lab, wires: tuple[Wire, Wire]) -> None:
    """Of an address without rules; in a fragment (RFC 6980); without a target."""
    plain = nd(135, ("33:33:ff:00:00:77", B), PEER6, "ff02::1:ff00:77", "fd00::77")
    short = frames.ethernet(NODES_MAC, B, IPV6, frames.ipv6(PEER6, NODES, ICMP6, bytes([135, 0, 0, 0]) + bytes(4), 255))
    split = bytes([ICMP6, 0, 0, 1]) + bytes(4) + plain[54:]
    fragment = frames.ethernet(NODES_MAC, B, IPV6, frames.ipv6(PEER6, NODES, 44, split, 255))
    for frame in (plain, short[:62], fragment):
        wires[1].send(frame)
        assert wires[0].receive() == frame
    own = mac_bytes(NODES_MAC) + mac_bytes(A) + short[12:62]
    wires[0].send(own)
    assert wires[1].receive() == own
    assert lab.drops(1) == {}


def test_what_the_guest_says_by_discovery_is_of_its_outside_address(wires: tuple[Wire, Wire]) -> None:
    group = ("33:33:ff:00:00:09", A)
    wires[0].send(nd(135, group, INSIDE6, "ff02::1:ff00:9", PEER6, option=1))
    assert wires[1].receive().hex() == nd(135, group, OUTSIDE6, "ff02::1:ff00:9", PEER6, option=1).hex()
    wires[0].send(nd(136, (NODES_MAC, A), INSIDE6, NODES, INSIDE6, OVERRIDE, 2))
    assert wires[1].receive().hex() == nd(136, (NODES_MAC, A), OUTSIDE6, NODES, OUTSIDE6, OVERRIDE, 2).hex()


def guarded(lab: Lab, *rules: dict[str, Any]) -> Map:
    """Port 1 gets a policy. Returns its connection table."""
    table = lab.switch.inner("conntracks", 1, "ct_table", 64)
    compiled = compile_rules([rule(number, **one) for number, one in enumerate(rules, start=1)])
    load_policy(lab.switch, 1, compiled)
    lab.switch.put("policies", 1, compiled.digest << 32 | 1)
    port = lab.switch.get("ports", "port", 1)
    lab.change_port(1, policy=1, word=port.word & ~(0xFFFFFF << 8))
    return table


def test_connections_are_of_the_inside_address(lab: Lab, wires: tuple[Wire, Wire]) -> None:
    table = guarded(lab, {"direction": "to"})
    crossed(
        wires,
        1,
        packet(PEER, SERVICE, TCP, segment(999, 443, SYN)),
        packet(PEER, INSIDE, TCP, segment(999, 8443, SYN)),
    )
    (key,) = table.keys()
    found = MODEL.ct_key.from_buffer_copy(key)
    assert bytes(found.laddr) == frames.address(INSIDE)
    assert struct.pack("=H", found.lport) == struct.pack("!H", 8443)


def segment(source: int, target: int, flags: int) -> bytes:
    return struct.pack("!HHIIBBHHH", source, target, 1000, 0, 5 << 4, flags, 1024, 0, 0)


def test_a_reset_comes_from_the_outside_address(lab: Lab, wires: tuple[Wire, Wire]) -> None:
    guarded(lab, {"direction": "to", "action": "reject"})
    wires[1].send(framed(A, B, packet(PEER, SERVICE, TCP, segment(999, 443, SYN))))
    answer = wires[1].receive()[14:]
    assert answer[12:20] == packed(SERVICE) + packed(PEER)
    source, target, _, acknowledged, _, flags = struct.unpack_from("!HHIIBB", answer, 20)
    assert (source, target, acknowledged, flags & RST) == (443, 999, 1001, RST)
    assert checksum(answer[12:20] + struct.pack("!HH", TCP, 20) + answer[20:40]) == 0
    assert checksum(answer[:20]) == 0


def test_an_unreachable_comes_from_the_outside_address(lab: Lab, wires: tuple[Wire, Wire]) -> None:
    guarded(lab, {"direction": "to", "action": "reject"})
    sent = packet(PEER6, OUTSIDE6, UDP, body_of(UDP, 999, 33434))
    wires[1].send(framed(A, B, sent))
    answer = wires[1].receive()[14:]
    assert answer[8:40] == packed(OUTSIDE6) + packed(PEER6)
    assert answer[48:88] == sent[:40]
    assert answer[88:92] == sent[40:44]
    assert checksum(answer[8:40] + struct.pack("!IHBB", len(answer) - 40, 0, 0, ICMP6) + answer[40:]) == 0


def test_a_reset_to_the_guest_is_to_what_it_knows(lab: Lab, wires: tuple[Wire, Wire]) -> None:
    guarded(lab, {"direction": "from", "action": "reject"})
    wires[0].send(framed(B, A, packet(INSIDE, PEER, TCP, segment(8443, 999, SYN))))
    answer = wires[0].receive()[14:]
    assert answer[12:20] == packed(PEER) + packed(INSIDE)
    assert struct.unpack_from("!HH", answer, 20) == (999, 8443)


def test_an_error_passes_with_its_connection(lab: Lab, wires: tuple[Wire, Wire]) -> None:
    guarded(lab, {"direction": "from"})
    there = packet(INSIDE, PEER, UDP, body_of(UDP, 1000, 2000))
    seen = packet(OUTSIDE, PEER, UDP, body_of(UDP, 1000, 2000))
    crossed(wires, 0, there, seen)
    crossed(wires, 1, error("198.51.100.1", OUTSIDE, seen), error("198.51.100.1", INSIDE, there))
    wires[1].send(framed(A, B, error("198.51.100.1", OUTSIDE, packet(OUTSIDE, PEER, UDP, body_of(UDP, 1001, 2000)))))
    wait_for(lambda: lab.drops(1) == {MODEL.DROP_CT_INVALID: 1}, "the drop")


def test_announcements_of_outside_addresses_pass_anti_spoofing(lab: Lab, wires: tuple[Wire, Wire]) -> None:
    lab.change_port(1, word=1 << 32 | (MODEL.PORT_F_STATELESS | MODEL.PORT_F_ANTISPOOF) << 8 | MODEL.PORT_ACTIVE)
    for own in (INSIDE, INSIDE6):
        lab.switch.put("addresses", struct.pack("=I", 1) + frames.address(own), 1)
    for said in (
        arp(1, (A, SERVICE), (NOBODY, SERVICE)),
        nd(136, (NODES_MAC, A), SERVICE6, NODES, SERVICE6, OVERRIDE, 2),
    ):
        wires[0].send(said)
        assert wires[1].receive().hex() == said.hex()
    crossed(
        wires,
        0,
        packet(INSIDE, PEER, UDP, body_of(UDP, 1000, 2000)),
        packet(OUTSIDE, PEER, UDP, body_of(UDP, 1000, 2000)),
    )
    wires[0].send(arp(1, (A, "203.0.113.99"), (NOBODY, "203.0.113.99")))
    wires[0].send(nd(136, (NODES_MAC, A), INSIDE6, NODES, "2001:db8::99", OVERRIDE, 2))
    wires[0].send(nd(136, (NODES_MAC, A), "2001:db8::99", NODES, INSIDE6, OVERRIDE, 2))
    claims = {MODEL.DROP_SPOOF_ARP: 1, MODEL.DROP_SPOOF_ND: 1, MODEL.DROP_SPOOF_ADDRESS: 1}
    wait_for(lambda: lab.drops(1) == claims, "the drops of claims")
    for claimed, peer in ((OUTSIDE, PEER), (OUTSIDE6, PEER6)):
        wires[0].send(framed(B, A, packet(claimed, peer, UDP, body_of(UDP, 1000, 2000))))
    wait_for(lambda: lab.drops(1) == claims | {MODEL.DROP_SPOOF_ADDRESS: 3}, "the drops")
