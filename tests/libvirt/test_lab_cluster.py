# SPDX-License-Identifier: GPL-2.0-only
"""Agents beside libvirtd: a guest's tap as a port of the switch, and daemons that are killed where they run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from migrator.lab.machines import Port, add_peer
from migrator.lab.processes import wait_until

from .lab import LibvirtCluster, add_guest

NETWORKS = [{"name": "blue", "kind": "uplink", "vlan": 100, "uplink": "up0"}]
OPEN = {
    "name": "open",
    "rules": [{"direction": way, "priority": 100, "protocol": "any", "action": "allow"} for way in ("from", "to")],
}
SERVICE = 7000


@pytest.fixture(scope="module")
def cluster() -> Iterator[LibvirtCluster]:
    with LibvirtCluster(networks=NETWORKS) as made:
        made.apply(policies=[OPEN])
        yield made


def test_an_agent_lives_where_libvirtd_does(cluster: LibvirtCluster) -> None:
    for name, host in cluster.hosts.items():
        agent, libvirtd = (Path("/proc", str(pid), "ns") for pid in (cluster.agents[name].pid, host.libvirtd.pid))
        for sort in ("net", "mnt", "uts", "pid"):
            assert (agent / sort).readlink() == (libvirtd / sort).readlink()
    assert cluster.agents["h3"].pid  # a host for peers: no libvirtd, an agent as everywhere


def test_an_agent_is_killed_and_comes_back(cluster: LibvirtCluster) -> None:
    agent = cluster.agents["h1"]
    before = agent.pid
    agent.kill()
    assert not agent.running() and not Path("/proc", str(before)).exists()
    cluster.restart(agent)
    assert agent.pid != before and agent.running()


@pytest.mark.slow
def test_a_guest_behind_the_switch_talks_to_a_peer_of_another_host(cluster: LibvirtCluster) -> None:
    with cluster.scope():
        guest = add_guest(cluster, "vm1", "h1", [Port("02:00:00:00:00:01", "blue", ("10.1.0.1",))], policy="open")
        peer = add_peer(cluster, "p1", "h3", Port("02:00:00:00:00:02", "blue", ("10.1.0.2",)), policy="open")
        cluster.declare(guest, peer)
        guest.booted()
        for server, client in ((guest, peer), (peer, guest)):
            server.worker("tcp").call("listen", address="0.0.0.0", port=SERVICE)
            talker = client.worker("tcp")
            assert talker.call("connect", address=server.address, port=SERVICE, count=10)["connected"] == 10
            assert talker.call("check", size=2000)["lost"] == 0
        cluster.withdraw(guest, peer)
    assert guest.place() == ""
    wait_until("the switch has forgotten", lambda: not cluster.remains("h1"), explain=lambda: cluster.remains("h1"))
