"""Physical interfaces that networks go out by. They stay ordinary interfaces with the host's own addresses."""

from __future__ import annotations

import errno
from collections.abc import Sequence

from pyroute2 import IPRoute

from datapath.drivers.ebpf import devices
from datapath.drivers.ebpf.attach import Attachments, Direction
from datapath.drivers.ebpf.kernel import Kernel
from datapath.drivers.ebpf.layout import C
from datapath.drivers.ebpf.records import mac_bytes
from datapath.errors import UnsupportedKind


class Uplinks:
    """`names`: those that the configuration lets the switch use."""

    def __init__(self, kernel: Kernel, attachments: Attachments, names: Sequence[str]) -> None:
        self._kernel, self._attachments, self.names = kernel, attachments, tuple(names)
        self._attached: dict[str, int] = {}

    def first(self) -> str:
        """The one that a network takes which names none; "" when there is none."""
        return self.names[0] if self.names else ""

    def check(self, name: str) -> None:
        """Raises UnsupportedKind when the interface is not there or not to be used."""
        if name not in self.names:
            raise UnsupportedKind(
                f"{name or 'no interface'} is none of the uplinks {', '.join(self.names) or '(none)'}",
                hint="add it to `uplinks` of the driver's options",
            )
        if devices.link(name) is None:
            raise UnsupportedKind(f"there is no interface {name} on this host", hint="correct the network's uplink")

    def attach(self, name: str) -> int:
        """Take the interface's frames, also those for other MACs. Returns its ifindex, 0 while it is not there."""
        link = devices.link(name)
        if link is None:
            return 0
        self._kernel.devices.set(link.ifindex, (0, C.DEVICE_UPLINK))
        self._attachments.attach(link.ifindex, Direction.INGRESS, self._kernel.switch.program("from_uplink"))
        if self._attached.get(name) != link.ifindex:
            with IPRoute() as route, devices.kernel_errors(f"make {name} promiscuous"):
                route.link("set", index=link.ifindex, flags=_PROMISC, change=_PROMISC)
            self._attached[name] = link.ifindex
        return link.ifindex

    def ifindex(self, name: str) -> int:
        """Index that programs know the interface by, 0 if none."""
        return self._attached.get(name, 0)

    def mac(self, name: str) -> bytes:
        link = devices.link(name)
        return mac_bytes(link.mac) if link is not None and link.mac else bytes(6)

    def detach(self) -> None:
        """Give the interfaces back as they were."""
        for name, ifindex in self._attached.items():
            self._attachments.detach(ifindex, Direction.INGRESS)
            self._kernel.devices.delete(ifindex)
            with IPRoute() as route, devices.kernel_errors(f"end promiscuity of {name}", errno.ENODEV):
                route.link("set", index=ifindex, flags=0, change=_PROMISC)
        self._attached.clear()


_PROMISC = 0x100  # IFF_PROMISC, linux/if.h
