# SPDX-License-Identifier: GPL-2.0-only
"""The ebpf driver's switchover on real frames: nothing lost, doubled or out of order."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from datapath.errors import NotReady, StaleEpoch
from datapath.provider import PortRef, PortState
from migrator.lab.processes import PATIENT_S

from .driver_lab import Guest, Host, hosts, shelf, wait_until

NUMBERS = [{"direction": "to", "protocol": "udp", "ports": [[9000, 9000]]}]
CHANNEL = 4711


@pytest.fixture
def pair(request: pytest.FixtureRequest) -> Iterator[list[Host]]:
    """Parametrised by the underlay's version of IP, 4 unless a test says so."""
    with shelf.lend(2, getattr(request, "param", 4)) as made:
        yield made


either_underlay = pytest.mark.parametrize("pair", [4, 6], indirect=True, ids=["ipv4", "ipv6"])


class Stream:
    """Numbered datagrams from one guest, and which numbers came at which receiver, in order."""

    def __init__(self, sender: Guest, address: str, *receivers: Guest) -> None:
        self.got: list[list[int]] = [[] for _ in receivers]
        self.sent = 0
        self._address = address
        self._stop = threading.Event()
        self._sender = sender.socket(socket.SOCK_DGRAM)
        self._sockets = [one.socket(socket.SOCK_DGRAM) for one in receivers]
        for one, guest in zip(self._sockets, receivers, strict=True):
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
            one.settimeout(0.1)
            one.bind((guest.address, 9000))
        jobs: list[Callable[[], None]] = [self._send, *(lambda n=n: self._receive(n) for n in range(len(receivers)))]
        self._threads = [threading.Thread(target=job) for job in jobs]
        for thread in self._threads:
            thread.start()

    def _send(self) -> None:
        while not self._stop.wait(0.0005):
            self._sender.sendto(self.sent.to_bytes(4, "big"), (self._address, 9000))
            self.sent += 1

    def _receive(self, number: int) -> None:
        quiet = 0
        while quiet < 3:
            try:
                self.got[number].append(int.from_bytes(self._sockets[number].recv(64), "big"))
            except TimeoutError:
                quiet = quiet + 1 if self._stop.is_set() else 0

    def run_on(self, count: int) -> None:
        goal = self.sent + count
        wait_until(lambda: self.sent >= goal, "datagrams are sent")

    def finish(self) -> list[list[int]]:
        self._stop.set()
        for thread in self._threads:
            thread.join(20)
        for one in (self._sender, *self._sockets):
            one.close()
        return self.got


def twin(host: Host, guest: Guest) -> Guest:
    """The same VM as it will run on another host: same MAC and address, its port staged with a newer epoch."""
    made = Guest(host, guest.address, network=str(guest.record["network"]))
    made.ref = PortRef(guest.ref.vm, guest.ref.mac, guest.ref.epoch + 1)
    made.record = dict(guest.record)
    made.run(lambda: _set_mac("eth0", guest.ref.mac))
    host.guests.append(made)
    host.run(lambda: host.driver.stage(made.ref, made.record, made.device))
    return made


def _set_mac(device: str, mac: str) -> None:
    from pyroute2 import IPRoute

    with IPRoute() as route:
        route.link("set", ifname=device, address=mac)


def copy(source: Host, target: Host, one: Guest, other: Guest) -> None:
    """First round: track, then every kind."""
    source.run(lambda: source.driver.track(one.ref))
    for kind in ("acl", "fdb", "conntrack"):
        for table in source.run(lambda kind=kind: list(source.driver.dump(one.ref, kind))):  # type: ignore[misc]
            target.run(lambda table=table: target.driver.load(other.ref, table))  # type: ignore[misc]


def carry(source: Host, target: Host, one: Guest, other: Guest) -> None:
    """A round of changes."""
    for table in source.run(lambda: source.driver.drain(one.ref)):
        target.run(lambda table=table: target.driver.load(other.ref, table))  # type: ignore[misc]


def settle(source: Host, target: Host, one: Guest, other: Guest) -> None:
    for table in source.run(lambda: list(source.driver.settle(one.ref))):
        target.run(lambda table=table: target.driver.load(other.ref, table))  # type: ignore[misc]
    target.run(lambda: target.driver.settled(other.ref))


@either_underlay
@pytest.mark.parametrize("network", ["vlan", "over"])
def test_numbered_frames_move_with_the_vm(pair: list[Host], network: str) -> None:
    source, target = pair
    vm = source.guest("10.0.0.1", NUMBERS, network=network)
    peer = source.guest("10.0.0.2", network=network)
    moved = twin(target, vm)
    target.run(lambda: target.driver.accept_redirect(moved.ref, CHANNEL, "h1"))
    resolve(peer, vm)
    stream = Stream(peer, vm.address, vm, moved)
    stream.run_on(100)
    copy(source, target, vm, moved)
    stream.run_on(50)
    source.run(lambda: source.driver.hold(vm.ref))
    stream.run_on(100)
    began = time.monotonic()
    source.run(lambda: source.driver.quiesce(vm.ref))
    carry(source, target, vm, moved)
    target.run(lambda: target.driver.commit(moved.ref))
    paused = time.monotonic() - began
    stream.run_on(20)
    target.run(lambda: target.driver.open(moved.ref))
    pumped = source.run(lambda: source.driver.redirect(vm.ref, CHANNEL, "h2"))
    stream.run_on(200)
    settle(source, target, vm, moved)
    here, there = stream.finish()
    assert here + there == list(range(stream.sent)), "lost, doubled or out of order"
    assert pumped.passed >= 100 and len(there) > 200
    sent_on, _ = source.run(lambda: source.driver.passed_on(vm.ref))
    assert target.run(lambda: target.driver.passed_on(moved.ref)) == (0, sent_on), "all that went came, and is counted"
    assert sent_on >= pumped.passed
    assert paused < 1.0
    (table,) = target.run(lambda: list(target.driver.dump(moved.ref, "conntrack")))
    assert table.columns is not None
    assert table.columns["packets_to"].sum() == stream.sent, "counters go on where the source stopped"
    counters = target.run(lambda: target.driver.port(moved.ref)).counters
    assert counters["packets_to"] >= stream.sent
    source.run(lambda: source.driver.purge(vm.ref, keep_redirect=True))
    assert source.run(lambda: source.driver.port(vm.ref)).state is PortState.STUB
    source.run(lambda: source.driver.purge(vm.ref))
    left = source.run(source.driver.remains)
    assert len(left["ports"]) == 1, left


def resolve(one: Guest, other: Guest) -> None:
    """Neighbour entry, so that no ARP is needed while a port is silent."""

    def add() -> None:
        from pyroute2 import IPRoute

        with IPRoute() as route:
            route.neigh(
                "replace", dst=other.address, lladdr=other.ref.mac, ifindex=socket.if_nametoindex("eth0"), state=128
            )

    one.run(add)


def test_rule_rollback_gives_held_frames_back_in_order(pair: list[Host]) -> None:
    source, _ = pair
    vm = source.guest("10.0.0.1", NUMBERS)
    peer = source.guest("10.0.0.2")
    resolve(peer, vm)
    stream = Stream(peer, vm.address, vm)
    stream.run_on(50)
    source.run(lambda: source.driver.hold(vm.ref))
    stream.run_on(50)
    source.run(lambda: source.driver.quiesce(vm.ref))
    wait_until(lambda: source.run(lambda: source.driver.port(vm.ref)).held_to > 20, "frames are held")
    assert source.run(lambda: source.driver.port(vm.ref)).gate == "local shut"
    pumped = source.run(lambda: source.driver.resume(vm.ref))
    stream.run_on(50)
    (got,) = stream.finish()
    assert pumped.passed > 20
    assert got == list(range(stream.sent))


def test_restart_under_traffic_loses_nothing(pair: list[Host]) -> None:
    source, _ = pair
    vm = source.guest("10.0.0.1", NUMBERS)
    peer = source.guest("10.0.0.2")
    resolve(peer, vm)
    stream = Stream(peer, vm.address, vm)
    stream.run_on(50)
    source.restart()
    stream.run_on(50)
    assert source.run(lambda: source.driver.port(vm.ref)).state is PortState.ACTIVE
    (got,) = stream.finish()
    assert got == list(range(stream.sent))


def test_rule_held_frames_survive_a_restart(pair: list[Host]) -> None:
    source, _ = pair
    vm = source.guest("10.0.0.1", NUMBERS)
    peer = source.guest("10.0.0.2")
    resolve(peer, vm)
    stream = Stream(peer, vm.address, vm)
    stream.run_on(30)
    source.run(lambda: source.driver.hold(vm.ref))
    stream.run_on(30)
    source.restart()
    stream.run_on(30)
    source.run(lambda: source.driver.resume(vm.ref))
    (got,) = stream.finish()
    assert got == list(range(stream.sent))


def test_what_the_guest_sends_before_the_open_waits(pair: list[Host]) -> None:
    source, target = pair
    vm = source.guest("10.0.0.1", network="vlan")
    peer = source.guest("10.0.0.2", NUMBERS, network="vlan")
    moved = twin(target, vm)
    resolve(moved, peer)
    copy(source, target, vm, moved)
    stream = Stream(moved, peer.address, peer)
    stream.run_on(50)
    assert target.run(lambda: target.driver.port(moved.ref)).state is PortState.STAGED
    target.run(lambda: target.driver.commit(moved.ref))
    wait_until(
        lambda: target.run(lambda: target.driver.port(moved.ref)).state is PortState.ACTIVE, "its frame opens it"
    )
    wait_until(lambda: any(event.what == "opened" for event in target.events), "the agent is told")
    pumped = target.run(lambda: target.driver.open(moved.ref))
    stream.run_on(50)
    (got,) = stream.finish()
    assert pumped.passed >= 40
    assert got == list(range(stream.sent))


@pytest.mark.parametrize(
    ("pair", "passing", "lost"),
    [(4, (100, 1514, 9000), ()), (6, (100, 1600 - 56), (1600 - 55, 9000))],
    indirect=["pair"],
    ids=["ipv4", "ipv6"],
)
def test_rule_probe_of_the_path(pair: list[Host], passing: tuple[int, ...], lost: tuple[int, ...]) -> None:
    """IPv4 cuts what is too large for the underlay's 1,600 bytes; IPv6 does not, and no redirected frame would pass."""
    source, target = pair
    vm = source.guest("10.0.0.1", network="vlan")
    moved = twin(target, vm)
    assert not source.run(lambda: source.driver.probe_path(CHANNEL, "h2", 1514, 0.3)), "no channel is open there"
    target.run(lambda: target.driver.accept_redirect(moved.ref, CHANNEL, "h1"))
    for size in passing:
        assert source.run(lambda size=size: source.driver.probe_path(CHANNEL, "h2", size, 3.0))  # type: ignore[misc]
    for size in lost:
        assert not source.run(lambda size=size: source.driver.probe_path(CHANNEL, "h2", size, 0.3))  # type: ignore[misc]
    assert not source.run(source.driver.remains).get("channels")


def test_lease_ends_a_redirect(pair: list[Host]) -> None:
    source, target = pair
    vm = source.guest("10.0.0.1", NUMBERS, network="vlan")
    peer = source.guest("10.0.0.2", network="vlan")
    moved = twin(target, vm)
    resolve(peer, vm)
    source.run(lambda: source.driver.hold(vm.ref))
    source.run(lambda: source.driver.quiesce(vm.ref))
    source.run(lambda: source.driver.redirect(vm.ref, CHANNEL, "h2"))
    source.run(lambda: source.driver.set_lease(vm.ref, 0.0))
    with peer.socket(socket.SOCK_DGRAM) as sender:
        sender.sendto(b"late", (vm.address, 9000))
    wait_until(lambda: source.run(lambda: source.driver.port(vm.ref)).drops.get("lease") == 1, "it is dropped")
    assert moved.ref.epoch == 2


def test_older_epoch_is_stale(pair: list[Host]) -> None:
    source, _ = pair
    vm = source.guest("10.0.0.1")
    old = PortRef(vm.ref.vm, vm.ref.mac, vm.ref.epoch - 1)
    with pytest.raises(StaleEpoch):
        source.run(lambda: source.driver.hold(old))
    source.run(lambda: source.driver.purge(old))
    assert source.run(lambda: source.driver.port(vm.ref)).state is PortState.ACTIVE


def test_inject_as_the_guest(pair: list[Host]) -> None:
    source, _ = pair
    vm, peer = source.guest("10.0.0.1"), source.guest("10.0.0.2")
    frame = bytes(10) + bytes.fromhex("ffffffffffff" + vm.ref.mac.replace(":", "") + "88b6") + bytes(46)
    spoofed = bytes(10) + bytes.fromhex("ffffffffffff0200000000ee88b6") + bytes(46)
    raw = peer.run(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x88B6)))
    with raw:
        raw.settimeout(PATIENT_S)
        assert source.run(lambda: source.driver.inject(vm.ref, [spoofed, frame], judged=False)) == 2
        assert raw.recv(2000)[6:12] == bytes.fromhex(vm.ref.mac.replace(":", ""))
    assert source.run(lambda: source.driver.port(vm.ref)).drops.get("spoof-mac") == 1


def test_overflow_of_the_dirty_set_asks_for_a_new_dump(pair: list[Host], monkeypatch: pytest.MonkeyPatch) -> None:
    from datapath.drivers.ebpf import tracking

    monkeypatch.setattr(tracking, "KEYS_MAX", 8)
    source, _ = pair
    vm, peer = source.guest("10.0.0.1"), source.guest("10.0.0.2")
    source.run(lambda: source.driver.track(vm.ref))
    with peer.socket(socket.SOCK_DGRAM) as sender:
        for port in range(9000, 9050):
            sender.sendto(b"x", (vm.address, port))
    with pytest.raises(NotReady, match="changed between two drains"):
        source.run(lambda: source.driver.drain(vm.ref))
    source.run(lambda: source.driver.track(vm.ref))
    assert source.run(lambda: source.driver.drain(vm.ref)) == []


def test_a_crash_in_the_middle_of_a_resize_is_mended(pair: list[Host], monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = pair
    vm, peer = source.guest("10.0.0.1", NUMBERS), source.guest("10.0.0.2")
    resolve(peer, vm)
    staging = source.driver._parts().staging
    monkeypatch.setattr(staging, "go_on", lambda *_, **__: None)
    source.run(lambda: source.driver.update(vm.ref, {**vm.record, "connections_max": 1000}))
    stream = Stream(peer, vm.address, vm)
    stream.run_on(50)
    assert source.run(lambda: source.driver.port(vm.ref)).state is PortState.STAGED
    source.restart()
    assert source.run(lambda: source.driver.port(vm.ref)).state is PortState.ACTIVE
    stream.run_on(50)
    (got,) = stream.finish()
    assert got == list(range(stream.sent))


def test_held_frames_without_a_keeper_are_lost_and_the_port_goes_on() -> None:
    with hosts(1, keeper=False) as (host,):
        vm, peer = host.guest("10.0.0.1", NUMBERS), host.guest("10.0.0.2")
        resolve(peer, vm)
        host.run(lambda: host.driver.hold(vm.ref))
        with peer.socket(socket.SOCK_DGRAM) as sender, vm.socket(socket.SOCK_DGRAM) as receiver:
            receiver.bind((vm.address, 9000))
            sender.sendto(b"lost", (vm.address, 9000))
            wait_until(lambda: host.run(lambda: host.driver.port(vm.ref)).held_to == 1, "it is held")
            host.restart()
            assert host.run(lambda: host.driver.port(vm.ref)).held_to == 0
            assert host.run(lambda: host.driver.port(vm.ref)).gate == "local shut"
            host.run(lambda: host.driver.resume(vm.ref))
            sender.sendto(b"kept", (vm.address, 9000))
            assert receiver.recv(16) == b"kept"


def test_ports_come_back_after_a_reboot_of_the_host(pair: list[Host]) -> None:
    """The maps are gone, the state directory is not: ports are there as configured, with empty tables."""
    source, _ = pair
    vm, peer = source.guest("10.0.0.1", NUMBERS), source.guest("10.0.0.2")
    pins = source.driver._parts().pins

    def reboot() -> None:
        source.driver.stop()
        pins.clear()
        pins.make()

    source.run(reboot)
    source.start()
    for guest in (vm, peer):
        status = source.run(lambda guest=guest: source.driver.port(guest.ref))  # type: ignore[misc]
        assert (status.state, status.gate, status.device) == (PortState.ACTIVE, "local", guest.device)
    with peer.socket(socket.SOCK_DGRAM) as sender, vm.socket(socket.SOCK_DGRAM) as receiver:
        receiver.bind((vm.address, 9000))
        sender.sendto(b"again", (vm.address, 9000))
        assert receiver.recv(16) == b"again"
