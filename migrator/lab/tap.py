# SPDX-License-Identifier: GPL-2.0-only
"""Tap devices with a virtio-net header of 12 bytes and offloads on, as QEMU opens them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from pathlib import Path

from migrator.lab import netns

VNET_HEADER = 12  # bytes in front of each frame
FRAME_MAX = VNET_HEADER + 65536 + 18

_TUNSETIFF = 0x400454CA
_TUNSETOFFLOAD = 0x400454D0
_TUNSETVNETHDRSZ = 0x400454D8
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
_CSUM, _TSO4, _TSO6, _TSO_ECN, _UFO, _USO4, _USO6 = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20, 0x40
_TCP = _CSUM | _TSO4 | _TSO6 | _TSO_ECN


def open_tap(namespace: Path, name: str) -> int:
    """Make a tap in a namespace and open it, non-blocking; the device lives as long as its descriptors.

    The kernel of the host sends nothing of its own through it: IPv6 is off on the device.
    """
    with netns.entered(namespace):
        handle = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            request = struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR)
            fcntl.ioctl(handle, _TUNSETIFF, request)
            fcntl.ioctl(handle, _TUNSETVNETHDRSZ, struct.pack("i", VNET_HEADER))
            _set_offloads(handle)
        except OSError:
            os.close(handle)
            raise
    return handle


def quiet(namespace: Path, name: str) -> None:
    """Keep the host's kernel from sending router solicitations and the like through the device."""
    with netns.entered(namespace), contextlib.suppress(FileNotFoundError):
        Path("/proc/sys/net/ipv6/conf", name, "disable_ipv6").write_text("1")


def _set_offloads(handle: int) -> None:
    """All that the kernel can hand over unsegmented; USO since 6.2, UFO for older ones."""
    for flags in (_TCP | _USO4 | _USO6 | _UFO, _TCP | _USO4 | _USO6, _TCP | _UFO, _TCP):
        with contextlib.suppress(OSError):
            fcntl.ioctl(handle, _TUNSETOFFLOAD, flags)
            return
