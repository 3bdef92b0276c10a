# SPDX-License-Identifier: GPL-2.0-only
"""The ebpf driver's configuration on real frames: devices that come late, trunks, places, uplinks, traces, epochs."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

import pytest
from pyroute2 import IPRoute

from datapath.errors import NotReady, UnsupportedKind
from datapath.provider import Network, NetworkKind, Place, PortRef, PortState
from datapath.state.kind import Table
from migrator.lab.processes import PATIENT_S

from .driver_lab import ANY, Guest, Host, connect, give_address, hosts, rules, shelf, wait_until
from .test_driver_forward import talk

ETHERTYPE = 0x88B6


@pytest.fixture
def host() -> Iterator[Host]:
    with shelf.lend(1) as made:
        yield made[0]


@pytest.fixture
def pair() -> Iterator[list[Host]]:
    with shelf.lend(2) as made:
        yield made


def raw(guest: Guest) -> socket.socket:
    """Every frame of the guest's device, with what tags it has."""

    def make() -> socket.socket:
        made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)  # hears nothing before it is bound
        made.bind(("eth0", 3))
        made.settimeout(PATIENT_S)
        made.setsockopt(263, 8, 1)  # SOL_PACKET, PACKET_AUXDATA: the tag that the kernel took off
        return made

    return guest.run(make)


def received(one: socket.socket, ethertype: int = ETHERTYPE) -> tuple[bytes, int]:
    """(source MAC, VLAN id) of the next frame of that type."""
    while True:
        data, auxiliary, _, _ = one.recvmsg(2000, 100)
        tag = next((struct.unpack("=IIIHHHH", value)[5] for _, _, value in auxiliary), 0) & 0xFFF
        if data[12:14] == b"\x81\x00":
            data, tag = data[:12] + data[16:], struct.unpack("!H", data[14:16])[0] & 0xFFF
        if data[12:14] == ethertype.to_bytes(2, "big"):
            return data[6:12], tag


def frame(source: Guest, target: str = "ff:ff:ff:ff:ff:ff", vid: int = 0) -> bytes:
    tag = b"\x81\x00" + vid.to_bytes(2, "big") if vid else b""
    macs = bytes.fromhex(target.replace(":", "") + source.ref.mac.replace(":", ""))
    return macs + tag + ETHERTYPE.to_bytes(2, "big") + bytes(46)


def mac(guest: Guest) -> bytes:
    return bytes.fromhex(guest.ref.mac.replace(":", ""))


def test_a_device_that_comes_late_and_goes(host: Host) -> None:
    server = host.guest("10.0.0.1")
    late = host.guest("10.0.0.2")
    host.run(lambda: _delete(late.device))
    wait_until(lambda: any(event.what == "device-removed" for event in host.events), "the agent is told")
    assert host.run(lambda: host.driver.port(late.ref)).device == ""
    connect(host, late.device, late, "eth0", late.ref.mac)
    give_address(late, "eth0", late.address)
    wait_until(lambda: any(event.what == "device-added" for event in host.events), "the agent is told")
    assert host.run(lambda: host.driver.port(late.ref)).device == late.device
    talk(server, late)


def _delete(device: str) -> None:
    with IPRoute() as route:
        route.link("del", ifname=device)


def test_trunk_and_access_ports_meet_by_tag(host: Host) -> None:
    host.run(lambda: host.driver.set_network(Network("green", NetworkKind.LOCAL)))
    trunk = host.guest("10.0.0.1", trunk={"30": "green"})
    blue, green = host.guest("10.0.0.2"), host.guest("10.0.0.3", network="green")
    with raw(trunk) as at_trunk, raw(blue) as at_blue, raw(green) as at_green:
        at_trunk.send(frame(trunk, vid=30))
        assert received(at_green) == (mac(trunk), 0)
        at_trunk.send(frame(trunk))
        assert received(at_blue) == (mac(trunk), 0)
        at_green.send(frame(green, trunk.ref.mac))
        assert received(at_trunk) == (mac(green), 30)
        at_blue.send(frame(blue, trunk.ref.mac))
        assert received(at_trunk) == (mac(blue), 0)
        at_trunk.send(frame(trunk, vid=31))
        wait_until(lambda: host.run(lambda: host.driver.port(trunk.ref)).drops.get("vlan") == 1, "other tags drop")
    record = {**trunk.record, "trunk": {}}
    host.run(lambda: host.driver.update(trunk.ref, record))
    with raw(trunk) as at_trunk, raw(green):
        at_trunk.send(frame(trunk, vid=30))
        wait_until(lambda: host.run(lambda: host.driver.port(trunk.ref)).drops.get("vlan") == 2, "the trunk is gone")


def test_a_place_leads_there_and_is_forgotten(pair: list[Host]) -> None:
    here, there = pair
    near, far = here.guest("10.0.0.1", network="over"), there.guest("10.0.0.2", network="over")
    here.run(lambda: here.driver.set_place(Place("over", far.ref.mac, "h2")))
    assert any(far.ref.mac in name for name in here.run(here.driver.remains)["places"])
    with raw(near) as at_near, raw(far) as at_far:
        at_near.send(frame(near, far.ref.mac))
        assert received(at_far) == (mac(near), 0)
    here.run(lambda: here.driver.remove_place("over", far.ref.mac))
    assert "places" not in here.run(here.driver.remains)


def test_a_place_never_touches_an_open_port_and_holds_after_its_purge(pair: list[Host]) -> None:
    here, _ = pair
    guest, peer = here.guest("10.0.0.1", network="over"), here.guest("10.0.0.2", network="over")
    here.run(lambda: here.driver.set_place(Place("over", guest.ref.mac, "h2")))
    with raw(guest) as at_guest, raw(peer) as at_peer:
        at_peer.send(frame(peer, guest.ref.mac))
        assert received(at_guest) == (mac(peer), 0)
    here.run(lambda: here.driver.purge(guest.ref))
    assert any(guest.ref.mac in name for name in here.run(here.driver.remains)["places"])


def test_a_host_that_is_gone_is_no_peer(pair: list[Host]) -> None:
    here, there = pair
    near, far = here.guest("10.0.0.1", network="over"), there.guest("10.0.0.2", network="over")
    there.run(lambda: there.driver.set_hosts({"h2": "192.0.2.2"}))

    def refused() -> int:
        return there.driver._parts().counters.own(0).get("drop_tunnel-peer", 0)

    before = there.run(refused)
    with raw(near) as at_near, raw(far):
        at_near.send(frame(near))
        wait_until(lambda: there.run(refused) > before, "it is dropped by name")
    with pytest.raises(NotReady, match="h1"):
        there.run(lambda: there.driver.set_place(Place("over", near.ref.mac, "h1")))


def test_the_host_keeps_its_address_on_an_untagged_uplink(pair: list[Host]) -> None:
    here, there = pair
    for host in pair:
        host.run(lambda host=host: host.driver.set_network(Network("flat", NetworkKind.UPLINK, uplink="up0")))  # type: ignore[misc]
    give_address(there, "up0", "10.0.0.9")
    guest = here.guest("10.0.0.1", network="flat")
    with guest.socket(socket.SOCK_DGRAM) as one, there.socket(socket.SOCK_DGRAM) as other:
        other.bind(("10.0.0.9", 9000))
        one.sendto(b"to the host", ("10.0.0.9", 9000))
        data, sender = other.recvfrom(100)
        assert data == b"to the host"
        other.sendto(b"and back", sender)
        assert one.recv(100) == b"and back"
    assert here.driver is not there.driver


def test_what_cannot_be_carried_is_refused_by_name(pair: list[Host]) -> None:
    here, _ = pair

    def refused(network: Network, said: str) -> None:
        with pytest.raises(UnsupportedKind, match=said):
            here.run(lambda: here.driver.set_network(network))

    refused(Network("x", NetworkKind.UPLINK, uplink="up1"), "up1")
    refused(Network("x", NetworkKind.UPLINK, uplink="up0", vlan=7), "vlan")
    refused(Network("x", NetworkKind.UPLINK, uplink="up0", vlan=4095), "4095")
    refused(Network("x", NetworkKind.OVERLAY, vni=5000), "over")
    refused(Network("x", NetworkKind.OVERLAY, vni=0), "VNI 0")
    refused(Network("x", NetworkKind.OVERLAY, vni=7, mtu=1551), "1550")
    assert [network.name for network in here.run(here.driver.networks)] == ["blue", "vlan", "over"]


def test_a_host_knows_itself_and_the_room_of_an_ipv6_underlay() -> None:
    """However its address is spelled: or it would flood to itself."""
    with hosts(2, 6) as (one, _):
        one.run(lambda: one.driver.set_hosts({"h1": "2001:DB8:0:0::0001", "h2": "2001:db8:0::2"}))
        index, address = one.driver._parts().hosts.names()["h2"]
        assert (address, one.driver._parts().peers()) == ("2001:db8::2", [index])
        fits = Network("over", NetworkKind.OVERLAY, vni=5000, mtu=1600 - 70)
        one.run(lambda: one.driver.set_network(fits))
        with pytest.raises(UnsupportedKind, match="mtu 1531, the underlay carries 1530"):
            one.run(lambda: one.driver.set_network(Network("over", NetworkKind.OVERLAY, vni=5000, mtu=1531)))


def test_a_network_that_changes_its_tag_takes_its_ports_along(pair: list[Host]) -> None:
    near, far = pair[0].guest("10.0.0.1", network="vlan"), pair[1].guest("10.0.0.2", network="vlan")
    for host in pair:
        host.run(
            lambda host=host: host.driver.set_network(Network("vlan", NetworkKind.UPLINK, uplink="up0", vlan=8))  # type: ignore[misc]
        )
    talk(near, far)


def test_traces_and_logs_tell_every_verdict(host: Host) -> None:
    logged = [{"direction": "to", "protocol": "udp", "ports": [[9000, 9000]], "log": True}]
    guest, peer = host.guest("10.0.0.1", logged), host.guest("10.0.0.2")
    host.run(lambda: host.driver.set_trace(guest.ref, True))
    with peer.socket(socket.SOCK_DGRAM) as sender:
        sender.sendto(b"allowed", (guest.address, 9000))
        sender.sendto(b"dropped", (guest.address, 9001))

    def seen() -> set[tuple[str, str, str]]:
        found = [event for event in host.events if event.ref == guest.ref and event.what in ("trace", "log")]
        return {(event.what, event.data["verdict"], event.data["reason"]) for event in found}

    wait_until(lambda: {("trace", "pass", ""), ("trace", "drop", "policy"), ("log", "pass", "")} <= seen(), "verdicts")
    (logged_event,) = [event for event in host.events if event.what == "log"]
    assert logged_event.data["rule"] == 1 and b"allowed" in logged_event.data["frame"]
    host.run(lambda: host.driver.set_trace(guest.ref, False))
    count = len(host.events)
    with peer.socket(socket.SOCK_DGRAM) as sender:
        sender.sendto(b"dropped", (guest.address, 9001))
    wait_until(lambda: host.run(lambda: host.driver.port(guest.ref)).drops["policy"] >= 2, "it is dropped")
    assert len(host.events) == count


def test_a_newer_epoch_takes_the_device_and_gives_it_back(host: Host) -> None:
    guest, peer = host.guest("10.0.0.1"), host.guest("10.0.0.2")
    newer = PortRef(guest.ref.vm, guest.ref.mac, 2)
    host.run(lambda: host.driver.hold(guest.ref))
    host.run(lambda: host.driver.quiesce(guest.ref))
    host.run(lambda: host.driver.stage(newer, guest.record, guest.device))
    assert host.run(lambda: host.driver.port(newer)).device == guest.device
    assert host.run(lambda: host.driver.port(guest.ref)).device == ""
    host.run(lambda: host.driver.purge(newer))
    assert host.run(lambda: host.driver.port(guest.ref)).device == guest.device
    host.run(lambda: host.driver.resume(guest.ref))
    assert host.run(lambda: host.driver.port(guest.ref)).state is PortState.ACTIVE
    talk(guest, peer)


def test_a_guest_allows_itself_nothing_new_while_its_port_is_a_stub(pair: list[Host]) -> None:
    source, _ = pair
    guest = source.guest("10.0.0.1", ANY, network="vlan")
    for step in (source.driver.hold, source.driver.quiesce):
        source.run(lambda step=step: step(guest.ref))  # type: ignore[misc]
    source.run(lambda: source.driver.redirect(guest.ref, 99, "h2"))
    source.run(lambda: source.driver.purge(guest.ref, keep_redirect=True))
    with pytest.raises(NotReady, match="stub"):
        source.run(lambda: source.driver.load(guest.ref, Table("acl", records=rules(*ANY))))
    assert source.run(lambda: source.driver.redirect_idle_s(guest.ref)) < 60


@pytest.mark.parametrize("last", ["holds.make", "policies.set", "floods.add", "ledger.save_rules"])
def test_a_port_that_a_crash_left_half_made_is_gone_after_the_restart(
    host: Host, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    """The driver dies in `stage` when it has come to `last`, and can undo nothing."""
    before = host.run(host.driver.remains)
    guest = Guest(host, "10.0.0.1")
    host.guests.append(guest)
    parts = host.driver._parts()
    part, name = last.split(".")

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(parts.staging, "wipe", lambda _: None)
        patch.setattr(getattr(parts, part), name, die)
        with pytest.raises(KeyboardInterrupt):
            host.run(lambda: host.driver.stage(guest.ref, guest.record, guest.device))
    host.restart()
    assert host.run(host.driver.remains) == before
    host.open(guest)
