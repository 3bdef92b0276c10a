# SPDX-License-Identifier: GPL-2.0-only
"""IP packets between the guest of probe.py and its peer, with headers that frames.py does not build."""

from __future__ import annotations

import socket
import struct

from . import frames
from .frames import IPV4, IPV6, checksum
from .probe import GUEST, GUEST6, GUEST_MAC, PEER, PEER6, PEER_MAC

MORE = 0x2000  # IPv4: more fragments follow
HOP_BY_HOP, ROUTING, FRAGMENT, DESTINATION = 0, 43, 44, 60


def pair(direction: int, v6: bool = False) -> tuple[str, str]:
    own, other = (GUEST6, PEER6) if v6 else (GUEST, PEER)
    return (other, own) if direction else (own, other)


def wrap(direction: int, packet: bytes, target: str = "") -> bytes:
    source = PEER_MAC if direction else GUEST_MAC
    target = target or (GUEST_MAC if direction else PEER_MAC)
    return frames.ethernet(target, source, IPV4 if packet[0] >> 4 == 4 else IPV6, packet)


def v4(direction: int, proto: int, body: bytes, *, options: bytes = b"", offset: int = 0, number: int = 1) -> bytes:
    """An IPv4 packet; `offset` is the field with its flags, in units of 8 bytes."""
    source, target = (socket.inet_aton(text) for text in pair(direction))
    words = 5 + len(options) // 4
    length = words * 4 + len(body)
    head = struct.pack("!BBHHHBBH", 0x40 | words, 0, length, number, offset, 64, proto, 0) + source + target + options
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + body


def extension(following: int, data: bytes = bytes(6)) -> bytes:
    assert len(data) % 8 == 6
    return struct.pack("!BB", following, (len(data) - 6) // 8) + data


def fragment(following: int, offset: int, more: bool, number: int) -> bytes:
    return struct.pack("!BBHI", following, 0, offset << 3 | more, number)
