# SPDX-License-Identifier: GPL-2.0-only
"""Daemons killed at each call of the hook and in each phase of a move that libvirt makes, and started again.

Whatever died: the guest runs on one host, its connections live, nothing of it is left on the other host, and the next
move works.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from migrator.lab.machines import Port, add_peer
from migrator.lab.processes import wait_until
from tests.netns import standing
from tests.netns.standing import StandingCluster

from .hooked import NETWORKS, OPEN, OUT, Moving, Traffic, install, metadata, reports
from .lab import GuestMachine, LibvirtCluster, add_guest, migrate

pytestmark = pytest.mark.slow
PORT = Port("52:54:00:00:00:10", "blue", ("10.1.0.1",))


class Killable(StandingCluster, LibvirtCluster):
    """A libvirt cluster whose daemons can be made to stand still. A guest moves from h1 to h2."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Killable]:
    options = {"redirect_idle_s": 3.0, "settle_s": 10.0}
    with Killable(networks=NETWORKS, guests={"driver": "libvirt"}, migration_options=options) as made:
        install(made)
        made.apply(policies=[OUT, OPEN])
        yield made


@pytest.fixture(scope="module")
def guest(cluster: Killable) -> GuestMachine:
    made = add_guest(cluster, "vm1", "h1", [PORT], metadata=metadata(PORT))
    made.booted()
    return made


@pytest.fixture(scope="module")
def traffic(cluster: Killable, guest: GuestMachine) -> Traffic:
    peer = add_peer(cluster, "p1", "h3", Port("52:54:00:00:00:20", "blue", ("10.1.0.2",)), policy="open")
    cluster.declare(peer)
    return Traffic(guest, peer)


@pytest.fixture
def home(cluster: Killable, guest: GuestMachine, traffic: Traffic) -> GuestMachine:
    """The guest at h1: this move there is the one that has to work after whatever died before."""
    if guest.place() != "h1":
        migrate(guest, "h1")
        traffic.check()
    settled(cluster, guest)
    return guest


def settled(cluster: Killable, guest: GuestMachine) -> None:
    """All its moves have ended, and it has ports where it runs and nowhere else."""

    def quiet() -> bool:
        states = {name: states_at(cluster, guest, name) for name in cluster.machine_names}
        place = guest.place()
        apart = all(found == (["active"] if name == place else []) for name, found in states.items())
        return bool(place) and apart and all(report.done for report in reports(cluster, guest))

    def explain() -> object:
        found = {name: states_at(cluster, guest, name) for name in cluster.machine_names}
        return guest.place(), found, [(r.phase, r.outcome, r.reason) for r in reports(cluster, guest) if not r.done]

    wait_until("all is settled", quiet, 45.0, explain=explain)


def states_at(cluster: Killable, guest: GuestMachine, host: str) -> list[str]:
    return [p.instance.state for p in cluster.ports(host) if p.instance.vm == guest.uuid]


@pytest.mark.parametrize(
    ("point", "killed"),
    [
        ("hook.migrate", "h2"),
        ("hook.migrate", "h1"),
        ("hook.migrate", "coordinator"),
        ("hook.prepare", "h2"),
        ("hook.prepare", "h1"),
        ("hook.start", "h2"),
        ("hook.started", "h2"),
        ("source.watching", "h1"),
        ("source.draining", "h1"),
        ("source.draining", "h2"),
        ("source.final", "h1"),
        ("destination.committing", "h2"),
        ("destination.committed", "h2"),
        ("destination.opening", "h2"),
        ("source.redirecting", "h1"),
        ("source.settling", "coordinator"),
    ],
)
def test_a_daemon_dies(
    cluster: Killable, home: GuestMachine, traffic: Traffic, point: str, killed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(standing.BY_ROLE, "hook", "h2")
    daemon = cluster.daemon(killed)
    with cluster.standing(point):
        moving = Moving(home, "h2")
        cluster.wait_for(point)
        daemon.kill()
    moving.join()
    cluster.restart(daemon)
    assert home.place() == ("h1" if moving.error is not None else "h2"), moving.error
    settled(cluster, home)
    traffic.check()
