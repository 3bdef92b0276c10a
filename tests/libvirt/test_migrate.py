# SPDX-License-Identifier: GPL-2.0-only
"""VMs that libvirt moves, with the hook alone: nobody gives the migrator an order."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import libvirt
import pytest

from migrator._pb import migrator_pb2 as pb
from migrator.lab import netns
from migrator.lab.machines import Machine, Port, add_peer
from migrator.lab.processes import wait_until

from .hooked import FOLLOWED_MAX, Traffic, ended, hooked, metadata, reports
from .lab import GuestMachine, LibvirtCluster, Wiring, add_guest, allow_downtime, migrate

pytestmark = pytest.mark.slow
MAC = "52:54:00:00:00:10"
LIVE = libvirt.VIR_MIGRATE_LIVE
PEER2PEER = LIVE | libvirt.VIR_MIGRATE_PEER2PEER


@pytest.fixture(scope="module")
def cluster() -> Iterator[LibvirtCluster]:
    with hooked() as made:
        for host in made.machine_names:
            netns.ip_batch(made.name(host), ["link add br9 type bridge", "link set br9 up"])
        yield made


@pytest.fixture(scope="module")
def peer(cluster: LibvirtCluster) -> Machine:
    made = add_peer(cluster, "p1", "h3", Port("52:54:00:00:00:20", "blue", ("10.1.0.2",)), policy="open")
    cluster.declare(made)
    return made


def start(cluster: LibvirtCluster, wiring: Wiring, **attributes: str) -> GuestMachine:
    port = Port(MAC, "blue", ("10.1.0.1",))
    guest = add_guest(cluster, "vm1", "h1", [port], wiring, metadata=metadata(port, **attributes))
    guest.booted()
    return guest


@pytest.mark.parametrize(
    "wiring",
    [Wiring(), Wiring(managed=False), Wiring("bridge", bridge="br9")],
    ids=["ethernet", "own-tap", "bridge"],
)
def test_there_and_back_with_nobody_typing_anything(cluster: LibvirtCluster, peer: Machine, wiring: Wiring) -> None:
    with cluster.scope():
        guest = start(cluster, wiring)
        traffic = Traffic(guest, peer)
        followed = 0
        for number, to in enumerate(("h2", "h1"), 1):
            migrate(guest, to)
            traffic.check()
            report = ended(cluster, guest, number)
            assert (report.outcome, report.destination) == ("complete", to), report
            assert report.moved["conntrack"] >= traffic.connections
            assert not report.not_moved
            followed += not report.leading
        lost = traffic.count()
        assert lost["from"] == (0, 0)
        assert lost["to"][1] == 0 and lost["to"][0] <= FOLLOWED_MAX * followed, (lost, followed)
    gone(cluster, guest)


def gone(cluster: LibvirtCluster, guest: GuestMachine) -> None:
    """Nothing of a guest that was destroyed is left anywhere."""

    def left() -> dict[str, object]:
        found: dict[str, object] = {}
        for host in cluster.machine_names:
            remains = [name for names in cluster.remains(host).values() for name in names]
            found |= {f"remains {host}": name for name in remains if MAC in name or guest.uuid in name}
            links = netns.ip("-o", "link", namespace=cluster.name(host))
            found |= {f"device {host}": port.device for port in guest.ports if port.device in links}
        instances = [p.instance for host in cluster.machine_names for p in cluster.ports(host)]
        found |= {f"port {one.mac}": one.state for one in instances if one.vm == guest.uuid}
        return found

    wait_until("nothing of the guest is left", lambda: not left(), 20.0, explain=left)


class Standing:
    """One guest with its traffic, moved by one test after the other."""

    def __init__(self, cluster: LibvirtCluster, peer: Machine) -> None:
        self.cluster = cluster
        self.guest = start(cluster, Wiring())
        self.traffic = Traffic(self.guest, peer)

    @property
    def other(self) -> str:
        """The host where it does not run."""
        return next(name for name in self.cluster.machine_names if not self.cluster.hosts[name].domain(self.guest.uuid))

    def count(self) -> int:
        return len(reports(self.cluster, self.guest))

    def ended(self, count: int) -> pb.Migration:
        return ended(self.cluster, self.guest, count)

    def move(self, flags: int, **params: object) -> pb.Migration:
        """Move it to the other host peer to peer; its report."""
        count, to = self.count(), self.other
        migrate(self.guest, to, flags=flags, **params)
        report = self.ended(count + 1)
        assert report.destination == to
        return report


@pytest.fixture(scope="module")
def standing(cluster: LibvirtCluster, peer: Machine) -> Iterator[Standing]:
    with cluster.scope():
        yield Standing(cluster, peer)


def direct(standing: Standing) -> pb.Migration:
    """The client speaks to both libvirtd."""
    count, to = standing.count(), standing.other
    there = standing.cluster.hosts[to]
    allow_downtime(standing.guest)
    standing.guest.domain().migrate3(
        there.connection(), {libvirt.VIR_MIGRATE_PARAM_URI: f"tcp://{there.address}"}, LIVE
    )
    return standing.ended(count + 1)


def tunnelled(standing: Standing) -> pb.Migration:
    count, to = standing.count(), standing.other
    allow_downtime(standing.guest)
    flags = PEER2PEER | libvirt.VIR_MIGRATE_TUNNELLED
    standing.guest.domain().migrateToURI3(standing.cluster.hosts[to].remote_uri, {}, flags)
    return standing.ended(count + 1)


def persistent(standing: Standing) -> pb.Migration:
    report = standing.move(PEER2PEER | libvirt.VIR_MIGRATE_PERSIST_DEST | libvirt.VIR_MIGRATE_UNDEFINE_SOURCE)
    assert standing.guest.domain().isPersistent()
    standing.guest.domain().undefine()
    return report


def under_another_name(standing: Standing) -> pb.Migration:
    name = "vm1" if standing.guest.domain().name() != "vm1" else "vm1-moved"
    report = standing.move(PEER2PEER, **{libvirt.VIR_MIGRATE_PARAM_DEST_NAME: name})
    assert standing.guest.domain().name() == name
    return report


def changed_protection(standing: Standing) -> pb.Migration:
    return standing.move(PEER2PEER | libvirt.VIR_MIGRATE_CHANGE_PROTECTION)


@pytest.mark.parametrize("how", [direct, tunnelled, persistent, under_another_name, changed_protection])
def test_every_way_of_libvirts(standing: Standing, how: Callable[[Standing], pb.Migration]) -> None:
    report = how(standing)
    assert report.outcome == "complete", report
    standing.traffic.check()


def test_a_paused_vm_moves_paused(standing: Standing) -> None:
    """Neither a pause nor a resume is heard: the end at the source says it."""
    count, to = standing.count(), standing.other
    domain, there = standing.guest.domain(), standing.cluster.hosts[to]
    domain.suspend()
    domain.migrateToURI3(there.remote_uri, {libvirt.VIR_MIGRATE_PARAM_URI: f"tcp://{there.address}"}, PEER2PEER)
    arrived = there.domain(standing.guest.uuid)
    assert arrived is not None and arrived.state()[0] == libvirt.VIR_DOMAIN_PAUSED
    assert not any(
        p.instance.state == "active" for p in standing.cluster.ports(to) if p.instance.vm == standing.guest.uuid
    )
    arrived.resume()
    assert standing.ended(count + 1).outcome == "complete"
    standing.traffic.check()


def test_a_vm_that_stays_paused_after_its_move(standing: Standing) -> None:
    count, to = standing.count(), standing.other
    there = standing.cluster.hosts[to]
    allow_downtime(standing.guest)
    params = {libvirt.VIR_MIGRATE_PARAM_URI: f"tcp://{there.address}"}
    standing.guest.domain().migrateToURI3(there.remote_uri, params, PEER2PEER | libvirt.VIR_MIGRATE_PAUSED)
    arrived = there.domain(standing.guest.uuid)
    assert arrived is not None and arrived.state()[0] == libvirt.VIR_DOMAIN_PAUSED
    arrived.resume()
    assert standing.ended(count + 1).outcome == "complete"
    standing.traffic.check()
