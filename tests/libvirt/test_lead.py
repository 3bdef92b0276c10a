# SPDX-License-Identifier: GPL-2.0-only
"""Who stops the guest: the agent, so that no frame is lost; QEMU, and then two may be."""

from __future__ import annotations

from collections.abc import Iterator

import libvirt
import pytest

from migrator._pb import migrator_pb2 as pb
from migrator.lab.machines import Machine, Port, add_peer
from migrator.lab.processes import wait_until

from .hooked import FOLLOWED_MAX, UNHURRIED, Traffic, ended, hooked, led, metadata, reports
from .lab import GuestMachine, LibvirtCluster, Wiring, add_guest, migrate

pytestmark = pytest.mark.slow
EVERY_MS = 2
MOVES = ("h2", "h1")


@pytest.fixture(scope="module")
def cluster() -> Iterator[LibvirtCluster]:
    with hooked() as made:
        yield made


@pytest.fixture(scope="module")
def peer(cluster: LibvirtCluster) -> Machine:
    made = add_peer(cluster, "p1", "h3", Port("52:54:00:00:00:20", "blue", ("10.1.0.2",)), policy="open")
    cluster.declare(made)
    return made


def start(cluster: LibvirtCluster, name: str, number: int, **attributes: str) -> GuestMachine:
    port = Port(f"52:54:00:00:00:1{number}", "blue", (f"10.1.0.1{number}",))
    guest = add_guest(cluster, name, "h1", [port], Wiring(), metadata=metadata(port, **attributes))
    guest.booted()
    return guest


def measured(cluster: LibvirtCluster, guest: GuestMachine) -> pb.Migration:
    """The newest report, when QEMU's own count of the downtime is in it."""
    found: pb.Migration = wait_until(
        "QEMU's downtime is reported", lambda: [r for r in reports(cluster, guest)[-1:] if "downtime_ms" in r.memory]
    )[0]
    return found


def test_a_guest_that_the_agent_stops_loses_nothing(cluster: LibvirtCluster, peer: Machine) -> None:
    """An emulated guest has to be stopped in the first pass, or QEMU does it: its metadata say so."""
    with cluster.scope():
        guest = start(cluster, "led", 1, max_passes="1")
        traffic = Traffic(guest, peer, every_ms=EVERY_MS)
        for number, to in enumerate(MOVES, 1):
            migrate(guest, to, **{libvirt.VIR_MIGRATE_PARAM_BANDWIDTH: UNHURRIED})
            report = led(ended(cluster, guest, number))
            assert report.outcome == "complete", report
            assert report.frames["may_be_lost"] == 0 and not report.warnings, report
            assert 0 < measured(cluster, guest).memory["downtime_ms"] < report.times_ms["total"]
            traffic.check()
        assert traffic.count() == {"from": (0, 0), "to": (0, 0)}


def test_a_guest_that_qemu_stops_loses_no_more_than_is_said(cluster: LibvirtCluster, peer: Machine) -> None:
    with cluster.scope():
        guest = start(cluster, "followed", 2, lead="no")
        traffic = Traffic(guest, peer, every_ms=EVERY_MS)
        for number, to in enumerate(MOVES, 1):
            migrate(guest, to)
            report = ended(cluster, guest, number)
            assert report.outcome == "complete" and not report.leading, report
            assert report.frames["may_be_lost"] == FOLLOWED_MAX
            assert "stopped by itself" in " ".join(report.warnings)
            traffic.check()
        lost = traffic.count()
        assert lost["from"] == (0, 0)
        assert lost["to"][0] <= FOLLOWED_MAX * len(MOVES) and lost["to"][1] == 0
