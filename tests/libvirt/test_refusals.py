# SPDX-License-Identifier: GPL-2.0-only
"""What a destination cannot hold is refused in its hook: virsh prints the reason, and the guest does not notice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import libvirt
import pytest

from migrator.lab import netns
from migrator.lab.machines import Machine, Port, add_peer
from migrator.lab.processes import wait_until
from migrator.lab.topology import UPLINK

from .counted import CountedTraffic
from .hooked import NETWORKS, OPEN, OUT, ended, install, metadata, reports
from .lab import GuestMachine, LibvirtCluster, add_guest, migrate

pytestmark = pytest.mark.slow
OTHER_UPLINK = "up9"
GREEN = {"name": "green", "kind": "uplink", "vlan": 200, "uplink": OTHER_UPLINK}
GUEST = Port("52:54:00:00:00:10", "blue", ("10.1.0.1",))


class Unequal(LibvirtCluster):
    """h1 has a second uplink, h2 has room for one port, h3 has a switch that cannot track connections."""

    def __init__(self) -> None:
        options = {"redirect_idle_s": 1.0}
        machines = ("h1", "h2", "h3")
        super().__init__(machines, machines, networks=NETWORKS, guests={"driver": "libvirt"}, migration_options=options)

    def _mount_bpffs(self, host: str) -> None:
        super()._mount_bpffs(host)
        if host == "h1":
            netns.ip("link", "add", OTHER_UPLINK, "up", "type", "veth", namespace=self.name(host))

    def _agent_config(self, host: str) -> dict[str, Any]:
        config = super()._agent_config(host)
        changes: dict[str, dict[str, Any]] = {
            "h1": {**config["driver"], "uplinks": [UPLINK, OTHER_UPLINK]},
            "h2": {**config["driver"], "slots": 2},
            "h3": {"name": "dummy", "host": host, "kinds": ["acl", "fdb"]},
        }
        return {**config, "driver": changes[host]}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Unequal]:
    with Unequal() as made:
        install(made)
        made.apply(policies=[OUT, OPEN])
        yield made


@pytest.fixture(scope="module")
def guest(cluster: Unequal) -> GuestMachine:
    made = add_guest(cluster, "vm1", "h1", [GUEST], metadata=metadata(GUEST))
    made.booted()
    return made


@pytest.fixture(scope="module")
def traffic(cluster: Unequal, guest: GuestMachine) -> CountedTraffic:
    return CountedTraffic(guest, peer(cluster, "p1", "h1", 1))


def peer(cluster: Unequal, name: str, host: str, number: int) -> Machine:
    port = Port(f"52:54:00:00:00:2{number}", "blue", (f"10.1.0.2{number}",))
    made = add_peer(cluster, name, host, port, policy="open")
    cluster.declare(made)
    return made


def refused(cluster: Unequal, guest: GuestMachine, to: str) -> str:
    """What virsh would print. Nothing of the VM is at `to` after it."""
    with pytest.raises(libvirt.libvirtError) as raised:
        migrate(guest, to)
    assert guest.place() == "h1" and cluster.hosts[to].domain(guest.uuid) is None
    assert ended(cluster, guest, len(reports(cluster, guest))).outcome == "refused"
    wait_until("its ports are as before", lambda: cluster.is_open(guest, "h1"))
    assert not [port for port in cluster.ports(to) if port.instance.vm == guest.uuid]
    assert guest.ports[0].device not in netns.ip("-o", "link", namespace=cluster.name(to))
    return str(raised.value)


def unharmed(traffic: CountedTraffic) -> None:
    traffic.check()
    assert traffic.lost() == {"from": (0, 0), "to": (0, 0)}


def test_no_room(cluster: Unequal, guest: GuestMachine, traffic: CountedTraffic) -> None:
    """When there is room, the same call works."""
    with cluster.scope():
        tenant = peer(cluster, "p2", "h2", 2)
        assert "The VM has 1 ports, 0 slots are free" in refused(cluster, guest, "h2")
        unharmed(traffic)
        cluster.withdraw(tenant)
        wait_until("there is room again", lambda: not cluster.ports("h2"))
    for to in ("h2", "h1"):
        count = len(reports(cluster, guest))
        migrate(guest, to)
        assert ended(cluster, guest, count + 1).outcome == "complete"
    traffic.check()


def test_a_kind_that_the_switch_cannot_hold(cluster: Unequal, guest: GuestMachine, traffic: CountedTraffic) -> None:
    traffic.lost()
    assert "conntrack" in refused(cluster, guest, "h3")
    unharmed(traffic)


def test_a_network_that_is_not_there(cluster: Unequal) -> None:
    cluster.apply(networks=[GREEN])
    with cluster.scope():
        port = Port("52:54:00:00:00:11", "green", ("10.1.0.11",))
        made = add_guest(cluster, "vm2", "h1", [port], metadata=metadata(port))
        made.booted()
        assert f"Port {port.mac} is on network green, which this host does not have" in refused(cluster, made, "h2")
