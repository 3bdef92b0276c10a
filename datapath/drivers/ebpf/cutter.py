"""The cutter: a device at whose egress copies of mirrors are cut (datapath/bpf/to_cutter.bpf.c). Nothing leaves by it.

A tap that nobody has open and that is never up: frames meet its egress program all the same, and no other.
"""

from __future__ import annotations

import errno
import os

from datapath.drivers.ebpf import devices, tun
from datapath.drivers.ebpf.attach import Attachments, Direction
from datapath.drivers.ebpf.kernel import Kernel
from datapath.drivers.ebpf.layout import C
from datapath.errors import KernelError


class Cutter:
    """There while a mirror needs it. It outlives the agent, as the programs that send to it do."""

    def __init__(self, kernel: Kernel, attachments: Attachments, name: str) -> None:
        self._kernel, self._attachments, self.name = kernel, attachments, name

    def make(self) -> None:
        """Make it, or take it over. Raises FeatureMissing (no tun), KernelError."""
        there = devices.link(self.name)
        if there is not None and self._kernel.mirror_cutter.get(0) == there.ifindex:
            return
        if there is None:
            os.close(tun.open_tap(self.name, persist=True))
            devices.quiet(self.name)
        made = devices.link(self.name)
        if made is None:
            raise KernelError(f"device {self.name} is gone again", errno.ENODEV)
        self._kernel.devices.set(made.ifindex, (0, C.DEVICE_CUTTER))
        self._attachments.attach(made.ifindex, Direction.EGRESS, self._kernel.switch.program("to_cutter"))
        self._kernel.mirror_cutter.set(0, made.ifindex)

    def remove(self) -> None:
        """Not there is no error."""
        if self._kernel.mirror_cutter.get(0):
            self._kernel.mirror_cutter.set(0, 0)
            self.tidy()

    def tidy(self) -> None:
        """Delete one that is not in use: an agent died while it made or removed it."""
        there = None if self._kernel.mirror_cutter.get(0) else devices.link(self.name)
        if there is not None:
            self._attachments.detach(there.ifindex, Direction.EGRESS)
            self._kernel.devices.delete(there.ifindex)
            devices.remove(self.name)
