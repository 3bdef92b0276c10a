# SPDX-License-Identifier: GPL-2.0-only
"""Headers that are odd or broken."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from . import frames
from .frames import IPV4, IPV6, TCP, UDP, mac_bytes
from .model import MODEL
from .packets import DESTINATION, FRAGMENT, HOP_BY_HOP, MORE, ROUTING, extension, fragment, pair, v4, wrap
from .probe import BOTH, FROM, FROM_ONLY, GUEST_MAC, ICMP, PEER_MAC, SYN, Probe, tcp

Ports = Callable[..., Probe]


@pytest.mark.parametrize("options", [b"\x01" * 4, b"\x94\x04\x00\x00", bytes(40)])
def test_ipv4_options(ports: Ports, options: bytes) -> None:
    port = ports(FROM_ONLY)
    assert port.send(FROM, wrap(FROM, v4(FROM, TCP, tcp(40000, 80, SYN), options=options))) == MODEL.DROP_NONE
    assert list(port.entry(port.key(TCP)).bytes) == [40 + len(options), 0]


@pytest.mark.parametrize(
    "chain",
    [
        [HOP_BY_HOP],
        [DESTINATION],
        [HOP_BY_HOP, ROUTING, DESTINATION],
        [HOP_BY_HOP, DESTINATION, ROUTING, FRAGMENT],
        [DESTINATION] * 8,
        [DESTINATION] * 7 + [FRAGMENT],
    ],
)
def test_ipv6_extension_headers(ports: Ports, chain: list[int]) -> None:
    port = ports(FROM_ONLY)
    body = tcp(40000, 80, SYN)
    following = TCP
    for kind in reversed(chain):
        head = fragment(following, 0, False, 9) if kind == FRAGMENT else extension(following, bytes(14))
        body, following = head + body, kind
    assert port.send(FROM, wrap(FROM, frames.ipv6(*pair(FROM, True), following, body))) == MODEL.DROP_NONE
    assert port.table.keys() == [port.key(TCP, v6=True)]


@pytest.mark.parametrize("last", [extension(TCP), extension(FRAGMENT) + fragment(TCP, 8, False, 9)])
def test_too_many_extension_headers(ports: Ports, last: bytes) -> None:
    port = ports(BOTH)
    count = 8 if len(last) == 8 else 7
    body = b"".join([extension(DESTINATION)] * count) + last + tcp(40000, 80, SYN)
    assert port.send(FROM, wrap(FROM, frames.ipv6(*pair(FROM, True), DESTINATION, body))) == MODEL.DROP_MALFORMED


def test_one_tag_in_the_data_is_skipped(ports: Ports) -> None:
    port = ports(FROM_ONLY)
    frame = port.frame(FROM, TCP, tcp(40000, 80, SYN))
    tagged = frame[:12] + struct.pack("!HH", 0x8100, 5) + frame[12:]
    assert port.send(FROM, tagged) == MODEL.DROP_NONE
    assert port.entry(port.key(TCP)) is not None


@pytest.mark.parametrize("kind", [frames.ARP, frames.RARP, 0x88CC, 0x0806])
def test_what_is_not_ip_passes(ports: Ports, kind: int) -> None:
    port = ports([])
    assert port.send(FROM, frames.ethernet(PEER_MAC, GUEST_MAC, kind, bytes(46))) == MODEL.DROP_NONE
    assert port.table.keys() == []


def test_padding_is_not_counted(ports: Ports) -> None:
    port = ports(FROM_ONLY)
    frame = port.frame(FROM, UDP, frames.udp(40000, 53, b"x")).ljust(200, b"\xaa")
    assert port.send(FROM, frame) == MODEL.DROP_NONE
    assert list(port.entry(port.key(UDP, rport=53)).bytes) == [29, 0]


def cut(packet: bytes, size: int) -> bytes:
    """The frame ends in the middle of the packet. With a tag, or BPF_PROG_RUN would refuse it by itself."""
    kind = IPV4 if packet[0] >> 4 == 4 else IPV6
    return mac_bytes(PEER_MAC) + mac_bytes(GUEST_MAC) + struct.pack("!HHH", 0x8100, 5, kind) + packet[:size]


SEGMENT = tcp(40000, 80, SYN)
GOOD = v4(FROM, TCP, SEGMENT)
GOOD6 = frames.ipv6(*pair(FROM, True), TCP, SEGMENT)
MALFORMED = {
    "no IP header": cut(GOOD, 10),
    "cut in the TCP header": cut(GOOD, 30),
    "longer by its header": wrap(FROM, GOOD[:2] + struct.pack("!H", 400) + GOOD[4:]),
    "shorter than its header": wrap(FROM, GOOD[:2] + struct.pack("!H", 19) + GOOD[4:]),
    "TCP header behind the length": wrap(FROM, GOOD[:2] + struct.pack("!H", 30) + GOOD[4:]),
    "version": cut(GOOD, 0) + b"\x55" + GOOD[1:],
    "header length 16": wrap(FROM, b"\x44" + GOOD[1:]),
    "TCP header length 16": wrap(FROM, v4(FROM, TCP, SEGMENT[:12] + b"\x40" + SEGMENT[13:])),
    "TCP header length 60": wrap(FROM, v4(FROM, TCP, SEGMENT[:12] + b"\xf0" + SEGMENT[13:])),
    "ICMPv6 in IPv4": wrap(FROM, v4(FROM, frames.ICMP6, bytes([143]) + bytes(23))),
    "ICMP in IPv6": wrap(FROM, frames.ipv6(*pair(FROM, True), ICMP, bytes([8]) + bytes(23))),
    "UDP header of 4": wrap(FROM, v4(FROM, UDP, bytes(4))),
    "ICMP header of 4": wrap(FROM, v4(FROM, ICMP, bytes(4))),
    "first fragment without flags": wrap(FROM, v4(FROM, TCP, SEGMENT[:8], offset=MORE)),
    "fragment over the flags": wrap(FROM, v4(FROM, TCP, SEGMENT, offset=1)),
    "IPv6 cut": cut(GOOD6, 39),
    "IPv6 longer by its header": wrap(FROM, GOOD6[:4] + struct.pack("!H", 400) + GOOD6[6:]),
    "IPv6 extension behind the length": wrap(FROM, frames.ipv6(*pair(FROM, True), DESTINATION, b"\x06\xff" + bytes(6))),
    "IPv6 extension in a fragment": wrap(
        FROM, frames.ipv6(*pair(FROM, True), FRAGMENT, fragment(DESTINATION, 0, True, 1) + extension(TCP) + SEGMENT)
    ),
    "IPv6 from a v4-mapped address": wrap(FROM, frames.ipv6("::ffff:10.0.0.1", pair(FROM, True)[1], TCP, SEGMENT)),
    "IPv6 to a v4-mapped address": wrap(FROM, frames.ipv6(pair(FROM, True)[0], "::ffff:10.0.0.1", TCP, SEGMENT)),
    "IPv6 two fragment headers": wrap(
        FROM, frames.ipv6(*pair(FROM, True), FRAGMENT, fragment(44, 0, True, 1) + fragment(TCP, 0, True, 1) + SEGMENT)
    ),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_malformed(ports: Ports, what: str) -> None:
    port = ports(BOTH)
    assert port.send(FROM, MALFORMED[what]) == MODEL.DROP_MALFORMED
    assert port.table.keys() == []
