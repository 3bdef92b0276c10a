# SPDX-License-Identifier: GPL-2.0-only
"""The ebpf driver opens a port whose guest runs already: real frames, and an agent that is slow."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from datapath.drivers.ebpf.instances import Instance
from datapath.provider import Place
from datapath.state.kind import Table

from .driver_lab import ANY, Guest, Host, rules, shelf
from .test_driver_move import resolve


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
