# SPDX-License-Identifier: GPL-2.0-only
"""VMs that libvirt moves, with the hook alone: nobody gives the migrator an order."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from functools import partial

import libvirt
import pytest

from migrator._pb import migrator_pb2 as pb
from migrator.lab import netns
from migrator.lab.machines import Machine, Port, add_peer
from migrator.lab.processes import PATIENT_S, wait_until

from .hooked import (
    FOLLOWED_MAX,
    LIVE,
    SERVICE,
    UNHURRIED,
    Moving,
    Traffic,
    ended,
    hooked,
    install,
    led,
    metadata,
    reports,
    slowly,
)
from .lab import GuestMachine, LibvirtCluster, Wiring, add_guest, allow_downtime, migrate

pytestmark = pytest.mark.slow
DISK_BYTES, DISK_SEED = 32 << 20, 17
OFFLINE = libvirt.VIR_MIGRATE_OFFLINE | libvirt.VIR_MIGRATE_PEER2PEER | libvirt.VIR_MIGRATE_PERSIST_DEST
OFFLINE |= libvirt.VIR_MIGRATE_UNDEFINE_SOURCE
LED = {"max_passes": "1"}
"""The agent stops the guest at QEMU's first pass: without KVM it may not wait for a second one."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[LibvirtCluster]:
    with hooked() as made:
        for host in made.machine_names:
            netns.ip_batch(made.name(host), ["link add br9 type bridge", "link set br9 up"])
        yield made


@pytest.fixture(scope="module")
def peer(cluster: LibvirtCluster) -> Machine:
    return new_peer(cluster, 0)


def new_peer(cluster: LibvirtCluster, number: int) -> Machine:
    port = Port(f"52:54:00:00:00:2{number}", "blue", (f"10.1.0.2{number}",))
    made = add_peer(cluster, f"p{number}", "h3", port, policy="open")
    cluster.declare(made)
    return made


def start(cluster: LibvirtCluster, wiring: Wiring, **attributes: str) -> GuestMachine:
    return _started(cluster, 1, "vm1", "h1", wiring, **attributes)


def _started(
    cluster: LibvirtCluster, number: int, name: str, host: str, wiring: Wiring | None = None, **attributes: str
) -> GuestMachine:
    port = Port(f"52:54:00:00:00:1{number}", "blue", (f"10.1.0.1{number}",))
    guest = add_guest(cluster, name, host, [port], wiring or Wiring(), metadata=metadata(port, **attributes))
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


def test_no_frame_is_lost_when_the_agent_stops_the_guest(cluster: LibvirtCluster, peer: Machine) -> None:
    with cluster.scope():
        guest = start(cluster, Wiring(), **LED)
        traffic = Traffic(guest, peer, every_ms=2)
        for number, to in enumerate(("h2", "h1"), 1):
            migrate(guest, to, **{libvirt.VIR_MIGRATE_PARAM_BANDWIDTH: UNHURRIED})
            report = led(ended(cluster, guest, number))
            assert report.outcome == "complete", report
            assert not report.frames["may_be_lost"]
        traffic.check()
        assert traffic.count() == {"from": (0, 0), "to": (0, 0)}


def gone(cluster: LibvirtCluster, guest: GuestMachine) -> None:
    """Nothing of a guest that was destroyed is left anywhere."""

    def left() -> dict[str, object]:
        found: dict[str, object] = {}
        for host in cluster.machine_names:
            remains = [name for names in cluster.remains(host).values() for name in names]
            found |= {f"remains {host}": name for name in remains if guest.ports[0].mac in name or guest.uuid in name}
            links = netns.ip("-o", "link", namespace=cluster.name(host))
            found |= {f"device {host}": port.device for port in guest.ports if port.device in links}
        instances = [p.instance for host in cluster.machine_names for p in cluster.ports(host)]
        found |= {f"port {one.mac}": one.state for one in instances if one.vm == guest.uuid}
        return found

    wait_until("nothing of the guest is left", lambda: not left(), explain=left)


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
        there.connection(), {libvirt.VIR_MIGRATE_PARAM_URI: f"tcp://{there.address}"}, libvirt.VIR_MIGRATE_LIVE
    )
    return standing.ended(count + 1)


def tunnelled(standing: Standing) -> pb.Migration:
    count, to = standing.count(), standing.other
    allow_downtime(standing.guest)
    flags = LIVE | libvirt.VIR_MIGRATE_TUNNELLED
    standing.guest.domain().migrateToURI3(standing.cluster.hosts[to].remote_uri, {}, flags)
    return standing.ended(count + 1)


def persistent(standing: Standing) -> pb.Migration:
    report = standing.move(LIVE | libvirt.VIR_MIGRATE_PERSIST_DEST | libvirt.VIR_MIGRATE_UNDEFINE_SOURCE)
    assert standing.guest.domain().isPersistent()
    standing.guest.domain().undefine()
    return report


def under_another_name(standing: Standing) -> pb.Migration:
    name = "vm1" if standing.guest.domain().name() != "vm1" else "vm1-moved"
    report = standing.move(LIVE, **{libvirt.VIR_MIGRATE_PARAM_DEST_NAME: name})
    assert standing.guest.domain().name() == name
    return report


def changed_protection(standing: Standing) -> pb.Migration:
    return standing.move(LIVE | libvirt.VIR_MIGRATE_CHANGE_PROTECTION)


@pytest.mark.parametrize("how", [direct, tunnelled, persistent, under_another_name, changed_protection])
def test_every_way_of_libvirts(standing: Standing, how: Callable[[Standing], pb.Migration]) -> None:
    report = how(standing)
    assert report.outcome == "complete", report
    standing.traffic.check()


def test_post_copy(standing: Standing) -> None:
    """The guest runs at the destination while the source still has most of its memory."""
    count, to = standing.count(), standing.other
    moving = slowly(standing.cluster, standing.guest, to, LIVE | libvirt.VIR_MIGRATE_POSTCOPY)
    standing.guest.domain().migrateStartPostCopy()
    moving.join()
    assert moving.error is None
    report = standing.ended(count + 1)
    assert (report.outcome, report.destination, standing.guest.place()) == ("complete", to, to), report
    standing.traffic.check()


def test_two_in_opposite_directions(cluster: LibvirtCluster, standing: Standing) -> None:
    """Their own traffic with each other goes on: both ends of it move."""
    with cluster.scope():
        first, second = (_started(cluster, n, f"vm{n}", host, policy="open") for n, host in ((2, "h1"), (3, "h2")))
        second.worker("tcp").call("listen", address="0.0.0.0", port=SERVICE)
        talker = first.worker("tcp")
        assert talker.call("connect", address=second.address, port=SERVICE, count=20)["connected"] == 20
        talker.call("flow", every_ms=100, size=64)
        for number, (one, other) in enumerate((("h2", "h1"), ("h1", "h2")), 1):
            moves = [Moving(first, one), Moving(second, other)]
            for move in moves:
                move.join()
                assert move.error is None
            assert (first.place(), second.place()) == (one, other)
            assert [ended(cluster, guest, number).outcome for guest in (first, second)] == ["complete"] * 2
            checked = talker.call("check", size=2000, timeout_s=PATIENT_S)
            assert (checked["total"], checked["lost"]) == (20, 0), checked["reasons"]
    standing.traffic.check()


def test_a_paused_vm_moves_paused(standing: Standing) -> None:
    """Neither a pause nor a resume is heard: the end at the source says it."""
    count, to = standing.count(), standing.other
    domain, there = standing.guest.domain(), standing.cluster.hosts[to]
    domain.suspend()
    domain.migrateToURI3(there.remote_uri, {libvirt.VIR_MIGRATE_PARAM_URI: f"tcp://{there.address}"}, LIVE)
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
    standing.guest.domain().migrateToURI3(there.remote_uri, params, LIVE | libvirt.VIR_MIGRATE_PAUSED)
    arrived = there.domain(standing.guest.uuid)
    assert arrived is not None and arrived.state()[0] == libvirt.VIR_DOMAIN_PAUSED
    arrived.resume()
    assert standing.ended(count + 1).outcome == "complete"
    standing.traffic.check()


def test_storage_is_copied_with_the_state(cluster: LibvirtCluster) -> None:
    """`--copy-storage-all`: QEMU mirrors the disk first, and the pause waits for it."""
    content = random.Random(DISK_SEED).randbytes(DISK_BYTES)
    with cluster.scope():
        port = Port("52:54:00:00:00:14", "blue", ("10.1.0.14",))
        guest = add_guest(cluster, "vm4", "h1", [port], metadata=metadata(port, **LED), disk=content)
        guest.booted()
        traffic = Traffic(guest, new_peer(cluster, 1))
        for number, to in enumerate(("h2", "h1"), 1):
            if to == "h1":
                guest.disk(to).write_bytes(bytes(DISK_BYTES))
            migrate(guest, to, flags=LIVE | libvirt.VIR_MIGRATE_NON_SHARED_DISK)
            report = ended(cluster, guest, number)
            assert (report.outcome, report.destination) == ("complete", to), report
            assert guest.disk(to).read_bytes() == content
            traffic.check()
        lost = traffic.count()
        followed = sum(not report.leading for report in reports(cluster, guest))
        assert lost["from"] == (0, 0)
        assert lost["to"][1] == 0 and lost["to"][0] <= FOLLOWED_MAX * followed, (lost, followed)


def test_a_vm_that_is_off_starts_elsewhere(cluster: LibvirtCluster) -> None:
    """`virsh migrate --offline` moves a definition; the ports are where the VM starts, and nowhere else."""
    with cluster.scope():
        port = Port("52:54:00:00:00:15", "blue", ("10.1.0.15",))
        guest = add_guest(cluster, "vm5", "h1", [port], metadata=metadata(port), start=False)
        cluster.hosts["h1"].define(guest.xml).create()
        guest.booted()
        peer = new_peer(cluster, 2)
        peer.worker("tcp").call("listen", address="0.0.0.0", port=SERVICE)
        for here, there in (("h1", "h2"), ("h2", "h1")):
            assert guest.worker("tcp").call("connect", address=peer.address, port=SERVICE, count=5)["connected"] == 5
            guest.control.close()
            off = guest.domain()
            off.destroy()
            params = {libvirt.VIR_MIGRATE_PARAM_URI: f"tcp://{cluster.hosts[there].address}"}
            off.migrateToURI3(cluster.hosts[there].remote_uri, params, OFFLINE)
            started = cluster.hosts[there].domain(guest.uuid)
            assert started is not None
            started.create()
            guest.booted()
            wait_until("its ports are there only", partial(_only_at, cluster, guest, there, here))
        assert guest.worker("tcp").call("connect", address=peer.address, port=SERVICE, count=5)["connected"] == 5


def test_a_vm_comes_from_a_host_without_an_agent(cluster: LibvirtCluster) -> None:
    """What it has under way was never seen to begin: its port learns, until it is told to enforce."""
    source = cluster.hosts["h1"]
    source.run_inside(sys.executable, "-m", "migrator.cli.main", "libvirt", "uninstall")
    cluster.agents["h1"].kill()
    try:
        with cluster.scope():
            port = Port("52:54:00:00:00:16", "blue", ("10.1.0.16",))
            guest = add_guest(cluster, "vm6", "h1", [port], metadata=metadata(port))
            guest.booted()
            migrate(guest, "h2")
            wait_until("its port learns", lambda: _learning(cluster, guest) == [True])
    finally:
        install(cluster)
        cluster.restart(cluster.agents["h1"])
    gone(cluster, guest)


def _learning(cluster: LibvirtCluster, guest: GuestMachine) -> list[bool]:
    """Of its ports, of which each is active at h2."""
    active = {p.instance.mac for p in cluster.ports("h2") if p.instance.state == "active"}
    declared = cluster.coordinator_stub().Show(pb.Empty(), timeout=10).ports
    return [port.learning for port in declared if port.vm == guest.uuid and port.mac in active]


def _only_at(cluster: LibvirtCluster, guest: GuestMachine, there: str, here: str) -> bool:
    found = {host: [port for port in cluster.ports(host) if port.instance.vm == guest.uuid] for host in (there, here)}
    return not found[here] and [port.instance.state for port in found[there]] == ["active"]
