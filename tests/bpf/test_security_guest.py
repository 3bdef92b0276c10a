# SPDX-License-Identifier: GPL-2.0-only
"""What a guest tries past anti-spoofing, policy and its network: other headers, sizes, its host, the underlay."""

from __future__ import annotations

import random
import struct

import pytest

from .frames import (
    ARP,
    BROADCAST,
    IPV4,
    IPV6,
    UDP,
    VLAN,
    address,
    arp,
    datagram,
    ethernet,
    ipv4,
    ipv6,
    mac,
    mac_bytes,
    nd,
    udp,
    vxlan,
)
from .lab import UNDERLAY, UNDERLAY_MAC, Lab, Wire, wait_for
from .model import MODEL
from .sysbpf import TCX_INGRESS
from .test_forward_spoof import OWN, PEER, guest, icmp6, sent
from .test_forward_tunnel import CHANNEL, VNI, channel, overlay
from .test_forward_uplink import OUTSIDE, on_uplink

__all__ = ["guest"]
A, B = mac(1), mac(2)
SHOT, REDIRECT = 2, 7
SEED, FRAMES = 20261123, 3000
MTU = 1500


def snap(body: bytes, kind: int, organisation: bytes = bytes(3), source: str = OWN, target: str = PEER) -> bytes:
    """`body` in an 802.3 frame with 802.2 SNAP."""
    llc = b"\xaa\xaa\x03" + organisation + struct.pack("!H", kind) + body
    return (mac_bytes(target) + mac_bytes(source) + struct.pack("!H", len(llc)) + llc).ljust(60, b"\0")


SPOOFED = [
    snap(ipv4("10.0.0.9", "10.0.0.2", UDP, udp(1, 2)), IPV4),
    snap(ipv6("2001:db8::9", "2001:db8::2", UDP, udp(1, 2)), IPV6),
    snap(arp(OWN, "10.0.0.9", "10.0.0.2")[14:], ARP),
    snap(icmp6("fe80::9", 134)[14:], IPV6),  # a router's advertisement, past what guards against it
    snap(ipv4("10.0.0.9", "10.0.0.2", UDP, udp(1, 2)), IPV4, b"\0\0\xf8"),  # IEEE 802.1H
    snap(struct.pack("!HH", 5, IPV4) + ipv4("10.0.0.9", "10.0.0.2", UDP, udp(1, 2)), VLAN),
]


@pytest.mark.parametrize("frame", SPOOFED, ids=["ipv4", "ipv6", "arp", "router", "802.1H", "tag"])
def test_a_snap_header_hides_nothing(guest: Lab, frame: bytes) -> None:
    """Many receivers look through it; anti-spoofing and policies would see what is not IP, and pass it."""
    assert sent(guest, frame) == "DROP_MALFORMED"
    guest.set_port(2, PEER, ifindex=guest.switch.get("ports", "port", 2).ifindex, flags=0)
    device = guest.switch.get("ports", "port", 2).ifindex
    guest.switch.put("devices", device, MODEL.device(slot=2, role=MODEL.DEVICE_PORT))
    assert guest.switch.run("to_port", frame, device).verdict == SHOT, "nor when it comes by an uplink"


@pytest.mark.parametrize(
    "frame",
    [
        snap(b"x", 0x2000, b"\0\0\x0c"),
        snap(b"x", 0x2000, b"\0\1\0"),
        snap(b"x", 0x2000, b"\1\0\0"),
        ethernet(PEER, OWN, 38, b"\x42\x42\x03" + bytes(35)),
        ethernet(PEER, OWN, 38, b"\xaa\x42\x03" + bytes(35)),
        ethernet(PEER, OWN, 1, b"")[:18],
    ],
    ids=["Cisco", "second byte", "first byte", "no SNAP", "half a SNAP", "short"],
)
def test_other_802_3_frames_pass(guest: Lab, frame: bytes) -> None:
    assert sent(guest, frame) == "passed"


def from_link_local(source: str) -> bytes:
    return ethernet(PEER, OWN, IPV6, ipv6(source, "ff02::2", UDP, udp(1, 2)))


def test_a_guest_may_take_any_link_local_address(guest: Lab) -> None:
    """What the documentation warns of: they are the guests' own choice, and a router's is one, too."""
    assert sent(guest, from_link_local("fe80::1")) == "passed"
    assert sent(guest, nd("fe80::1", 136, "fe80::1", OWN, sender=OWN)) == "passed"


@pytest.mark.parametrize(
    ("frame", "expected"),
    [
        (from_link_local("fe80::5"), "passed"),
        (nd("fe80::5", 136, "fe80::5", OWN, sender=OWN), "passed"),
        (nd("::", 135, "fe80::5", "", sender=OWN), "passed"),
        (from_link_local("fe80::1"), "DROP_SPOOF_ADDRESS"),
        (nd("fe80::5", 136, "fe80::1", OWN, sender=OWN), "DROP_SPOOF_ND"),
        (nd("fe80::1", 136, "fe80::1", OWN, sender=OWN), "DROP_SPOOF_ADDRESS"),
        (nd("::", 135, "fe80::1", "", sender=OWN), "DROP_SPOOF_ND"),
        (icmp6("fe80::1", 133), "DROP_SPOOF_ADDRESS"),
    ],
    ids=[
        "own",
        "own advertised",
        "own probed",
        "router's",
        "router's advertised",
        "as router",
        "router's probed",
        "asks",
    ],
)
def test_a_guest_whose_link_local_address_is_named_has_no_other(guest: Lab, frame: bytes, expected: str) -> None:
    for text in ("fe80::5", "fe80::"):  # as policies.set_addresses writes it
        guest.switch.put("addresses", struct.pack("=I", 1) + address(text), 1)
    assert sent(guest, frame) == expected


@pytest.mark.parametrize(
    ("source", "server", "client", "expected"),
    [
        ("10.0.0.1", 67, 68, "DROP_SPOOF_ADDRESS"),
        ("10.0.0.1", 67, 67, "passed"),
        ("10.0.0.1", 66, 68, "passed"),
        ("2001:db8::1", 547, 546, "DROP_SPOOF_ADDRESS"),
        ("fe80::1", 547, 546, "DROP_SPOOF_ADDRESS"),
        ("2001:db8::1", 547, 547, "passed"),
    ],
    ids=["server", "relay", "another port", "IPv6", "IPv6, link-local", "IPv6 relay"],
)
def test_a_guest_is_no_dhcp_server(guest: Lab, source: str, server: int, client: int, expected: str) -> None:
    """Its address is its own; what it says to others there goes past their policies."""
    six = ":" in source
    packet = (
        ipv6(source, "2001:db8::2", UDP, udp(server, client))
        if six
        else ipv4(source, "10.0.0.2", UDP, udp(server, client))
    )
    assert sent(guest, ethernet(PEER, OWN, IPV6 if six else IPV4, packet)) == expected


@pytest.mark.parametrize(
    ("size", "verdict"), [(MTU - 40, REDIRECT), (MTU - 28, REDIRECT), (MTU - 27, SHOT), (9000, SHOT), (65000, SHOT)]
)
def test_a_segment_larger_than_the_network_takes_is_not_left_to_the_nic(lab: Lab, size: int, verdict: int) -> None:
    uplink, _, _ = on_uplink(lab, 100, mtu=MTU)
    lab.place(OUTSIDE, MODEL.L2_UPLINK, uplink)
    device = lab.switch.get("ports", "port", 1).ifindex
    done = lab.switch.run("from_port", datagram(OUTSIDE, A, bytes(2000)), device, gso_size=size, gso_segs=2)
    assert done.verdict == verdict
    assert lab.drops(1) == ({MODEL.DROP_MTU: 1} if verdict == SHOT else {})


def mutated(source: random.Random, seeds: list[bytes]) -> bytes:
    """A frame with some bytes changed, perhaps cut as far as BPF_PROG_RUN allows, perhaps nothing but noise."""
    frame = bytearray(source.choice(seeds))
    for _ in range(source.randrange(6)):
        frame[source.randrange(min(len(frame), 80))] = source.randrange(256)
    if source.random() < 0.1:
        frame[12:] = source.randbytes(len(frame) - 12)
    return bytes(frame[: source.randrange(60, len(frame) + 1)])


@pytest.mark.parametrize("sort", ["tagged uplink", "untagged uplink", "overlay"])
@pytest.mark.parametrize("flags", [MODEL.PORT_F_STATELESS, MODEL.PORT_F_ANTISPOOF])
def test_nothing_that_a_guest_sends_goes_up_the_stack_of_its_host(lab: Lab, sort: str, flags: int) -> None:
    """Every frame ends in the switch or leaves by it; TC_ACT_OK would hand it to the host on the guest's device."""
    if sort == "overlay":
        overlay(lab, flags=flags)
    else:
        on_uplink(lab, 100 if sort == "tagged uplink" else 0)
        lab.change_port(1, word=1 << 32 | flags << 8 | MODEL.PORT_ACTIVE)
    lab.switch.inner("conntracks", 1, "ct_table", 64)
    device = lab.switch.get("ports", "port", 1).ifindex
    source = random.Random(SEED)
    seeds = [
        *(datagram(to, A) for to in (B, BROADCAST, OUTSIDE, A, "01:80:c2:00:00:0e", mac(0x99))),
        *(datagram(B, A, vlan=vid) for vid in (5, 100)),
        arp(A, "10.0.0.1", "10.0.0.2"),
        nd("fe80::1", 135, "fe80::2", A, sender=A),
        ethernet(B, A, IPV4, ipv4("10.0.0.1", "10.0.0.2", 4, ipv4("10.0.0.3", "10.0.0.4", UDP, udp(1, 2)))),
        ethernet(B, A, 0x88A8, struct.pack("!HH", 7, IPV4) + bytes(40)),
        *SPOOFED,
    ]
    verdicts = {lab.switch.run("from_port", mutated(source, seeds), device).verdict for _ in range(FRAMES)}
    assert verdicts <= {SHOT, REDIRECT}, f"seed {SEED}"


def shared(lab: Lab, *, antispoof: bool) -> tuple[Wire, Wire]:
    """The guest's network is the untagged one of the very interface that is the underlay: the worst place for it.

    Returns (another guest on an overlay, the guest).
    """
    overlay(lab)
    underlay = lab.underlay_index()
    lab.attach("from_uplink", underlay, TCX_INGRESS)
    lab.network(3, [], kind=MODEL.NETWORK_UPLINK, uplink=underlay)
    lab.vlan(underlay, 0, 3)
    lab.place(mac(UNDERLAY_MAC), MODEL.L2_HOST, underlay, network=3, flags=MODEL.L2_F_STATIC)
    victim = lab.port(5, B)
    lab.network(1, [(MODEL.L2_PORT, 5, 0)], kind=MODEL.NETWORK_OVERLAY, vni=VNI)
    flags = MODEL.PORT_F_STATELESS | (MODEL.PORT_F_ANTISPOOF if antispoof else 0)
    hostile = lab.port(6, OUTSIDE, network=3, flags=flags)
    lab.switch.put("addresses", struct.pack("=I", 6) + address("192.0.2.66"), 1)
    return victim, hostile


def forged(source: str, identifier: int, mark: int) -> bytes:
    body = udp(12345, 4789, vxlan(identifier, mark, datagram(B, OUTSIDE, b"forged")))
    return ethernet(mac(UNDERLAY_MAC), OUTSIDE, IPV4, ipv4(source, UNDERLAY[0], UDP, body))


@pytest.mark.parametrize("mark", [0, MODEL.MARK_REDIRECT, MODEL.MARK_PROBE])
def test_a_guest_forges_no_tunnel_packet_with_its_own_address(lab: Lab, mark: int) -> None:
    """It reaches the host's tunnel, for the host is on its network; and ends there, being of no host of ours."""
    victim, hostile = shared(lab, antispoof=True)
    channel(lab, 5)
    for source in (UNDERLAY[1], "192.0.2.66"):
        hostile.send(forged(source, CHANNEL if mark else VNI, mark))
    reason = MODEL.DROP_CHANNEL if mark else MODEL.DROP_TUNNEL_PEER
    wait_for(lambda: lab.drops(0) == {reason: 1}, "the one with its own address ends at the tunnel")
    assert lab.drops(6) == {MODEL.DROP_SPOOF_ADDRESS: 1}, "the one with a host's does not get so far"
    assert victim.waiting() == []


def test_without_anti_spoofing_a_guest_on_the_underlay_can_forge(lab: Lab) -> None:
    """What the documentation warns of."""
    victim, hostile = shared(lab, antispoof=False)
    hostile.send(forged(UNDERLAY[1], VNI, 0))
    assert victim.receive() == datagram(B, OUTSIDE, b"forged")
