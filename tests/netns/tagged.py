# SPDX-License-Identifier: GPL-2.0-only
"""A guest that talks in a second network by the same NIC, with a tag; and what frames with and without one are."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from pathlib import Path

from datapath.build import compile_object
from datapath.drivers.ebpf import libbpf
from datapath.drivers.ebpf.attach import ClsactAttachments, Direction
from migrator.lab import netns
from migrator.lab.cluster import Cluster, port_messages
from migrator.lab.machines import GUEST_DEVICE, Machine

TAG = 20
NEAR, FAR = "tagged0", "tagged1"  # the guest's interface with the tag, and its other end
_SOURCE = Path(__file__).parent / "tags.bpf.c"


def tag_of(frame: bytes) -> int:
    """VLAN id of a frame, 0 without a tag."""
    return int.from_bytes(frame[14:16], "big") & 0xFFF if frame[12:14] == b"\x81\x00" else 0


def trunked(cluster: Cluster, vm: Machine, peer: Machine, address: str) -> Machine:
    """Give a VM an address in a peer's network; the VM as who talks to it there sees it."""
    port = dataclasses.replace(vm.ports[0], network=peer.ports[0].network, addresses=(address,))
    (message,) = port_messages(vm)
    trunk = {"trunk": {TAG: port.network}, "addresses": [*message["addresses"], address]}
    cluster.apply(ports=[{**message, **trunk}])
    guest, other = (cluster.name(one.name) for one in (vm, peer))
    _interface(guest, port.mac, port.mtu)
    netns.ip_batch(guest, [f"addr add {address}/32 dev {NEAR}", f"route add {peer.address} dev {NEAR} src {address}"])
    netns.ip_batch(other, [f"route add {address} dev {GUEST_DEVICE}"])
    return dataclasses.replace(vm, ports=[port])


def _interface(guest: str, mac: str, mtu: int) -> None:
    """A veth pair: what goes in at the near end is on the NIC's wire with the tag, and the other way round."""
    lines = [f"link add {NEAR} address {mac} mtu {mtu} type veth peer name {FAR} mtu {mtu}"]
    netns.ip_batch(guest, [*lines, f"link set {FAR} up", f"link set {NEAR} up"])
    place = netns.path(guest)
    links = {link["ifname"]: link["ifindex"] for link in json.loads(netns.ip("-j", "link", namespace=guest))}
    for device, to, flags in ((FAR, GUEST_DEVICE, ["-DPUSH"]), (GUEST_DEVICE, FAR, [])):
        with tempfile.TemporaryDirectory(prefix="tagged-") as directory:
            program = compile_object(_SOURCE, Path(directory, "tags.o"), f"-DTAG={TAG}", f"-DTO={links[to]}", *flags)
            with contextlib.closing(libbpf.Object(program, Path(directory))) as loaded, netns.entered(place):
                loaded.load()
                ClsactAttachments("tags").attach(links[device], Direction.INGRESS, loaded.programs()["tags"])
