# SPDX-License-Identifier: GPL-2.0-only
"""Mirrors of the lab's ports, and what comes out of them."""

from __future__ import annotations

import ctypes
import socket
import struct
import subprocess

from datapath.drivers.ebpf.maps import possible_cpus

from .frames import address
from .lab import Lab, Wire
from .model import MODEL
from .sysbpf import TCX_EGRESS

BOTH, FROM, TO = 3, 1, 2


def mirror(
    lab: Lab, slot: int, number: int = 0, *, vlans: tuple[int, ...] = (), remote: str = "", **fields: int
) -> None:
    """Number `number` of a port's mirrors; fields of struct mirror."""
    made = MODEL.mirror(**({"directions": BOTH, "filtered": bool(vlans)} | fields))
    for vlan in vlans:
        made.vlans[vlan // 64] |= 1 << vlan % 64
    if remote:
        made.remote = (ctypes.c_uint32 * 4).from_buffer_copy(address(remote))
    key = slot * MODEL.MIRRORS_MAX + number
    lab.switch.put("mirrors", key, made)
    zero = bytes(ctypes.sizeof(MODEL.mirror_count) * possible_cpus())
    lab.switch.maps["mirror_counts"].update(struct.pack("=I", key), zero)
    lab.change_port(slot, features=MODEL.FEATURE_MIRROR)


def to_device(lab: Lab, slot: int, number: int = 0, **fields: object) -> Wire:
    """A mirror to a device: what is behind it."""
    ifindex, wire = lab.veth()
    mirror(lab, slot, number, output=MODEL.MIRROR_DEVICE, target=ifindex, **fields)  # type: ignore[arg-type]
    return wire


def counted(lab: Lab, slot: int, number: int = 0) -> tuple[int, int, int]:
    """(packets, bytes, dropped) of a mirror."""
    raw = lab.switch.maps["mirror_counts"].lookup(struct.pack("=I", slot * MODEL.MIRRORS_MAX + number))
    assert raw is not None
    values = struct.unpack(f"={len(raw) // 8}Q", raw)
    return sum(values[::3]), sum(values[1::3]), sum(values[2::3])


def cutter(lab: Lab) -> None:
    """The device that copies are cut at: nobody holds it, and it is not up."""
    subprocess.run(["ip", "tuntap", "add", "cut", "mode", "tap"], check=True)
    ifindex = socket.if_nametoindex("cut")
    lab.attach("to_cutter", ifindex, TCX_EGRESS)
    lab.switch.put("mirror_cutter", 0, ifindex)


def known(lab: Lab, name: tuple[int, int], newest: int, older: int = 0) -> None:
    """What a copy says, (id, port bits of the mark), is these instances here."""
    key = MODEL.mirror_name(id=name[0], mark=MODEL.MARK_COPY | name[1])
    lab.switch.put("mirror_ports", key, MODEL.mirror_slots(newest=newest, older=older))


def to_port(lab: Lab, slot: int, name: tuple[int, int], number: int = 0, **fields: object) -> None:
    mark = MODEL.MARK_COPY | name[1]
    mirror(lab, slot, number, output=MODEL.MIRROR_PORT, id=name[0], mark=mark, **fields)  # type: ignore[arg-type]
