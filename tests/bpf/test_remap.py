# SPDX-License-Identifier: GPL-2.0-only
"""Remapping at a port: what leaves each wire, byte for byte, is the same packet with other ends and right checksums."""

from __future__ import annotations

import ipaddress
import struct
from typing import Any

import pytest

from datapath.drivers.ebpf.remap import elements
from datapath.state.kind import Record
from datapath.state.remap import RemapDocument

from . import frames
from .frames import ICMP6, IPV4, IPV6, TCP, UDP, checksum, mac, mac_bytes
from .lab import Lab, Wire, wait_for
from .model import MODEL
from .test_acl_reject import pseudo_sum, send_unfinished

A, B = mac(1), mac(2)
ICMP, DCCP, UDPLITE, SCTP = 1, 33, 136, 132
CHECK_AT = {TCP: 16, UDP: 6, DCCP: 6, UDPLITE: 6, ICMP: 2, ICMP6: 2}
INSIDE, OUTSIDE, SERVICE, PEER = "10.0.0.5", "203.0.113.10", "203.0.113.11", "192.0.2.9"
INSIDE6, OUTSIDE6, SERVICE6, PEER6 = "fd00::5", "2001:db8::10", "2001:db8::11", "2001:db8:9::9"
RULES = [
    {"outside": OUTSIDE, "inside": INSIDE},
    {"outside": SERVICE, "inside": INSIDE, "protocol": "tcp", "outside_port": 443, "inside_port": 8443},
    {"outside": SERVICE, "inside": INSIDE, "protocol": "udp", "outside_port": 53, "inside_port": 5353},
    {"outside": OUTSIDE6, "inside": INSIDE6},
    {"outside": SERVICE6, "inside": INSIDE6, "protocol": "tcp", "outside_port": 443, "inside_port": 8443},
]
BOTH = pytest.mark.parametrize("v6", [False, True], ids=["ipv4", "ipv6"])


def load(lab: Lab, slot: int, rules: list[dict[str, Any]]) -> None:
    records: list[Record] = RemapDocument.model_validate({"rules": rules}).records()
    table = lab.switch.maps["remaps"]
    for key, value in zip(*elements(slot, records), strict=True):
        table.update(key.tobytes(), value.tobytes())
    lab.change_port(slot, features=MODEL.FEATURE_REMAP)


@pytest.fixture
def wires(lab: Lab) -> tuple[Wire, Wire]:
    """The guest with RULES at port 1, without a policy, and its peer at port 2."""
    lab.network(1, [(MODEL.L2_PORT, 1, 0), (MODEL.L2_PORT, 2, 0)])
    made = lab.port(1, A), lab.port(2, B)
    lab.place(A, MODEL.L2_PORT, 1)
    lab.place(B, MODEL.L2_PORT, 2)
    load(lab, 1, RULES)
    return made


def packet(source: str, target: str, proto: int, body: bytes) -> bytes:
    """An IP packet with every checksum; a checksum field of 0xffff in `body` of UDP over IPv4 stands for none."""
    v6 = ":" in source
    at = CHECK_AT.get(proto)
    if proto == UDP and not v6 and body[6:8] == b"\xff\xff":
        body = body[:6] + bytes(2) + body[8:]
    elif at is not None:
        pseudo = frames.address(source) + frames.address(target) if v6 else packed(source) + packed(target)
        pseudo += struct.pack("!IHBB", len(body), 0, 0, proto) if proto != ICMP else b""
        if proto == ICMP:
            pseudo = b""
        value = checksum(pseudo + body) or 0xFFFF
        body = body[:at] + struct.pack("!H", value) + body[at + 2 :]
    return frames.ipv6(source, target, proto, body) if v6 else frames.ipv4(source, target, proto, body)


def packed(text: str) -> bytes:
    return ipaddress.ip_address(text).packed


def framed(to: str, source: str, body: bytes) -> bytes:
    return frames.ethernet(to, source, IPV4 if body[0] >> 4 == 4 else IPV6, body)


def body_of(proto: int, source: int, target: int, data: bytes = b"some data of odd size") -> bytes:
    if proto == TCP:
        return struct.pack("!HHIIBBHHH", source, target, 1000, 77, 5 << 4, 0x10, 1024, 0, 0) + data
    if proto in (ICMP, ICMP6):
        return struct.pack("!BBHHH", 8 if proto == ICMP else 128, 0, 0, source, 7) + data
    return struct.pack("!HHHH", source, target, 8 + len(data), 0) + data


def crossed(wires: tuple[Wire, Wire], direction: int, before: bytes, after: bytes) -> None:
    """What one end sends as `before` the other gets as `after`; direction 0 is from the guest."""
    ends = ((B, A), (A, B))[direction]
    wires[direction].send(framed(*ends, before))
    assert wires[1 - direction].receive().hex() == framed(*ends, after).hex()


def names(v6: bool) -> tuple[str, str, str, str]:
    return (INSIDE6, OUTSIDE6, SERVICE6, PEER6) if v6 else (INSIDE, OUTSIDE, SERVICE, PEER)


@BOTH
@pytest.mark.parametrize("proto", [TCP, UDP, UDPLITE, DCCP, SCTP, ICMP])
def test_a_whole_address_both_ways(lab: Lab, wires: tuple[Wire, Wire], proto: int, v6: bool) -> None:
    inside, outside, _, peer = names(v6)
    proto = ICMP6 if proto == ICMP and v6 else proto
    there, back = body_of(proto, 1000, 2000), body_of(proto, 2000, 1000)
    crossed(wires, 0, packet(inside, peer, proto, there), packet(outside, peer, proto, there))
    crossed(wires, 1, packet(peer, outside, proto, back), packet(peer, inside, proto, back))
    assert lab.drops(1) == {}


@BOTH
def test_a_port_both_ways(lab: Lab, wires: tuple[Wire, Wire], v6: bool) -> None:
    inside, _, service, peer = names(v6)
    crossed(
        wires,
        1,
        packet(peer, service, TCP, body_of(TCP, 999, 443)),
        packet(peer, inside, TCP, body_of(TCP, 999, 8443)),
    )
    crossed(
        wires,
        0,
        packet(inside, peer, TCP, body_of(TCP, 8443, 999)),
        packet(service, peer, TCP, body_of(TCP, 443, 999)),
    )
    assert lab.drops(1) == {}


def test_datagrams_without_checksum_stay_so(wires: tuple[Wire, Wire]) -> None:
    bare = struct.pack("!HHHH", 5353, 999, 12, 0xFFFF) + b"data"
    other = struct.pack("!HHHH", 53, 999, 12, 0xFFFF) + b"data"
    crossed(wires, 0, packet(INSIDE, PEER, UDP, bare), packet(SERVICE, PEER, UDP, other))


@BOTH
@pytest.mark.parametrize("proto", [TCP, UDP])
def test_a_checksum_that_is_left_to_the_device(wires: tuple[Wire, Wire], proto: int, v6: bool) -> None:
    """CHECKSUM_PARTIAL: the field holds the pseudo-header's sum, which is of the new ends afterwards."""
    inside, _, service, peer = names(v6)
    if v6 and proto == UDP:
        service = OUTSIDE6
    ports = {TCP: (8443, 443), UDP: (5353, 53) if not v6 else (5353, 5353)}[proto]
    before, after = (body_of(proto, port, 999) for port in ports)
    start = 54 if v6 else 34
    frame = framed(B, A, packet(inside, peer, proto, before))
    length = len(frame) - start
    frame = with_sum(frame, start + CHECK_AT[proto], pseudo_sum(frame[14:], length))
    send_unfinished("far1", frame, start, CHECK_AT[proto])
    arrived = wires[1].receive()
    expected = framed(B, A, packet(service, peer, proto, after))
    completed = with_sum(expected, start + CHECK_AT[proto], pseudo_sum(expected[14:], length))
    assert arrived.hex() in (expected.hex(), completed.hex())


def with_sum(frame: bytes, offset: int, value: int) -> bytes:
    return frame[:offset] + struct.pack("!H", value) + frame[offset + 2 :]


@BOTH
@pytest.mark.parametrize("proto", [TCP, UDP, ICMP])
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "cut"])
def test_errors_about_what_the_guest_sent(wires: tuple[Wire, Wire], proto: int, whole: bool, v6: bool) -> None:
    """From a router on the way: inside the error is what it saw; the guest has to see what it sent."""
    inside, outside, service, peer = names(v6)
    router = "2001:db8:ff::1" if v6 else "198.51.100.1"
    proto = ICMP6 if proto == ICMP and v6 else proto
    here, there = (8443, 443) if proto == TCP else (1000, 1000)
    seen = packet(service if proto == TCP else outside, peer, proto, body_of(proto, there, 999))
    sent = packet(inside, peer, proto, body_of(proto, here, 999))
    if proto == TCP and not whole:
        assert len(seen) == len(sent)
    crossed(
        wires,
        1,
        error(router, service if proto == TCP else outside, cut(seen, whole)),
        error(router, inside, cut(sent, whole)),
    )


@BOTH
@pytest.mark.parametrize("proto", [TCP, UDP])
def test_errors_of_the_guest(wires: tuple[Wire, Wire], proto: int, v6: bool) -> None:
    """What it tells of a packet that it got, its peer has to know as it sent it."""
    inside, outside, service, peer = names(v6)
    here, there = (8443, 443) if proto == TCP else (33434, 33434)
    got = packet(peer, inside, proto, body_of(proto, 999, here))
    sent = packet(peer, service if proto == TCP else outside, proto, body_of(proto, 999, there))
    crossed(wires, 0, error(inside, peer, got), error(service if proto == TCP else outside, peer, sent))


def test_an_error_about_a_datagram_without_checksum(wires: tuple[Wire, Wire]) -> None:
    seen = packet(SERVICE, PEER, UDP, struct.pack("!HHHH", 53, 999, 12, 0xFFFF) + b"data")
    sent = packet(INSIDE, PEER, UDP, struct.pack("!HHHH", 5353, 999, 12, 0xFFFF) + b"data")
    crossed(wires, 1, error(PEER, SERVICE, seen), error(PEER, INSIDE, sent))


def test_an_error_from_another_address_of_the_guest(wires: tuple[Wire, Wire]) -> None:
    """It forwards for somebody, and tells from an address that is remapped, of one that is not."""
    other = packet(PEER, "10.9.9.9", UDP, body_of(UDP, 999, 33434))
    crossed(wires, 0, error(INSIDE, PEER, other), error(OUTSIDE, PEER, other))


def test_an_error_that_carries_nothing_is_dropped(lab: Lab, wires: tuple[Wire, Wire]) -> None:
    wires[1].send(framed(A, B, error(PEER, OUTSIDE, b"no packet at all")))
    wait_for(lambda: lab.drops(1) == {MODEL.DROP_REMAP: 1}, "the drop")


def cut(body: bytes, whole: bool) -> bytes:
    """Of the packet that caused it an error has at least 8 bytes of transport header."""
    return body if whole else body[: (40 if body[0] >> 4 == 6 else 20) + 8]


def error(source: str, target: str, carried: bytes) -> bytes:
    """Time exceeded."""
    v6 = ":" in source
    head = struct.pack("!BBHI", 3 if v6 else 11, 0, 0, 0)
    return packet(source, target, ICMP6 if v6 else ICMP, head + carried)


DROPPED = [
    # to the guest: target, protocol, port
    (INSIDE, TCP, 80),  # the network does not see it
    (INSIDE6, UDP, 80),
    (SERVICE, TCP, 444),  # a port without a rule
    (SERVICE, ICMP, 0),  # only ports have rules
    (OUTSIDE, TCP, 8443),  # the answer would come from the other address
]


@pytest.mark.parametrize(("target", "proto", "port"), DROPPED)
def test_what_could_not_be_answered_is_dropped(
    lab: Lab, wires: tuple[Wire, Wire], target: str, proto: int, port: int
) -> None:
    peer = PEER6 if ":" in target else PEER
    wires[1].send(framed(A, B, packet(peer, target, proto, body_of(proto, 999, port))))
    wait_for(lambda: lab.drops(1) == {MODEL.DROP_REMAP: 1}, "the drop")
    assert wires[0].waiting() == []


def test_a_port_of_an_address_that_has_rules_by_port_only(lab: Lab, wires: tuple[Wire, Wire]) -> None:
    """The rest of the inside address is the network's, too; that port is not."""
    load(lab, 2, [{"outside": SERVICE, "inside": PEER, "protocol": "tcp", "outside_port": 443, "inside_port": 8443}])
    body = body_of(TCP, 999, 22)
    crossed(wires, 0, packet(INSIDE, PEER, TCP, body), packet(OUTSIDE, PEER, TCP, body))
    back = body_of(TCP, 22, 999)
    crossed(wires, 1, packet(PEER, OUTSIDE, TCP, back), packet(PEER, INSIDE, TCP, back))
    wires[0].send(framed(B, A, packet(INSIDE, PEER, TCP, body_of(TCP, 999, 8443))))
    wait_for(lambda: lab.drops(2) == {MODEL.DROP_REMAP: 1}, "the drop")


def test_dhcp_is_spoken_with_the_inside_address(wires: tuple[Wire, Wire]) -> None:
    ask, answer = body_of(UDP, 68, 67), body_of(UDP, 67, 68)
    crossed(wires, 0, packet(INSIDE, PEER, UDP, ask), packet(INSIDE, PEER, UDP, ask))
    crossed(wires, 1, packet(PEER, INSIDE, UDP, answer), packet(PEER, INSIDE, UDP, answer))
    other = body_of(UDP, 68, 999)
    crossed(wires, 0, packet(INSIDE, PEER, UDP, other), packet(OUTSIDE, PEER, UDP, other))


def test_later_fragments_go_with_their_address(wires: tuple[Wire, Wire]) -> None:
    """They have no ports: also where only ports have rules."""
    for outside in (OUTSIDE, SERVICE):
        crossed(wires, 1, later(PEER, outside), later(PEER, INSIDE))
    crossed(wires, 0, later(INSIDE, PEER), later(OUTSIDE, PEER))


def later(source: str, target: str) -> bytes:
    whole = frames.ipv4(source, target, UDP, b"what is behind the ports")
    head = whole[:6] + struct.pack("!H", 8) + whole[8:10] + b"\0\0" + whole[12:20]
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + whole[20:]


@BOTH
def test_rules_count_what_they_remap(lab: Lab, wires: tuple[Wire, Wire], v6: bool) -> None:
    inside, outside, _, peer = names(v6)
    there = packet(inside, peer, UDP, body_of(UDP, 1000, 2000))
    for _ in range(3):
        crossed(wires, 0, there, packet(outside, peer, UDP, body_of(UDP, 1000, 2000)))
    keys, _ = elements(1, RemapDocument.model_validate({"rules": RULES}).records())
    counted = {}
    for key in keys:
        value = lab.switch.maps["remaps"].lookup(key.tobytes())
        assert value is not None
        entry = MODEL.remap_entry.from_buffer_copy(value)
        if entry.packets:
            counted[key["addr"].tobytes(), int(key["port"]), int(key["side"])] = (entry.packets, entry.bytes)
    assert counted == {(frames.address(inside), 0, MODEL.REMAP_OUT): (3, 3 * len(there))}


def test_a_port_without_the_feature_remaps_nothing(lab: Lab, wires: tuple[Wire, Wire]) -> None:
    lab.change_port(1, features=0)
    same = packet(INSIDE, PEER, UDP, body_of(UDP, 1000, 2000))
    crossed(wires, 0, same, same)


def test_a_checksum_that_comes_to_nothing(wires: tuple[Wire, Wire]) -> None:
    """RFC 768: that of a datagram within an error is written as all ones, for none is zero."""
    port = next(p for p in range(1024, 65_536) if udp_sum(INSIDE, PEER, body_of(UDP, p, 999)) == 0)
    seen, sent = (packet(source, PEER, UDP, body_of(UDP, port, 999)) for source in (OUTSIDE, INSIDE))
    crossed(wires, 1, error(PEER, OUTSIDE, seen), error(PEER, INSIDE, sent))


def udp_sum(source: str, target: str, body: bytes) -> int:
    return checksum(packed(source) + packed(target) + struct.pack("!HH", UDP, len(body)) + body)


def test_an_error_about_an_address_without_a_rule(wires: tuple[Wire, Wire]) -> None:
    same = error(PEER, "10.0.0.77", packet("10.0.0.77", PEER, UDP, body_of(UDP, 1, 2)))
    crossed(wires, 1, same, same)


def test_an_error_about_what_the_guest_cannot_have_sent(lab: Lab, wires: tuple[Wire, Wire]) -> None:
    """From that port it leaves with the other address."""
    wires[1].send(framed(A, B, error(PEER, OUTSIDE, packet(OUTSIDE, PEER, TCP, body_of(TCP, 8443, 999)))))
    wait_for(lambda: lab.drops(1) == {MODEL.DROP_REMAP: 1}, "the drop")


@BOTH
def test_a_packet_that_ends_before_its_checksum_is_dropped(lab: Lab, wires: tuple[Wire, Wire], v6: bool) -> None:
    inside, _, _, peer = names(v6)
    body = struct.pack("!HH", 1000, 2000)
    short = frames.ipv6(inside, peer, UDPLITE, body) if v6 else frames.ipv4(inside, peer, UDPLITE, body)
    wires[0].send(mac_bytes(B) + mac_bytes(A) + struct.pack("!H", IPV6 if v6 else IPV4) + short)
    wait_for(lambda: lab.drops(1) == {MODEL.DROP_REMAP: 1}, "the drop")


def test_what_is_not_ip_passes(wires: tuple[Wire, Wire]) -> None:
    for direction, ends in enumerate(((B, A), (A, B))):
        frame = frames.ethernet(*ends, 0x88B5, b"of no protocol stack")
        wires[direction].send(frame)
        assert wires[1 - direction].receive() == frame


def test_an_inside_address_of_which_only_ports_have_rules(lab: Lab, wires: tuple[Wire, Wire]) -> None:
    """It is the network's as well."""
    load(lab, 2, [{"outside": SERVICE, "inside": PEER, "protocol": "tcp", "outside_port": 443, "inside_port": 8443}])
    there, back = body_of(ICMP, 1, 0), body_of(ICMP, 2, 0)
    crossed(wires, 0, packet(INSIDE, PEER, ICMP, there), packet(OUTSIDE, PEER, ICMP, there))
    crossed(wires, 1, packet(PEER, OUTSIDE, ICMP, back), packet(PEER, INSIDE, ICMP, back))
