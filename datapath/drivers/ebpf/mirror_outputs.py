"""Where the copies of a mirror go on this host: a record's output as fields of struct mirror, and why it cannot be."""

from __future__ import annotations

import ipaddress
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from pyroute2 import IPRoute, NetlinkError

from datapath.drivers.ebpf import devices
from datapath.drivers.ebpf.copy_names import copy_key
from datapath.drivers.ebpf.devices import Link
from datapath.drivers.ebpf.layout import C
from datapath.drivers.ebpf.records import address_bytes
from datapath.provider import Network, NetworkKind, Place
from datapath.state.kind import Record
from datapath.state.mirror import output_text

if TYPE_CHECKING:
    from datapath.drivers.ebpf.running import Running

NOWHERE = bytes(16)
Links = Mapping[str, Link]
"""By name."""


@dataclass(frozen=True)
class Output:
    """Fields of struct mirror."""

    output: int
    target: int = 0
    vid: int = 0
    id: int = 0
    mark: int = 0
    remote: bytes = NOWHERE


class Outputs:
    """Every method may be called from any thread."""

    def __init__(self, parts: Running) -> None:
        self._parts = parts
        self._places: dict[str, dict[str, Place]] = {}  # MAC -> network -> place
        self._lock = threading.Lock()

    # ---- word of the coordinator ----

    def placed(self, place: Place) -> None:
        with self._lock:
            self._places.setdefault(place.mac, {})[place.network] = place

    def forget(self, network: str, mac: str) -> None:
        with self._lock:
            self._places.get(mac, {}).pop(network, None)
            if not self._places.get(mac):
                self._places.pop(mac, None)

    def host_of(self, vm: str, mac: str) -> str:
        """The host that has another VM's port, "" when nobody has said."""
        with self._lock:
            named = [place for place in self._places.get(mac, {}).values() if place.vm in ("", vm)]
        return next((place.host for place in named if place.host), "")

    # ---- outputs ----

    def find(self, record: Record, links: Links | None = None) -> Output:
        """What is not there has target 0, or remote NOWHERE: its copies are counted as dropped until it is.

        `links`: devices of the host, for whoever asks for many mirrors.
        """
        if record["output"] == "device":
            link = self._device(record["device"], links)
            return Output(C.MIRROR_DEVICE, target=link.ifindex if link else 0)
        if record["output"] == "port":
            number, mark = copy_key(record["vm"], record["mac"])
            return Output(C.MIRROR_PORT, id=number, mark=mark, remote=self._remote(record))
        if record["output"] == "network":
            network = self._network(record["network"])
            target = self._parts.networks.uplink_ifindex(network) if network else 0
            return Output(C.MIRROR_VLAN, target=target, vid=network.vlan if network else 0)
        return Output(C.MIRROR_TUNNEL, id=record["vni"], remote=address_bytes(record["address"]))

    def _device(self, pattern: str, links: Links | None = None) -> Link | None:
        """The first by name that is not the switch's own: to these copies would be frames of a network."""
        there = devices.links() if links is None else links
        return next((there[n] for n in sorted(there) if fnmatchcase(n, pattern) and not self._is_own(there[n])), None)

    def _is_own(self, link: Link) -> bool:
        options = self._parts.options
        if link.name in (*options.uplinks, options.tunnel) or link.name.startswith(options.tap_prefix):
            return True
        return link.ifindex in self._parts.kernel.devices or self._parts.instances.on(link.name) is not None

    def _remote(self, record: Record) -> bytes:
        host = self.host_of(record["vm"], record["mac"])
        known = self._parts.hosts.names().get(host)
        if known is None or known[1] == self._parts.underlay.address:
            return NOWHERE
        return address_bytes(known[1])

    def _network(self, name: str) -> Network | None:
        found = next((one for one in self._parts.networks.all() if one.name == name), None)
        return found if found is not None and found.kind is NetworkKind.UPLINK else None

    # ---- what cannot be ----

    def obstacle(self, record: Record) -> str:
        """Why copies of this mirror cannot go there from this host; "" when they can."""
        why = getattr(self, f"_without_{record['output']}")(record)
        return f"mirror {record['name']}, output {output_text(record)}: {why}" if why else ""

    def _without_accept(self, record: Record) -> str:  # noqa: ARG002
        return ""

    def _without_device(self, record: Record) -> str:
        if self._device(record["device"]) is not None:
            return ""
        named = any(fnmatchcase(name, record["device"]) for name in devices.links())
        return "the device is the switch's own" if named else "this host has no such device"

    def _without_port(self, record: Record) -> str:
        vm, mac = record["vm"], record["mac"]
        here = any((one.ref.vm, one.ref.mac) == (vm, mac) for one in self._parts.instances)
        return "" if here or self.host_of(vm, mac) else "no host is known to have it"

    def _without_network(self, record: Record) -> str:
        if self._network(record["network"]) is not None:
            return ""
        return "this host has no uplink network of that name"

    def _without_remote(self, record: Record) -> str:
        if not self._parts.underlay.address:
            return "this host has no underlay"
        taken = next((one for one in self._parts.networks.all() if one.vni == record["vni"]), None)
        if taken is not None:
            return f"that VNI is network {taken.name}"
        try:
            with IPRoute() as route:
                route.route("get", dst=str(ipaddress.ip_address(record["address"])))
        except NetlinkError as error:
            return f"no route to it ({error.args[-1]})"
        except ValueError:
            return "it is no address"
        return ""
