# SPDX-License-Identifier: GPL-2.0-only
"""Clusters in which libvirt does everything: agents with its driver, the hook installed as an operator does it.

with hooked() as cluster:
    guest = add_guest(cluster, "vm1", "h1", [port], metadata=metadata(port, policy="out"))
    traffic = Traffic(guest, peer)
    migrate(guest, "h2")
    traffic.check()
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import libvirt

from migrator._pb import migrator_pb2 as pb
from migrator.lab.errors import TooSlow
from migrator.lab.machines import Machine, Port
from migrator.lab.processes import PATIENT_S, wait_until

from .lab import GuestMachine, LibvirtCluster, allow_downtime, still_whole

NAMESPACE = "urn:vm-netstate-migrator:ports:1"
NETWORKS = [{"name": "blue", "kind": "uplink", "vlan": 100, "uplink": "up0"}]
OUT = {"name": "out", "rules": [{"direction": "from", "priority": 100, "protocol": "any", "action": "allow"}]}
"""Lets the guest begin, and nobody else: what comes back is let in by the state of what it began."""
OPEN = {
    "name": "open",
    "rules": [{"direction": way, "priority": 100, "protocol": "any", "action": "allow"} for way in ("from", "to")],
}
LIVE = libvirt.VIR_MIGRATE_LIVE | libvirt.VIR_MIGRATE_PEER2PEER
SERVICE, NUMBERS = 7000, 9000
WAYS = (("from", 1, "to"), ("to", 2, "from"))  # from or to the guest, flow, who counts: the other end
UNHURRIED = 24
"""MiB/s: on a busy machine, too, the agent stops the guest before QEMU can, as it does in the first pass of an emulated
one whose metadata say max-passes='1'."""
MOVED_S = 120.0
FOLLOWED_MAX = 2
"""Frames for the guest that may be lost at each pause of which QEMU chose the moment."""


@contextlib.contextmanager
def hooked(**guests: Any) -> Iterator[LibvirtCluster]:
    """Two libvirt hosts h1 and h2 with hook and agent, h3 for peers. `guests`: options of libvirt's driver."""
    driver = {"driver": "libvirt", **guests}
    with LibvirtCluster(networks=NETWORKS, guests=driver, migration_options={"redirect_idle_s": 1.0}) as cluster:
        install(cluster)
        cluster.apply(policies=[OUT, OPEN])
        yield cluster


def install(cluster: LibvirtCluster) -> None:
    """As the operator does."""
    for host in cluster.hosts.values():
        host.run_inside(sys.executable, "-m", "migrator.cli.main", "libvirt", "install", "--reload")


def metadata(*ports: Port, policy: str = "out", **attributes: str) -> str:
    """Our element for a domain. `attributes` are of the element."""
    own = "".join(f" {name.replace('_', '-')}='{value}'" for name, value in attributes.items())
    inner = "".join(
        f"<port mac='{port.mac}' network='{port.network}' policy='{policy}'>"
        + "".join(f"<address>{address}</address>" for address in port.addresses)
        + "</port>"
        for port in ports
    )
    return f"<ports xmlns='{NAMESPACE}'{own}>{inner}</ports>"


def reports(cluster: LibvirtCluster, guest: GuestMachine) -> list[pb.Migration]:
    """All migrations of a guest, the newest last."""
    found = cluster.coordinator_stub().Migrations(pb.Empty(), timeout=10).migrations
    return [migration for migration in found if migration.vm == guest.uuid]


def ended(cluster: LibvirtCluster, guest: GuestMachine, count: int) -> pb.Migration:
    """The report of the guest's migration number `count`, when it has ended."""

    def last() -> pb.Migration | None:
        known = reports(cluster, guest)
        return known[-1] if len(known) >= count and known[-1].done else None

    return wait_until(f"migration {count} of {guest.name} has ended", last, explain=lambda: reports(cluster, guest))


def led(report: pb.Migration) -> pb.Migration:
    """The report of a move in which the agent was to stop the guest. Raises TooSlow when QEMU was quicker."""
    if not report.leading:
        raise TooSlow(f"QEMU stopped the guest before the agent did: {list(report.warnings)}")
    return report


class Moving:
    """A move in a thread of its own, as a client of libvirt's waits for one. `error`: libvirt's, when it has ended."""

    def __init__(self, guest: GuestMachine, to: str, flags: int = LIVE, **parameters: Any) -> None:
        hosts = guest.hosts.hosts
        self._guest = guest
        self.error: libvirt.libvirtError | None = None
        self._uri, self._uuid = hosts[guest.place()].uri, guest.uuid
        there = hosts[to]
        given = {libvirt.VIR_MIGRATE_PARAM_URI: f"tcp://{there.address}", **parameters}
        allow_downtime(guest)
        self._thread = threading.Thread(target=self._run, args=(there.remote_uri, given, flags), daemon=True)
        self._thread.start()

    def _run(self, to: str, parameters: dict[str, Any], flags: int) -> None:
        with contextlib.closing(libvirt.open(self._uri)) as connection:
            try:
                connection.lookupByUUIDString(self._uuid).migrateToURI3(to, parameters, flags)
            except libvirt.libvirtError as error:
                self.error = error

    def join(self, timeout_s: float = MOVED_S) -> None:
        """Wait until it has ended. Raises NotWhole when the guest that has moved cannot be trusted any more."""
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), "libvirt's migration does not end"
        if self.error is None:
            still_whole(self._guest)


def slowly(cluster: LibvirtCluster, guest: GuestMachine, to: str, flags: int = LIVE) -> Moving:
    """Begin a move that QEMU cannot finish soon; the first copy of the state is there, memory is on its way."""
    count = len(reports(cluster, guest))
    moving = Moving(guest, to, flags, **{libvirt.VIR_MIGRATE_PARAM_BANDWIDTH: 1})
    wait_until("the state has followed", lambda: _phases(cluster, guest, count) == ["authorised"])
    wait_until("memory is sent", lambda: guest.domain().jobStats().get("memory_processed", 0) > 0)
    return moving


def _phases(cluster: LibvirtCluster, guest: GuestMachine, count: int) -> list[str]:
    return [report.phase for report in reports(cluster, guest)[count:]]


class Traffic:
    """All that a guest and a peer can have under way where only the guest may begin: TCP with checked bytes, and
    numbered datagrams each way."""

    def __init__(self, guest: GuestMachine, peer: Machine, *, connections: int = 50, every_ms: float = 10) -> None:
        self.guest, self.peer, self.connections = guest, peer, connections
        peer.worker("tcp").call("listen", address="0.0.0.0", port=SERVICE)
        self.tcp = guest.worker("tcp")
        made = self.tcp.call("connect", address=peer.address, port=SERVICE, count=connections)
        assert made["connected"] == connections, made
        self.tcp.call("flow", every_ms=200, size=64)
        self.probes = {"from": guest.worker("probe"), "to": peer.worker("probe")}
        self._send("to", 2, guest.address, every_ms)  # this socket receives, too; what it sends is not let in yet
        self._send("from", 1, peer.address, every_ms)
        wait_until("datagrams come both ways", lambda: self._came("to", 1) and self._came("from", 2))
        self._before = {way: self._report(at, flow)["missing_count"] for way, flow, at in WAYS}

    def _send(self, way: str, flow: int, address: str, every_ms: float) -> None:
        self.probes[way].call("send", flow=flow, address=address, port=NUMBERS, source_port=NUMBERS, every_ms=every_ms)

    def _report(self, at: str, flow: int, below: int | None = None) -> dict[str, Any]:
        found: dict[str, Any] = self.probes[at].call("report", below=below)["flows"].get(str(flow), {})
        return found

    def _came(self, at: str, flow: int) -> bool:
        return bool(self._report(at, flow).get("received"))

    def check(self) -> None:
        """Every connection lives and carries the bytes it should."""
        checked = self.tcp.call("check", size=2000, timeout_s=PATIENT_S)
        assert (checked["total"], checked["lost"]) == (self.connections, 0), checked.get("reasons")

    def count(self) -> dict[str, tuple[int, int]]:
        """Stop the datagrams and wait for the last of them: for each way how many were lost and doubled."""
        found = {}
        for way, flow, at in WAYS:
            sent = self.probes[way].call("stop", flow=flow)["sent"]
            wait_until(f"the last of {way} came", partial(self._reached, at, flow, sent - 1))
            report = self._report(at, flow, below=sent)
            found[way] = (report["missing_count"] - self._before[way], report["doubled"])
        return found

    def _reached(self, at: str, flow: int, number: int) -> bool:
        return bool(self._report(at, flow)["newest"] >= number)
