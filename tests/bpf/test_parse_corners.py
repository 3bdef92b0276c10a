# SPDX-License-Identifier: GPL-2.0-only
"""Frames that are cut off, lie about themselves, or carry what is seldom seen."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from . import frames
from .frames import ARP, IPV4, SERVICE_VLAN, TCP, UDP, VLAN, mac_bytes
from .model import MODEL
from .packets import FRAGMENT, HOP_BY_HOP, MORE, pair, v4
from .probe import ACK, BOTH, FROM, FROM_ONLY, GUEST_MAC, ICMP, PEER_MAC, TO, Probe, tcp

Ports = Callable[..., Probe]
MACS = mac_bytes(PEER_MAC) + mac_bytes(GUEST_MAC)


def bare(packet: bytes, kind: int = 0) -> bytes:
    """A frame without the padding that would hide where its packet ends."""
    kind = kind or (IPV4 if packet[0] >> 4 == 4 else frames.IPV6)
    return MACS + struct.pack("!H", kind) + packet


def six(proto: int, body: bytes) -> bytes:
    return frames.ipv6(*pair(FROM, True), proto, body)


@pytest.mark.parametrize(
    "frame",
    [
        bare(b"\0\7", VLAN),
        bare(v4(FROM, UDP, b"\x9c\x40\0\x35")),
        bare(v4(FROM, TCP, tcp(40000, 80, ACK)[:12])),
        bare(struct.pack("!HH", 7, IPV4) + v4(FROM, UDP, b"")[:19], VLAN),  # behind a tag: BPF_PROG_RUN itself looks
        bare(six(HOP_BY_HOP, b"\x11\0")),
        bare(six(FRAGMENT, b"\x11\0")),
        bare(b"\x50" + six(UDP, frames.udp(40000, 53))[1:], frames.IPV6),
    ],
    ids=["tag", "UDP", "TCP", "IPv4", "hop-by-hop options", "fragment header", "another version"],
)
def test_what_is_cut_off_is_malformed(ports: Ports, frame: bytes) -> None:
    assert ports(BOTH).send(FROM, frame) == MODEL.DROP_MALFORMED


def test_behind_a_service_tag_is_what_it_is(ports: Ports) -> None:
    """At the egress of a device the tag may still be in the data: the packet behind it is judged."""
    port = ports(FROM_ONLY)
    packet = v4(TO, UDP, frames.udp(53, 40000))
    tagged = bare(struct.pack("!HH", 7, IPV4) + packet, SERVICE_VLAN)
    assert port.send(TO, tagged) == MODEL.DROP_POLICY
    assert port.udp(FROM) == MODEL.DROP_NONE
    assert port.send(TO, tagged) == MODEL.DROP_NONE


def test_segments_of_what_is_not_ip_are_not_counted(ports: Ports) -> None:
    assert ports([]).send(FROM, bare(bytes(400), ARP), gso_size=100) == MODEL.DROP_NONE


def test_tcp_in_fragments(ports: Ports) -> None:
    """A later fragment behind the whole header; one that would overwrite the flags is malformed (RFC 1858)."""
    port = ports(FROM_ONLY)
    key = port.key(TCP)
    port.put(key, MODEL.CT_ESTABLISHED, MODEL.CT_F_REPLIED)
    segment = tcp(40000, 80, ACK) + bytes(44)
    assert port.send(FROM, bare(v4(FROM, TCP, segment, offset=MORE, number=9))) == MODEL.DROP_NONE
    assert port.send(FROM, bare(v4(FROM, TCP, bytes(64), offset=8, number=9))) == MODEL.DROP_NONE
    assert port.send(FROM, bare(v4(FROM, TCP, bytes(64), offset=1, number=9))) == MODEL.DROP_MALFORMED
    assert port.entry(key).packets[0] == 2


def test_the_echo_of_a_protocol_is_that_of_its_version(ports: Ports) -> None:
    """Type 0 is a reply to ICMP; to ICMPv6 it is nothing, and has no connection."""
    port = ports(FROM_ONLY)
    assert port.icmp(FROM, 0, v6=True) == MODEL.DROP_NONE
    assert port.icmp(FROM, 0) == MODEL.DROP_CT_INVALID
    assert port.table.keys() == []


def test_an_address_with_a_zero_head_is_not_ipv4(ports: Ports) -> None:
    port = ports(FROM_ONLY)
    assert port.udp(FROM, v6=True, peer="0:0:1::1") == MODEL.DROP_NONE
    assert port.table.keys() == [port.key(UDP, rport=53, v6=True, peer="0:0:1::1")]


@pytest.mark.parametrize("v6", [False, True])
def test_a_dhcp_server_answers_clients_only(ports: Ports, v6: bool) -> None:
    port = ports([])
    server, client = (547, 546) if v6 else (67, 68)
    assert port.udp(TO, lport=client, rport=server, v6=v6) == MODEL.DROP_NONE
    assert port.udp(TO, lport=client + 10, rport=server, v6=v6) == MODEL.DROP_POLICY


def test_a_query_keeps_its_direction_without_assurance(ports: Ports) -> None:
    port = ports(FROM_ONLY)
    assert [port.icmp(FROM, 8) for _ in range(3)] == [MODEL.DROP_NONE] * 3
    (key,) = port.table.keys()
    assert port.entry(key).packets[0] == 3
    assert port.entry(key).word & 0xFFFF == MODEL.CT_NEW
    assert key[36] == ICMP
