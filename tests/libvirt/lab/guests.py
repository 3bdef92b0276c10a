# SPDX-License-Identifier: GPL-2.0-only
"""Guests: real QEMU machines that can be used wherever a `Machine` of a lab can, and moves of them by libvirt."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import libvirt

from migrator.lab.errors import LabError, TooSlow
from migrator.lab.machines import Machine, Port
from migrator.lab.processes import wait_until

from .control import Control, GuestWorker
from .domain import Wiring, console_path, control_path, disk_path, domain_xml
from .image import image
from .labs import AnyLab, host_path

MANAGED = Wiring()
BOOT_S = 120.0
MAX_DOWNTIME_MS = 2000
MAX_PASSES = 3
COMPLETED = libvirt.VIR_DOMAIN_JOB_STATS_COMPLETED | libvirt.VIR_DOMAIN_JOB_STATS_KEEP_COMPLETED
LIVE = libvirt.VIR_MIGRATE_LIVE | libvirt.VIR_MIGRATE_PEER2PEER


class NotWhole(TooSlow):
    """QEMU without KVM spoils memory that it sends too often, as it does when it is slower than the guest writes."""


@dataclass(eq=False)
class GuestMachine(Machine):
    """A QEMU guest. `worker` orders guestd inside it; `xml` is what it was started with."""

    hosts: AnyLab = field(kw_only=True)
    xml: str = field(default="", kw_only=True)
    control: Control = field(init=False)

    def __post_init__(self) -> None:
        self.control = Control(self.name, self._control_socket)

    def worker(self, module: str, *, name: str = "") -> Any:
        """As of any machine, for the modules tcp and probe. All are one guestd: their counts are common."""
        return GuestWorker(self.control, module, name or f"{self.name}-{module}")

    def place(self) -> str:
        return next((name for name, host in self.hosts.hosts.items() if host.runs(self.uuid)), "")

    def domain(self) -> libvirt.virDomain:
        """Where it runs. Raises LabError."""
        place = self.place()
        found = self.hosts.hosts[place].domain(self.uuid) if place else None
        if found is None:
            raise LabError(f"{self.name} runs nowhere")
        return found

    def booted(self, timeout_s: float = BOOT_S) -> None:
        """Wait until guestd answers."""
        try:
            self.control.call("ping", timeout_s=timeout_s)
        except LabError as error:
            raise LabError(f"{self.name} does not come up: {error}; console: {self.console()[-2000:]}") from None

    def reset(self) -> None:
        """Close all that guestd has open and forget its counts."""
        self.control.call("reset")

    def console(self) -> str:
        """What the guest wrote to its console, on all hosts."""
        files = [host_path(self.hosts, host, console_path(self.name)) for host in self.hosts.hosts]
        return "".join(file.read_text(errors="replace") for file in files if file.exists())

    def disk(self, host: str) -> Path:
        """The file of its disk, from outside."""
        return host_path(self.hosts, host, disk_path(self.name))

    def destroy(self) -> None:
        """End it everywhere."""
        self.control.close()
        for host in self.hosts.hosts.values():
            domain = host.domain(self.uuid)
            if domain is not None:
                with contextlib.suppress(libvirt.libvirtError):
                    domain.destroy()
                with contextlib.suppress(libvirt.libvirtError):
                    domain.undefine()

    def _control_socket(self) -> Path | None:
        place = self.place()
        path = host_path(self.hosts, place, control_path(self.name)) if place else None
        return path if path is not None and path.exists() else None


def add_guest(
    lab: AnyLab,
    name: str,
    host: str,
    ports: Sequence[Port],
    wiring: Wiring | Sequence[Wiring] = MANAGED,
    *,
    memory_mib: int = 128,
    metadata: str = "",
    disk: bytes = b"",
    start: bool = True,
    **fields: Any,
) -> GuestMachine:
    """A guest, begun on a host; `booted()` waits for it. Its taps have the same name everywhere. It goes with the lab,
    or with the `scope` that it was made in. `disk`: what is on its disk there; the other hosts have room for it."""
    for number, port in enumerate(ports):
        port.device = port.device or f"{name}.{number}"[:15]
    machine = GuestMachine(lab, name, host, list(ports), hosts=lab, **fields)
    wires = [wiring] * len(ports) if isinstance(wiring, Wiring) else wiring
    own = {"memory_mib": memory_mib, "metadata": metadata, "disk": bool(disk)}
    machine.xml = domain_xml(name, machine.uuid, image(), ports, wires, **own)
    lab.stack.callback(machine.destroy)
    for at in lab.hosts if disk else ():
        path = machine.disk(at)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(disk if at == host else bytes(len(disk)))
        lab.stack.callback(path.unlink)
    if start:
        lab.hosts[host].create(machine.xml)
    return machine


@dataclass(frozen=True)
class Move:
    """What libvirt says of a completed migration; times in milliseconds."""

    total_ms: int
    downtime_ms: int
    passes: int


def allow_downtime(machine: GuestMachine) -> None:
    """Before each migration (it falls back each time): an emulated CPU corrupts memory that is sent in many passes."""
    machine.domain().migrateSetMaxDowntime(MAX_DOWNTIME_MS)


def last_move(machine: GuestMachine) -> Move:
    """libvirt's statistics of its last migration; it runs at the destination by now. Raises NotWhole when the guest
    cannot be trusted any more."""
    stats = machine.domain().jobStats(COMPLETED)
    move = Move(int(stats["time_elapsed"]), int(stats["downtime"]), int(stats["memory_iteration"]))
    _whole(move.passes)
    return move


def still_whole(machine: GuestMachine) -> None:
    """The same of one that has come to where it may stand, and whose libvirtd may have been killed since."""
    for host in machine.hosts.hosts.values():
        with contextlib.suppress(libvirt.libvirtError):
            domain = host.domain(machine.uuid)
            if domain is not None and domain.isActive():
                _whole(int(domain.jobStats(COMPLETED).get("memory_iteration", 0)))


def _whole(passes: int) -> None:
    if passes > MAX_PASSES:
        raise NotWhole(f"{passes} passes over memory: QEMU without KVM corrupts the guest beyond {MAX_PASSES}")


def migrate(machine: GuestMachine, to: str, *, flags: int = LIVE, **params: Any) -> Move:
    """Move it as any libvirt client would, and wait until it runs there. Raises libvirtError, NotWhole."""
    destination = machine.hosts.hosts[to]
    allow_downtime(machine)
    options = {libvirt.VIR_MIGRATE_PARAM_URI: f"tcp://{destination.address}", **params}
    machine.domain().migrateToURI3(destination.remote_uri, options, flags)
    wait_until(f"{machine.name} runs at {to}", lambda: machine.place() == to)
    return last_move(machine)
