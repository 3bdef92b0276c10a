# SPDX-License-Identifier: GPL-2.0-only
"""A network namespace with the switch attached to real devices in it, for tests that must see what leaves each wire."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import itertools
import mmap
import os
import select
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

from datapath.drivers.ebpf.attach import ClsactAttachments, Direction, has_tcx

from .frames import address, mac, mac_bytes
from .harness import Switch
from .model import MODEL
from .ring import Ring
from .sysbpf import TCX_EGRESS, TCX_INGRESS, tcx_attach

DEADLINE_S = 5.0
UNDERLAY_MAC = 0x500
UNDERLAY = ("192.0.2.1", "192.0.2.2")  # own, far
UNDERLAY6 = ("2001:db8:1::1", "2001:db8:1::2")
_CLONE_NEWNET = 0x40000000
_ETH_P_ALL = 3
_SOL_PACKET, _PACKET_AUXDATA, _PACKET_OUTGOING = 263, 8, 4
_SO_RCVBUFFORCE = 33
_TP_STATUS_VLAN_VALID = 1 << 4
_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
_SIOCGIFFLAGS, _IFF_RUNNING = 0x8913, 0x40
_numbers = itertools.count()
_libc = ctypes.CDLL(None, use_errno=True)


def wait_for(condition: Callable[[], object], what: str) -> None:
    """Poll until the condition holds; fails after DEADLINE_S."""
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, f"not within {DEADLINE_S} s: {what}"
        select.select([], [], [], 0.001)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def up(name: str) -> int:
    """Set a device up. Returns its ifindex."""
    _ip("link", "set", name, "up")
    return socket.if_nametoindex(name)


def _is_running(name: str) -> bool:
    """The kernel has seen the carrier: until then it drops what is sent, and on a busy machine that lasts."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        answer = fcntl.ioctl(any_socket, _SIOCGIFFLAGS, struct.pack("16sH22x", name.encode(), 0))
    return bool(struct.unpack_from("16xH", answer)[0] & _IFF_RUNNING)


@contextlib.contextmanager
def namespace() -> Iterator[str]:
    """A new network namespace that the calling thread is in, without IPv6's own chatter."""
    name = f"bpf-{os.getpid()}-{next(_numbers)}"
    _ip("netns", "add", name)
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        with open(f"/run/netns/{name}") as target:  # noqa: PTH123 - a descriptor for setns
            _setns(target.fileno())
        Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1")
        _ip("link", "set", "lo", "up")
        yield name
    finally:
        _setns(home)
        os.close(home)
        _ip("netns", "del", name)


@contextlib.contextmanager
def inside(name: str) -> Iterator[None]:
    """The calling thread is in this network namespace; what it opens stays there."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        with open(f"/run/netns/{name}") as target:  # noqa: PTH123 - a descriptor for setns
            _setns(target.fileno())
        yield
    finally:
        _setns(home)
        os.close(home)


def _setns(fd: int) -> None:
    if _libc.setns(fd, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


class Wire:
    """The far end of a device: what a guest, or the physical network, sends and sees."""

    def __init__(self, name: str) -> None:
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)  # hears nothing before it is bound
        self._socket.setsockopt(_SOL_PACKET, _PACKET_AUXDATA, 1)
        self._socket.bind((name, _ETH_P_ALL))

    def close(self) -> None:
        self._socket.close()

    def buffer(self, size: int) -> None:
        """Bytes that may wait to be received, past the system's limit."""
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, size)

    def send(self, frame: bytes) -> None:
        self._socket.send(frame)

    def receive(self) -> bytes:
        """The next frame, its tag in the data. Fails when none comes."""
        end = time.monotonic() + DEADLINE_S
        while (left := end - time.monotonic()) > 0:
            if select.select([self._socket], [], [], left)[0]:
                frame = self._read()
                if frame is not None:
                    return frame
        raise AssertionError(f"no frame within {DEADLINE_S} s")

    def waiting(self) -> list[bytes]:
        """What has arrived already."""
        found = []
        while select.select([self._socket], [], [], 0)[0]:
            frame = self._read()
            if frame is not None:
                found.append(frame)
        return found

    def _read(self) -> bytes | None:
        data, ancillary, _, origin = self._socket.recvmsg(65536, 256)
        if origin[2] == _PACKET_OUTGOING:
            return None
        for level, kind, content in ancillary:
            if (level, kind) == (_SOL_PACKET, _PACKET_AUXDATA):
                status, _, _, _, _, tci, protocol = struct.unpack("=IIIHHHH", content[:20])
                if status & _TP_STATUS_VLAN_VALID:
                    return data[:12] + struct.pack("!HH", protocol or 0x8100, tci) + data[12:]
        return data


class Tap:
    """A tap that is kept open: what the switch holds waits in it until it is read."""

    def __init__(self, name: str) -> None:
        self.fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(self.fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI))
        self.ifindex = socket.if_nametoindex(name)

    def close(self) -> None:
        os.close(self.fd)

    def read(self) -> bytes | None:
        try:
            return os.read(self.fd, 65536)
        except BlockingIOError:
            return None

    def write(self, frame: bytes) -> None:
        os.write(self.fd, frame)


class Lab:
    """A namespace, the switch, and devices attached to it. Everything ends with the `with`."""

    def __init__(self, switch: Switch) -> None:
        self.switch = switch
        self._stack = contextlib.ExitStack()
        self._count = 0

    def __enter__(self) -> Lab:
        self.namespace = self._stack.enter_context(namespace())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def attach(self, program: str, ifindex: int, hook: int) -> None:
        """By a tcx link, or where the kernel has none by a filter, which goes with the device."""
        fd = self.switch.programs[program]
        if has_tcx():
            self._stack.callback(os.close, tcx_attach(fd, ifindex, hook))
        else:
            direction = Direction.INGRESS if hook == TCX_INGRESS else Direction.EGRESS
            ClsactAttachments("test").attach(ifindex, direction, fd)

    def veth(self, own_mac: str = "") -> tuple[int, Wire]:
        """A pair: ifindex of the switch's end, and its far end."""
        self._count += 1
        near, far = f"near{self._count}", f"far{self._count}"
        arguments = [
            "link",
            "add",
            near,
            *(["address", own_mac] if own_mac else []),
            "type",
            "veth",
            "peer",
            "name",
            far,
        ]
        _ip(*arguments)
        for name in (near, far):
            _ip("link", "set", name, "up")
        for name in (near, far):
            wait_for(lambda name=name: _is_running(name), f"{name} runs")  # type: ignore[misc]
        wire = Wire(far)
        self._stack.callback(wire.close)
        return socket.if_nametoindex(near), wire

    def tap(self, slot: int, role: int, program: str = "from_hold", queue: int = 16384) -> Tap:
        """A tap with the switch at its ingress, as the agent makes it for frames that wait."""
        self._count += 1
        name = f"tap{self._count}"
        tap = Tap(name)
        self._stack.callback(tap.close)
        _ip("link", "set", name, "txqueuelen", str(queue), "up")
        self.attach(program, tap.ifindex, TCX_INGRESS)
        self.switch.put("devices", tap.ifindex, MODEL.device(slot=slot, role=role))
        return tap

    def port(self, slot: int, own_mac: str, **fields: int) -> Wire:
        """An active, open port without policy on network 1. Fields of struct port, and `state`, `flags`, `epoch`."""
        ifindex, wire = self.veth()
        self.attach("from_port", ifindex, TCX_INGRESS)
        self.attach("to_port", ifindex, TCX_EGRESS)
        self.switch.put("devices", ifindex, MODEL.device(slot=slot, role=MODEL.DEVICE_PORT))
        self.set_port(slot, own_mac, ifindex=ifindex, **fields)
        return wire

    def set_port(self, slot: int, own_mac: str, **fields: int) -> None:
        state = fields.pop("state", MODEL.PORT_ACTIVE)
        flags = fields.pop("flags", MODEL.PORT_F_STATELESS)
        epoch = fields.pop("epoch", 1)
        fields = {"network": 1, "gate": MODEL.GATE_LOCAL, "learned_max": 16} | fields
        word = epoch << 32 | flags << 8 | state
        port = MODEL.port(word=word, slot=slot, mac=(ctypes.c_uint8 * 6)(*mac_bytes(own_mac)), **fields)
        self.switch.put("ports", slot, port)

    def change_port(self, slot: int, **fields: int) -> None:
        port = self.switch.get("ports", "port", slot)
        for name, value in fields.items():
            setattr(port, name, value)
        self.switch.put("ports", slot, port)

    def uplink(self, own_mac: str) -> tuple[int, Wire]:
        """A physical interface: its ifindex, and the network behind it."""
        ifindex, wire = self.veth(own_mac)
        self.attach("from_uplink", ifindex, TCX_INGRESS)
        return ifindex, wire

    def vlan(self, uplink: int, vid: int, network: int) -> None:
        self.switch.put("uplinks", MODEL.uplink_key(ifindex=uplink, vid=vid), network)

    def tunnel(self) -> Wire:
        """The vxlan device over an underlay of its own, this host at UNDERLAY. Returns the underlay's wire."""
        ifindex, wire = self.veth(mac(UNDERLAY_MAC))
        near = self._underlay = socket.if_indextoname(ifindex)
        Path(f"/proc/sys/net/ipv6/conf/{near}/disable_ipv6").write_text("0")
        Path(f"/proc/sys/net/ipv6/conf/{near}/accept_dad").write_text("0")
        for own, far in (UNDERLAY, UNDERLAY6):
            _ip("addr", "add", f"{own}/64" if ":" in own else f"{own}/24", "dev", near)
            self.neighbour(far)
        _ip("link", "add", "vx", "type", "vxlan", "external", "gbp", "dstport", "4789", "udp6zerocsumrx")
        _ip("link", "set", "vx", "up")
        tunnel = socket.if_nametoindex("vx")
        self.attach("from_tunnel", tunnel, TCX_INGRESS)
        self.switch.put("settings", 0, MODEL.settings(tunnel=tunnel, mtu=1500))
        return wire

    def underlay_index(self) -> int:
        """The device under the tunnel."""
        return socket.if_nametoindex(self._underlay)

    def neighbour(self, far: str) -> None:
        """Another host on the underlay; its frames leave by the same wire."""
        _ip("neigh", "replace", far, "lladdr", mac(UNDERLAY_MAC + 1), "dev", self._underlay)

    def host(self, number: int, text: str) -> None:
        self.switch.put("hosts", number, address(text))
        self.switch.put("host_index", address(text), number)

    def ports_memory(self) -> mmap.mmap:
        """The map `ports` as memory, as the agent has it."""
        ports = self.switch.maps["ports"]
        memory = mmap.mmap(ports.fd, ports.max_entries * ports.value_size)
        self._stack.callback(memory.close)
        return memory

    def network(self, number: int, members: list[tuple[int, int, int]] | None = None, **fields: int) -> None:
        """A network; members of its flood list as (kind, target, vlan)."""
        self.switch.put("networks", number, MODEL.network(**({"kind": MODEL.NETWORK_LOCAL} | fields)))
        flood = self.switch.inner("floods", number, "flood_list")
        for index, (kind, target, vlan) in enumerate(members or []):
            flood.update(struct.pack("=I", index), bytes(MODEL.member(kind=kind, target=target, vlan=vlan)))

    def place(self, where: str, kind: int, target: int, *, network: int = 1, flags: int = 0, vlan: int = 0) -> None:
        entry = MODEL.l2_entry(kind=kind, flags=flags, target=target, vlan=vlan)
        self.switch.put("l2", self._l2_key(where, network), entry)

    def placed(self, where: str, network: int = 1) -> tuple[int, int] | None:
        """(kind, target) of the L2 entry."""
        value = self.switch.maps["l2"].lookup(self._l2_key(where, network))
        entry = None if value is None else MODEL.l2_entry.from_buffer_copy(value)
        return None if entry is None else (entry.kind, entry.target)

    def change_place(self, where: str, network: int = 1, **fields: int) -> ctypes.Structure:
        """The L2 entry, after some of its fields were set."""
        key = self._l2_key(where, network)
        entry = MODEL.l2_entry.from_buffer_copy(self.switch.maps["l2"].lookup(key) or b"")
        for name, value in fields.items():
            setattr(entry, name, value)
        if fields:
            self.switch.put("l2", key, entry)
        return entry

    def drops(self, slot: int) -> dict[int, int]:
        """Drop reason -> frames, of the reasons that occurred."""
        total: dict[int, int] = {}
        for count in self.counters(slot):
            for reason, frames in enumerate(count.drops):
                if frames:
                    total[reason] = total.get(reason, 0) + frames
        return total

    def counted(self, slot: int, name: str, index: int | None = None) -> int:
        values = [getattr(count, name) for count in self.counters(slot)]
        return sum(value if index is None else value[index] for value in values)

    def counters(self, slot: int) -> list[ctypes.Structure]:
        raw = self.switch.maps["counters"].lookup(struct.pack("=I", slot))
        assert raw is not None
        size = ctypes.sizeof(MODEL.counters)
        return [MODEL.counters.from_buffer_copy(raw, offset) for offset in range(0, len(raw), size)]

    @staticmethod
    def _l2_key(where: str, network: int) -> bytes:
        return struct.pack("=I6sH", network, mac_bytes(where), 0)

    def ring(self) -> Ring:
        events = self.switch.maps["events"]
        ring = Ring(events.fd, events.max_entries)
        self._stack.callback(ring.close)
        return ring
