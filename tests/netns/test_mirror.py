# SPDX-License-Identifier: GPL-2.0-only
"""Mirrors of a VM that moves: tcpdump at the output has what it has on the guest's wire, byte for byte, once each."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from datapath.errors import LoadRejected
from datapath.provider import Need, Network, NetworkKind
from datapath.provider import Place as Where
from datapath.state.kind import Op, Table
from datapath.state.mirror import MirrorDocument

from .captures import Capture, Captures, captures, same
from .driver_lab import Guest, Host, Place, connect, give_address, hosts, shelf, wait_until
from .test_driver_move import CHANNEL, Stream, carry, copy, resolve, settle, twin

COLLECTOR, VNI = "198.51.100.9", 77


@pytest.fixture
def pair() -> Iterator[list[Host]]:
    with shelf.lend(2) as made:
        yield made


@pytest.fixture
def watch() -> Iterator[Captures]:
    with captures() as made:
        yield made


def load(host: Host, guest: Guest, *sessions: dict[str, Any]) -> None:
    """Make these the mirrors of a guest's port; without any it takes copies."""
    named = [{"name": f"m{number}", **session} for number, session in enumerate(sessions)]
    document = MirrorDocument.model_validate({"sessions": named, "takes_copies": not sessions})
    host.run(lambda: host.driver.load(guest.ref, Table("mirror", records=document.records())))


def counted(host: Host, guest: Guest) -> dict[str, tuple[int, int, int]]:
    """Name -> packets, bytes, dropped."""
    (table,) = host.run(lambda: list(host.driver.dump(guest.ref, "mirror")))
    return {one["name"]: (one["packets"], one["bytes"], one["dropped"]) for one in table.records or ()}


def plain(guest: Guest) -> Guest:
    """Whole checksums on its wire, so that a copy has the same bytes however it went."""
    command = ["ethtool", "-K", "eth0", "tx", "off", "tso", "off", "gso", "off"]
    guest.run(lambda: subprocess.run(command, check=True, capture_output=True, timeout=20))
    return guest


class Wide(Stream):
    """Datagrams that are longer than what is left of them by a snap length."""

    def _send(self) -> None:
        while not self._stop.wait(0.0005):
            self._sender.sendto(self.sent.to_bytes(64, "big"), (self._address, 9000))
            self.sent += 1


class Scene:
    """A VM, its peer beside it, and frames in both directions."""

    def __init__(self, pair: list[Host], network: str = "over") -> None:
        self.source, self.target = pair
        self.network = network
        self.vm = plain(self.source.guest("10.0.0.1", network=network))
        self.peer = plain(self.source.guest("10.0.0.2", network=network))
        self.moved: Guest | None = None
        for one, other in ((self.peer, self.vm), (self.vm, self.peer)):
            resolve(one, other)

    def wires(self, watch: Captures, expression: str = "udp") -> list[Capture]:
        """The guest's wire at both hosts."""
        assert self.moved is not None
        return [watch.on(one, "eth0", expression) for one in (self.vm, self.moved)]

    def stage(self) -> Guest:
        self.moved = plain(twin(self.target, self.vm))
        self.target.run(lambda: self.target.driver.accept_redirect(self.moved.ref, CHANNEL, "h1"))  # type: ignore[union-attr]
        resolve(self.moved, self.peer)
        if self.network == "over":  # else its frames are flooded, to a monitor too
            self.target.run(lambda: self.target.driver.set_place(Where("over", self.peer.ref.mac, "h1")))
        return self.moved

    def talk(self, guest: Guest, count: int = 60) -> None:
        """Datagrams from the guest."""
        stream = Wide(guest, self.peer.address, self.peer)
        stream.run_on(count)
        stream.finish()

    def move(self) -> None:
        """Under datagrams to it all the time, and from it before and after."""
        source, target, vm, moved = self.source, self.target, self.vm, self.moved
        assert moved is not None
        stream = Wide(self.peer, vm.address, vm, moved)
        stream.run_on(100)
        self.talk(vm)
        copy(source, target, vm, moved)
        for table in source.run(lambda: list(source.driver.dump(vm.ref, "mirror"))):
            target.run(lambda table=table: target.driver.load(moved.ref, table))  # type: ignore[misc]
        source.run(lambda: source.driver.hold(vm.ref))
        stream.run_on(60)
        source.run(lambda: source.driver.quiesce(vm.ref))
        carry(source, target, vm, moved)
        target.run(lambda: target.driver.commit(moved.ref))
        target.run(lambda: target.driver.open(moved.ref))
        source.run(lambda: source.driver.redirect(vm.ref, CHANNEL, "h2"))
        stream.run_on(100)
        settle(source, target, vm, moved)
        self.talk(moved)
        here, there = stream.finish()
        assert here + there == list(range(stream.sent)), "the VM itself lost nothing"
        source.run(lambda: source.driver.purge(vm.ref, keep_redirect=True))


def monitor_device(host: Host) -> Place:
    """A device `mon0` of the host, and what is behind it."""
    behind = Place()
    connect(host, "mon0", behind, "tap0", mtu=9000)
    return behind


@pytest.fixture
def monitors(pair: list[Host]) -> Iterator[list[Place]]:
    made = [monitor_device(host) for host in pair]
    try:
        yield made
    finally:
        for place in made:
            place.close()
        for host in pair:
            wait_until(lambda host=host: not host.run(lambda: _there("mon0")), "mon0 is gone")  # type: ignore[misc]


def _there(device: str) -> bool:
    return subprocess.run(["ip", "link", "show", device], capture_output=True, check=False, timeout=20).returncode == 0


def test_a_device_at_each_host_gets_what_the_guest_there_has(
    pair: list[Host], monitors: list[Place], watch: Captures
) -> None:
    scene = Scene(pair)
    moved = scene.stage()
    outputs = [watch.on(place, "tap0", "udp") for place in monitors]
    wires = scene.wires(watch)
    load(scene.source, scene.vm, {"output": {"device": "mon*"}})
    scene.move()
    first, second = (same([output], [wire]) for output, wire in zip(outputs, wires, strict=True))
    assert first.total() > 160 and second.total() > 160
    sizes = sum(len(frame) * n for frame, n in (first + second).items())
    assert counted(scene.target, moved) == {"m0": (first.total() + second.total(), sizes, 0)}, "counters came along"


@pytest.mark.parametrize("where", ["source", "target"])
def test_the_port_of_a_monitoring_vm_is_found_wherever_the_two_are(
    pair: list[Host], watch: Captures, where: str
) -> None:
    """Beside it first and through the tunnel then, or the other way."""
    scene = Scene(pair)
    moved = scene.stage()
    host, other = pair if where == "source" else pair[::-1]
    monitor = host.guest("10.0.0.9", [], network="over")
    load(host, monitor)
    place = Where("over", monitor.ref.mac, "h1" if where == "source" else "h2", monitor.ref.vm)
    other.run(lambda: other.driver.set_place(place))
    output, wires = watch.on(monitor, "eth0", "udp"), scene.wires(watch)
    load(scene.source, scene.vm, {"output": {"port": f"{monitor.ref.vm}/{monitor.ref.mac}"}})
    scene.move()
    copies = same([output], wires)
    assert copies.total() > 320
    assert counted(scene.target, moved)["m0"][0] == copies.total()
    status = host.run(lambda: host.driver.port(monitor.ref))
    assert status.counters["packets_to"] == 0 and not status.drops, "copies are no traffic of the monitor's port"


def test_a_vlan_of_the_uplink_has_each_copy_once(pair: list[Host], watch: Captures) -> None:
    for host in pair:
        host.run(
            lambda host=host: host.driver.set_network(Network("span", NetworkKind.UPLINK, uplink="up0", vlan=99))  # type: ignore[misc]
        )
    scene = Scene(pair)
    scene.stage()
    # what h1 sends comes in there, what h2 sends goes out there
    output, wires = watch.on(pair[1], "up0", "vlan 99 and udp", outer_tag=True), scene.wires(watch)
    load(scene.source, scene.vm, {"output": {"network": "span"}})
    scene.move()
    assert same([output], wires).total() > 320


@pytest.fixture
def collector(pair: list[Host]) -> Iterator[Place]:
    """A machine that both hosts reach, with the kernel's own VXLAN device."""
    made = Place()
    for number, host in enumerate(pair, 1):
        connect(host, "col0", made, f"from{number}", mtu=1700)
        give_address(host, "col0", f"10.9.{number}.1")
        give_address(made, f"from{number}", f"10.9.{number}.2")
        _ip(host, "route", "add", COLLECTOR, "via", f"10.9.{number}.2")
    _ip(made, "link", "set", "lo", "up")
    _ip(made, "addr", "add", COLLECTOR, "dev", "lo")
    _ip(made, "link", "add", "vx", "type", "vxlan", "id", str(VNI), "dstport", "4789", "local", COLLECTOR)
    _ip(made, "link", "set", "vx", "mtu", "1600", "up")
    try:
        yield made
    finally:
        made.close()
        for host in pair:
            wait_until(lambda host=host: not host.run(lambda: _there("col0")), "col0 is gone")  # type: ignore[misc]


def _ip(place: Place, *arguments: str) -> None:
    place.run(lambda: subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=20))


def test_a_collector_far_away_has_each_copy_once(pair: list[Host], collector: Place, watch: Captures) -> None:
    scene = Scene(pair)
    scene.stage()
    output, wires = watch.on(collector, "vx", "udp"), scene.wires(watch)
    load(scene.source, scene.vm, {"output": {"remote": {"address": COLLECTOR, "vni": VNI}}})
    scene.move()
    assert same([output], wires).total() > 320


def test_directions_and_lengths(pair: list[Host], monitors: list[Place], watch: Captures) -> None:
    """Three mirrors of one port to one device: they differ by what they take."""
    scene = Scene(pair)
    scene.stage()
    output, wires = watch.on(monitors[0], "tap0", "udp"), scene.wires(watch)
    load(
        scene.source,
        scene.vm,
        {"output": {"device": "mon0"}, "direction": "from", "snap": 64},
        {"output": {"device": "mon0"}, "vlans": [5]},
    )
    scene.move()
    sent = [frame for frame in wires[0].frames() if frame[6:12] == bytes.fromhex(scene.vm.ref.mac.replace(":", ""))]
    wait_until(lambda: len(output.frames()) >= len(sent), "copies come")
    assert sorted(output.stop()) == sorted(frame[:64] for frame in sent) and len(sent) >= 60


def test_only_a_port_that_says_so_takes_copies(pair: list[Host]) -> None:
    scene = Scene(pair)
    other = scene.source.guest("10.0.0.9", [], network="over")
    load(scene.source, scene.vm, {"output": {"port": f"{other.ref.vm}/{other.ref.mac}"}, "direction": "from"})
    scene.talk(scene.vm, 20)
    copied, _, dropped = counted(scene.source, scene.vm)["m0"]
    assert copied == 0 and dropped >= 20
    load(scene.source, other)
    scene.talk(scene.vm, 20)
    assert counted(scene.source, scene.vm)["m0"][0] >= 20 and counted(scene.source, scene.vm)["m0"][2] == dropped
    gone = Table("mirror", Op.DELETE, records=[{"name": ""}])
    scene.source.run(lambda: scene.source.driver.load(other.ref, gone))
    scene.talk(scene.vm, 20)
    assert counted(scene.source, scene.vm)["m0"][2] >= dropped + 20


def test_an_output_that_moves_is_followed(pair: list[Host], watch: Captures) -> None:
    """What finds the monitor between two hosts waits as frames for it do: each copy comes, once."""
    scene = Scene(pair)
    source, target = pair
    monitor = source.guest("10.0.0.9", [], network="over")
    there = twin(target, monitor)
    for host, guest in ((source, monitor), (target, there)):
        load(host, guest)
    target.run(lambda: target.driver.accept_redirect(there.ref, CHANNEL, "h1"))
    outputs = [watch.on(one, "eth0", "udp") for one in (monitor, there)]
    wire = watch.on(scene.vm, "eth0", "udp")
    load(source, scene.vm, {"output": {"port": f"{monitor.ref.vm}/{monitor.ref.mac}"}})
    stream = Wide(scene.peer, scene.vm.address, scene.vm)
    stream.run_on(100)
    source.run(lambda: source.driver.hold(monitor.ref))
    stream.run_on(50)
    source.run(lambda: source.driver.quiesce(monitor.ref))
    target.run(lambda: target.driver.commit(there.ref))
    target.run(lambda: target.driver.open(there.ref))
    source.run(lambda: source.driver.redirect(monitor.ref, CHANNEL, "h2"))
    stream.run_on(100)  # sent on by the port that the monitor left
    source.run(lambda: source.driver.set_place(Where("over", monitor.ref.mac, "h2", monitor.ref.vm)))
    source.run(lambda: source.driver.purge(monitor.ref))
    stream.run_on(100)  # straight to where it is
    stream.finish()
    frames = wire.stop()
    packets, _, dropped = counted(source, scene.vm)["m0"]
    assert (packets, dropped) == (len(frames), 0)
    wait_until(lambda: sum(len(one.frames()) for one in outputs) >= packets, "copies come")
    before, after = (one.stop() for one in outputs)
    assert len(before) >= 100 and len(after) >= 200 and len(before) + len(after) == packets
    assert not set(before) & set(after) and set(before) | set(after) <= set(frames)


# ---- refusals, restarts ----


def _need(record: dict[str, Any]) -> Need:
    return Need({"mirror": 1}, [], 0, 0, {"mirror": [record]})


@pytest.mark.parametrize(
    ("output", "why"),
    [
        ({"device": "mon7"}, "output device mon7: this host has no such device"),
        ({"device": "up0"}, "output device up0: the device is the switch's own"),
        ({"network": "over"}, "output network over: this host has no uplink network of that name"),
        ({"network": "nowhere"}, "output network nowhere: this host has no uplink network of that name"),
        ({"remote": {"address": "203.0.113.1", "vni": 77}}, "output VNI 77 at 203.0.113.1: no route to it"),
        ({"remote": {"address": "192.0.2.1", "vni": 5000}}, "output VNI 5000 at 192.0.2.1: that VNI is network over"),
    ],
)
def test_what_a_host_cannot_send_to_is_refused_by_name(pair: list[Host], output: dict[str, Any], why: str) -> None:
    source, target = pair
    document = MirrorDocument.model_validate({"sessions": [{"name": "ids", "output": output}]})
    (found,) = target.run(lambda: target.driver.probe(_need(document.records()[0])))
    assert why in found and found.startswith("mirror ids, ")
    vm = source.guest("10.0.0.1")
    with pytest.raises(LoadRejected, match="mirror ids, output"):
        source.run(lambda: source.driver.load(vm.ref, Table("mirror", records=document.records())))
    assert not any(source.run(lambda: [len(table) for table in source.driver.dump(vm.ref, "mirror")]))


def test_a_mirror_into_itself_is_refused(pair: list[Host]) -> None:
    source, _ = pair
    vm = source.guest("10.0.0.1", network="vlan")
    with pytest.raises(LoadRejected, match="its output is the port that it mirrors"):
        load(source, vm, {"output": {"port": f"{vm.ref.vm}/{vm.ref.mac}"}})
    with pytest.raises(LoadRejected, match="output network vlan is what it mirrors"):
        load(source, vm, {"output": {"network": "vlan"}})


def test_an_output_port_that_nobody_has_is_refused_before_a_move(pair: list[Host]) -> None:
    source, target = pair
    monitor = "6f1c0f6e-8a5d-4e0e-9d3e-0c5f7b1f2a01/52:54:00:00:00:09"
    vm = source.guest("10.0.0.1", network="over")
    load(source, vm, {"output": {"port": monitor}})  # it may come yet
    need = source.run(lambda: source.driver.describe([vm.ref]))
    (found,) = target.run(lambda: target.driver.probe(need))
    assert found == f"mirror m0, output port {monitor}: no host is known to have it"


def test_a_restarted_agent_and_a_device_that_comes_back(
    pair: list[Host], monitors: list[Place], watch: Captures
) -> None:
    scene = Scene(pair)
    scene.stage()
    load(scene.source, scene.vm, {"output": {"device": "mon0"}, "snap": 100}, {"output": {"device": "mon0"}})
    scene.talk(scene.vm)
    before = counted(scene.source, scene.vm)
    assert before["m0"][0] >= 60 and before["m0"] == before["m1"]
    scene.source.restart()
    assert counted(scene.source, scene.vm) == before
    _ip(scene.source, "link", "del", "mon0")
    dropping = counted(scene.source, scene.vm)["m1"][2]
    scene.talk(scene.vm, 20)
    assert counted(scene.source, scene.vm)["m1"][2] >= dropping + 20, "without its device copies are counted as dropped"
    connect(scene.source, "mon0", monitors[0], "tap0", mtu=9000)
    output, wire = watch.on(monitors[0], "tap0", "udp"), watch.on(scene.vm, "eth0", "udp")
    index = scene.source.run(lambda: socket.if_nametoindex("mon0"))
    wait_until(lambda: _leads_to(scene.source, index), "the mirrors have their device again")
    scene.talk(scene.vm)
    frames = wire.stop()
    wait_until(lambda: len(output.frames()) >= 2 * len(frames), "copies come")
    assert sorted(output.stop()) == sorted([*frames, *(frame[:100] for frame in frames)]) and len(frames) >= 60


def test_a_takeover_of_the_maps_keeps_mirrors_and_what_they_counted() -> None:
    with hosts(1) as (host,):
        vm, peer = host.guest("10.0.0.1"), host.guest("10.0.0.2")
        resolve(vm, peer)
        behind = monitor_device(host)
        try:
            load(host, vm, {"output": {"device": "mon0"}}, {"output": {"device": "mon0"}, "direction": "to"})
            for round_, slots in enumerate((32, 48, 40), 1):
                if slots != host.options["slots"]:
                    host.options["slots"] = slots
                    host.restart()
                stream = Wide(vm, peer.address, peer)
                stream.run_on(20)
                stream.finish()
                sent = host.run(lambda: host.driver.port(vm.ref)).counters["packets_from"]
                assert counted(host, vm)["m0"][0] >= sent >= 20 * round_ and counted(host, vm)["m0"][2] == 0
                assert counted(host, vm)["m1"] != counted(host, vm)["m0"]
        finally:
            behind.close()


def _leads_to(host: Host, ifindex: int) -> bool:
    mirrors = host.run(lambda: host.driver._parts().kernel.mirrors.read()[1])
    return bool((mirrors["target"] == ifindex).all())
