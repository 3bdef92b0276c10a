# SPDX-License-Identifier: GPL-2.0-only
"""The hook under a real libvirtd: what it refuses and how the operator reads it, how it gets there, what ends early."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import libvirt
import pytest

from migrator.lab import netns
from migrator.lab.machines import Machine, Port, add_peer
from migrator.lab.processes import wait_until

from .hooked import Traffic, ended, hooked, metadata, reports, slowly
from .lab import GuestMachine, LibvirtCluster, LibvirtLab, add_guest, migrate

pytestmark = pytest.mark.slow
PORT = Port("52:54:00:00:00:10", "blue", ("10.1.0.1",))


@pytest.fixture(scope="module")
def cluster() -> Iterator[LibvirtCluster]:
    with hooked() as made:
        yield made


@pytest.fixture(scope="module")
def guest(cluster: LibvirtCluster) -> GuestMachine:
    made = add_guest(cluster, "vm1", "h1", [PORT], metadata=metadata(PORT))
    made.booted()
    return made


@pytest.fixture(scope="module")
def traffic(cluster: LibvirtCluster, guest: GuestMachine) -> Traffic:
    peer: Machine = add_peer(cluster, "p1", "h3", Port("52:54:00:00:00:20", "blue", ("10.1.0.2",)), policy="open")
    cluster.declare(peer)
    return Traffic(guest, peer)


def refusal(guest: GuestMachine, to: str) -> str:
    """What virsh would print."""
    with pytest.raises(libvirt.libvirtError) as raised:
        migrate(guest, to)
    return str(raised.value)


def nothing_at(cluster: LibvirtCluster, host: str, guest: GuestMachine) -> None:
    def left() -> list[str]:
        remains = [name for names in cluster.remains(host).values() for name in names]
        devices = netns.ip("-o", "link", namespace=cluster.name(host)).splitlines()
        return [name for name in remains if guest.uuid in name] + [line for line in devices if device in line]

    device = f" {guest.ports[0].device}: "
    wait_until(f"nothing of {guest.name} is left at {host}", lambda: not left(), explain=left)


# ---- refused ----


def test_a_device_in_the_way(cluster: LibvirtCluster, guest: GuestMachine, traffic: Traffic) -> None:
    device = guest.ports[0].device
    cluster.hosts["h2"].make_tap(device)
    try:
        said = refusal(guest, "h2")
    finally:
        netns.ip("link", "del", device, namespace=cluster.name("h2"))
    assert f"host h2 has a device {device} already" in said
    traffic.check()
    assert guest.place() == "h1" and not reports(cluster, guest)


def test_an_interface_that_cannot_be_owned(cluster: LibvirtCluster) -> None:
    xml = metadata(PORT)
    with cluster.scope(), pytest.raises(libvirt.libvirtError, match=r"52:54:00:00:00:11: <filterref>: .*nwfilter"):
        port = Port("52:54:00:00:00:11", "blue", ())
        made = add_guest(cluster, "vm2", "h1", [port], metadata=xml.replace(PORT.mac, port.mac), start=False)
        made.xml = made.xml.replace(
            "<model type='virtio'/>", "<model type='virtio'/><filterref filter='clean-traffic'/>"
        )
        cluster.hosts["h1"].create(made.xml)


def test_a_network_that_does_not_exist(cluster: LibvirtCluster) -> None:
    port = Port("52:54:00:00:00:12", "green", ())
    with cluster.scope(), pytest.raises(libvirt.libvirtError, match=r"migrator: .*green"):
        add_guest(cluster, "vm3", "h1", [port], metadata=metadata(port))


def test_metadata_that_cannot_be_read(cluster: LibvirtCluster) -> None:
    port = Port("52:54:00:00:00:13", "blue", ())
    with cluster.scope(), pytest.raises(libvirt.libvirtError, match="attribute 'polcy' is not known"):
        add_guest(cluster, "vm4", "h1", [port], metadata=metadata(port).replace("policy", "polcy"))


def test_a_dead_agent_at_the_destination(cluster: LibvirtCluster, guest: GuestMachine, traffic: Traffic) -> None:
    cluster.agents["h2"].kill()
    try:
        said = refusal(guest, "h2")
    finally:
        cluster.restart(cluster.agents["h2"])
    assert "start the migrator agent on h2" in said
    traffic.check()


def test_a_dead_coordinator(cluster: LibvirtCluster, guest: GuestMachine, traffic: Traffic) -> None:
    cluster.coordinator.kill()
    try:
        said = refusal(guest, "h2")
    finally:
        cluster.restart(cluster.coordinator)
    assert "coordinator" in said
    traffic.check()


def test_vms_of_others_need_no_agent(cluster: LibvirtCluster) -> None:
    cluster.agents["h2"].kill()
    try:
        with cluster.scope():
            made = add_guest(cluster, "other", "h2", [Port("52:54:00:00:00:14", "", ())])
            assert made.place() == "h2"
    finally:
        cluster.restart(cluster.agents["h2"])


# ---- begun, and ended early ----


def qemu(host: str, cluster: LibvirtCluster, guest: GuestMachine) -> int:
    """Process id of its QEMU at a host, as seen from here."""
    inside = str(cluster.hosts[host].pid)
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            same = (process / "ns/mnt").readlink() == Path("/proc", inside, "ns/mnt").readlink()
            if same and f"guest={guest.name}," in (process / "cmdline").read_text():
                return int(process.name)
    raise AssertionError(f"no QEMU of {guest.name} at {host}")


def back_to_normal(cluster: LibvirtCluster, guest: GuestMachine, traffic: Traffic, count: int) -> None:
    """It runs at h1 as if nothing had been, nothing of it is at h2, and the next migration works."""
    assert ended(cluster, guest, count).outcome == "aborted"
    assert guest.place() == "h1"
    traffic.check()
    nothing_at(cluster, "h2", guest)
    for number, to in ((1, "h2"), (2, "h1")):
        migrate(guest, to)
        assert ended(cluster, guest, count + number).outcome == "complete"
        traffic.check()


def test_the_operator_aborts(cluster: LibvirtCluster, guest: GuestMachine, traffic: Traffic) -> None:
    count = len(reports(cluster, guest))
    moving = slowly(cluster, guest, "h2")
    guest.domain().abortJob()
    moving.join()
    assert "canceled by client" in str(moving.error)
    back_to_normal(cluster, guest, traffic, count + 1)


def test_qemu_dies_at_the_destination(cluster: LibvirtCluster, guest: GuestMachine, traffic: Traffic) -> None:
    count = len(reports(cluster, guest))
    moving = slowly(cluster, guest, "h2")
    os.kill(qemu("h2", cluster, guest), signal.SIGKILL)
    moving.join()
    assert moving.error is not None
    back_to_normal(cluster, guest, traffic, count + 1)


def test_libvirtd_dies_at_the_destination(cluster: LibvirtCluster, guest: GuestMachine, traffic: Traffic) -> None:
    count = len(reports(cluster, guest))
    moving = slowly(cluster, guest, "h2")
    cluster.hosts["h2"].libvirtd.kill()
    assert ended(cluster, guest, count + 1).outcome == "aborted"
    moving.join()
    assert moving.error is not None
    cluster.hosts["h2"].start_libvirtd()
    back_to_normal(cluster, guest, traffic, count + 1)


@pytest.mark.parametrize("host", ["h1", "h2"])
def test_an_agent_dies_in_pre_copy(cluster: LibvirtCluster, guest: GuestMachine, traffic: Traffic, host: str) -> None:
    """Its migration is over; libvirt's goes on, and the next one works, whichever way this one ended."""
    count = len(reports(cluster, guest))
    moving = slowly(cluster, guest, "h2")
    cluster.agents[host].kill()
    guest.domain().abortJob()
    moving.join()
    cluster.restart(cluster.agents[host])
    back_to_normal(cluster, guest, traffic, count + 1)


# ---- getting there ----


def test_the_first_hook_of_a_host_is_seen_after_a_reload() -> None:
    """`migrator libvirt install` says so, and `--reload` does it; without it libvirtd runs nothing."""
    with LibvirtLab(("h1",)) as lab:
        host = lab.hosts["h1"]
        command = [sys.executable, "-m", "migrator.cli.main", "libvirt", "install", "--json"]
        said = json.loads(host.run_inside(*command))
        assert said["changed"] and "does not look for hooks yet" in said["notes"][0]
        port = Port("52:54:00:00:00:15", "blue", ())
        with lab.scope():  # nobody asked: it starts without an agent
            add_guest(lab, "vm1", "h1", [port], metadata=metadata(port))
        said = json.loads(host.run_inside(*command, "--reload"))
        assert not said["changed"] and "told to look again" in said["notes"][0]

        def refused() -> bool:
            with lab.scope():
                try:
                    add_guest(lab, "vm2", "h1", [port], metadata=metadata(port))
                except libvirt.libvirtError as error:
                    return "start the migrator agent on h1" in str(error)
            return False

        wait_until("libvirtd runs the hook", refused)
        host.run_inside(sys.executable, "-m", "migrator.cli.main", "libvirt", "uninstall")
        with lab.scope():
            add_guest(lab, "vm3", "h1", [port], metadata=metadata(port))


def test_status_on_a_host(cluster: LibvirtCluster, guest: GuestMachine) -> None:
    said = json.loads(
        cluster.hosts[guest.place()].run_inside(
            sys.executable, "-m", "migrator.cli.main", "libvirt", "status", "--json"
        )
    )
    assert said["problems"] == []
    assert said["agent"]["host"] == guest.place() and said["agent"]["hooks"] > 0
    assert said["domains"] == [{"uuid": guest.uuid, "name": "vm1", "running": True, "ports": [PORT.mac], "refused": []}]
