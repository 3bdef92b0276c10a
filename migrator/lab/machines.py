# SPDX-License-Identifier: GPL-2.0-only
"""VMs and peers of a lab: a guest's namespace behind a vNIC process, or a namespace behind a plain wire."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from migrator.lab import netns
from migrator.lab.errors import LabError
from migrator.lab.processes import PATIENT_S, Worker, wait_until
from migrator.lab.topology import Lab

GUEST_DEVICE = "eth0"
UNRESOLVED_BYTES = 32 << 20


@dataclass
class Port:
    """One NIC: what the coordinator is told of it."""

    mac: str
    network: str
    addresses: tuple[str, ...]
    device: str = ""  # where it has the same name everywhere
    devices: Mapping[str, str] = field(default_factory=dict)  # host -> device
    mtu: int = 1500
    silent: tuple[str, ...] = ()  # addresses it may use but its kernel does not have: nothing answers by itself


@dataclass(eq=False)
class Machine:
    """What has ports, addresses and sockets: a VM, or a peer that never moves."""

    lab: Lab
    name: str
    host: str  # where it began
    ports: list[Port]
    policy: str = ""
    timeouts_ms: Mapping[str, int] = field(default_factory=dict)
    connections_max: int = 0
    uuid: str = field(default_factory=lambda: str(uuid.uuid4()))
    vnic: Worker | None = None

    @property
    def address(self) -> str:
        """Its first IPv4 address."""
        return next(a for a in self.ports[0].addresses if ":" not in a)

    @property
    def address6(self) -> str:
        """Its first IPv6 address."""
        return next(a for a in self.ports[0].addresses if ":" in a)

    def worker(self, module: str, *, name: str = "") -> Worker:
        """A traffic worker inside."""
        arguments = {"device": GUEST_DEVICE}
        return self.lab.worker(
            self.name, module, arguments, name=name or f"{self.name}-{module}-{len(self.lab.workers)}"
        )

    def order(self, op: str, **arguments: Any) -> dict[str, Any]:
        """Order the vNIC process."""
        assert self.vnic is not None, f"{self.name} has no vNIC"
        return self.vnic.call(op, **arguments)

    def place(self) -> str:
        """Host where the guest runs now, "" while it stands."""
        status = self.order("status")
        return str(status["place"]) if status["running"] else ""

    def wait_for_place(self, host: str, timeout_s: float = PATIENT_S) -> None:
        wait_until(f"{self.name} runs at {host}", lambda: self.place() == host, timeout_s)


def add_peer(lab: Lab, name: str, host: str, port: Port, **fields: Any) -> Machine:
    """A namespace behind a wire to a host: its far end is a port like any other."""
    lab.namespace(name)
    port.device = port.device or f"p-{name}"[:15]
    lab.wire(host, port.device, name, GUEST_DEVICE)
    netns.ip_batch(lab.name(host), [f"link set {port.device} mtu {port.mtu} up"])
    netns.ip_batch(lab.name(name), [f"link set {GUEST_DEVICE} address {port.mac} mtu {port.mtu} up"])
    _configure(lab, name, [port])
    return Machine(lab, name, host, [port], **fields)


def add_outsider(lab: Lab, name: str, port: Port) -> Machine:
    """A namespace on the fabric itself, untagged: a machine that no switch of ours knows."""
    lab.namespace(name)
    lab.wire("fabric", name, name, GUEST_DEVICE)
    netns.ip_batch(lab.name("fabric"), [f"link set {name} master br0 mtu {port.mtu} up"])
    netns.ip_batch(lab.name(name), [f"link set {GUEST_DEVICE} address {port.mac} mtu {port.mtu} up"])
    _configure(lab, name, [port])
    return Machine(lab, name, "", [port])


def add_vm(
    lab: Lab, name: str, host: str, ports: Sequence[Port], *, behaviour: Mapping[str, Any] | None = None, **fields: Any
) -> Machine:
    """A guest's namespace and the vNIC process that joins it to the hosts. It runs at once."""
    lab.namespace(name)
    netns.set_sysctl(lab.name(name), "net/ipv6/conf/default/accept_dad", 0)
    for number, port in enumerate(ports):
        port.devices = port.devices or {h: f"{name}.{number}{h}"[:15] for h in lab.host_names}
    machine = Machine(lab, name, host, list(ports), **fields)
    setup = {
        "vm": machine.uuid,
        "guest": str(lab.path(name)),
        "at": host,
        "behaviour": dict(behaviour or {}),
        "nics": [
            {"mac": p.mac, "guest_device": f"eth{n}", "devices": p.devices, "mtu": p.mtu} for n, p in enumerate(ports)
        ],
        "hosts": {h: {"netns": str(lab.path(h)), "guests": str(lab.directory / h / "guests")} for h in lab.host_names},
    }
    machine.vnic = Worker(
        f"{name}-vnic", lab.name("control"), "migrator.lab.vnic", setup, lab.directory / f"{name}-vnic.log"
    )
    lab.adopt(machine.vnic)
    _configure(lab, name, ports)
    return machine


def unplug(lab: Lab, machine: Machine) -> None:
    """Take a peer's wires off its host."""
    for port in machine.ports:
        with contextlib.suppress(LabError):  # gone with its namespace
            netns.ip("link", "del", port.device, namespace=lab.name(machine.host))


def _configure(lab: Lab, name: str, ports: Sequence[Port]) -> None:
    """Give the guest its addresses. While a neighbour's MAC is asked for no datagram is dropped for want of room."""
    for number in range(len(ports)):
        for family in ("ipv4", "ipv6"):
            netns.set_sysctl(lab.name(name), f"net/{family}/neigh/eth{number}/unres_qlen_bytes", UNRESOLVED_BYTES)
    netns.ip_batch(
        lab.name(name),
        [
            f"addr add {address}/{64 if ':' in address else 16} dev eth{number}{' nodad' if ':' in address else ''}"
            for number, port in enumerate(ports)
            for address in port.addresses
        ],
    )
