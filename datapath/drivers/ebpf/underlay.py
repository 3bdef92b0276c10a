"""The network between hosts: this host's address in it, what it carries, and the tunnel device."""

from __future__ import annotations

import ipaddress

from pyroute2 import IPRoute

from datapath.drivers.ebpf import devices
from datapath.drivers.ebpf.attach import Attachments, Direction
from datapath.drivers.ebpf.kernel import Kernel
from datapath.drivers.ebpf.layout import C
from datapath.drivers.ebpf.options import Options
from datapath.errors import UnsupportedKind

OVERHEAD_V4 = 50  # outer IPv4, UDP, VXLAN, inner Ethernet
OVERHEAD_V6 = 70


class Underlay:
    """Without an underlay address nothing is made, and the switch has neither overlays nor redirects."""

    def __init__(self, kernel: Kernel, attachments: Attachments, options: Options) -> None:
        self._kernel, self._attachments, self._options = kernel, attachments, options
        self.address = str(ipaddress.ip_address(options.underlay)) if options.underlay else ""
        self._ifindex = 0

    def start(self) -> None:
        """Make the tunnel device, or take it over. Raises FeatureMissing (no vxlan in this kernel), KernelError."""
        if not self.address:
            return
        link = devices.make_tunnel(self._options.tunnel, self._options.tunnel_port)
        self._ifindex = link.ifindex
        self._kernel.devices.set(link.ifindex, (0, C.DEVICE_TUNNEL))
        self._attachments.attach(link.ifindex, Direction.INGRESS, self._kernel.switch.program("from_tunnel"))
        self._kernel.set_settings(tunnel=link.ifindex)

    def room(self) -> int:
        """Bytes of a VM's packet that fit into one of the underlay. Raises UnsupportedKind: no underlay, or not yet."""
        if not self.address:
            raise UnsupportedKind("this host has no underlay", hint="set `underlay` in the driver's options")
        mtu = self._options.underlay_mtu or self._mtu()
        self._kernel.set_settings(mtu=mtu)
        return mtu - (OVERHEAD_V6 if ipaddress.ip_address(self.address).version == 6 else OVERHEAD_V4)

    def destroy(self) -> None:
        if self._ifindex:
            self._attachments.detach(self._ifindex, Direction.INGRESS)
            devices.remove(self._options.tunnel)

    def _mtu(self) -> int:
        """MTU of the interface that has the address."""
        with IPRoute() as route:
            for found in route.get_addr():
                if found.get_attr("IFA_ADDRESS") == self.address or found.get_attr("IFA_LOCAL") == self.address:
                    return int(route.get_links(found["index"])[0].get_attr("IFLA_MTU"))
        raise UnsupportedKind(
            f"no interface has the underlay address {self.address}", hint="correct `underlay` in the driver's options"
        )
