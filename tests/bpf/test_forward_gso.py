# SPDX-License-Identifier: GPL-2.0-only
"""GSO frames of a real tap: one frame in the switch, counted as what it will be on a wire."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Iterator

import pytest

from .frames import IPV4, TCP, checksum, ethernet, ipv4, mac
from .lab import Lab, up, wait_for
from .model import MODEL
from .sysbpf import TCX_EGRESS, TCX_INGRESS

A, B = mac(1), mac(2)
SEGMENT, PAYLOAD = 1000, bytes(range(250)) * 14  # 3,500 bytes
HEADERS = 14 + 20 + 20
_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_TAP, _NO_PI, _VNET_HEADER = 0x0002, 0x1000, 0x4000
_OFFLOADS = 0x01 | 0x02 | 0x04  # checksum, TSO4, TSO6
_NEEDS_CHECKSUM, _GSO_TCP4 = 1, 1


class GuestTap:
    """A tap as QEMU has it: a virtio-net header before each frame, large frames passed whole."""

    def __init__(self, name: str) -> None:
        self.fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(self.fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _TAP | _NO_PI | _VNET_HEADER))
        fcntl.ioctl(self.fd, _TUNSETOFFLOAD, _OFFLOADS)
        self.ifindex = up(name)

    def read(self) -> bytes:
        found: list[bytes] = []

        def arrived() -> bool:
            try:
                found.append(os.read(self.fd, 70_000))
            except BlockingIOError:
                return False
            return True

        wait_for(arrived, "a frame in the tap")
        return found[0]


@pytest.fixture
def taps(lab: Lab) -> Iterator[list[GuestTap]]:
    """Devices of port 1 and port 2, and one for frames towards port 2 that wait."""
    made: list[GuestTap] = []
    try:
        for name in ("guest1", "guest2", "hold2"):
            made.append(GuestTap(name))
        lab.network(1)
        for slot, own_mac in ((1, A), (2, B)):
            ifindex = made[slot - 1].ifindex
            lab.attach("from_port", ifindex, TCX_INGRESS)
            lab.attach("to_port", ifindex, TCX_EGRESS)
            lab.switch.put("devices", ifindex, MODEL.device(slot=slot, role=MODEL.DEVICE_PORT))
            lab.set_port(slot, own_mac, ifindex=ifindex, hold_to=made[2].ifindex)
            lab.place(own_mac, MODEL.L2_PORT, slot)
        lab.attach("from_hold", made[2].ifindex, TCX_INGRESS)
        lab.switch.put("devices", made[2].ifindex, MODEL.device(slot=2, role=MODEL.DEVICE_HOLD_TO))
        yield made
    finally:
        for tap in made:
            os.close(tap.fd)


def large_segment() -> bytes:
    """virtio_net_hdr (virtio 1.2, 5.1.6) and a TCP segment that is cut into four on a wire."""
    source, target = "10.0.0.1", "10.0.0.2"
    tcp = struct.pack("!HHIIBBHHH", 1000, 2000, 1, 1, 5 << 4, 0x10, 1000, 0, 0)
    pseudo = socket.inet_aton(source) + socket.inet_aton(target) + struct.pack("!HH", TCP, len(tcp) + len(PAYLOAD))
    tcp = tcp[:16] + struct.pack("!H", ~checksum(pseudo) & 0xFFFF) + tcp[18:]  # the kernel completes it
    header = struct.pack("=BBHHHH", _NEEDS_CHECKSUM, _GSO_TCP4, HEADERS, SEGMENT, 14 + 20, 16)
    return header + ethernet(B, A, IPV4, ipv4(source, target, TCP, tcp + PAYLOAD))


def told(frame: bytes) -> bytes:
    """Without the length of its headers, which is a hint that each kernel fills as it likes."""
    return frame[:2] + frame[4:]


def test_a_large_segment_passes_whole_and_counts_as_four(lab: Lab, taps: list[GuestTap]) -> None:
    a, b, _ = taps
    os.write(a.fd, large_segment())
    assert told(b.read()) == told(large_segment())
    for slot, direction in ((1, 0), (2, 1)):
        assert lab.counted(slot, "packets", direction) == 4
        assert lab.counted(slot, "bytes", direction) == len(PAYLOAD) + 4 * HEADERS


def test_a_large_segment_waits_whole(lab: Lab, taps: list[GuestTap]) -> None:
    a, b, hold = taps
    lab.change_port(2, gate=MODEL.GATE_LOCAL | 1 << 8)
    os.write(a.fd, large_segment())
    waiting = hold.read()
    assert told(waiting) == told(large_segment())
    lab.change_port(2, gate=MODEL.GATE_LOCAL)
    os.write(hold.fd, waiting)
    assert told(b.read()) == told(large_segment())
    assert lab.counted(2, "packets", 1) == 4
