# SPDX-License-Identifier: GPL-2.0-only
"""The ebpf driver opens a port whose guest runs already: real frames, and an agent that is slow."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from pyroute2 import IPRoute

from datapath.drivers.ebpf import devices, holding, switchover
from datapath.drivers.ebpf.holds import QUEUE_LENGTH
from datapath.drivers.ebpf.instances import Instance
from datapath.errors import NotReady
from datapath.provider import Place, PortRef
from datapath.state.kind import Table

from .driver_lab import ANY, Guest, Host, hosts, rules, shelf, wait_until
from .test_driver_move import CHANNEL, NUMBERS, Stream, copy, resolve, twin

ROUNDS = 10


@pytest.fixture
def pair() -> Iterator[list[Host]]:
    with shelf.lend(2) as made:
        yield made


def test_rule_no_place_no_frame_answers_the_first_that_the_guest_sends(
    pair: list[Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the agent opens the port the guest runs already: what answers it comes back by the port's own network."""
    source, target = pair
    peer, vm = source.guest("10.0.0.2", network="vlan"), Guest(target, "10.0.0.1", network="vlan")
    target.guests.append(vm)
    target.run(lambda: target.driver.set_place(Place("vlan", vm.ref.mac, "h1")))
    target.run(lambda: target.driver.stage(vm.ref, vm.record, vm.device))
    target.run(lambda: target.driver.load(vm.ref, Table("acl", records=rules(*ANY))))
    target.run(lambda: target.driver.commit(vm.ref))
    resolve(peer, vm)
    resolve(vm, peer)
    fdb = target.driver._parts().fdb
    take_all = fdb.take_all
    with peer.socket(socket.SOCK_DGRAM) as answering, vm.socket(socket.SOCK_DGRAM) as asking:
        answering.bind((peer.address, 9000))

        def slowly(instance: Instance) -> None:
            asking.sendto(b"asked", (peer.address, 9000))
            answering.sendto(b"answer", answering.recvfrom(16)[1])
            take_all(instance)

        monkeypatch.setattr(fdb, "take_all", slowly)
        target.run(lambda: target.driver.open(vm.ref))
        assert asking.recv(16) == b"answer"


def test_what_a_pump_gives_up_is_kept_and_goes_on_later(pair: list[Host], monkeypatch: pytest.MonkeyPatch) -> None:
    """The hold's device takes nothing for a while: the step says so, and what waits reaches the guest by itself."""
    monkeypatch.setattr(holding, "PUMP_S", 0.1)
    host, _ = pair
    vm, peer = host.guest("10.0.0.1", NUMBERS), host.guest("10.0.0.2")
    resolve(peer, vm)
    tap = host.driver._parts().instances.find(vm.ref).hold_to.name
    with peer.socket(socket.SOCK_DGRAM) as sender, vm.socket(socket.SOCK_DGRAM) as receiver:
        receiver.bind((vm.address, 9000))
        host.run(lambda: host.driver.hold(vm.ref))
        for number in range(5):
            sender.sendto(bytes([number]), (vm.address, 9000))
        host.run(lambda: set_state(tap, "down"))
        with pytest.raises(NotReady, match=r"5 frames .* wait") as refused:
            host.run(lambda: host.driver.resume(vm.ref))
        assert "they are kept" in refused.value.hint
        host.run(lambda: set_state(tap, "up"))
        assert [receiver.recv(4) for _ in range(5)] == [bytes([number]) for number in range(5)]
        sender.sendto(b"next", (vm.address, 9000))
        assert receiver.recv(4) == b"next"
    wait_until(lambda: host.run(lambda: host.driver.port(vm.ref)).held_to == 0, "nothing waits")


def set_state(device: str, state: str) -> None:
    with IPRoute() as route:
        route.link("set", ifname=device, state=state)


def test_a_queue_that_is_made_longer_under_traffic_loses_nothing(
    pair: list[Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A migration begins and is given up, again and again: frames wait while the guest's device gets another queue."""
    host, _ = pair
    vm, peer = host.guest("10.0.0.1", NUMBERS), host.guest("10.0.0.2")
    resolve(peer, vm)
    gates: list[str] = []
    set_queue = devices.set_queue

    def noted(link: devices.Link, length: int) -> None:
        gates.append(host.driver.port(vm.ref).gate)
        set_queue(link, length)

    monkeypatch.setattr(devices, "set_queue", noted)
    stream = Stream(peer, vm.address, vm)
    stream.run_on(20)
    for _ in range(ROUNDS):
        host.run(lambda: host.driver.track(vm.ref))
        assert host.run(devices.links)[vm.device].queue == QUEUE_LENGTH
        host.run(lambda: host.driver.untrack(vm.ref))
    stream.run_on(20)
    (got,) = stream.finish()
    assert got == list(range(stream.sent))
    assert gates == ["local shut"] * 2 * ROUNDS
    assert host.run(lambda: host.driver.port(vm.ref)).gate == "local"


def test_an_uplink_that_goes_while_it_is_given_back_is_no_error() -> None:
    """Another device has its name by then, and the one that was promiscuous is nowhere."""
    with hosts(1) as (host,):
        uplinks = host.driver._parts().uplinks

        def exchanged() -> None:
            with IPRoute() as route:
                route.link("add", ifname="up0", kind="veth", peer="up0-far")
                gone = uplinks.attach("up0")
                route.link("del", index=gone)
                route.link("add", ifname="up0", kind="veth", peer="up0-far")
            uplinks.detach()

        host.run(exchanged)
        assert not uplinks.ifindex("up0")


def _opened_before_its_source(source: Host, target: Host) -> PortRef:
    """A port whose VM has come, and which still waits for what the source held."""
    vm = source.guest("10.0.0.1", network="vlan")
    moved = twin(target, vm)
    target.run(lambda: target.driver.accept_redirect(moved.ref, CHANNEL, "h1"))
    copy(source, target, vm, moved)
    target.run(lambda: target.driver.commit(moved.ref))
    target.run(lambda: target.driver.open(moved.ref, broadcast=False))
    assert target.run(lambda: target.driver.port(moved.ref)).gate == "local shut"
    return moved.ref


def test_an_agent_that_dies_as_the_source_is_done_leaves_no_gate_shut(
    pair: list[Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the flags, from which on nothing more passes by the hold, and the gate."""
    source, target = pair
    ref = _opened_before_its_source(source, target)

    def die() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as dying:
        dying.setattr(switchover, "barrier", die)
        with pytest.raises(KeyboardInterrupt):
            target.run(lambda: target.driver.set_broadcast(ref, True))
    target.restart()
    assert target.run(lambda: target.driver.port(ref)).gate == "local shut"
    target.run(lambda: target.driver.set_broadcast(ref, True))
    assert target.run(lambda: target.driver.port(ref)).gate == "local"


def test_a_hold_of_the_next_move_stays_shut_when_the_source_is_done(pair: list[Host]) -> None:
    source, target = pair
    ref = _opened_before_its_source(source, target)
    target.run(lambda: target.driver.hold(ref))
    target.run(lambda: target.driver.set_broadcast(ref, True))
    assert target.run(lambda: target.driver.port(ref)).gate == "local shut"


def test_what_found_the_hold_full_at_the_destination_is_told(pair: list[Host]) -> None:
    source, target = pair
    ref = _opened_before_its_source(source, target)
    target.run(lambda: target.driver.set_lease(ref, 600))
    vm = next(guest for guest in target.guests if guest.ref == ref)
    peer = target.guest("10.0.0.2", network="vlan")
    resolve(peer, vm)
    with peer.socket(socket.SOCK_DGRAM) as sender:
        sender.connect((vm.address, 9000))

        def full() -> int:
            for _ in range(500):
                sender.send(b"waits")
            return _full(target, ref)

        wait_until(full, "the hold is full", 60)
        told = target.run(lambda: target.driver.set_broadcast(ref, True))
    assert told.passed > 16_000
    assert told.dropped == _full(target, ref) > 0


def _full(host: Host, ref: PortRef) -> int:
    return host.run(lambda: host.driver.port(ref)).drops.get("hold-full", 0)
