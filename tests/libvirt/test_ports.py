# SPDX-License-Identifier: GPL-2.0-only
"""Ports of real guests, declared by nobody but their domains: they appear, follow and go as libvirt has them."""

from __future__ import annotations

import re
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import libvirt
import pytest

from migrator._pb import migrator_pb2 as pb
from migrator.lab import netns
from migrator.lab.machines import Machine, Port, add_outsider, add_peer
from migrator.lab.processes import PATIENT_S, wait_until

from .lab import GuestMachine, LibvirtCluster, Wiring, add_guest

NAMESPACE = "urn:vm-netstate-migrator:ports:1"
NETWORKS = [{"name": "blue", "kind": "uplink", "vlan": 100, "uplink": "up0"}]
RULE = {"priority": 100, "protocol": "tcp"}
POLICIES = [
    {"name": "out", "rules": [{**RULE, "direction": "from", "action": "allow"}]},
    {"name": "in", "rules": [{**RULE, "direction": "to", "ports": ["7000"], "action": "allow"}]},
    {"name": "any", "rules": [{**RULE, "direction": way, "action": "allow"} for way in ("from", "to")]},
]
HOOK = Path(__file__).parents[2] / "hooks" / "qemu"
MAC, SECOND = "52:54:00:00:01:01", "52:54:00:00:01:02"


@pytest.fixture(scope="module")
def cluster() -> Iterator[LibvirtCluster]:
    """One libvirt host with our hook, and a host for peers."""
    uplinks = {"uplinks": ["up0", "up1"]}
    with LibvirtCluster(
        ("h1", "h3"), ("h1",), {"driver": "libvirt"}, networks=NETWORKS, driver_options=uplinks
    ) as made:
        made.apply(policies=POLICIES)
        host = made.hosts["h1"]
        shutil.copy(HOOK, host.hooks / "migrator")
        (host.hooks / "migrator").chmod(0o755)
        host.libvirtd.reload()
        yield made


@pytest.fixture(scope="module")
def peer(cluster: LibvirtCluster) -> Machine:
    made = add_peer(cluster, "peer", "h3", Port("02:00:00:00:01:20", "blue", ("10.1.0.20",)), policy="any")
    cluster.declare(made)
    made.worker("tcp", name="server").call("listen", address="0.0.0.0", port=7000)
    return made


def ports_xml(*macs: str, policy: str = "out", network: str = "blue", rest: str = "") -> str:
    """Metadata with these ports, the addresses as `Guests.define` gives them."""
    ports = "".join(
        f'<port mac="{mac}" network="{network}" policy="{policy}" {rest}><address>10.{number}.0.10</address></port>'
        for number, mac in enumerate(macs, 1)
    )
    return f'<ports xmlns="{NAMESPACE}">{ports}</ports>'


class Guests:
    """Persistent guests of h1, all gone afterwards; then the switch has forgotten them, and the coordinator, too."""

    def __init__(self, cluster: LibvirtCluster) -> None:
        self.cluster = cluster
        self.host = cluster.hosts["h1"]
        self.made: list[GuestMachine] = []
        self.before = cluster.remains("h1")  # where peers are

    def define(self, *macs: str, metadata: str | None = None, wiring: Wiring | None = None) -> GuestMachine:
        ports = [Port(mac, "blue", (f"10.{number}.0.10",)) for number, mac in enumerate(macs, 1)]
        xml = ports_xml(*macs) if metadata is None else metadata
        made = add_guest(
            self.cluster, f"vm{len(self.made)}", "h1", ports, wiring or Wiring(), metadata=xml, start=False
        )
        self.host.define(made.xml)
        self.made.append(made)
        return made

    def domain(self, guest: GuestMachine) -> libvirt.virDomain:
        found = self.host.domain(guest.uuid)
        assert found is not None
        return found

    def start(self, guest: GuestMachine) -> None:
        self.domain(guest).create()
        guest.booted()

    def declared(self, guest: GuestMachine) -> dict[str, pb.Port]:
        config = self.cluster.coordinator_stub().Show(pb.Empty(), timeout=5)
        return {port.mac: port for port in config.ports if port.vm == guest.uuid}

    def here(self, guest: GuestMachine) -> dict[str, pb.PortStatus]:
        return {one.instance.mac: one for one in self.cluster.ports("h1") if one.instance.vm == guest.uuid}

    def set_metadata(self, guest: GuestMachine, text: str) -> None:
        live, element = libvirt.VIR_DOMAIN_AFFECT_LIVE, libvirt.VIR_DOMAIN_METADATA_ELEMENT
        self.domain(guest).setMetadata(element, text, "p", NAMESPACE, live)

    def log(self) -> str:
        return self.cluster.agents["h1"].tail()

    def until(self, what: str, condition: Callable[[], object]) -> None:
        wait_until(what, condition, explain=self.log)

    def forgotten(self, guest: GuestMachine) -> None:
        self.until("no port is declared", lambda: not self.declared(guest))
        self.until("the switch has forgotten", lambda: not self.here(guest))

    def close(self) -> None:
        for guest in self.made:
            guest.destroy()
            self.forgotten(guest)
        self.until("nothing is left", lambda: self.cluster.remains("h1") == self.before)


@pytest.fixture
def guests(cluster: LibvirtCluster) -> Iterator[Guests]:
    with cluster.scope():
        made = Guests(cluster)
        try:
            yield made
        finally:
            made.close()


def devices(cluster: LibvirtCluster) -> set[str]:
    lines = netns.ip("-o", "link", namespace=cluster.name("h1")).splitlines()
    return {line.split(": ")[1].partition("@")[0] for line in lines}


@pytest.mark.slow
@pytest.mark.parametrize("wiring", [Wiring(), Wiring(managed=False)], ids=["managed", "unmanaged"])
def test_a_start_declares_and_a_destroy_leaves_nothing(
    cluster: LibvirtCluster, guests: Guests, peer: Machine, wiring: Wiring
) -> None:
    before = devices(cluster)
    guest = guests.define(MAC, wiring=wiring)
    guests.start(guest)
    (port,) = guests.declared(guest).values()
    assert (port.declared_by, port.host, port.policy, port.name) == ("libvirt", "h1", "out", guest.name)
    shown = cluster.cli("port", "list").stdout
    assert MAC in shown and "enforcing" in shown
    assert guests.here(guest)[MAC].instance.state == "active"
    talker = guest.worker("tcp")
    assert talker.call("connect", address=peer.address, port=7000, count=3)["connected"] == 3
    assert talker.call("check", size=1000)["lost"] == 0
    talker.call("listen", address="0.0.0.0", port=7000)
    outside = peer.worker("tcp", name=f"peer-{wiring.managed}")
    outside.ask("connect", address=guest.address, port=7000, count=1, timeout_s=1.0)
    assert outside.answer("connect")["connected"] == 0, "policy out lets nothing in"
    guests.domain(guest).destroy()
    guests.forgotten(guest)
    guests.until("the taps are gone", lambda: devices(cluster) == before)
    guests.start(guest)
    assert guests.here(guest)[MAC].instance.epoch == 2


@pytest.mark.slow
def test_a_tap_in_a_bridge_has_the_name_that_libvirt_gives(
    cluster: LibvirtCluster, guests: Guests, peer: Machine
) -> None:
    """Nobody knows it before QEMU is about to run; what the bridge floods into it the guest does not see."""
    netns.ip_batch(cluster.name("h1"), ["link add br0 type bridge", "link set br0 up", "addr add 10.1.0.99/16 dev br0"])
    guest = guests.define(MAC, wiring=Wiring("bridge", bridge="br0"))
    guests.host.define(re.sub(r"<target dev=[^>]*>", "", guest.xml))
    guests.start(guest)
    (port,) = guests.declared(guest).values()
    assert port.device == "p{mac6}{vm8}" and port.devices["h1"].startswith("vnet")
    assert guests.here(guest)[MAC].device == port.devices["h1"]
    talker = guest.worker("tcp")
    assert talker.call("connect", address=peer.address, port=7000, count=3)["connected"] == 3
    with netns.entered(cluster.path("h1")), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"x", (guest.address, 9))  # the host asks for the guest's MAC by its bridge
    guests.until("its question is dropped", lambda: guests.here(guest)[MAC].drops.get("not-ours", 0))
    assert talker.call("check", size=1000)["lost"] == 0
    guests.domain(guest).destroy()
    guests.forgotten(guest)
    netns.ip("link", "del", "br0", namespace=cluster.name("h1"))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["save", "managed"])
def test_a_save_takes_the_connections_along(cluster: LibvirtCluster, guests: Guests, peer: Machine, how: str) -> None:
    guest = guests.define(MAC)
    guests.start(guest)
    talker = guest.worker("tcp")
    assert talker.call("connect", address=peer.address, port=7000, count=20)["connected"] == 20
    assert talker.call("check", size=1000)["lost"] == 0
    domain, file = guests.domain(guest), f"/run/{guest.name}.save"
    domain.save(file) if how == "save" else domain.managedSave()
    guest.control.close()
    guests.forgotten(guest)
    kept = cluster.directory / "h1" / "state" / "saved" / f"{guest.uuid}.mgs"
    assert kept.stat().st_mode & 0o777 == 0o600
    guests.host.connection().restore(file) if how == "save" else domain.create()
    guest.booted()
    assert guests.here(guest)[MAC].connections >= 0 and not guests.declared(guest)[MAC].learning
    assert talker.call("check", size=1000, timeout_s=PATIENT_S)["lost"] == 0
    assert not kept.exists()


@pytest.mark.slow
def test_what_was_saved_dies_with_a_new_boot(cluster: LibvirtCluster, guests: Guests, peer: Machine) -> None:
    guest = guests.define(MAC)
    guests.start(guest)
    assert guest.worker("tcp").call("connect", address=peer.address, port=7000, count=1)["connected"] == 1
    domain = guests.domain(guest)
    domain.managedSave()
    guest.control.close()
    guests.forgotten(guest)
    domain.managedSaveRemove()
    guests.start(guest)
    assert not list((cluster.directory / "h1" / "state" / "saved").iterdir())
    cluster.agent_stub("h1")
    dumped = list(cluster.agent_stub("h1").Dump(pb.VmRequest(vm=guest.uuid, kind="conntrack"), timeout=5))
    assert not dumped or guests.here(guest)[MAC].connections == 0


@pytest.mark.slow
def test_interfaces_come_and_go_while_it_runs(guests: Guests, peer: Machine) -> None:
    guest = guests.define(MAC, metadata=ports_xml(MAC, SECOND))
    guests.start(guest)
    assert list(guests.declared(guest)) == [MAC]
    assert guest.worker("tcp").call("connect", address=peer.address, port=7000, count=5)["connected"] == 5
    nic = f"<interface type='ethernet'><mac address='{SECOND}'/><target dev='hot0'/><model type='virtio'/></interface>"
    guests.domain(guest).attachDeviceFlags(nic, libvirt.VIR_DOMAIN_AFFECT_LIVE)
    guests.until("the new port is open", lambda: set(guests.here(guest)) == {MAC, SECOND})
    guests.until("it has its device", lambda: guests.here(guest)[SECOND].device == "hot0")
    assert not guests.declared(guest)[SECOND].learning
    guests.domain(guest).detachDeviceFlags(nic, libvirt.VIR_DOMAIN_AFFECT_LIVE)
    guests.until("the port is gone", lambda: list(guests.here(guest)) == [MAC])
    assert guest.worker("tcp").call("check", size=500)["lost"] == 0
    guests.set_metadata(guest, ports_xml(MAC, policy="any"))
    guests.until("the policy is another", lambda: guests.declared(guest)[MAC].policy == "any")
    assert guest.worker("tcp").call("check", size=500)["lost"] == 0
    guests.domain(guest).reset(0)
    guests.set_metadata(guest, ports_xml(MAC, policy="in"))
    guests.until("the policy is another", lambda: guests.declared(guest)[MAC].policy == "in")
    assert guests.here(guest)[MAC].instance.epoch == 1, "a reset is no start"


@pytest.mark.slow
def test_a_running_vm_is_adopted_when_the_agent_comes(cluster: LibvirtCluster, guests: Guests, peer: Machine) -> None:
    """The metadata is added while the VM runs and the agent is away: its ports learn until told otherwise."""
    guest = guests.define(MAC, metadata="")
    agent = cluster.agents["h1"]
    agent.stop()
    guests.start(guest)  # not ours yet: the hook lets it through
    guests.set_metadata(guest, ports_xml(MAC))
    cluster.restart(agent)
    guests.until("the port is declared", lambda: MAC in guests.declared(guest))
    assert guests.declared(guest)[MAC].learning and "learning" in cluster.cli("port", "list").stdout
    guests.until("the port is open", lambda: MAC in guests.here(guest))
    talker = guest.worker("tcp")
    assert talker.call("connect", address=peer.address, port=7000, count=2)["connected"] == 2
    cluster.cli("port", "enforce", guest.uuid)
    assert not guests.declared(guest)[MAC].learning
    guests.host.restart_libvirtd()
    assert talker.call("check", size=500)["lost"] == 0
    cluster.cli("port", "show", MAC)
    guests.domain(guest).destroy()
    guests.forgotten(guest)


@pytest.mark.slow
def test_connections_of_a_bridge_outlive_the_adoption(cluster: LibvirtCluster, guests: Guests) -> None:
    """A host as it was before: uplink and tap in one bridge. The VM's port takes up what is under way."""
    bridge_to_fabric(cluster)
    outside = add_outsider(cluster, "outside", Port("02:00:00:00:01:30", "", ("10.1.0.30",)))
    outside.worker("tcp").call("listen", address="0.0.0.0", port=7000)
    guest = guests.define(MAC, metadata="", wiring=Wiring("bridge", bridge="br0"))
    guests.start(guest)
    talker = guest.worker("tcp")
    assert talker.call("connect", address=outside.address, port=7000, count=10)["connected"] == 10
    cluster.apply(networks=[{"name": "flat", "kind": "uplink", "uplink": "up1"}])
    guests.set_metadata(guest, ports_xml(MAC, network="flat", policy="any"))
    guests.until("the port is open", lambda: MAC in guests.here(guest))
    assert guests.declared(guest)[MAC].learning
    assert talker.call("check", size=2000)["lost"] == 0
    assert guests.here(guest)[MAC].counters["packets_from"] > 0, "by the switch"
    cluster.cli("port", "enforce", guest.uuid)
    guests.until("it enforces", lambda: not guests.declared(guest)[MAC].learning)
    assert talker.call("check", size=2000)["lost"] == 0
    guests.domain(guest).destroy()
    guests.forgotten(guest)
    cluster.coordinator_stub().Remove(pb.Removal(sort="network", name="flat"), timeout=5)


def bridge_to_fabric(cluster: LibvirtCluster) -> None:
    """br0 on h1, on the fabric by a wire of its own, untagged."""
    name = cluster.name("h1")
    netns.set_sysctl(name, "net/ipv4/conf/all/arp_ignore", 1)  # the bridge does not answer for up0
    cluster.wire("h1", "up1", "fabric", "h1-up1")
    netns.ip_batch(cluster.name("fabric"), ["link set h1-up1 master br0 up"])
    netns.ip_batch(name, ["link add br0 type bridge", "link set up1 master br0 up", "link set br0 up"])


@pytest.mark.slow
def test_what_happens_while_nobody_looks_is_found_out(cluster: LibvirtCluster, guests: Guests, peer: Machine) -> None:
    guest = guests.define(MAC)
    guests.start(guest)
    talker = guest.worker("tcp")
    assert talker.call("connect", address=peer.address, port=7000, count=5)["connected"] == 5
    agent = cluster.agents["h1"]
    agent.kill()
    assert talker.call("check", size=500)["lost"] == 0, "the switch goes on without its agent"
    guests.host.restart_libvirtd()
    cluster.restart(agent)
    assert talker.call("check", size=500)["lost"] == 0
    assert guests.here(guest)[MAC].instance.epoch == 1 and not guests.declared(guest)[MAC].learning
    agent.kill()
    guests.domain(guest).destroy()
    cluster.restart(agent)
    guests.forgotten(guest)


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["network", "agent", "bandwidth"])
def test_a_start_that_cannot_be_is_refused_with_a_reason(cluster: LibvirtCluster, guests: Guests, wrong: str) -> None:
    guest = guests.define(MAC, metadata=ports_xml(MAC, network="nowhere" if wrong == "network" else "blue"))
    if wrong == "bandwidth":
        shaped = guest.xml.replace("<model type='virtio'/>", "<bandwidth><inbound average='1000'/></bandwidth>")
        guests.host.define(shaped)
    agent = cluster.agents["h1"]
    if wrong == "agent":
        agent.stop()
    with pytest.raises(libvirt.libvirtError) as caught:
        guests.domain(guest).create()
    words = {"network": "there is no network nowhere", "agent": "agent", "bandwidth": "<bandwidth>"}[wrong]
    assert words in str(caught.value), caught.value
    assert not guests.domain(guest).isActive()
    if wrong == "agent":
        cluster.restart(agent)
    assert not guests.here(guest)
