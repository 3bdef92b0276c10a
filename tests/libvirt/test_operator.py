# SPDX-License-Identifier: GPL-2.0-only
"""What an operator orders: `migrator migrate` has libvirt move the guest, `migrator host drain` all of them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import libvirt
import pytest

from migrator._pb import migrator_pb2 as pb
from migrator.lab.machines import Machine, Port, add_peer
from migrator.lab.processes import wait_until

from .hooked import UNHURRIED, Traffic, ended, hooked, led, metadata, reports
from .lab import GuestMachine, LibvirtCluster, Wiring, add_guest

pytestmark = pytest.mark.slow
UNDERLAY = {"h1": "10.66.0.1", "h2": "10.66.0.2"}
GUESTS: dict[str, Any] = {
    "uris": {host: f"qemu+tcp://{address}/system" for host, address in UNDERLAY.items()},
    "data_uris": {host: f"tcp://{address}" for host, address in UNDERLAY.items()},
    "max_passes": 1,
    "max_downtime_ms": 2000,
}
"""Without KVM: QEMU may send memory in few passes only."""
ABORTED = 41
DRAINED_S = 240.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[LibvirtCluster]:
    with hooked(**GUESTS) as made:
        assert {host: made.underlay(host) for host in UNDERLAY} == UNDERLAY
        yield made


@pytest.fixture(scope="module")
def peer(cluster: LibvirtCluster) -> Machine:
    made = add_peer(cluster, "p1", "h3", Port("52:54:00:00:00:20", "blue", ("10.1.0.2",)), policy="open")
    cluster.declare(made)
    return made


def start(cluster: LibvirtCluster, name: str, number: int, host: str = "h1", **attributes: str) -> GuestMachine:
    port = Port(f"52:54:00:00:00:3{number}", "blue", (f"10.1.0.3{number}",))
    guest = add_guest(cluster, name, host, [port], Wiring(), metadata=metadata(port, **attributes))
    guest.booted()
    return guest


def said(ran: subprocess.CompletedProcess[str], code: int = 0) -> str:
    assert ran.returncode == code, ran.stdout + ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def guest(cluster: LibvirtCluster) -> Iterator[GuestMachine]:
    with cluster.scope():
        yield start(cluster, "vm1", 1)


@pytest.fixture(scope="module")
def traffic(guest: GuestMachine, peer: Machine) -> Traffic:
    return Traffic(guest, peer)


def test_one_command_moves_guest_and_state(cluster: LibvirtCluster, guest: GuestMachine, traffic: Traffic) -> None:
    text = said(cluster.cli("migrate", guest.name, "--to", "h2", "--bandwidth", str(UNHURRIED)))
    assert guest.place() == "h2"
    traffic.check()
    report = led(ended(cluster, guest, 1))
    assert (report.outcome, report.frames["may_be_lost"]) == ("complete", 0), report
    assert report.moved["conntrack"] >= traffic.connections
    assert report.memory["downtime_ms"] > 0 and report.memory["transferred"] > 1 << 20, report.memory
    assert "as the hypervisor says; " in text and "connections  " in text and " sent of " in text
    back = json.loads(said(cluster.cli("migrate", guest.uuid, "--to", "h1", "--json")))
    assert guest.place() == "h1" and back["outcome"] == "complete"
    assert back["memory"]["passes"] >= 1 and back["times_ms"]["open"] >= 0
    traffic.check()


def test_options_are_libvirts(cluster: LibvirtCluster, guest: GuestMachine, traffic: Traffic) -> None:
    """The domain is transient: what it is at the destination comes from the options alone."""
    count = len(reports(cluster, guest))
    there = cluster.hosts["h2"]
    options = ["--persistent", "--bandwidth", "900", "--tunnelled", "--uri", there.remote_uri]
    said(cluster.cli("migrate", guest.name, "--to", "h2", *options))
    assert ended(cluster, guest, count + 1).outcome == "complete"
    assert guest.domain().isPersistent()
    said(cluster.cli("migrate", guest.name, "--to", "h1", "--no-persistent", "--no-undefine"))
    assert not guest.domain().isPersistent()
    left = there.domain(guest.uuid)
    assert left is not None and left.isPersistent() and not left.isActive()
    left.undefine()
    traffic.check()


def test_what_libvirt_refuses_is_in_the_report(cluster: LibvirtCluster, guest: GuestMachine, traffic: Traffic) -> None:
    ran = cluster.cli("migrate", guest.name, "--to", "h2", "--uri", "qemu+tcp://10.66.0.99/system", "--json")
    report = json.loads(said(ran, ABORTED))
    assert "10.66.0.99" in report["reason"], report
    assert guest.place() == "h1"
    cluster.settled(guest)
    traffic.check()


def begin(cluster: LibvirtCluster, guest: GuestMachine, *options: str) -> tuple[str, int]:
    """Order a move whose memory takes long; id, and how many there are with it."""
    count = len(reports(cluster, guest)) + 1
    migration = said(cluster.cli("migrate", guest.name, "--to", "h2", "--detach", "--bandwidth", "1", *options)).strip()
    wait_until("the state has followed", lambda: reports(cluster, guest)[-1].phase == "authorised")
    return migration, count


def test_an_abort_ends_libvirts_job(cluster: LibvirtCluster, guest: GuestMachine, traffic: Traffic) -> None:
    """The agent may not stop the guest before the second pass, which QEMU does not come to."""
    with without_lead(guest):
        migration, count = begin(cluster, guest)
        wait_until("memory is sent", lambda: guest.domain().jobStats().get("memory_processed", 0) > 0)
        wait_until("memory is told", lambda: reports(cluster, guest)[-1].memory.get("total"))
        assert "aborted" in said(cluster.cli("migration", "abort", migration[:8]))
    report = ended(cluster, guest, count)
    assert (report.outcome, guest.place()) == ("aborted", "h1"), report
    idle(cluster, guest)
    traffic.check()


def test_an_abort_after_the_pause_gives_the_guest_back(
    cluster: LibvirtCluster, guest: GuestMachine, traffic: Traffic
) -> None:
    """The agent has stopped it, and QEMU still sends what it had written: there is time for a word."""
    migration, count = begin(cluster, guest)
    wait_until("it stands still", lambda: guest.place() == "")
    ran = cluster.cli("migration", "abort", migration)
    report = ended(cluster, guest, count)
    assert (ran.returncode, report.outcome) == (0, "aborted"), (ran.stdout, ran.stderr, report)
    assert guest.place() == "h1"
    idle(cluster, guest)
    traffic.check()


class without_lead:  # noqa: N801
    """The guest's metadata leave its stop to QEMU."""

    def __init__(self, guest: GuestMachine) -> None:
        self._guest = guest

    def __enter__(self) -> None:
        self._set("no")

    def __exit__(self, *_: object) -> None:
        self._set("yes")

    def _set(self, lead: str) -> None:
        ports = metadata(*self._guest.ports, lead=lead)
        namespace = "urn:vm-netstate-migrator:ports:1"
        self._guest.domain().setMetadata(
            libvirt.VIR_DOMAIN_METADATA_ELEMENT, ports, "ports", namespace, libvirt.VIR_DOMAIN_AFFECT_LIVE
        )


def idle(cluster: LibvirtCluster, guest: GuestMachine) -> None:
    """Nothing of a move is left anywhere: no job of libvirt's, no domain at the destination, no instance."""
    cluster.settled(guest)
    assert guest.domain().jobStats().get("type", 0) == libvirt.VIR_DOMAIN_JOB_NONE
    wait_until("nothing of it is at h2", lambda: cluster.hosts["h2"].domain(guest.uuid) is None)
    wait_until("no port is at h2", lambda: not [p for p in cluster.ports("h2") if p.instance.vm == guest.uuid])


def test_a_host_is_drained(cluster: LibvirtCluster, guest: GuestMachine, traffic: Traffic) -> None:
    """Two guests go at once; a VM whose ports nobody's libvirt has stays, and is said to."""
    with cluster.scope():
        second = start(cluster, "vm2", 2)
        planned = json.loads(said(cluster.cli("host", "drain", "h1", "--to", "h2", "--dry-run", "--json")))
        assert {move["name"]: move["to"] for move in planned} == {"vm1": "h2", "vm2": "h2"}
        text = said(cluster.cli("host", "drain", "h1", "--to", "h2", timeout_s=DRAINED_S))
        assert (guest.place(), second.place()) == ("h2", "h2")
        assert text.count("complete") == 4, text
        traffic.check()
        cluster.settled(guest)
        cluster.settled(second)
        cluster.apply(ports=[stray()])
        try:
            ran = cluster.cli("host", "drain", "h2", "--to", "h1", "--json", timeout_s=DRAINED_S)
            moves = {move["name"]: move for move in json.loads(said(ran, ABORTED))}
            assert {name: move["state"] for name, move in moves.items()} == {
                "vm1": "complete",
                "vm2": "complete",
                "stray": "aborted",
            }, moves
        finally:
            removal = pb.Removal(sort="port", name=f"{STRAY}/{stray()['mac']}")
            cluster.coordinator_stub().Remove(removal, timeout=10)
        assert (guest.place(), second.place()) == ("h1", "h1")
        traffic.check()


STRAY = "3b0f6a52-6c3e-4d52-9a43-0f6f5a2b7c99"


def stray() -> dict[str, Any]:
    return {
        "vm": STRAY,
        "name": "stray",
        "mac": "52:54:00:00:00:39",
        "network": "blue",
        "host": "h2",
        "device": "stray0",
    }
