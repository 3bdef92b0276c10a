# SPDX-License-Identifier: GPL-2.0-only
"""Hold taps, guests' taps and devices, with real frames in a namespace of the test's own."""

from __future__ import annotations

import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyroute2 import IPRoute

from datapath.drivers.ebpf import devices, taps, tun
from datapath.drivers.ebpf.devices import Link, Watch
from datapath.drivers.ebpf.driver import EbpfDriver
from datapath.drivers.ebpf.holds import TAP_LENGTH, HoldTap, Pump
from datapath.drivers.ebpf.keeper import Keeper
from datapath.drivers.ebpf.taps import GuestTap
from datapath.errors import FeatureMissing, KernelError
from datapath.provider import PortRef
from migrator.lab.processes import PATIENT_S

from .private import ETH_P_ALL, private_namespace, raw_socket, veth, wait_until

LOCAL = 0x88B5  # EtherType for experiments (IEEE 802)
HELD = 16_000
SO_RCVBUFFORCE = 33
HOLDER = """
import os, sys
from datapath.drivers.ebpf import tun
fd = tun.open_tap(sys.argv[1])
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def namespace() -> Iterator[int]:
    with private_namespace() as entered:
        yield entered


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[Keeper]:
    made = Keeper(tmp_path / "keeper")
    yield made
    made.end()
    wait_until(lambda: not (tmp_path / "keeper").exists(), "the keeper has ended")


def frame(number: int, size: int = 60) -> bytes:
    return struct.pack("!6s6sHI", b"\xff" * 6, b"\x02" + bytes(5), LOCAL, number).ljust(size, b"\x5a")


def gso_frame(size: int = 9000) -> bytes:
    """A TCP segment of 9,000 bytes to be cut into 1,448: vnet header and frame."""
    tcp = struct.pack("!HHIIBBHHH", 1000, 2000, 7, 9, 5 << 4, 0x18, 512, 0, 0)
    ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 40 + size, 1, 0, 64, 6, 0, bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2]))
    ethernet = b"\xff" * 6 + b"\x02" + bytes(5) + b"\x08\x00"
    return (
        struct.pack("=BBHHHH", 1, 1, 54, 1448, 34, 16)
        + ethernet
        + ip
        + tcp
        + bytes(index % 251 for index in range(size))
    )


def put(hold: HoldTap, frames: list[bytes]) -> None:
    """Frames with vnet header into the tap's queue."""
    assert tun.inject(hold.ifindex, frames) == len(frames)


def headed(frames: list[bytes]) -> list[bytes]:
    return [bytes(tun.VNET_HEADER) + one for one in frames]


@pytest.mark.alone
def test_a_hold_tap_keeps_sixteen_thousand_frames_unchanged() -> None:
    hold = HoldTap("hold0")
    frames = [frame(number, 60 + number % 1400) for number in range(HELD)]
    put(hold, headed(frames))
    with raw_socket(hold.ifindex, ETH_P_ALL) as watcher:
        watcher.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 28)
        left = iter(range(HELD - 1, -2, -1))
        count = HELD

        def remaining() -> int:
            nonlocal count
            now, count = count, next(left)
            return now

        began = time.monotonic()
        assert hold.pump(remaining) == Pump(HELD, 0, 0)
        took = time.monotonic() - began
        seen = [watcher.recv(2000) for _ in range(HELD)]
    assert seen == frames
    assert took < 2.0
    hold.destroy()
    assert "hold0" not in devices.links()


def test_a_queue_that_is_full_says_so() -> None:
    hold = HoldTap("hold0")
    taken = tun.inject(hold.ifindex, headed([frame(number) for number in range(TAP_LENGTH + 10)]))
    assert HELD <= taken <= TAP_LENGTH
    assert len(hold.drain()) == taken
    hold.destroy()


def test_segmentation_waits_with_the_frame() -> None:
    hold = HoldTap("hold0")
    put(hold, [gso_frame()])
    assert hold.drain() == [gso_frame()]
    hold.destroy()


def test_the_kernel_says_nothing_through_a_hold_tap() -> None:
    hold = HoldTap("hold0")
    with IPRoute() as route:
        route.link("set", ifname="hold0", state="down")
        route.link("set", ifname="hold0", state="up")
    assert not Path("/proc/thread-self/net/if_inet6").read_text().count("hold0")
    assert hold.drain() == []
    hold.destroy()


def test_held_frames_outlive_the_agent(keeper: Keeper) -> None:
    first = HoldTap("hold0", keeper)
    put(first, headed([frame(1), frame(2)]))
    first.close()
    second = HoldTap("hold0", keeper)
    assert second.ifindex == first.ifindex
    assert second.drain() == headed([frame(1), frame(2)])
    assert keeper.kept() == ["hold0"]
    second.destroy()
    assert keeper.kept() == []
    assert "hold0" not in devices.links()


LEAVES = """
import sys
from pathlib import Path
from datapath.drivers.ebpf import taps
from datapath.drivers.ebpf.holds import HoldTap
from datapath.drivers.ebpf.keeper import Keeper
tap = HoldTap("hold1", Keeper(Path(sys.argv[1]), patience_s=1.5))
assert taps.holders("hold1"), "the keeper has it"
"""


def test_a_keeper_ends_when_the_agent_does_not_come_back(tmp_path: Path) -> None:
    path = tmp_path / "keeper"
    subprocess.run([sys.executable, "-c", LEAVES, str(path)], check=True, timeout=30)
    wait_until(lambda: not path.exists(), "the keeper has ended")
    wait_until(lambda: taps.holders("hold1") == [], "nobody has the tap")
    HoldTap("hold1").destroy()


def test_without_a_keeper_the_device_stays_alone() -> None:
    first = HoldTap("hold0")
    put(first, headed([frame(1)]))
    ifindex = first.ifindex
    first.close()
    second = HoldTap("hold0")
    assert second.ifindex == ifindex
    assert second.drain() == []
    with pytest.raises(KernelError, match="EBUSY"):
        HoldTap("hold0")
    second.destroy()
    with pytest.raises(KernelError, match="EINVAL"):
        HoldTap("a-name-of-sixteen")


@pytest.fixture
def guest() -> Iterator[subprocess.Popen[str]]:
    """A process that holds tap `guest0` and reads nothing."""
    command = [sys.executable, "-c", HOLDER, "guest0"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        devices.quiet("guest0")
        with IPRoute() as route:
            route.link("set", ifname="guest0", state="up")
        yield process
        process.kill()


def test_a_guest_s_queue_is_read_by_a_copy(guest: subprocess.Popen[str]) -> None:
    ifindex = socket.if_nametoindex("guest0")
    assert [holder.pid for holder in taps.holders("guest0")] == [guest.pid]
    with GuestTap("guest0") as tap:
        assert tap.queues == 1
        assert not tap.readable()
        assert tun.inject(ifindex, [*headed([frame(1), frame(2)]), gso_frame(1000)]) == 3
        assert tap.readable(1000)
        drained = tap.drain()
        assert drained[:2] == headed([frame(1), frame(2)])
        assert len(drained) >= 3
        assert not tap.readable()


QEMU = """
import fcntl, os, struct, sys
IFF_TAP, IFF_NO_PI, IFF_MULTI_QUEUE, IFF_VNET_HDR = 2, 0x1000, 0x100, 0x4000
TUNSETIFF, TUNSETVNETHDRSZ = 0x400454CA, 0x400454D8
for _ in range(2):
    fd = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", b"guest1", IFF_TAP | IFF_NO_PI | IFF_MULTI_QUEUE | IFF_VNET_HDR))
    fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("i", 12))
print("ready", flush=True)
sys.stdin.read()
"""


def test_several_queues_with_qemu_s_header_are_read_without_blocking() -> None:
    """QEMU's descriptors have a header of 12 bytes and, here, block."""
    command = [sys.executable, "-c", QEMU]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        devices.quiet("guest1")
        with IPRoute() as route:
            route.link("set", ifname="guest1", state="up")
        with GuestTap("guest1") as tap:
            assert tap.queues == 2
            frames = [flow(number) for number in range(64)]
            assert tun.inject(socket.if_nametoindex("guest1"), headed(frames)) == 64
            drained = tap.drain()
            assert sorted(drained) == sorted(headed(frames))
            assert tap.drain() == []
        process.kill()


def flow(number: int) -> bytes:
    """A UDP frame of a flow of its own, so that frames spread over queues."""
    udp = struct.pack("!HHHH", 1000 + number, 2000, 8 + 20, 0) + bytes(20)
    ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 1, 0, 64, 17, 0, bytes(4), bytes(4))
    return b"\xff" * 6 + b"\x02" + bytes(5) + b"\x08\x00" + ip + udp


VHOST = """
import sys
from datapath.drivers.ebpf import tun
vhost, fd = open(sys.argv[2]), tun.open_tap(sys.argv[1])
print("ready", flush=True)
sys.stdin.read()
"""


def test_a_queue_that_vhost_reads_cannot_be_seen_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel thread reads ahead: empty is not taken. A file stands for the device, whose module may be missing."""
    device = tmp_path / "vhost-net"
    device.touch()
    command = [sys.executable, "-c", VHOST, "guest0", str(device)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with GuestTap("guest0") as tap:
            assert not tap.vhost
        monkeypatch.setattr(taps, "VHOST", str(device))
        with GuestTap("guest0") as tap:
            assert tap.vhost
            assert EbpfDriver.idle(Looking(tap), PortRef("vm", "mac", 1)) is None  # type: ignore[arg-type]
            tap.vhost = False
            assert EbpfDriver.idle(Looking(tap), PortRef("vm", "mac", 1)) is True  # type: ignore[arg-type]
        process.kill()


class Looking:
    """As much of a driver as looks into a queue."""

    def __init__(self, tap: GuestTap) -> None:
        self.tap = tap
        self.kinds = self

    def idle(self, _: PortRef) -> bool:
        """No kind of state has a queue of its own in front of the guest's."""
        return True

    def _parts(self) -> Looking:
        return self

    def _find(self, ref: PortRef) -> PortRef:
        return ref

    def _guest_tap(self, _: PortRef) -> GuestTap:
        return self.tap


def test_the_copy_keeps_the_tap_alive_until_closed(guest: subprocess.Popen[str]) -> None:
    with GuestTap("guest0"):
        guest.kill()
        guest.wait(PATIENT_S)
        assert "guest0" in devices.links()
    assert "guest0" not in devices.links()


def test_a_tap_that_nobody_holds_is_named() -> None:
    with pytest.raises(FeatureMissing, match="no process holds tap nobody"):
        GuestTap("nobody")


def test_a_tap_of_another_namespace_is_not_taken(guest: subprocess.Popen[str]) -> None:
    with private_namespace():
        assert [holder.pid for holder in taps.holders("guest0")] == [guest.pid]
        with pytest.raises(FeatureMissing, match="no process holds"):
            GuestTap("guest0")


def test_one_device_by_its_name() -> None:
    """As the list of all has it; other names of a device, and words that no device can have, are not there."""
    veth("a0", "a1")
    with IPRoute() as route:
        route.link("property_add", ifname="a0", altname="other")
    there = devices.links()
    assert [devices.link(name) for name in ("lo", "a0", "a1")] == [there["lo"], there["a0"], there["a1"]]
    assert [devices.link(name) for name in ("other", "a2", "", "a-name-of-17-chars")] == [None] * 4


def test_the_watch_tells_of_every_change() -> None:
    told: list[tuple[str, str, int]] = []

    def added(link: Link) -> None:
        told.append(("added", link.name, link.ifindex))

    def removed(link: Link) -> None:
        told.append(("removed", link.name, link.ifindex))

    watch = Watch(added, removed)
    watch.start()
    assert told == [("added", "lo", 1)]
    near, far = veth("a0", "a1")
    wait_until(lambda: ("added", "a0", near) in told and ("added", "a1", far) in told, "new devices")
    with IPRoute() as route:
        route.link("set", index=near, state="down")
        route.link("set", index=near, ifname="b0")
        wait_until(
            lambda: told[-2:] == [("removed", "a0", near), ("added", "b0", near)] or told[-1][1] == "b0", "rename"
        )
        assert ("removed", "a0", near) in told
        route.link("del", index=near)
    wait_until(lambda: ("removed", "b0", near) in told and ("removed", "a1", far) in told, "removal")
    watch.stop()


def test_a_watch_goes_on_past_an_error(caplog: pytest.LogCaptureFixture) -> None:
    told: list[str] = []

    def added(link: Link) -> None:
        told.append(link.name)
        raise ValueError(link.name)

    watch = Watch(added, lambda _: None)
    watch.start()
    veth("a0", "a1")
    wait_until(lambda: {"lo", "a0", "a1"} <= set(told), "all are told")
    watch.stop()
    assert "a change of device a0 was not handled" in caplog.text


def test_the_tunnel_device_is_made_once_and_taken_again() -> None:
    made = devices.make_tunnel("mgr0")
    assert devices.make_tunnel("mgr0") == made
    assert made.up
    other = devices.make_tunnel("mgr0", port=8472)
    assert other.ifindex != made.ifindex
    with pytest.raises(KernelError, match="no external vxlan"):
        devices.make_tunnel("lo")
    devices.remove("mgr0")
    devices.remove("mgr0")
    assert "mgr0" not in devices.links()


def test_injecting_into_a_device_that_is_gone_is_an_error() -> None:
    with pytest.raises(KernelError):
        tun.inject(4711, headed([frame(1)]))
    assert tun.inject(4711, []) == 0
