# SPDX-License-Identifier: GPL-2.0-only
"""One NIC of a VM: a tap in the guest's namespace, one on the host where it runs, and one where it is moving to."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from migrator.lab import netns, tap

QUEUE = 16384  # frames that wait in a tap while the guest stands still, or this process has no CPU
BATCH = 64


@dataclass
class Nic:
    """`devices` names the tap on each host; `guest_device` the one inside."""

    mac: str
    guest_device: str
    devices: dict[str, str]
    mtu: int = 1500
    guest: int = -1  # descriptor
    host: dict[str, int] = field(default_factory=dict)  # host -> descriptor
    kept: list[bytes] = field(default_factory=list)  # read after the stop, as QEMU keeps it in its own queue
    lost_at_stop: bool = False  # the stop has cost its frame
    to_guest: int = 0
    from_guest: int = 0
    swallowed: int = 0
    refused: int = 0  # frames that a device would not take

    def plug(self, namespace: Path) -> None:
        """Make the guest's end."""
        self.guest = tap.open_tap(namespace, self.guest_device)
        netns.ip_batch(
            namespace.name,
            [
                f"link set {self.guest_device} address {self.mac} txqueuelen {QUEUE} mtu {self.mtu}",
                f"link set {self.guest_device} up",
            ],
        )

    def appear(self, host: str, namespace: Path) -> None:
        """Make the host's end."""
        device = self.devices[host]
        self.host[host] = tap.open_tap(namespace, device)
        tap.quiet(namespace, device)
        netns.ip_batch(namespace.name, [f"link set {device} txqueuelen {QUEUE} mtu {self.mtu} up"])

    def vanish(self, host: str) -> None:
        """Close the host's end; the device goes with its last descriptor."""
        handle = self.host.pop(host, -1)
        if handle >= 0:
            os.close(handle)

    def copy_in(self, host: str, buffer: bytearray) -> None:
        """Frames from the host to the guest, at most BATCH."""
        self.to_guest += self._copy(self.host[host], self.guest, buffer)

    def copy_out(self, host: str, buffer: bytearray) -> None:
        """Frames from the guest to the host, at most BATCH."""
        self.from_guest += self._copy(self.guest, self.host[host], buffer)

    def swallow(self, host: str) -> bool:
        """Do to one frame what QEMU does after a stop: the first is lost, the second kept. True when one was there."""
        try:
            frame = os.read(self.host[host], tap.FRAME_MAX)
        except BlockingIOError:
            return False
        if self.lost_at_stop:
            self.kept.append(frame)
        else:
            self.swallowed += 1
            self.lost_at_stop = True
        return True

    def give_kept(self, *, here: bool) -> None:
        """The guest runs again: what was kept in the NIC's own queue reaches it, or is gone with the source."""
        if here:
            for frame in self.kept:
                self._write(self.guest, frame)
            self.to_guest += len(self.kept)
        else:
            self.swallowed += len(self.kept)
        self.kept.clear()
        self.lost_at_stop = False

    def send(self, host: str, frame: bytes) -> None:
        """A frame of the hypervisor's own, without vnet header, to the host."""
        self._write(self.host[host], bytes(tap.VNET_HEADER) + frame)

    def _copy(self, source: int, target: int, buffer: bytearray) -> int:
        view = memoryview(buffer)
        for done in range(BATCH):
            try:
                size = os.readv(source, [buffer])
            except BlockingIOError:
                return done
            self._write(target, view[:size])
        return BATCH

    def _write(self, target: int, frame: bytes | memoryview) -> None:
        try:
            os.write(target, frame)
        except OSError:
            self.refused += 1
