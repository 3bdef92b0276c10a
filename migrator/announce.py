"""Frames that tell a network where a VM is: gratuitous ARP (RFC 5227), unsolicited neighbour advertisements (RFC 4861)
and reverse ARP (RFC 903), each behind a zeroed struct virtio_net_hdr (10 bytes), as `Driver.inject` takes them.

Pure: the driver puts them in as if the guest had sent them.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterator, Sequence

from datapath.state.kind import Record

VNET_HEADER = bytes(10)
BROADCAST = b"\xff" * 6
FRAME_MIN = 60  # without checksum
ETH_ARP, ETH_RARP, ETH_VLAN, ETH_IPV6 = 0x0806, 0x8035, 0x8100, 0x86DD
ARP_REQUEST, ARP_REPLY, RARP_REQUEST = 1, 2, 3
ICMPV6, NEIGHBOUR_ADVERTISEMENT, OVERRIDE, TARGET_LINK_ADDRESS = 58, 136, 0x20, 2


def frames(record: Record, more: Sequence[str] = ()) -> list[bytes]:
    """All announcements for a port, untagged and on each tag of its trunk. `record` is of kind `port`.

    `more`: addresses that the network finds at the port beside its own. For each IPv4 address an ARP request and reply,
    for each IPv6 address an advertisement, and one reverse request.
    """
    mac = bytes.fromhex(str(record["mac"]).replace(":", ""))
    tags = [0, *sorted(int(tag) for tag in record["trunk"])]
    plain = list(_plain(mac, [*record["addresses"], *more]))
    return [VNET_HEADER + _framed(mac, to, tag, kind, body) for tag in tags for to, kind, body in plain]


def _plain(mac: bytes, addresses: list[str]) -> Iterator[tuple[bytes, int, bytes]]:
    """(destination MAC, Ethernet type, body) of every announcement."""
    for text in addresses:
        address = ipaddress.ip_interface(text).ip
        if address.version == 4:
            yield BROADCAST, ETH_ARP, _arp(ARP_REQUEST, mac, address.packed, bytes(6), address.packed)
            yield BROADCAST, ETH_ARP, _arp(ARP_REPLY, mac, address.packed, BROADCAST, address.packed)
        else:
            yield bytes.fromhex("333300000001"), ETH_IPV6, _advertisement(mac, address.packed)
    yield BROADCAST, ETH_RARP, _arp(RARP_REQUEST, mac, bytes(4), mac, bytes(4))


def _framed(mac: bytes, to: bytes, tag: int, kind: int, body: bytes) -> bytes:
    head = to + mac + (struct.pack("!HH", ETH_VLAN, tag) if tag else b"")
    return (head + struct.pack("!H", kind) + body).ljust(FRAME_MIN, b"\0")


def _arp(operation: int, mac: bytes, sender: bytes, target_mac: bytes, target: bytes) -> bytes:
    return struct.pack("!HHBBH", 1, 0x0800, 6, 4, operation) + mac + sender + target_mac + target


def _advertisement(mac: bytes, address: bytes) -> bytes:
    all_nodes = ipaddress.IPv6Address("ff02::1").packed
    body = struct.pack("!BBHI", NEIGHBOUR_ADVERTISEMENT, 0, 0, OVERRIDE << 24) + address
    body += bytes((TARGET_LINK_ADDRESS, 1)) + mac
    pseudo = address + all_nodes + struct.pack("!II", len(body), ICMPV6)
    body = body[:2] + struct.pack("!H", _checksum(pseudo + body)) + body[4:]
    return struct.pack("!IHBB", 6 << 28, len(body), ICMPV6, 255) + address + all_nodes + body


def _checksum(data: bytes) -> int:
    """RFC 1071; `data` is of even length."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
