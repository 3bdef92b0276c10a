# SPDX-License-Identifier: GPL-2.0-only
"""Remapping of large frames from and to a real tap: they pass whole, their checksum still left to the device."""

from __future__ import annotations

import os
import socket
import struct

import pytest

from . import frames
from .frames import IPV4, IPV6, TCP, checksum, ethernet
from .lab import Lab
from .test_forward_gso import PAYLOAD, SEGMENT, A, B, GuestTap, taps, told
from .test_remap import load

__all__ = ["taps"]  # the fixture

INSIDE, OUTSIDE, PEER = "10.0.0.5", "203.0.113.10", "192.0.2.9"
INSIDE6, OUTSIDE6, PEER6 = "fd00::5", "2001:db8::10", "2001:db8:9::9"
RULES = [
    {"outside": OUTSIDE, "inside": INSIDE, "protocol": "tcp", "outside_port": 443, "inside_port": 8443},
    {"outside": OUTSIDE6, "inside": INSIDE6, "protocol": "tcp", "outside_port": 443, "inside_port": 8443},
]
_NEEDS_CHECKSUM, _GSO_TCP4, _GSO_TCP6 = 1, 1, 4


def large(macs: tuple[str, str], source: tuple[str, int], target: tuple[str, int]) -> bytes:
    """virtio_net_hdr and a TCP segment that is cut into four; its checksum field has the pseudo-header's sum."""
    v6 = ":" in source[0]
    tcp = struct.pack("!HHIIBBHHH", source[1], target[1], 1, 1, 5 << 4, 0x10, 1000, 0, 0)
    length = len(tcp) + len(PAYLOAD)
    ends = [socket.inet_pton(socket.AF_INET6 if v6 else socket.AF_INET, end[0]) for end in (source, target)]
    pseudo = b"".join(ends) + struct.pack("!IHBB", length, 0, 0, TCP)
    tcp = tcp[:16] + struct.pack("!H", ~checksum(pseudo) & 0xFFFF) + tcp[18:]
    start = 14 + (40 if v6 else 20)
    sort = _GSO_TCP6 if v6 else _GSO_TCP4
    header = struct.pack("=BBHHHH", _NEEDS_CHECKSUM, sort, start + 20, SEGMENT, start, 16)
    packet = (frames.ipv6 if v6 else frames.ipv4)(source[0], target[0], TCP, tcp + PAYLOAD)
    return header + ethernet(*macs, IPV6 if v6 else IPV4, packet)


@pytest.mark.parametrize("v6", [False, True], ids=["ipv4", "ipv6"])
def test_a_large_segment_is_remapped_whole(lab: Lab, taps: list[GuestTap], v6: bool) -> None:
    load(lab, 1, RULES)
    inside, outside, peer = (INSIDE6, OUTSIDE6, PEER6) if v6 else (INSIDE, OUTSIDE, PEER)
    guest, other, _ = taps
    os.write(guest.fd, large((B, A), (inside, 8443), (peer, 999)))
    assert told(other.read()).hex() == told(large((B, A), (outside, 443), (peer, 999))).hex()
    os.write(other.fd, large((A, B), (peer, 999), (outside, 443)))
    assert told(guest.read()).hex() == told(large((A, B), (peer, 999), (inside, 8443))).hex()
    assert (lab.counted(1, "packets", 0), lab.counted(1, "packets", 1)) == (4, 4)
