# SPDX-License-Identifier: GPL-2.0-only
"""Anti-spoofing and learning, by BPF_PROG_RUN: a frame from the guest goes out (redirect) or ends with its reason."""

from __future__ import annotations

import struct

import pytest

from .frames import (
    BROADCAST,
    ICMP6,
    IPV4,
    IPV6,
    UDP,
    address,
    arp,
    datagram,
    ethernet,
    ipv4,
    ipv6,
    mac,
    nd,
    rarp,
    udp,
)
from .lab import Lab
from .model import MODEL

OWN, FLOATING, LEARNED, PEER, STRANGER = mac(1), mac(2), mac(3), mac(0x77), mac(0x66)
IP, IP6, LINK_LOCAL = "10.0.0.1", "2001:db8::1", "fe80::1"
NAMED = "10.0.0.3"
FORWARDED, DROPPED = 7, 2
REASON = {value: name for name, value in MODEL.constants.items() if name.startswith("DROP_")}


def name_of(value: object) -> str:
    """Test ids: the frame itself is no name."""
    return value if isinstance(value, str) else "frame"


@pytest.fixture
def guest(lab: Lab) -> Lab:
    """Port 1 under anti-spoofing; the peer, and broadcast as well as multicast, lead to port 2."""
    lab.network(1)
    lab.port(1, OWN, flags=MODEL.PORT_F_ANTISPOOF | MODEL.PORT_F_STATELESS)
    lab.set_port(2, PEER, ifindex=lab.veth()[0])
    lab.place(PEER, MODEL.L2_PORT, 2, flags=MODEL.L2_F_LOCATION)
    lab.place(FLOATING, MODEL.L2_PORT, 1, flags=MODEL.L2_F_STATIC)
    lab.place(LEARNED, MODEL.L2_PORT, 1)
    for text in (IP, IP6):
        lab.switch.put("addresses", struct.pack("=I", 1) + address(text), 1)
    return lab


def sent(lab: Lab, frame: bytes) -> str:
    """What became of a frame of port 1: "passed" or the name of its drop reason. Flooded frames end in the program."""
    before = lab.drops(1)
    passed = lab.counted(1, "packets", 0)
    lab.switch.run("from_port", frame, lab.switch.get("ports", "port", 1).ifindex)
    new = [REASON[reason] for reason, count in lab.drops(1).items() if count != before.get(reason, 0)]
    counted = lab.counted(1, "packets", 0) - passed
    if counted:
        new = [name for name in new if name != "DROP_NO_NETWORK"]  # counted as well when nothing floods
    assert (counted, len(new)) in ((1, 0), (0, 1)), (counted, new)
    return new[0] if new else "passed"


def from_ip(source: str, sport: int = 1000, dport: int = 2000) -> bytes:
    return ethernet(PEER, OWN, IPV4, ipv4(source, "10.0.0.2", UDP, udp(sport, dport)))


def from_ip6(source: str, target: str = "2001:db8::2") -> bytes:
    return ethernet(PEER, OWN, IPV6, ipv6(source, target, UDP, udp(1, 2)))


def icmp6(source: str, kind: int, body: bytes = b"\0" * 4, hops: int = 255) -> bytes:
    return ethernet(PEER, OWN, IPV6, ipv6(source, "ff02::2", ICMP6, struct.pack("!BBH", kind, 0, 0) + body, hops))


def in_fragments(kind: int, later: bool = False) -> bytes:
    """A neighbour discovery message behind a fragment header."""
    head = struct.pack("!BBHI", ICMP6, 0, 8 << 3 if later else 1, 9)
    return ethernet(PEER, OWN, IPV6, ipv6(LINK_LOCAL, "ff02::2", 44, head + struct.pack("!BBH", kind, 0, 0) + bytes(4)))


@pytest.mark.parametrize(
    "source, expected",
    [
        (OWN, "passed"),
        (FLOATING, "passed"),
        (LEARNED, "DROP_SPOOF_MAC"),
        (STRANGER, "DROP_SPOOF_MAC"),
        (PEER, "DROP_SPOOF_MAC"),
        ("03:00:00:00:00:01", "DROP_SPOOF_MAC"),
        (BROADCAST, "DROP_SPOOF_MAC"),
    ],
)
def test_source_mac(guest: Lab, source: str, expected: str) -> None:
    assert sent(guest, datagram(PEER, source, ip=(IP, "10.0.0.2"))) == expected


@pytest.mark.parametrize(
    "frame, expected",
    [
        (from_ip(IP), "passed"),
        (from_ip("10.0.0.9"), "DROP_SPOOF_ADDRESS"),
        (from_ip("0.0.0.0"), "DROP_SPOOF_ADDRESS"),
        (from_ip("0.0.0.0", 68, 67), "passed"),
        (from_ip("0.0.0.0", 67, 68), "DROP_SPOOF_ADDRESS"),
        (from_ip("0.0.0.0", 68, 69), "DROP_SPOOF_ADDRESS"),
        (from_ip("0.0.0.0", 68, 67).replace(b"\x40\0\x40\x11", b"\x20\0\x40\x11"), "DROP_SPOOF_ADDRESS"),  # a fragment
        (ethernet(PEER, OWN, IPV4, ipv4("0.0.0.0", "10.0.0.2", 47, bytes(8))), "DROP_SPOOF_ADDRESS"),
        (from_ip("10.0.0.9", 68, 67), "DROP_SPOOF_ADDRESS"),
        (from_ip6(IP6), "passed"),
        (from_ip6(LINK_LOCAL), "passed"),
        (from_ip6("2001:db8::9"), "DROP_SPOOF_ADDRESS"),
        (from_ip6("::"), "DROP_SPOOF_ADDRESS"),
        (from_ip6("::ffff:10.0.0.1"), "DROP_MALFORMED"),  # how IPv4 is stored, never on a wire
        (ethernet(PEER, OWN, 0x88CC, b"LLDP"), "passed"),
        (from_ip(IP)[:14] + b"\x44" + from_ip(IP)[15:], "DROP_MALFORMED"),
    ],
    ids=name_of,
)
def test_source_address(guest: Lab, frame: bytes, expected: str) -> None:
    assert sent(guest, frame) == expected


@pytest.mark.parametrize(
    "frame, expected",
    [
        (arp(OWN, IP, "10.0.0.2"), "passed"),
        (arp(OWN, IP, "10.0.0.2", operation=2), "passed"),
        (arp(FLOATING, IP, "10.0.0.2"), "passed"),
        (arp(OWN, "0.0.0.0", IP), "passed"),
        (arp(OWN, "10.0.0.9", "10.0.0.2"), "DROP_SPOOF_ARP"),
        (arp(OWN, IP, "10.0.0.2", claimed=PEER), "DROP_SPOOF_ARP"),
        (arp(STRANGER, IP, "10.0.0.2"), "DROP_SPOOF_MAC"),
        (arp(OWN, IP, "10.0.0.2").replace(b"\x06\x04\0\x01", b"\x06\x06\0\x01"), "DROP_SPOOF_ARP"),
        (arp(OWN, IP, "10.0.0.2").replace(b"\x06\x04\0\x01", b"\x08\x04\0\x01"), "DROP_SPOOF_ARP"),
        (arp(OWN, IP, "10.0.0.2").replace(b"\0\x01\x08\0\x06", b"\0\x06\x08\0\x06"), "DROP_SPOOF_ARP"),
        (arp(OWN, IP, "10.0.0.2").replace(b"\0\x01\x08\0\x06", b"\0\x01\x86\xdd\x06"), "DROP_SPOOF_ARP"),
        (arp(OWN, IP, "10.0.0.2")[:40], "DROP_SPOOF_ARP"),
        (rarp(OWN), "passed"),
        (rarp(OWN, claimed=PEER), "DROP_SPOOF_ARP"),
    ],
    ids=name_of,
)
def test_arp(guest: Lab, frame: bytes, expected: str) -> None:
    assert sent(guest, frame) == expected


@pytest.mark.parametrize(
    "frame, expected",
    [
        (nd(IP6, 135, "2001:db8::2", OWN, sender=OWN), "passed"),
        (nd(LINK_LOCAL, 135, "2001:db8::2", OWN, sender=OWN), "passed"),
        (nd(IP6, 135, "2001:db8::2", PEER, sender=OWN), "DROP_SPOOF_ND"),
        (nd(IP6, 135, "2001:db8::2", OWN, sender=OWN, hops=64), "DROP_SPOOF_ND"),
        (nd("::", 135, IP6, "", sender=OWN), "passed"),
        (nd("::", 135, LINK_LOCAL, "", sender=OWN), "passed"),
        (nd("::", 135, "2001:db8::2", "", sender=OWN), "DROP_SPOOF_ND"),
        (nd(IP6, 136, IP6, OWN, sender=OWN), "passed"),
        (nd(LINK_LOCAL, 136, LINK_LOCAL, OWN, sender=OWN), "passed"),
        (nd(IP6, 136, "2001:db8::2", OWN, sender=OWN), "DROP_SPOOF_ND"),
        (nd(IP6, 136, IP6, PEER, sender=OWN), "DROP_SPOOF_ND"),
        (nd("2001:db8::9", 136, IP6, OWN, sender=OWN), "DROP_SPOOF_ADDRESS"),
        (nd("::", 136, IP6, OWN, sender=OWN), "DROP_SPOOF_ADDRESS"),
        (icmp6("::", 133), "passed"),
        (icmp6(LINK_LOCAL, 133, b"\0" * 4 + b"\x01\x01" + b"\x02\0\0\0\0\x01"), "passed"),
        (icmp6(LINK_LOCAL, 133, b"\0" * 4 + b"\x01\x01" + b"\x02\0\0\0\0\x77"), "DROP_SPOOF_ND"),
        (icmp6(LINK_LOCAL, 134, b"\0" * 12), "DROP_SPOOF_ND"),
        (icmp6(LINK_LOCAL, 137, b"\0" * 36), "DROP_SPOOF_ND"),
        (icmp6("::", 143), "passed"),
        (icmp6("::", 131), "passed"),
        (icmp6("::", 132), "passed"),
        (icmp6(LINK_LOCAL, 131), "passed"),
        (icmp6(LINK_LOCAL, 138), "passed"),
        (icmp6(LINK_LOCAL, 133, b"\0" * 4 + b"\x0e\x01" + b"nonce." + b"\x01\x01" + b"\x02\0\0\0\0\x01"), "passed"),
        (icmp6(LINK_LOCAL, 133, b"\0" * 4 + b"\x01\0" + b"\x02\0\0\0\0\x01"), "DROP_SPOOF_ND"),
        (icmp6(LINK_LOCAL, 133, b"\0" * 4 + b"\x01\x02" + b"\x02\0\0\0\0\x01" + bytes(8)), "DROP_SPOOF_ND"),
        (icmp6(LINK_LOCAL, 133, b"\0" * 4 + b"\x0e\x01nonce." * 5), "DROP_SPOOF_ND"),
        (icmp6(LINK_LOCAL, 135, b"\0" * 12), "DROP_SPOOF_ND"),
        (in_fragments(133), "DROP_SPOOF_ND"),
        (in_fragments(133, later=True), "passed"),
        (icmp6("::", 128), "DROP_SPOOF_ADDRESS"),
    ],
    ids=name_of,
)
def test_neighbour_discovery(guest: Lab, frame: bytes, expected: str) -> None:
    assert sent(guest, frame) == expected


def test_nothing_is_checked_or_learned_of_a_dropped_frame(guest: Lab) -> None:
    assert sent(guest, datagram(PEER, STRANGER, ip=(IP, "10.0.0.2"))) == "DROP_SPOOF_MAC"
    assert guest.placed(STRANGER) is None
    guest.set_port(1, OWN, ifindex=guest.switch.get("ports", "port", 1).ifindex)
    assert sent(guest, datagram(PEER, STRANGER, ip=("10.9.9.9", "10.0.0.2"))) == "passed"
    assert guest.placed(STRANGER) == (MODEL.L2_PORT, 1)


def test_a_mac_that_lives_elsewhere_is_not_owned(guest: Lab) -> None:
    guest.place(STRANGER, MODEL.L2_UPLINK, 1, flags=MODEL.L2_F_STATIC)
    assert sent(guest, datagram(PEER, STRANGER, ip=(IP, "10.0.0.2"))) == "DROP_SPOOF_MAC"


def test_a_group_address_is_never_a_source(guest: Lab) -> None:
    guest.set_port(1, OWN, ifindex=guest.switch.get("ports", "port", 1).ifindex)
    assert sent(guest, datagram(PEER, "03:00:00:00:00:01")) == "DROP_SPOOF_MAC"


def test_learning_has_a_limit_and_the_own_mac_is_free(guest: Lab) -> None:
    guest.set_port(1, OWN, ifindex=guest.switch.get("ports", "port", 1).ifindex, learned_max=2)
    assert [sent(guest, datagram(PEER, mac(number))) for number in (0x10, 0x11, 0x12, 0x10)] == [
        "passed",
        "passed",
        "DROP_LEARN_LIMIT",
        "passed",
    ]
    assert sent(guest, datagram(PEER, OWN)) == "passed"
    assert guest.switch.get("ports", "port", 1).learned == 2


def test_learning_counts_moves_and_leaves_pinned_entries(guest: Lab) -> None:
    guest.set_port(1, OWN, ifindex=guest.switch.get("ports", "port", 1).ifindex)
    dirty = [guest.switch.inner("dirty", slot, "dirty_set") for slot in (1, 2)]
    moved = mac(0x20)
    guest.place(moved, MODEL.L2_PORT, 2)
    assert sent(guest, datagram(PEER, moved)) == "passed"
    assert guest.placed(moved) == (MODEL.L2_PORT, 1)
    entry = MODEL.l2_entry.from_buffer_copy(guest.switch.maps["l2"].lookup(guest._l2_key(moved, 1)) or b"")
    assert (entry.moves, entry.flags) == (1, 0)
    assert [len(keys.items()) for keys in dirty] == [1, 1]
    assert sent(guest, datagram(mac(0x21), PEER)) == "passed"
    assert guest.placed(PEER) == (MODEL.L2_PORT, 2)


def test_traces_tell_every_verdict(guest: Lab) -> None:
    flags = MODEL.PORT_F_ANTISPOOF | MODEL.PORT_F_STATELESS | MODEL.PORT_F_TRACE
    guest.set_port(1, OWN, ifindex=guest.switch.get("ports", "port", 1).ifindex, flags=flags)
    ring = guest.ring()
    good, bad = datagram(PEER, OWN, bytes(200), ip=(IP, "10.0.0.2")), datagram(PEER, STRANGER)
    ifindex = guest.switch.get("ports", "port", 1).ifindex
    assert guest.switch.run("from_port", good, ifindex).verdict == FORWARDED
    assert guest.switch.run("from_port", bad, ifindex).verdict == DROPPED
    assert guest.switch.run("to_port", good, ifindex).verdict == 0
    events = [MODEL.event.from_buffer_copy(record) for record in ring.read()]
    told = [(event.type, event.slot, event.direction, event.reason, event.length) for event in events]
    assert told == [
        (MODEL.EVENT_TRACE, 1, 0, MODEL.DROP_NONE, len(good)),
        (MODEL.EVENT_TRACE, 1, 0, MODEL.DROP_SPOOF_MAC, len(bad)),
        (MODEL.EVENT_TRACE, 1, 1, MODEL.DROP_NONE, len(good)),
    ]
    assert bytes(events[0].data) == good[: MODEL.EVENT_BYTES]
    assert bytes(events[1].data)[: events[1].captured] == bad


def test_the_address_that_the_port_names_is_its_own_and_no_other(guest: Lab) -> None:
    """port.address: past the look-up, and gone with the agent's word."""
    from_named = datagram(PEER, OWN, ip=(NAMED, "10.0.0.2"))
    assert sent(guest, from_named) == "DROP_SPOOF_ADDRESS"
    guest.change_port(1, address=int.from_bytes(address(NAMED)[12:], "little"))
    assert sent(guest, from_named) == "passed"
    assert sent(guest, datagram(PEER, OWN, ip=(IP, "10.0.0.2"))) == "passed"
    assert sent(guest, datagram(PEER, OWN, ip=("10.0.0.4", "10.0.0.2"))) == "DROP_SPOOF_ADDRESS"
    assert sent(guest, datagram(PEER, STRANGER, ip=(NAMED, "10.0.0.2"))) == "DROP_SPOOF_MAC"
    guest.change_port(1, address=0)
    assert sent(guest, from_named) == "DROP_SPOOF_ADDRESS"
